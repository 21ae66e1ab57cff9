"""What the parts of the GPU script record: what was checked, and how it went.

What cannot be done on a machine raises `NotHereError`, with the reason.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from typing import Any

from measure import Row

RIGHT, WRONG, NOT_HERE = "right", "wrong", "not here"


class NotHereError(Exception):
    """What was to be checked or measured cannot be, for the reason that is the message."""


def attempt(name: str, check: Callable[[], Row | None], **facts: Any) -> Row:
    """Run a check, and say how it went: what it returns or raises, and how long it took.

    A check that finds something wrong returns it as "wrong" beside its facts, or raises.
    """
    row: Row = {"check": name, "status": RIGHT} | facts
    start = time.perf_counter()
    try:
        found = check() or {}
        row |= found | ({"status": WRONG} if found.get("wrong") else {})
    except NotHereError as reason:
        row |= {"status": NOT_HERE, "reason": str(reason)}
    except Exception as error:  # noqa: BLE001  (the check's failure, not the run's)
        # torch and CuPy have an exception of this name each.
        if type(error).__name__ == "OutOfMemoryError":
            row |= {"status": NOT_HERE, "reason": f"out of memory: {str(error).splitlines()[0]}"}
        else:
            row |= {"status": WRONG, "wrong": f"{type(error).__name__}: {error}"}
            if not isinstance(error, AssertionError):
                row["traceback"] = traceback.format_exc()
    return row | {"took_s": time.perf_counter() - start}


def require(holds: bool, message: str) -> None:
    """Raise what a check has found to be wrong."""
    if not holds:
        raise AssertionError(message)
