"""Draw a run of the benchmark of linear_cross_entropy: memory against time, as SVG and PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .. import plots, tables
from .tables import WHATS, beyond
from .work import PRODUCTS

STYLES = {
    "polyce torch": plots.STYLES["polyce torch"],
    "polyce numpy": plots.STYLES["polyce NumPy"],
    "polyce jax": ("#56B4E9", "D"),
    "torch": plots.STYLES["torch eager"],
    "torch compiled": plots.STYLES["torch compiled"],
    "torch chunked": ("#000000", "*"),
    "numpy unfused": ("#999999", "P"),
    "jax": plots.STYLES["jax jit"],
}
# A logarithmic axis cannot show 0; the system counts whole pages, and those of code too.
LEAST = 1.0


def draw(found: dict[str, Any], folder: Path) -> None:
    """Draw all figures into a folder."""
    plots.begin(folder)
    for dtype, threads in tables.settings(found):
        for what in WHATS:
            figure = memory_and_time(found, dtype, threads, what)
            if figure is not None:
                plots.save(figure, folder / f"linear-{what}-{dtype}-{threads}")


def memory_and_time(found: dict[str, Any], dtype: str, threads: int, what: str) -> Any:
    """Draw the memory of each contender against its time, each shape in a panel of its own."""
    times = tables.by_case(found["times"])
    megabytes = {
        (row["shape"], row["contender"]): max(beyond(row), LEAST)
        for row in found["memory"]
        if (row["dtype"], row["what"]) == (dtype, what)
    }
    if not megabytes:
        return None
    shapes = list(found["shapes"])
    columns = min(2, len(shapes))
    lines = -(-len(shapes) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(5 * columns, 1.0 + 2.8 * lines), squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    axes = list(grid.flat)
    for axis in axes[len(shapes) :]:
        axis.set_axis_off()
    for axis, shape in zip(axes, shapes, strict=False):
        case = (shape, dtype, threads, what)
        for name, (colour, marker) in STYLES.items():
            row = times.get((*case, name))
            if row and (shape, name) in megabytes:
                axis.scatter(
                    row["median_s"], megabytes[shape, name], s=80, c=colour, marker=marker,
                    label=name, zorder=3, alpha=0.9,
                )  # fmt: skip
        bound = times.get((*case, PRODUCTS))
        if bound:
            axis.axvline(
                bound["median_s"], color="#444444", linestyle="--", linewidth=1, label=PRODUCTS
            )
        axis.set_xlim(left=0.0)
        axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.xaxis.set_major_formatter(FuncFormatter(plots.plain))
        axis.set_yscale("log")
        plots.mark(axis.yaxis)
        tokens, features, classes = found["shapes"][shape]["dims"]
        axis.set_title(f"{tokens} tokens × {features} features → {classes} classes", fontsize=10)
        axis.set_xlabel("seconds (left is faster)")
    for axis in grid[:, 0]:
        axis.set_ylabel("MB beside inputs\nand gradients")
    figure.suptitle(f"{WHATS[what]}, {dtype}, {tables.count(threads)}", fontsize=11)
    plots.legend(figure, axes, STYLES)
    return figure
