"""Time polyce on a CPU against torch and jax, on shapes that occur.

python -m benchmarks.cpu run --out results.json [--quick | --tiny] [--shapes NAME ...]
python -m benchmarks.cpu table results.json
python -m benchmarks.cpu plot results.json --out docs/_static

The contenders of one case run in turn in one process: one of a single thread and one of all. For
large logits torch runs once more in two processes with huge pages. A case that was disturbed is
measured again after all others.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from polyce import _core

from .. import command, measure
from ..measure import Row
from ..shapes import SHAPES
from ..workers import worker
from . import tables, work
from .peers import WHATS


class Size(NamedTuple):
    """How much a run measures."""

    shapes: tuple[str, ...]
    dtypes: tuple[str, ...]
    costly: tuple[str, ...]
    """Shapes on which the costly contenders take part."""
    memory: tuple[tuple[str, str], ...]
    """Logits, and during what memory is measured."""
    memory_costly: bool
    """Whether memory is measured of costly contenders, too."""
    huge_pages: bool
    """Whether torch is timed with huge pages, too."""
    large: int
    """So many logits, from which on torch's pages matter, and what memory gives bounds the time."""
    seconds: float
    """Time for the rounds of one case."""
    rounds: int
    """Rounds of one case at least."""
    attempts: int
    """How often a case is measured at most, while it is disturbed."""
    limit: float
    """Seconds after which nothing is measured again."""


COSTLY = (
    "64x10", "65536x10", "128x100", "256x1000", "4096x1000", "1024x32000", "4x21x256x256",
)  # fmt: skip
# Malloc keeps freed blocks of up to 32 MiB, which would hide that a call takes as much again.
MEMORY = (
    ("1024x32000", "forward"),
    ("1024x32000", "gradient"),
    ("4x21x512x512", "gradient"),
)
FULL = Size(
    shapes=tuple(SHAPES),
    dtypes=("float32", "bfloat16"),
    costly=COSTLY,
    memory=MEMORY,
    memory_costly=True,
    huge_pages=True,
    large=2**19,
    seconds=0.6,
    rounds=7,
    attempts=4,
    limit=23 * 60.0,
)
QUICK = FULL._replace(
    dtypes=("float32",),
    costly=("256x1000",),
    memory=MEMORY[2:],
    memory_costly=False,
    huge_pages=False,
    seconds=0.2,
    rounds=5,
    limit=3.5 * 60.0,
)
TINY = QUICK._replace(
    shapes=("8x10", "8x3x64x64"),
    costly=("8x10",),
    memory=(("8x10", "gradient"),),
    huge_pages=True,
    large=0,
    seconds=0.0,
    rounds=2,
    attempts=1,
)


def run(size: Size, log: command.Log) -> None:
    """Measure everything."""
    # Inductor would keep processes of its own to compile in.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    facts = log.found["environment"]
    facts["instruction set"] = _core.isa()
    pages = (False, True) if size.huge_pages and measure.installed("torch") else (False,)
    settings = list(itertools.product(sorted({1, facts["processors usable"]}), pages))
    timing = {"budget": size.seconds, "rounds": size.rounds}
    with contextlib.ExitStack() as stack:
        processes = {each: stack.enter_context(worker(*each)) for each in settings}

        def time(case: work.Case) -> list[Row]:
            facts = (case.shape in size.costly, is_large(case.shape))
            process = processes[case.threads, case.huge_pages]
            return process.submit(work.time_case, case, *facts, **timing).result()

        def is_large(shape: str) -> bool:
            return math.prod(SHAPES[shape].dims) >= size.large

        cases = [
            work.Case(shape, dtype, *setting, what)
            for dtype, shape, setting, what in itertools.product(
                size.dtypes, size.shapes, settings, WHATS
            )
            if not setting[1] or is_large(shape)
        ]
        measure_memory(size, log)
        measure_until_calm(cases, time, log, size.attempts, size.limit)


def measure_until_calm(
    cases: Sequence[Any],
    time: Callable[[Any], list[Row]],
    log: command.Log,
    attempts: int,
    limit: float,
) -> None:
    """Time all cases, then those again that were disturbed, until time is up."""
    left = list(cases)
    for attempt in range(attempts):
        disturbed = []
        for case in left:
            if attempt and log.seconds() >= limit:
                return
            rows = time(case)
            log.add(str(case), times=[row | {"attempt": attempt} for row in rows])
            if rows and rows[0]["unrest"] > 1:
                disturbed.append(case)
        left = disturbed


def measure_memory(size: Size, log: command.Log) -> None:
    """Measure the growth of a fresh process for each contender."""
    for shape, what in size.memory:
        dims = [int(count) for count in shape.split("x")]
        rows: list[Row] = []
        for name in work.taking_part(what, size.memory_costly):
            grown = measure.fresh(work.grow, dims=dims, what=what, contender=name)
            if grown is not None:
                rows.append({"shape": shape, "what": what, "contender": name} | grown)
        log.add(f"memory of {shape}, {what}", memory=rows)


def draw(found: dict[str, Any], folder: Path) -> None:
    """Draw all figures; only this needs matplotlib."""
    from . import plots

    plots.draw(found, folder)


if __name__ == "__main__":
    summary = (__doc__ or "").splitlines()[0]
    sizes = command.Sizes(FULL, QUICK, TINY)
    command.main(summary, SHAPES, sizes, run, tables.show, draw, choices=("dtypes", "costly"))
