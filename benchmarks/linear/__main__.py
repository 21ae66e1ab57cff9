"""Time polyce.linear_cross_entropy on a CPU against torch, NumPy and jax, and measure its memory.

python -m benchmarks.linear run --out results.json [--quick | --tiny] [--shapes NAME ...]
python -m benchmarks.linear table results.json
python -m benchmarks.linear plot results.json --out docs/_static

The contenders of one library take turns in one process, and the processes of the libraries take
turns, since each has its own threads. Memory is measured in a fresh process for each.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from .. import command, measure
from ..measure import Row
from ..workers import TOLERANCE, worker
from . import tables, work
from .tables import WHATS
from .work import CONTENDERS, THREADS


class Shape(NamedTuple):
    """Tokens, features and classes."""

    dims: work.Dims
    source: str


TINIEST, SMALLEST = "8x4x10", "512x64x8000"
SHAPES = {
    TINIEST: Shape((8, 4, 10), "one that shows nothing, for a look at the benchmark itself"),
    SMALLEST: Shape((512, 64, 8000), "small enough for a first look"),
    "8192x64x10000": Shape((8192, 64, 10000), "a recommender's ten thousand items"),
    "2048x256x32000": Shape((2048, 256, 32000), "the vocabulary of Llama 2, a small model"),
    "4096x512x50257": Shape((4096, 512, 50257), "the vocabulary of GPT-2, four contexts of 1024"),
    "1024x1024x128256": Shape((1024, 1024, 128_256), "the vocabulary of Llama 3, a short sequence"),
}


class Size(NamedTuple):
    """How much a run measures."""

    shapes: tuple[str, ...]
    dtypes: tuple[str, ...]
    whats: tuple[str, ...]
    seconds: float
    """Time for the rounds of one case."""
    rounds: int
    """The least number of rounds of one case."""
    memory_compiled: bool
    """Whether memory is also measured for contenders that must be compiled first."""
    numpy_bfloat16: bool
    """Whether NumPy takes part in bfloat16, for which it has no fast loops."""


FULL = Size(
    tuple(name for name in SHAPES if name not in (TINIEST, SMALLEST)),
    ("float32", "bfloat16"),
    tuple(WHATS),
    seconds=6.0,
    rounds=3,
    memory_compiled=True,
    numpy_bfloat16=False,
)
QUICK = FULL._replace(shapes=(SMALLEST,), dtypes=("float32",), seconds=1.0, memory_compiled=False)
TINY = QUICK._replace(shapes=(TINIEST,), whats=("gradient",), seconds=0.0, rounds=1)


def run(size: Size, log: command.Log) -> None:
    """Measure everything."""
    # Otherwise inductor would keep its compile processes, and NumPy would take all processors.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(THREADS))
    cases = [
        (shape, dtype, what)
        for dtype, shape, what in itertools.product(size.dtypes, size.shapes, size.whats)
    ]
    with contextlib.ExitStack() as stack:
        processes = {
            library: stack.enter_context(worker(THREADS))
            for library in measure.installed(*work.LIBRARIES)
        }
        for case in cases:
            log.add(f"time of {' '.join(case)}", times=time_case(processes, size, *case))
    for case in cases:
        log.add(f"memory of {' '.join(case)}", memory=memory(size, *case))


def taking_part(library: str, size: Size, dtype: str) -> bool:
    """Tell whether a library is measured in a dtype."""
    return library != "numpy" or dtype == "float32" or size.numpy_bfloat16


def time_case(
    processes: Mapping[str, ProcessPoolExecutor], size: Size, shape: str, dtype: str, what: str
) -> list[Row]:
    """Compare the losses of one case, then time it, the processes in turn."""
    order = [library for library in processes if taking_part(library, size, dtype)]
    case = (SHAPES[shape].dims, dtype, what)
    losses: dict[str, float] = {}
    for library in order:
        losses |= processes[library].submit(work.prepare, library, *case).result()
    if losses:
        name, expected = f"{shape} {dtype} {what}", next(iter(losses.values()))
        measure.check_losses(name, losses, expected, TOLERANCE[dtype])
    taken: dict[str, list[float]] = {}
    number = 0
    end = time.perf_counter() + size.seconds
    while order and (number < size.rounds or time.perf_counter() < end):
        for library in order:
            times = processes[library].submit(work.turn, number, library, *case).result()
            for name, seconds in times.items():
                taken.setdefault(name, []).append(seconds)
        order.append(order.pop(0))
        number += 1
    facts: Row = {"shape": shape, "dtype": dtype, "what": what, "rounds": number}
    facts["threads"] = THREADS  # as by_case wants it
    return [
        facts | {"contender": name} | measure.summary(samples) for name, samples in taken.items()
    ]


def memory(size: Size, shape: str, dtype: str, what: str) -> list[Row]:
    """Measure the growth of a fresh process for each contender of one case."""
    libraries = measure.installed(*work.LIBRARIES)
    rows: list[Row] = []
    for name, contender in CONTENDERS.items():
        if contender.library not in libraries or not taking_part(contender.library, size, dtype):
            continue
        if not contender.has_loss or (contender.compiles and not size.memory_compiled):
            continue
        facts: Row = {"dtype": dtype, "what": what, "contender": name}
        dims = SHAPES[shape].dims
        grown = measure.fresh(work.grow, threads=THREADS, dims=dims, **facts)
        if grown is not None:
            rows.append({"shape": shape} | facts | grown)
    return rows


def draw(found: dict[str, Any], folder: Path) -> None:
    """Draw all figures; only this needs matplotlib."""
    from . import plots

    plots.draw(found, folder)


if __name__ == "__main__":
    summary = (__doc__ or "").splitlines()[0]
    sizes = command.Sizes(FULL, QUICK, TINY)
    command.main(
        summary,
        SHAPES,
        sizes,
        run,
        tables.show,
        draw,
        choices=("dtypes", "whats", "numpy_bfloat16"),
    )
