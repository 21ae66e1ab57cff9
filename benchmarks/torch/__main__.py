"""Time polyce.torch.CrossEntropyLoss against torch's own module on a CPU, eager and compiled.

python -m benchmarks.torch run --out results.json [--quick | --tiny] [--shapes NAME ...]
python -m benchmarks.torch table results.json
python -m benchmarks.torch plot results.json --out docs/_static

A call goes through a function around a module: the loss, and loss and gradient through autograd.
Contenders of one case take turns in one process; a second process, with huge pages, times those
that are not compiled.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .. import command, measure, tables
from ..shapes import SHAPES
from ..workers import Size, visit, worker
from . import work

THREADS = 2


# malloc keeps freed blocks of up to 32 MiB, which would hide memory that a call takes again.
MEMORY = ("1024x32000", "4x21x512x512")
FULL = Size(tuple(SHAPES), ("float32", "bfloat16"), MEMORY, True, 3, 0.4, 5)
QUICK = Size(("8x10", "4096x1000"), ("float32",), MEMORY[1:], False, 1, 0.1, 3)
TINY = Size(("8x10",), ("float32",), ("8x10",), False, 1, 0.0, 1)

# For each column of the tables: what is compared, and between which two contenders.
COLUMNS = {
    "loss": ("forward", "polyce", "torch"),
    "with gradient": ("gradient", "polyce", "torch"),
    "in place": ("gradient", "polyce in place", "torch"),
    "loss, compiled": ("forward", "polyce compiled", "torch compiled"),
    "with gradient, compiled": ("gradient", "polyce compiled", "torch compiled"),
}


def run(size: Size, log: command.Log) -> None:
    """Measure everything."""
    # Otherwise inductor would keep its compile processes.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    timing = {"budget": size.seconds, "rounds": size.rounds}
    with worker(THREADS) as plain, worker(THREADS, huge_pages=True) as huge:
        for dtype in size.dtypes:
            for shape in size.shapes:
                for what in work.WHATS:
                    case = (shape, dtype, what)
                    rows = visit(
                        {False: plain, True: huge},
                        size.visits,
                        lambda process, huge_pages, _, case=case: process.submit(
                            work.time_case, *case, huge_pages, **timing
                        ),
                    )
                    facts = dict(zip(("shape", "dtype", "what"), case, strict=True))
                    facts["threads"] = THREADS
                    log.add(" ".join(case), times=[facts | row for row in rows])
    for shape in size.memory:
        dims = [int(count) for count in shape.split("x")]
        for name in work.GRADIENT:
            if name.endswith("compiled") and not size.thorough:
                continue
            grown = measure.fresh(work.grow, dims=dims, contender=name)
            row = {"shape": shape, "what": "gradient", "contender": name}
            log.add(f"memory of {shape}, {name}", memory=[row | grown] if grown else [])


def show(found: dict[str, Any], key: str) -> None:
    """Print all tables, with the medians or the best of the times."""
    tables.print_head(found, key)
    for dtype, threads in tables.settings(found):
        setting = f"{dtype}, {tables.count(threads)}"
        print(f"Times as fast as torch's module: {setting}\n")
        tables.print_table(*against_torch(found, dtype, False, key))
        print(f"The same with THP_MEM_ALLOC_ENABLE=1: {setting}\n")
        tables.print_table(*against_torch(found, dtype, True, key))
    print("Growth of the process at its peak, loss and gradient, in multiples of the logits\n")
    rows = [row | {"times": f"{row['bytes'] / row['logits']:.2f}"} for row in found["memory"]]
    tables.print_table(*tables.crossed(rows, "shape", "times", "module"))


def against_torch(found: dict[str, Any], dtype: str, huge_pages: bool, key: str) -> tables.Table:
    """Compare the modules on each shape."""
    times = tables.by_case(found)
    columns = {
        name: (what, ours, theirs)
        for name, (what, ours, theirs) in COLUMNS.items()
        if not (huge_pages and theirs == "torch compiled")
    }
    rows = []
    for shape in found["shapes"]:
        case = (shape, dtype, THREADS, huge_pages)
        line = [
            tables.faster(times.get((*case, what, theirs)), times.get((*case, what, ours)), key)
            for what, ours, theirs in columns.values()
        ]
        eager = [times.get((*case, what, "torch")) for what in work.WHATS]
        rows.append([shape, *line, tables.seconds(eager, key)])
    return ["logits", *columns, "torch, loss / with gradient"], rows


def draw(found: dict[str, Any], folder: Path) -> None:
    """Draw all figures; only this needs matplotlib."""
    from .. import plots

    styles = {
        "torch": plots.STYLES["torch eager"],
        "polyce": plots.STYLES["polyce torch"],
        "polyce in place": plots.STYLES["polyce NumPy out="],
        "torch compiled": plots.STYLES["torch compiled"],
        "polyce compiled": plots.STYLES["jax jit"],
    }
    plots.begin(folder)
    for dtype, threads in tables.settings(found):
        figure = plots.time(tables.by_case(found), found["shapes"], dtype, threads, styles, "torch")
        plots.save(figure, folder / f"torch-modules-time-{dtype}-{threads}")
    if found["memory"]:
        plots.save(plots.memory(found["memory"], styles), folder / "torch-modules-memory")


if __name__ == "__main__":
    summary = (__doc__ or "").splitlines()[0]
    command.main(summary, SHAPES, command.Sizes(FULL, QUICK, TINY), run, show, draw)
