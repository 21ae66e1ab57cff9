"""Time polyce.torch.CrossEntropyLoss against torch's own module on a CPU, eager and compiled.

python benchmarks/torch_modules.py run --out results.json [--quick | --tiny] [--shapes NAME ...]
python benchmarks/torch_modules.py table results.json
python benchmarks/torch_modules.py plot results.json --out docs/_static

What is called is a function around a module: the loss, and loss and gradient through autograd.
Contenders of one case run in turn in one process. torch reads THP_MEM_ALLOC_ENABLE when it starts,
so there is a second process with it for those that are not compiled, and the two take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cpu
import measure
import tables
from measure import Row
from shapes import SHAPES

THREADS = 2


class Size(NamedTuple):
    """How much a run measures."""

    shapes: tuple[str, ...]
    dtypes: tuple[str, ...]
    memory: tuple[str, ...]
    """Logits during whose loss and gradient memory is measured."""
    memory_compiled: bool
    """Whether that is done with compiled functions too."""
    visits: int
    """How often each process has its turn at a case."""
    seconds: float
    """Time for the rounds of one visit."""
    rounds: int
    """Rounds of one visit at least."""


# Malloc keeps freed blocks of up to 32 MiB, which would hide that a call takes as much again.
MEMORY = ("1024x32000", "4x21x512x512")
FULL = Size(tuple(SHAPES), ("float32", "bfloat16"), MEMORY, True, 3, 0.4, 5)
QUICK = Size(("8x10", "4096x1000"), ("float32",), MEMORY[1:], False, 1, 0.1, 3)
TINY = Size(("8x10",), ("float32",), ("8x10",), False, 1, 0.0, 1)

# Column of the tables: what is compared, and which two contenders.
COLUMNS = {
    "loss": ("forward", "polyce", "torch"),
    "with gradient": ("gradient", "polyce", "torch"),
    "in place": ("gradient", "polyce in place", "torch"),
    "loss, compiled": ("forward", "polyce compiled", "torch compiled"),
    "with gradient, compiled": ("gradient", "polyce compiled", "torch compiled"),
}


def run(size: Size) -> dict[str, Any]:
    """Measure everything."""
    import torch_modules_work

    found: dict[str, Any] = {
        "environment": measure.environment() | {"threads": THREADS, "loads": []},
        "shapes": {
            name: {"dims": SHAPES[name].dims, "source": SHAPES[name].source} for name in size.shapes
        },
        "times": [],
        "memory": [],
    }
    # Inductor would keep processes of its own to compile in.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    start = time.perf_counter()

    def say(text: str) -> None:
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        found["environment"]["loads"].append(load)
        cpu.say(f"{time.perf_counter() - start:4.0f} s: {text}, load {load}")

    with cpu.worker(THREADS, False) as plain, cpu.worker(THREADS, True) as huge:
        for dtype in size.dtypes:
            for shape in size.shapes:
                for what in torch_modules_work.WHATS:
                    found["times"] += visit({False: plain, True: huge}, size, shape, dtype, what)
                say(f"{shape} {dtype}")
    for shape in size.memory:
        facts = {"shape": shape, "what": "gradient"}
        dims = [int(count) for count in shape.split("x")]
        for name in torch_modules_work.GRADIENT:
            if name.endswith("compiled") and not size.memory_compiled:
                continue
            grown = measure.fresh("torch_modules_work:grow", dims=dims, contender=name)
            if grown is not None:
                found["memory"].append(facts | {"contender": name} | grown)
        say(f"memory of {shape}")
    return found


def visit(
    processes: Mapping[bool, ProcessPoolExecutor], size: Size, shape: str, dtype: str, what: str
) -> list[Row]:
    """Time one case, the processes in turn, and put the visits of each together."""
    import torch_modules_work

    taken: dict[tuple[bool, str], list[Row]] = {}
    order = list(processes)
    for _ in range(size.visits):
        for huge_pages in order:
            times = (
                processes[huge_pages]
                .submit(
                    torch_modules_work.time_case,
                    *(shape, dtype, what, huge_pages),
                    budget=size.seconds,
                    rounds=size.rounds,
                )
                .result()
            )
            for name, seconds in times.items():
                taken.setdefault((huge_pages, name), []).append(seconds)
        order.reverse()
    facts = {"shape": shape, "dtype": dtype, "what": what, "threads": THREADS}
    return [
        facts
        | {
            "huge_pages": huge_pages,
            "contender": name,
            "median_s": statistics.median(each["median_s"] for each in visits),
            "best_s": min(each["best_s"] for each in visits),
        }
        for (huge_pages, name), visits in taken.items()
    ]


def show(found: dict[str, Any], key: str) -> None:
    """Print all tables, with the medians or the bests of the times."""
    facts = found["environment"]
    versions = ", ".join(" ".join(each) for each in facts["versions"].items())
    loads = [load for load in facts["loads"] if load is not None] or ["unknown"]
    print(f"{facts['processor']}, load {min(loads)} to {max(loads)}; {versions}")
    print(f"Times are the {'bests' if key == 'best_s' else 'medians'}.\n")
    for dtype, threads in tables.settings(found):
        setting = f"{dtype}, {tables.count(threads)}"
        print(f"Times as fast as torch's module: {setting}\n")
        tables.print_table(*against_torch(found, dtype, False, key))
        print(f"The same with THP_MEM_ALLOC_ENABLE=1: {setting}\n")
        tables.print_table(*against_torch(found, dtype, True, key))
    print("Growth of the process at its peak, loss and gradient, in multiples of the logits\n")
    tables.print_table(*memory(found["memory"]))


def against_torch(
    found: dict[str, Any], dtype: str, huge_pages: bool, key: str
) -> tuple[list[str], list[list[str]]]:
    """Compare the modules on each shape, in words too where polyce's is slower."""
    times = tables.by_case(found)
    columns = {
        name: (what, ours, theirs)
        for name, (what, ours, theirs) in COLUMNS.items()
        if not (huge_pages and theirs == "torch compiled")
    }
    eager = {what: theirs for what, _, theirs in columns.values() if theirs == "torch"}
    rows = []
    for shape in found["shapes"]:
        case = (shape, dtype, THREADS, huge_pages)
        line = [shape]
        for what, ours, theirs in columns.values():
            line.append(
                tables.faster(times.get((*case, what, theirs)), times.get((*case, what, ours)), key)
            )
        taken = [times.get((*case, what, theirs)) for what, theirs in eager.items()]
        line.append(" / ".join(measure.text("_s", row and row[key]) for row in taken))
        rows.append(line)
    return ["logits", *columns, "torch, loss / with gradient"], rows


def memory(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Give the growth of each contender."""
    grown = {
        (row["contender"], row["shape"]): f"{row['bytes'] / row['logits']:.2f}" for row in rows
    }
    shapes = list(dict.fromkeys(shape for _, shape in grown))
    names = dict.fromkeys(name for name, _ in grown)
    lines = [[name, *(grown[name, shape] for shape in shapes)] for name in names]
    return ["module", *(shapes or ["not told by this system"])], lines


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="measure")
    runs.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON to write")
    runs.add_argument("--quick", action="store_true", help="take half a minute, not four")
    runs.add_argument("--tiny", action="store_true", help=cpu.TINY_HELP)
    runs.add_argument("--shapes", nargs="+", choices=SHAPES, metavar="NAME", help=" ".join(SHAPES))
    printing = commands.add_parser("table", help="print Markdown tables of a run")
    printing.add_argument("results", type=Path)
    printing.add_argument("--best", action="store_true", help="compare the bests, not the medians")
    drawing = commands.add_parser("plot", help="draw a run")
    drawing.add_argument("results", type=Path)
    drawing.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    arguments = parser.parse_args()
    if arguments.command == "run":
        size = TINY if arguments.tiny else QUICK if arguments.quick else FULL
        if arguments.shapes:
            size = size._replace(shapes=tuple(arguments.shapes))
        arguments.out.write_text(json.dumps(run(size), indent=1) + "\n")
        return
    found = json.loads(arguments.results.read_text())
    if arguments.command == "table":
        show(found, "best_s" if arguments.best else "median_s")
    else:
        import plots as painter

        painter.draw_modules(found, arguments.out)


if __name__ == "__main__":
    main()
