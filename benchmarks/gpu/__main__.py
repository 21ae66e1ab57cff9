"""Time polyce's GPU kernels on a device, against a copy and against peers.

python -m benchmarks.gpu [--library LIBRARY] [--out FILE] [--quick] [--sweep]
python -m benchmarks.gpu --rehearse [--library LIBRARY] [--out FILE] [--sweep]
python -m benchmarks.gpu --table FILE

It needs Triton and a CUDA or ROCm device that torch finds; or, with `--library cupy`, a device that
CuPy finds. All results go into one JSON file, by default benchmarks/results/gpu-<device>.json, or
gpu-cupy-<device>.json, which is rewritten after every row, and a Markdown summary is printed. The
exit status is 1 if something of polyce's fails; no time is a failure. What cannot be done on a
machine is recorded as "not here", with its reason. Values are checked by tests/gpu.

`--rehearse` does the same without a device, on tiny arrays: it shows that the benchmark runs, and
nothing about a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpu.device import LIBRARIES, Device, NotHereError, find
from gpu.ledger import WRONG, attempt

from ..measure import Row, say
from . import tables
from .first_calls import first_calls, here
from .header import header, power, told
from .times import all_times, copy_bandwidth
from .timing import FULL, QUICK, REHEARSAL, Size

RESULTS = Path(__file__).parents[1] / "results"


def main() -> int:
    """Run what is asked for, and return the exit status."""
    arguments = parsed()
    if arguments.table:
        tables.show(json.loads(arguments.table.read_text()))
        return 0
    # torch's profiler logs each of its starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    try:
        device = find(arguments.library, arguments.rehearse)
    except NotHereError as reason:
        sys.exit(f"{reason}; --rehearse does without a device")
    if arguments.first_call:
        here(device)
        return 0
    found = run(device, arguments)
    tables.show(found)
    return int(any(row["status"] == WRONG for rows in found["parts"].values() for row in rows))


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", choices=LIBRARIES, default="torch", help="by default torch")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON to write")
    parser.add_argument("--quick", action="store_true", help="time two shapes only")
    parser.add_argument("--sweep", action="store_true", help="try tiles and numbers of warps too")
    parser.add_argument("--rehearse", action="store_true", help="run on a CPU, emulated and tiny")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print a run again")
    # For the processes that this one starts.
    parser.add_argument("--first-call", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def run(device: Device, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the parts, and save the results after each row, so that a crash does not lose them."""
    size = REHEARSAL if device.rehearses else QUICK if arguments.quick else FULL
    found: dict[str, Any] = {"header": header(device), "parts": {}}
    out = arguments.out or default_out(found["header"])
    start = time.perf_counter()
    for name, part in parts(device, size, arguments.sweep, found).items():
        rows = found["parts"][name] = []

        def all_rows(part: Callable[[], Iterator[Row]] = part, rows: list[Row] = rows) -> Row:
            for row in part():
                rows.append(row)
                write(found, out)
            return {}

        # If it ends early, for instance because the device is lost, that is the failure.
        rows.append(attempt("the part runs to its end", all_rows))
        say(f"{time.perf_counter() - start:5.0f} s: {name}")
    found["header"]["clocks and power afterwards"] = told(lambda: power(device))
    found["header"]["took_s"] = time.perf_counter() - start
    write(found, out)
    return found


def parts(
    device: Device, size: Size, with_sweep: bool, found: dict[str, Any]
) -> dict[str, Callable[[], Iterator[Row]]]:
    """Return the parts of the benchmark, by name."""

    def times() -> Iterator[Row]:
        copy = found["header"]["copy"] = copy_bandwidth(device, size)
        yield from all_times(device, size, copy["gb_per_s"])

    found_parts: dict[str, Callable[[], Iterator[Row]]] = {
        "times": times,
        "first calls": lambda: first_calls(device),
    }
    if with_sweep and device.library == "torch":
        from .sweep import sweep

        found_parts["sweep"] = lambda: sweep(device, size)
    return found_parts


def default_out(facts: dict[str, Any]) -> Path | None:
    """Return a file named after the device, or None for a rehearsal."""
    if facts["rehearsal"]:
        return None
    name = re.sub(r"[^a-z0-9]+", "-", facts["device"]["name"].lower()).strip("-")
    library = "" if facts["library"] == "torch" else f"{facts['library']}-"
    return RESULTS / f"gpu-{library}{name}.json"


def write(found: dict[str, Any], out: Path | None) -> None:
    """Write the JSON file."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
