"""Time polyce.linear_cross_entropy on a CPU against torch, NumPy and jax, and measure its memory.

python benchmarks/linear.py run --out results.json [--quick | --tiny] [--shapes NAME ...]
python benchmarks/linear.py table results.json
python benchmarks/linear.py plot results.json --out docs/_static

The contenders of one library run in turn in one process, and the processes of the libraries take
turns, since each has its own threads. Memory is measured in a fresh process for each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cpu
import cpu_work
import linear_work
import measure
import tables
from linear_work import CONTENDERS, PRODUCTS
from measure import Row

THREADS = 2
UNIT = "torch"
WHATS = {"gradient": "loss and gradients", "forward": "loss"}


class Shape(NamedTuple):
    """Tokens, features and classes."""

    dims: linear_work.Dims
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
    """Rounds of one case at least."""
    memory_compiled: bool
    """Whether memory is measured of what must be compiled first, too."""
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


def run(size: Size, out: Path) -> None:
    """Measure everything, and write down what there is after each case."""
    found: dict[str, Any] = {
        "environment": measure.environment() | {"threads": THREADS, "loads": []},
        "shapes": {name: SHAPES[name]._asdict() for name in size.shapes},
        "times": [],
        "memory": [],
    }
    # Inductor would keep processes of its own to compile in, and NumPy take all processors.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(THREADS))
    start = time.perf_counter()

    def add(rows: list[Row], what: str, text: str) -> None:
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        found["environment"]["loads"].append(load)
        found[what] += rows
        out.write_text(json.dumps(found, indent=1) + "\n")
        cpu.say(f"{time.perf_counter() - start:4.0f} s: {text}, load {load}")

    cases = [
        (shape, dtype, what)
        for dtype in size.dtypes
        for shape in size.shapes
        for what in size.whats
    ]
    with contextlib.ExitStack() as stack:
        processes = {
            library: stack.enter_context(cpu.worker(THREADS, False))
            for library in measure.installed(*linear_work.LIBRARIES)
        }
        for case in cases:
            add(visit(processes, size, *case), "times", f"time of {' '.join(case)}")
    for case in cases:
        add(memory(size, *case), "memory", f"memory of {' '.join(case)}")


def taking_part(library: str, size: Size, dtype: str) -> bool:
    """Tell whether a library takes part in a dtype."""
    return library != "numpy" or dtype == "float32" or size.numpy_bfloat16


def visit(
    processes: Mapping[str, ProcessPoolExecutor], size: Size, shape: str, dtype: str, what: str
) -> list[Row]:
    """Compare the losses of one case, and time it, the processes in turn."""
    order = [library for library in processes if taking_part(library, size, dtype)]
    case = (SHAPES[shape].dims, dtype, what)
    losses: dict[str, float] = {}
    for library in order:
        losses |= processes[library].submit(linear_work.prepare, library, *case).result()
    expected = next(iter(losses.values()), math.nan)
    for name, loss in losses.items():
        if not math.isclose(loss, expected, rel_tol=cpu_work.TOLERANCE[dtype]):
            raise RuntimeError(f"{shape} {dtype} {what}: the losses differ ({name}): {losses}")
    taken: dict[str, list[float]] = {}
    number = 0
    end = time.perf_counter() + size.seconds
    while order and (number < size.rounds or time.perf_counter() < end):
        for library in order:
            times = processes[library].submit(linear_work.turn, number, library, *case).result()
            for name, seconds in times.items():
                taken.setdefault(name, []).append(seconds)
        order.append(order.pop(0))
        number += 1
    facts: Row = {"shape": shape, "dtype": dtype, "what": what, "rounds": number}
    # As tables.by_case wants them.
    facts |= {"threads": THREADS, "huge_pages": False}
    return [
        facts | {"contender": name, "median_s": statistics.median(samples), "best_s": min(samples)}
        for name, samples in taken.items()
    ]


def memory(size: Size, shape: str, dtype: str, what: str) -> list[Row]:
    """Measure the growth of a fresh process for each contender of one case."""
    libraries = measure.installed(*linear_work.LIBRARIES)
    rows: list[Row] = []
    for name, contender in CONTENDERS.items():
        if contender.library not in libraries or not taking_part(contender.library, size, dtype):
            continue
        if not contender.has_loss or (contender.compiles and not size.memory_compiled):
            continue
        facts: Row = {"dtype": dtype, "what": what, "contender": name}
        dims = SHAPES[shape].dims
        grown = measure.fresh("linear_work:grow", threads=THREADS, dims=dims, **facts)
        if grown is not None:
            rows.append({"shape": shape} | facts | grown)
    return rows


def beyond(row: Row) -> float:
    """Give the megabytes that a call took beside its inputs and gradients."""
    return (row["bytes"] - row["gradients"]) / 1e6


def show(found: dict[str, Any], key: str) -> None:
    """Print all tables, with the medians or the bests of the times."""
    facts = found["environment"]
    versions = ", ".join(" ".join(each) for each in facts["versions"].items())
    loads = [load for load in facts["loads"] if load is not None] or ["unknown"]
    print(f"{facts['processor']}, load {min(loads)} to {max(loads)}; {versions}")
    if facts.get("OPENBLAS_CORETYPE"):
        print(f"NumPy multiplies as for a {facts['OPENBLAS_CORETYPE']} (OPENBLAS_CORETYPE).")
    rounds = sorted({row["rounds"] for row in found["times"]})
    counts = " to ".join(str(count) for count in dict.fromkeys((rounds[0], rounds[-1])))
    print(f"Times are the {'bests' if key == 'best_s' else 'medians'} of {counts} rounds.")
    print("Shapes are tokens, features and classes.\n")
    for dtype, threads in tables.settings(found):
        for what, title in WHATS.items():
            if any((row["dtype"], row["what"]) == (dtype, what) for row in found["times"]):
                setting = f"{title}, {dtype}, {tables.count(threads)}"
                print(f"Time / time of {UNIT}: {setting}\n")
                tables.print_table(*against_torch(found, dtype, what, key))
    if any(row["contender"] == PRODUCTS for row in found["times"]):
        print(f"Time on NumPy / time of its products alone, {tables.count(THREADS)}\n")
        tables.print_table(*against_products(found, key))
    for dtype, _ in tables.settings(found):
        for what, title in WHATS.items():
            rows = [row for row in found["memory"] if (row["dtype"], row["what"]) == (dtype, what)]
            if rows:
                print(f"MB at the peak beside inputs and gradients: {title}, {dtype}\n")
                tables.print_table(*memory_table(rows))


def against_torch(
    found: dict[str, Any], dtype: str, what: str, key: str
) -> tuple[list[str], list[list[str]]]:
    """Give each contender's time on each shape as a multiple of torch's, and torch's own."""
    times = tables.by_case(found)
    names = [
        name
        for name in CONTENDERS
        if name not in (UNIT, PRODUCTS)
        and any((dtype, what, name) == (k[1], k[4], k[5]) for k in times)
    ]
    lines = []
    for shape in found["shapes"]:
        case = (shape, dtype, THREADS, False, what)
        one = times.get((*case, UNIT))
        line = [ratio(times.get((*case, name)), one, key) for name in names]
        lines.append([shape, *line, measure.text("_s", one and one[key])])
    return ["shape", *names, UNIT], lines


def against_products(found: dict[str, Any], key: str) -> tuple[list[str], list[list[str]]]:
    """Give NumPy's times as multiples of those of the products alone, and these."""
    times = tables.by_case(found)
    names = [
        name
        for name, contender in CONTENDERS.items()
        if contender.library == "numpy" and contender.has_loss
    ]
    cases = dict.fromkeys(
        (row["shape"], row["dtype"], row["what"])
        for row in found["times"]
        if row["contender"] == PRODUCTS
    )
    lines = []
    for shape, dtype, what in cases:
        case = (shape, dtype, THREADS, False, what)
        one = times[*case, PRODUCTS]
        line = [ratio(times.get((*case, name)), one, key) for name in names]
        lines.append([shape, dtype, WHATS[what], *line, measure.text("_s", one[key])])
    return ["shape", "dtype", "what", *names, PRODUCTS], lines


def ratio(row: Row | None, one: Row | None, key: str) -> str:
    """Write a time as a multiple of another."""
    return f"{row[key] / one[key]:.2f}" if row and one else ""


def memory_table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Give the megabytes of each contender on each shape."""
    taken = {(row["contender"], row["shape"]): f"{beyond(row):.0f}" for row in rows}
    shapes = list(dict.fromkeys(shape for _, shape in taken))
    names = dict.fromkeys(name for name, _ in taken)
    lines = [[name, *(taken.get((name, shape), "") for shape in shapes)] for name in names]
    return ["", *shapes], lines


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="measure")
    runs.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON to write")
    runs.add_argument("--quick", action="store_true", help="take a minute, not half an hour")
    runs.add_argument("--tiny", action="store_true", help=cpu.TINY_HELP)
    runs.add_argument("--shapes", nargs="+", choices=SHAPES, metavar="NAME", help=" ".join(SHAPES))
    runs.add_argument("--dtypes", nargs="+", choices=FULL.dtypes)
    runs.add_argument("--whats", nargs="+", choices=FULL.whats)
    slow = "NumPy in bfloat16 as well, which is slow"
    runs.add_argument("--numpy-bfloat16", action="store_true", help=slow)
    printing = commands.add_parser("table", help="print Markdown tables of a run")
    printing.add_argument("results", type=Path)
    printing.add_argument("--best", action="store_true", help="compare the bests, not the medians")
    drawing = commands.add_parser("plot", help="draw a run")
    drawing.add_argument("results", type=Path)
    drawing.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    arguments = parser.parse_args()
    if arguments.command == "run":
        size = TINY if arguments.tiny else QUICK if arguments.quick else FULL
        size = size._replace(
            shapes=tuple(arguments.shapes or size.shapes),
            dtypes=tuple(arguments.dtypes or size.dtypes),
            whats=tuple(arguments.whats or size.whats),
            numpy_bfloat16=arguments.numpy_bfloat16,
        )
        run(size, arguments.out)
        return
    found = json.loads(arguments.results.read_text())
    if arguments.command == "table":
        show(found, "best_s" if arguments.best else "median_s")
    else:
        import linear_plots

        linear_plots.draw(found, arguments.out)


if __name__ == "__main__":
    main()
