"""What a part of a run finds: a file with a line of JSON for each row, written when it is known.

A part is made of steps, each of which has a line when it begins and a row with its outcome when it
ends. So whoever reads the file knows which step was under way when the process ended.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .device import NotHereError, is_lost

Row = dict[str, Any]
# The outcomes of a row.
RIGHT, WRONG, NOT_HERE = "right", "wrong", "not here"
# A step that was not started, for lack of time, and one that was stopped when its time was up.
NO_TIME, CUT_OFF = "no time", "cut off"
OUTCOMES = (RIGHT, WRONG, NOT_HERE, NO_TIME, CUT_OFF)
_BEGUN = "begun"
# The exit status of a process that has lost its device, and is to be started again.
AGAIN = 75
# By these a process is told its file, and the time, in seconds since 1970, at which it is stopped.
_FILE, _ENDS = "POLYCE_GPU_ROWS", "POLYCE_GPU_ENDS"


class Step(NamedTuple):
    """Something to try, which may yield rows on its way."""

    name: str
    seconds: float
    """What it takes on a GPU at most, by estimate."""
    run: Callable[[], Iterable[Row] | None]
    may_stop: bool = False
    """Whether it may begin without the time to end."""


class Ledger:
    """The rows of one part, in a file that several processes may write to."""

    def __init__(self, path: Path, ends: float) -> None:
        self.path, self.ends = path, ends
        self.longest = 0.0
        """How long a step of this process has taken."""

    @classmethod
    def of_this_process(cls) -> Ledger | None:
        """Return the one that the environment names; None outside of a run."""
        path = os.environ.get(_FILE)
        return None if path is None else cls(Path(path), float(os.environ[_ENDS]))

    def environment(self) -> dict[str, str]:
        """Return what tells another process of it."""
        return {_FILE: str(self.path), _ENDS: str(self.ends)}

    def left(self) -> float:
        """Return for how many seconds the part may still run."""
        return self.ends - time.time()

    def lack(self, seconds: float, *, may_stop: bool = False) -> str:
        """Return why a step of so many seconds does not fit into what is left, or nothing."""
        needed, left = max(seconds, self.longest), max(self.left(), 0.0)
        if left > 0.0 and (may_stop or needed <= left):
            return ""
        return f"it may take {needed:.1f} s, and {left:.1f} are left"

    def begin(self, step: str) -> None:
        """Write that a step begins."""
        self.write({"step": step, "status": _BEGUN})

    def end(self, step: str, row: Row) -> None:
        """Write the outcome of a step."""
        self.longest = max(self.longest, row.get("took_s", 0.0))
        self.write({"step": step, **row, "ends": True})

    def write(self, row: Row) -> None:
        """Append a row."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, default=str) + "\n")

    def run(self, steps: Iterable[Step]) -> int:
        """Run the steps that are not known yet and that fit into what is left of the time.

        Return the exit status for the process: AGAIN if no further step can run in it.
        """
        known = self.known()
        for step in steps:
            if step.name in known:
                continue
            if reason := self.lack(step.seconds, may_stop=step.may_stop):
                self.end(step.name, {"status": NO_TIME, "reason": reason})
                continue

            def all_rows(step: Step = step) -> Row:
                for row in step.run() or ():
                    self.write({"step": step.name} | row)
                return {}

            self.begin(step.name)
            ended = attempt(step.name, all_rows)
            self.end(step.name, ended)
            if ended["status"] == WRONG and is_lost():
                return AGAIN
        return 0

    def rows(self) -> list[Row]:
        """Return all rows with an outcome."""
        return [row for row in self._lines() if row["status"] != _BEGUN]

    def known(self) -> set[str]:
        """Return the steps that have begun, or were left out."""
        return {row["step"] for row in self._lines()}

    def unfinished(self) -> list[str]:
        """Return the steps that have begun and not ended, in order."""
        is_open: dict[str, bool] = {}
        for row in self._lines():
            is_open[row["step"]] = "ends" not in row
        return [step for step, still in is_open.items() if still]

    def _lines(self) -> Iterator[Row]:
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:  # what a process was writing when it was stopped
                continue


def attempt(name: str, run: Callable[[], Row], **facts: object) -> Row:
    """Run something, and return its row with the outcome and the time it took."""
    row: Row = {"check": name, "status": RIGHT} | facts
    start = time.perf_counter()
    try:
        row |= run()
    except NotHereError as reason:
        row |= {"status": NOT_HERE, "reason": str(reason)}
    except Exception as error:  # noqa: BLE001  (one step's failure, not the run's)
        # torch and CuPy have an exception of this name each.
        if type(error).__name__ == "OutOfMemoryError":
            row |= {"status": NOT_HERE, "reason": f"out of memory: {str(error).splitlines()[0]}"}
        else:
            row |= {"status": WRONG, "wrong": f"{type(error).__name__}: {error}"}
            row["traceback"] = traceback.format_exc()
    return row | {"took_s": time.perf_counter() - start}
