"""Time polyce on a CPU against torch, jax and scipy, on shapes that occur.

python -m benchmarks.cpu run --out results.json [--quick | --tiny] [--shapes NAME ...]
python -m benchmarks.cpu table results.json
python -m benchmarks.cpu plot results.json --out docs/_static

Contenders of one case take turns in one process. A second process gives torch huge pages, and two
more run with one thread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from polyce import _core

from .. import command, measure
from ..measure import Row
from ..shapes import SHAPES, element_type
from ..workers import Size, visit, worker
from . import peers, tables, work

# malloc keeps freed blocks of up to 32 MiB, which would hide memory that a call takes again.
MEMORY = ("1024x32000",)
FULL = Size(tuple(SHAPES), ("float32", "bfloat16"), MEMORY, True, 2, 0.4, 4)
QUICK = Size(("8x10", "4096x1000", "65536x10"), ("float32",), MEMORY, False, 1, 0.1, 3)
TINY = Size(("8x10",), ("float32",), ("8x10",), False, 1, 0.0, 1)


def run(size: Size, log: command.Log) -> None:
    """Measure everything."""
    facts = log.found["environment"]
    facts["instruction set"] = _core.isa()
    every = facts["processors usable"]
    for threads in sorted({1, every} if size.thorough else {every}, reverse=True):
        with worker(threads) as plain, worker(threads, huge_pages=True) as huge:
            processes = {False: plain, True: huge}
            for dtype in size.dtypes:
                for shape in size.shapes:
                    times = [
                        row
                        for what in peers.WHATS
                        for row in time_case(processes, size, shape, dtype, what, threads)
                    ]
                    log.add(f"{shape} {dtype}, threads: {threads}", times=times)
    log.add("memory", memory=[row for shape in size.memory for row in memory(shape)])


def time_case(
    processes: Mapping[bool, ProcessPoolExecutor],
    size: Size,
    shape: str,
    dtype: str,
    what: str,
    threads: int,
) -> list[Row]:
    """Time one case, the processes in turn."""
    timing = {"budget": size.seconds, "rounds": size.rounds}
    case = (shape, dtype, what, threads)
    rows = visit(
        processes,
        size.visits,
        lambda process, huge_pages, turn: process.submit(
            work.time_case, *case, huge_pages, turn == 0, **timing
        ),
    )
    moved = {"forward": 1, "gradient": 2}[what] * math.prod(SHAPES[shape].dims)
    nbytes = moved * element_type(dtype).itemsize
    facts = {"shape": shape, "dtype": dtype, "what": what, "threads": threads}
    return [facts | row | {"gb_per_s": nbytes / row["median_s"] / 1e9} for row in rows]


def memory(shape: str) -> list[Row]:
    """Measure the growth of a fresh process for each contender."""
    rows: list[Row] = []
    for what, table in peers.WHATS.items():
        for name in work.taking_part(table, "float32"):
            facts = {"shape": shape, "what": what, "contender": name}
            grown = measure.fresh(work.grow, **facts)
            if grown is not None:
                rows.append(facts | grown)
    return rows


def draw(found: dict[str, Any], folder: Path) -> None:
    """Draw all figures; only this needs matplotlib."""
    from . import plots

    plots.draw(found, folder)


if __name__ == "__main__":
    summary = (__doc__ or "").splitlines()[0]
    command.main(summary, SHAPES, command.Sizes(FULL, QUICK, TINY), run, tables.show, draw)
