"""Time polyce on a CPU against torch, jax and scipy, on shapes that occur.

python benchmarks/cpu.py run --out results.json [--quick | --tiny] [--shapes NAME ...]
python benchmarks/cpu.py table results.json
python benchmarks/cpu.py plot results.json --out docs/_static

Contenders of one case run in turn in one process. torch reads THP_MEM_ALLOC_ENABLE when it starts,
so there is a second process with it, and the two take turns; for one thread there are two more.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import measure
from measure import Row
from shapes import SHAPES, element_type

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"


class Size(NamedTuple):
    """How much a run measures."""

    shapes: tuple[str, ...]
    dtypes: tuple[str, ...]
    memory: str
    """Logits during whose loss and gradient memory is measured."""
    one_thread: bool
    """Whether to measure one thread beside all."""
    visits: int
    """How often each process has its turn at a case."""
    seconds: float
    """Time for the rounds of one visit."""
    rounds: int
    """Rounds of one visit at least."""


# Malloc keeps freed blocks of up to 32 MiB, which would hide that a call takes as much again.
MEMORY = "1024x32000"
FULL = Size(tuple(SHAPES), ("float32", "bfloat16"), MEMORY, True, 2, 0.4, 4)
QUICK = Size(("8x10", "4096x1000", "65536x10"), ("float32",), MEMORY, False, 1, 0.1, 3)
TINY = Size(("8x10",), ("float32",), "8x10", False, 1, 0.0, 1)
TINY_HELP = "run in seconds; the numbers mean nothing"


@contextlib.contextmanager
def worker(threads: int, huge_pages: bool) -> Iterator[ProcessPoolExecutor]:
    """Keep a fresh process that runs one function at a time."""
    import cpu_work

    os.environ[HUGE_PAGES] = str(int(huge_pages))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, cpu_work.begin, (threads,)) as process:
        # It starts, and reads the environment, with the first call.
        process.submit(os.getpid).result()
        yield process


def run(size: Size) -> dict[str, Any]:
    """Measure everything."""
    found: dict[str, Any] = {
        "environment": environment(),
        "shapes": {
            name: {"dims": SHAPES[name].dims, "source": SHAPES[name].source} for name in size.shapes
        },
        "times": [],
        "errors": [],
    }
    every = found["environment"]["processors usable"]
    start = time.perf_counter()
    for threads in sorted({1, every} if size.one_thread else {every}, reverse=True):
        with worker(threads, False) as plain, worker(threads, True) as huge:
            processes = {False: plain, True: huge}
            for dtype in size.dtypes:
                for shape in size.shapes:
                    for what in ("forward", "gradient"):
                        found["times"] += visit(processes, size, shape, dtype, what, threads)
                    if threads == every:
                        found["errors"] += call(plain, "errors", shape, dtype)
                    seconds = time.perf_counter() - start
                    say(f"{seconds:4.0f} s: {shape} {dtype}, threads: {threads}")
    found["memory"] = memory(size.memory)
    found["ratios"] = ratios(found["times"])
    say(f"{time.perf_counter() - start:4.0f} s in all")
    return found


def say(text: str) -> None:
    """Tell how far it is, beside what is printed."""
    print(text, file=sys.stderr, flush=True)


def call(process: ProcessPoolExecutor, function: str, *arguments: Any, **options: Any) -> Any:
    """Run a function of cpu_work in a worker."""
    import cpu_work

    return process.submit(getattr(cpu_work, function), *arguments, **options).result()


def visit(
    processes: dict[bool, ProcessPoolExecutor],
    size: Size,
    shape: str,
    dtype: str,
    what: str,
    threads: int,
) -> list[Row]:
    """Time one case, the processes in turn, and put the visits of each together."""
    taken: dict[tuple[bool, str], list[Row]] = {}
    order = list(processes)
    for turn in range(size.visits):
        for huge_pages in order:
            case = (shape, dtype, what, threads, huge_pages, turn == 0)
            times = call(
                processes[huge_pages], "time_case", *case, budget=size.seconds, rounds=size.rounds
            )
            for name, seconds in times.items():
                taken.setdefault((huge_pages, name), []).append(seconds)
        order.reverse()
    facts = {"shape": shape, "dtype": dtype, "what": what, "threads": threads}
    nbytes = (
        element_type(dtype).itemsize
        * math.prod(SHAPES[shape].dims)
        * {"forward": 1, "gradient": 2}[what]
    )
    rows = []
    for (huge_pages, name), visits in taken.items():
        median = statistics.median(each["median_s"] for each in visits)
        best = min(each["best_s"] for each in visits)
        times = {"median_s": median, "best_s": best, "gb_per_s": nbytes / median / 1e9}
        rows.append(facts | {"huge_pages": huge_pages, "contender": name} | times)
    return rows


def memory(shape: str) -> list[Row]:
    """Measure the growth of a fresh process for each contender."""
    import cpu_peers
    import cpu_work

    rows: list[Row] = []
    for what, table in cpu_peers.WHATS.items():
        for name in cpu_work.taking_part(table, "float32"):
            grown = measure.fresh("cpu_work:grow", shape=shape, what=what, contender=name)
            if grown is not None:
                rows.append({"shape": shape, "what": what, "contender": name} | grown)
    return rows


def ratios(times: list[Row]) -> list[Row]:
    """Compare forward to reading the logits once, and the gradient into out= to copying them."""
    medians = {(*case(row), row["what"], row["contender"]): row["median_s"] for row in times}
    pairs = {
        "forward / np.max": ("forward", "polyce NumPy", "np.max"),
        "gradient into out= / np.copyto": ("gradient", "polyce NumPy out=", "np.copyto"),
    }
    rows = []
    for shape, dtype, threads in dict.fromkeys((key[0], key[1], key[2]) for key in medians):
        facts = {"shape": shape, "dtype": dtype, "threads": threads}
        for name, (what, ours, bound) in pairs.items():
            key = (shape, dtype, threads, False, what)
            facts[name] = medians[*key, ours] / medians[*key, bound]
        rows.append(facts)
    return rows


def case(row: Row) -> tuple[Any, ...]:
    """Give what a time was taken under."""
    return row["shape"], row["dtype"], row["threads"], row["huge_pages"]


def environment() -> dict[str, Any]:
    """Tell what the numbers depend on."""
    facts = measure.environment()
    for name in measure.installed("scipy"):
        facts["versions"][name] = importlib.metadata.version(name)
    if hasattr(os, "getloadavg"):
        facts["load before the run"] = os.getloadavg()[0]
    return facts | {"instruction set": importlib.import_module("polyce._core").isa()}


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="measure")
    runs.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON to write")
    runs.add_argument("--quick", action="store_true", help="take two minutes, not ten")
    runs.add_argument("--tiny", action="store_true", help=TINY_HELP)
    runs.add_argument("--shapes", nargs="+", choices=SHAPES, metavar="NAME", help=" ".join(SHAPES))
    tables = commands.add_parser("table", help="print Markdown tables of a run")
    tables.add_argument("results", type=Path)
    tables.add_argument("--best", action="store_true", help="compare the bests, not the medians")
    plots = commands.add_parser("plot", help="draw a run")
    plots.add_argument("results", type=Path)
    plots.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    arguments = parser.parse_args()
    if arguments.command == "run":
        size = TINY if arguments.tiny else QUICK if arguments.quick else FULL
        if arguments.shapes:
            size = size._replace(shapes=tuple(arguments.shapes))
        arguments.out.write_text(json.dumps(run(size), indent=1) + "\n")
        return
    found = json.loads(arguments.results.read_text())
    if arguments.command == "table":
        import tables as printer

        printer.show(found, "best_s" if arguments.best else "median_s")
    else:
        import plots as painter

        painter.draw(found, arguments.out)


if __name__ == "__main__":
    main()
