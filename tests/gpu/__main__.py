"""Try polyce on a GPU within a number of seconds, in the order of what is learnt.

python -m tests.gpu --seconds 240 --out FOLDER [--part NAME] [--rehearse] [--wheels FOLDER]

It runs from a source tree, whose root is the current folder: polyce need be neither installed nor
compiled. Packages that the machine lacks are taken from wheels in a folder, which are unpacked, not
installed. Parts run in processes of their own, one after the other, each within its share of the
seconds; what is left of a share goes to the parts behind it. FOLDER/PART.jsonl gets a line after
every row, FOLDER/PART.log what the process prints, and FOLDER/table.md the closing table, which is
printed too. The exit status is 1 if something is wrong, or if nothing could run; no time is wrong.

--rehearse runs the same without a GPU, in Triton's interpreter, on a recorder of launches and on an
emulated CuPy, with tiny arrays.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import report, session


def main() -> int:
    """Run what is asked for, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seconds", type=float, default=240.0, help="by default 240")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument(
        "--part", choices=session.PARTS, action="append", help="this part alone; may be repeated"
    )
    parser.add_argument("--rehearse", action="store_true", help="do without a GPU")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="wheels to take packages of")
    given = parser.parse_args()
    if given.wheels is not None and not given.wheels.is_dir():
        parser.error(f"--wheels must be a folder of wheels, got {given.wheels}")
    found = session.run(
        given.out.resolve(),
        given.seconds,
        [name for name in session.PARTS if name in (given.part or session.PARTS)],
        rehearse=given.rehearse,
        wheels=given.wheels,
    )
    lines = report.table({name: ledger.rows() for name, ledger in found.items()}, given.seconds)
    text = "\n".join(lines)
    (given.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return int(session.has_failed(found))


if __name__ == "__main__":
    sys.exit(main())
