"""Drawings that the benchmarks share: styles, times and memory, as SVG and PNG."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from . import tables
from .measure import Row

Styles = Mapping[str, tuple[str, str]]
# The colours of Okabe and Ito, which the colour-blind can tell apart; the markers differ too.
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
UNIT = "torch eager"
TITLES = {"forward": "loss", "gradient": "loss and gradient"}


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


def mark(axis: Any) -> None:
    """Put ticks at round numbers of a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axis.set_major_formatter(FuncFormatter(plain))
    axis.set_minor_formatter(NullFormatter())


def name_shapes(axis: Any, shapes: Iterable[str]) -> None:
    """Label a place on the vertical axis for each shape, the first one on top."""
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
        mark(axis.xaxis)
        axis.tick_params(axis="x", rotation=45)
        axis.set_title(f"{title}, {dtype}, {tables.count(threads)}")
        axis.set_xlabel(f"time / time of {unit} (left is faster)")
    name_shapes(axes[0], shapes)
    legend(figure, axes, styles)
    return figure


def memory(rows: list[Row], styles: Styles = STYLES) -> Any:
    """Draw the growth of the process by contender, with a panel for each case."""
    names = [name for name in styles if any(row["contender"] == name for row in rows)]
    cases = list(dict.fromkeys((row["what"], row["shape"]) for row in rows))
    figure, ((*axes,),) = plt.subplots(
        1, len(cases), figsize=(10, 1.2 + 0.33 * len(names)), squeeze=False, sharex=True,
        sharey=True, layout="constrained",
    )  # fmt: skip
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
