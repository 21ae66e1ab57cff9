"""Draw a run of the CPU benchmark: time and bandwidth."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

from .. import tables
from ..plots import STYLES, TITLES, begin, legend, mark, save, time
from .peers import ROOFS

ROOF = "roof: one read of the logits, or one copy"
# Fewer logits stay in a core's own cache and say nothing about memory.
FEWEST = 2**19


def draw(found: dict[str, Any], folder: Path) -> None:
    """Draw all figures into a folder."""
    begin(folder)
    times = tables.by_case(found)
    for dtype, threads in tables.settings(found):
        name = f"{dtype}-{threads}"
        save(time(times, found["shapes"], dtype, threads), folder / f"cpu-time-{name}")
        figure = bandwidth(found, dtype, threads)
        if figure is not None:
            save(figure, folder / f"cpu-bandwidth-{name}")


def bandwidth(found: dict[str, Any], dtype: str, threads: int) -> Any:
    """Draw each contender's bandwidth against the number of classes, below the memory's own."""
    points: dict[tuple[str, str], list[tuple[int, float, str]]] = {}
    for row in found["times"]:
        dims = found["shapes"][row["shape"]]["dims"]
        setting = (row["dtype"], row["threads"], row["huge_pages"])
        if setting == (dtype, threads, False) and math.prod(dims) >= FEWEST:
            point = (dims[1], row["gb_per_s"], row["shape"])
            points.setdefault((row["what"], row["contender"]), []).append(point)
    if not points:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True, layout="constrained")
    for axis, (what, title) in zip(axes, TITLES.items(), strict=True):
        roof = highest(
            [sorted(points[what, name]) for name in ROOFS[what] if (what, name) in points]
        )
        classes = [point[0] for point in roof]
        rates = [point[1] for point in roof]
        axis.plot(classes, rates, color="#444444", linestyle="--", marker="_", label=ROOF)
        axis.fill_between(classes, rates, color="#eeeeee", zorder=0)
        for name, (colour, marker) in STYLES.items():
            line = sorted(points.get((what, name), []))
            if line:
                axis.plot(
                    [point[0] for point in line], [point[1] for point in line], color=colour,
                    marker=marker, label=name, linewidth=1, markersize=7,
                )  # fmt: skip
        axis.set_xscale("log")
        axis.set_yscale("log")
        mark(axis.yaxis)
        axis.set_xticks(
            classes,
            [f"{point[0]} ({point[2]})" for point in roof],
            rotation=40,
            ha="right",
            fontsize=8,
        )
        axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axis.set_xlabel("classes (of which logits)")
        axis.set_title(f"{title}, {dtype}, {tables.count(threads)}")
    axes[0].set_ylabel("GB/s of logits read and gradient written")
    axes[0].tick_params(labelleft=True)
    legend(figure, axes)
    return figure


def highest(lines: list[list[tuple[int, float, str]]]) -> list[tuple[int, float, str]]:
    """Return the maximum of several lines at each place."""
    return [max(points, key=lambda point: point[1]) for points in zip(*lines, strict=True)]
