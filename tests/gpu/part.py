"""The process of a part that is made of steps.

python -m gpu.part WHAT --library LIBRARY [--rehearse]

The environment names its ledger. `session.py` starts it, and starts it again behind a step that
has ended the process.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Iterable

from .device import NotHereError, find
from .ledger import NOT_HERE, Ledger, Step

WHATS = ("compile", "smoke", "times", "heads")


def main() -> int:
    """Run the steps that the ledger does not know yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=WHATS)
    parser.add_argument("--library", required=True)
    parser.add_argument("--rehearse", action="store_true")
    # For the processes that compile: which of the steps are this one's.
    parser.add_argument("--turn", type=int, nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    ledger = Ledger.of_this_process()
    if ledger is None:
        sys.exit("python -m tests.gpu starts this")
    # torch's profiler logs each of its starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    try:
        if importlib.util.find_spec(given.library) is None and not (
            given.rehearse and given.library == "cupy"
        ):
            raise NotHereError(f"{given.library} is not installed")
        return ledger.run(steps(given))
    except NotHereError as reason:
        ledger.end(given.what, {"status": NOT_HERE, "reason": str(reason)})
        return 0


def steps(given: argparse.Namespace) -> Iterable[Step]:
    """Return the steps of a part; what they import is imported only now."""
    if given.what == "heads":
        from . import heads

        return heads.steps(given.library, given.rehearse)
    if given.what == "compile":
        from . import ahead

        return ahead.steps(given.library, given.rehearse, given.turn)
    if given.library == "jax":
        from . import on_jax

        return on_jax.steps(given.rehearse)
    device = find(given.library, given.rehearse)
    if given.what == "times":
        from benchmarks.gpu import times

        return times.steps(device)
    from . import smoke

    return smoke.steps(device)


if __name__ == "__main__":
    sys.exit(main())
