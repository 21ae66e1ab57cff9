"""Draw a run of a CPU benchmark: time, bandwidth, memory and error, as SVG and PNG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import tables
from cpu_peers import ROOFS
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from measure import Row

Styles = Mapping[str, tuple[str, str]]
# The colours of Okabe and Ito, which the colour-blind tell apart; the markers differ too.
STYLES = {
    "polyce NumPy": ("#0072B2", "o"),
    "polyce NumPy out=": ("#56B4E9", "D"),
    "polyce torch": ("#009E73", "s"),
    "polyce reference": ("#999999", "P"),
    "torch eager": ("#D55E00", "^"),
    "torch compiled": ("#E69F00", "v"),
    "jax jit": ("#CC79A7", "X"),
    "scipy": ("#000000", "*"),
}
MODULES = {
    "torch": STYLES["torch eager"],
    "polyce": STYLES["polyce torch"],
    "polyce in place": ("#56B4E9", "D"),
    "torch compiled": STYLES["torch compiled"],
    "polyce compiled": ("#CC79A7", "X"),
}
UNIT = "torch eager"
ROOF = "roof: one read of the logits, or one copy"
TITLES = {"forward": "loss", "gradient": "loss and gradient"}
# Fewer logits stay in a core's own cache, so they say nothing about memory.
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
    if found["memory"]:
        save(memory(found["memory"]), folder / "cpu-memory")
    save(error(found), folder / "cpu-error")


def draw_modules(found: dict[str, Any], folder: Path) -> None:
    """Draw the figures of the benchmark of torch's and polyce's modules."""
    begin(folder)
    times = tables.by_case(found)
    for dtype, threads in tables.settings(found):
        figure = time(times, found["shapes"], dtype, threads, MODULES, "torch")
        save(figure, folder / f"torch-modules-time-{dtype}-{threads}")
    if found["memory"]:
        save(memory(found["memory"], MODULES), folder / "torch-modules-memory")


def begin(folder: Path) -> None:
    """Set the style, and make the folder."""
    matplotlib.use("Agg")
    plt.rcParams |= {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#dddddd",
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "font.size": 10,
        "svg.hashsalt": "polyce",  # the same file from the same results
        "svg.fonttype": "none",
    }
    folder.mkdir(parents=True, exist_ok=True)


def save(figure: Any, path: Path) -> None:
    """Write a figure in both formats."""
    # Without the date, the same results give the same file.
    figure.savefig(path.with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None})
    figure.savefig(path.with_suffix(".png"), bbox_inches="tight", dpi=150)
    plt.close(figure)


def plain(value: float, _: Any = None) -> str:
    """Write a tick of a logarithmic axis."""
    return f"{value:g}"


def name_shapes(axis: Any, shapes: Iterable[str]) -> None:
    """Name a place on the vertical axis for each shape, the first one on top."""
    names = list(shapes)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylabel("logits")
    axis.set_ylim(len(names) - 0.5, -0.5)


def legend(figure: Any, axes: Any, styles: Styles = STYLES) -> None:
    """Put one legend for all panels below them, in the same order in all figures."""
    found: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        found |= {label: handle for handle, label in zip(handles, labels, strict=True)}
    labels = [*(name for name in styles if name in found), *(found.keys() - styles)]
    figure.legend(
        [found[label] for label in labels],
        labels,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncol=3,
        frameon=False,
    )


def time(
    times: tables.Times,
    shapes: dict[str, Any],
    dtype: str,
    threads: int,
    styles: Styles = STYLES,
    unit: str = UNIT,
) -> Any:
    """Draw the time of each contender on each shape, relative to one of them."""
    with_huge_pages = f"{unit}, THP_MEM_ALLOC_ENABLE=1"
    colour_of_unit = styles[unit][0]
    figure, axes = plt.subplots(
        1, 2, figsize=(10, 1.2 + 0.5 * len(shapes)), sharey=True, layout="constrained"
    )
    for axis, (what, title) in zip(axes, TITLES.items(), strict=True):
        for name, (colour, marker) in (*styles.items(), (with_huge_pages, styles[unit])):
            huge_pages = name == with_huge_pages
            contender = unit if huge_pages else name
            places, values = [], []
            for place, shape in enumerate(shapes):
                row = times.get((shape, dtype, threads, huge_pages, what, contender))
                one = times.get((shape, dtype, threads, False, what, unit))
                if row and one:
                    places.append(place)
                    values.append(row["median_s"] / one["median_s"])
            if values:
                face = "none" if huge_pages else colour
                axis.scatter(
                    values, places, s=60, c=face, edgecolors=colour, marker=marker, label=name,
                    zorder=3, alpha=0.9,
                )  # fmt: skip
        axis.axvline(1.0, color=colour_of_unit, linewidth=1)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        axis.xaxis.set_major_formatter(FuncFormatter(plain))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(axis="x", rotation=45)
        axis.set_title(f"{title}, {dtype}, {tables.count(threads)}")
        axis.set_xlabel(f"time / time of {unit} (left is faster)")
    name_shapes(axes[0], shapes)
    legend(figure, axes, styles)
    return figure


def bandwidth(found: dict[str, Any], dtype: str, threads: int) -> Any:
    """Draw the bandwidth of each contender against the classes, under what memory gives."""
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
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(plain))
        axis.yaxis.set_minor_formatter(NullFormatter())
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
    """Give the highest point of several lines at each place."""
    return [max(points, key=lambda point: point[1]) for points in zip(*lines, strict=True)]


def memory(rows: list[Row], styles: Styles = STYLES) -> Any:
    """Draw the growth of the process by contender, each case in a panel of its own."""
    names = [name for name in styles if any(row["contender"] == name for row in rows)]
    cases = list(dict.fromkeys((row["what"], row["shape"]) for row in rows))
    figure, axes = plt.subplots(
        1,
        len(cases),
        figsize=(10, 1.2 + 0.33 * len(names)),
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for axis, (what, shape) in zip(axes, cases, strict=True):
        for row in rows:
            if (row["what"], row["shape"]) == (what, shape):
                place, length = names.index(row["contender"]), row["bytes"] / row["logits"]
                axis.barh(place, length, color=styles[row["contender"]][0], height=0.7)
                axis.annotate(
                    f"{length:.2f}",
                    (length, place),
                    (4, 0),
                    textcoords="offset points",
                    va="center",
                )
        axis.set_title(f"{TITLES[what]}, {shape} float32")
        axis.set_xlabel("growth of the process at its peak / size of the logits")
        axis.grid(visible=False, axis="y")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[0].margins(x=0.1)
    return figure


def error(found: dict[str, Any]) -> Any:
    """Draw the largest error of a row's loss on each shape."""
    shapes = list(found["shapes"])
    figure, axes = plt.subplots(
        1, 2, figsize=(10, 1.2 + 0.5 * len(shapes)), sharey=True, layout="constrained"
    )
    titles = {"random": "random rows", "confident": "confident rows, loss about 0.0005"}
    for axis, (kind, title) in zip(axes, titles.items(), strict=True):
        for name, (colour, marker) in STYLES.items():
            rows = [
                row
                for row in found["errors"]
                if (row["rows"], row["contender"], row["dtype"]) == (kind, name, "float32")
            ]
            if rows:
                values = [row["max_ulp"] for row in rows]
                places = [shapes.index(row["shape"]) for row in rows]
                axis.scatter(
                    values, places, s=60, c=colour, marker=marker, label=name, zorder=3, alpha=0.9
                )
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(plain))
        axis.set_title(f"{title}, float32")
        axis.set_xlabel("largest error of a row's loss, in units in the last place")
    name_shapes(axes[0], shapes)
    legend(figure, axes)
    return figure
