"""Time and measure the reference on NumPy, and dask: one table for each question.

python -m benchmarks.cpu.reference [--only NAME ...] [--json FILE] [--tiny]

Contenders of one case take turns in one process; `ratio` is polyce's median over that of the
contender beside it. A target is what polyce is to reach on an otherwise quiet machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .. import measure
from ..measure import Row
from ..shapes import problem
from ..tables import show
from . import by_hand, chunked


class Size(NamedTuple):
    """How much a run measures."""

    processes: int
    """How many fresh processes one number is measured in."""
    seconds: float
    """Time for the rounds of one case."""
    rounds: int
    """The least number of rounds of one case."""
    small: tuple[int, int]
    large: tuple[int, int]
    lazy: tuple[int, int]
    """Rows and classes of a dask array that would not all fit into memory."""
    lazy_chunk: int
    """The rows of each of its chunks."""

    @property
    def timing(self) -> dict[str, float]:
        """Return the arguments for timing one case."""
        return {"budget": self.seconds, "rounds": self.rounds}


# NumPy arrays would go to the compiled core.
PATH = "reference"
FULL = Size(11, 5.0, 11, (8, 10), (1024, 32000), (8192, 32000), 256)
TINY = Size(1, 0.0, 2, (4, 5), (32, 50), (64, 50), 8)


def imports(size: Size) -> list[Row]:
    """Time the imports and the first call, each time in a fresh process."""
    runs = measure.fresh_source(IMPORTS, size.processes)
    rows = []
    for step, target in (("import numpy", None), ("import polyce", 0.020), ("first call", None)):
        times = [run[step] for run in runs]
        median = statistics.median(times)
        rows.append({"step": step, "median_s": median, "best_s": min(times)})
        rows[-1] |= {} if target is None else {"target_s": target, "met": median <= target}
    return rows


# Nothing else may be imported before the clock stops: polyce might import it too.
IMPORTS = """
from time import perf_counter
start = perf_counter()
import numpy
numpy_done = perf_counter()
import polyce
polyce_done = perf_counter()
logits, labels = numpy.zeros((8, 10), numpy.float32), numpy.zeros(8, numpy.int64)
before = perf_counter()
polyce.cross_entropy(logits, labels)
after = perf_counter()
import json
print(json.dumps({
    "import numpy": numpy_done - start,
    "import polyce": polyce_done - numpy_done,
    "first call": after - before,
}))
"""


# For each kind of call: polyce's function, and what a user would write by hand.
BY_HAND = {
    "loss": ("cross_entropy", by_hand.LOSSES),
    "loss and gradient": ("cross_entropy_with_grad", by_hand.LOSSES_AND_GRADIENTS),
}
# A small input is compared with losses without any check, a large one with polyce's digits.
SMALL_TARGETS = {("loss", "simple"): 6.0}
LARGE_TARGETS = {("loss", "exact"): 2.5, ("loss and gradient", "exact"): 2.5}


def time_numpy(shape: tuple[int, int], small: bool, **timing: Any) -> list[Row]:
    """Time NumPy inputs; small ones only against the simple losses."""
    import polyce

    given = problem(tuple(shape))
    targets = SMALL_TARGETS if small else LARGE_TARGETS
    rows = []
    for what, (function, losses) in BY_HAND.items():
        peers = {
            name: (partial(loss, *given), targets.get((what, name)))
            for name, loss in losses.items()
            if name == "simple" or not small
        }
        ours = partial(getattr(polyce, function), *given, implementation=PATH)
        rows += measure.against(f"{what} {by(shape)}", ours, peers, **timing)
    return rows


def by(shape: tuple[int, int]) -> str:
    """Write a shape."""
    return "x".join(map(str, shape))


def memory(size: Size) -> list[Row]:
    """Measure the peak memory of NumPy calls, each in a fresh process."""
    rows = []
    dtypes = ("float32", "float16", *(["bfloat16"] if measure.installed("ml_dtypes") else []))
    for dtype in dtypes:
        for case, (function, _) in BY_HAND.items():
            grown = measure.fresh(grow, function=function, shape=size.large, dtype=dtype)
            if grown is None:
                raise LookupError("this system does not tell a process's peak memory")
            multiple = 1.0 + grown["bytes"] / grown["logits"]
            # The 16-bit dtypes are computed in float32, which takes twice their size.
            target = 3.5 if dtype == "float32" else None
            row = {"case": f"{case} {by(size.large)} {dtype}", "peak_times_logits": multiple}
            rows.append(row | measure.judge(multiple, target))
    return rows


def grow(function: str, shape: tuple[int, int], dtype: str) -> dict[str, float] | None:
    """Measure the growth of one call on NumPy."""
    import polyce

    call = partial(getattr(polyce, function), implementation=PATH)
    logits, labels = problem(tuple(shape), dtype)
    call(logits[:1, :2], labels[:1] * 0)  # not measured: what the first call imports
    grown = measure.peak_growth(lambda: call(logits, labels))
    return grown and grown | {"logits": logits.nbytes}


class Question(NamedTuple):
    """A question that one table answers."""

    title: str
    needed: str
    """The module that must be installed."""
    ask: Callable[[Size], list[Row]]


QUESTIONS = {
    "import": Question("import and first call, median of fresh processes", "numpy", imports),
    "small": Question(
        "NumPy, a small input, against losses without any check",
        "numpy",
        lambda size: measure.fresh(time_numpy, shape=size.small, small=True, **size.timing),
    ),
    "large": Question(
        "NumPy, a large input, against losses with polyce's digits (exact) and without (simple)",
        "numpy",
        lambda size: measure.fresh(time_numpy, shape=size.large, small=False, **size.timing),
    ),
    "memory": Question(
        "NumPy, peak memory in multiples of the logits, which count as the first", "numpy", memory
    ),
    "dask": Question(
        "dask, its own path against the reference, logits made chunk by chunk or in memory",
        "dask",
        lambda size: chunked.seconds(size.lazy, size.lazy_chunk),
    ),
    "dask-memory": Question(
        "dask, logits made chunk by chunk: growth of the process in GB",
        "dask",
        lambda size: chunked.memory(size.lazy, size.lazy_chunk),
    ),
    "dask-cluster": Question(
        "dask, one worker process with one thread: its peak memory in GB, of which 0.07 at rest",
        "distributed",
        lambda size: chunked.cluster(size.lazy, size.lazy_chunk),
    ),
    "dask-tasks": Question(
        "dask, tasks to run for more and more chunks",
        "dask",
        lambda size: measure.fresh(chunked.tasks, shape=size.lazy, chunk=size.lazy_chunk),
    ),
}


def main() -> None:
    """Answer the questions asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=QUESTIONS, metavar="NAME", help=" ".join(QUESTIONS)
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument(
        "--tiny", action="store_true", help="run in seconds; the numbers mean nothing"
    )
    arguments = parser.parse_args()
    found: dict[str, Any] = {"environment": measure.environment(), "questions": {}}
    for name, value in found["environment"].items():
        shown = ", ".join(map(" ".join, value.items())) if isinstance(value, dict) else value
        print(f"{name}: {shown}")
    print()
    for name in arguments.only or QUESTIONS:
        question = QUESTIONS[name]
        print(f"{name}: {question.title}", flush=True)
        if not measure.installed(question.needed):
            print(f"  left out: {question.needed} is not installed\n")
            continue
        rows = question.ask(TINY if arguments.tiny else FULL)
        show(rows)
        found["questions"][name] = {"title": question.title, "rows": rows}
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
