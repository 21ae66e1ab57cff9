"""Draw a run of the CPU benchmark: time and memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from .. import plots, tables
from ..measure import Row
from .peers import FLOOR, ON_HUGE_PAGES
from .tables import calmest

UNIT = "torch eager"
TITLES = {"forward": "loss", "gradient": "loss and gradient"}
STYLES = plots.STYLES | {
    "polyce NumPy out=": ("#56B4E9", "D"),
    "polyce in place": ("#009E73", "*"),
    "polyce compiled": ("#F0E442", "P"),
    ON_HUGE_PAGES["polyce torch"]: ("#009E73", "1"),
    ON_HUGE_PAGES[UNIT]: ("#D55E00", "1"),
    FLOOR: ("#000000", "|"),
    "polyce reference": ("#999999", "P"),
    "polyce jax": ("#CC79A7", "D"),
}


def draw(found: dict[str, Any], folder: Path) -> None:
    """Draw all figures into a folder."""
    plots.begin(folder)
    for dtype, threads in tables.settings(found):
        figure = time(calmest(found), list(found["shapes"]), dtype, threads)
        plots.save(figure, folder / f"cpu-time-{dtype}-{threads}")
    if found["memory"]:
        plots.save(memory(found["memory"]), folder / "cpu-memory")


def time(times: tables.Times, shapes: Sequence[str], dtype: str, threads: int) -> Any:
    """Draw the time of each contender on each shape, relative to torch's."""
    figure, axes = plt.subplots(
        1, 2, figsize=(10, 1.5 + 0.4 * len(shapes)), sharey=True, layout="constrained"
    )
    for axis, (what, title) in zip(axes, TITLES.items(), strict=True):
        for name, (colour, marker) in STYLES.items():
            places, values = [], []
            for place, shape in enumerate(shapes):
                case = (shape, dtype, threads, what)
                row, one = times.get((*case, name)), times.get((*case, UNIT))
                if row and one:
                    places.append(place)
                    values.append(row["median_s"] / one["median_s"])
            if values:
                axis.scatter(
                    values, places, s=60, c=colour, marker=marker, label=name, zorder=3, alpha=0.9
                )
        axis.axvline(1.0, color=STYLES[UNIT][0], linewidth=1)
        axis.set_xscale("log")
        plots.mark(axis.xaxis)
        axis.tick_params(axis="x", rotation=45)
        axis.set_title(f"{title}, {dtype}, {tables.count(threads)}")
        axis.set_xlabel(f"time / time of {UNIT} (left is faster)")
    axes[0].set_yticks(range(len(shapes)), shapes)
    axes[0].set_ylabel("logits")
    axes[0].set_ylim(len(shapes) - 0.5, -0.5)
    plots.legend(figure, axes, STYLES)
    return figure


def memory(rows: list[Row]) -> Any:
    """Draw the growth of the process by contender, each case in a panel of its own."""
    names = [name for name in STYLES if any(row["contender"] == name for row in rows)]
    cases = list(dict.fromkeys((row["what"], row["shape"]) for row in rows))
    figure, ((*axes,),) = plt.subplots(
        1, len(cases), figsize=(3.6 * len(cases), 1.2 + 0.33 * len(names)), squeeze=False,
        sharex=True, sharey=True, layout="constrained",
    )  # fmt: skip
    for axis, (what, shape) in zip(axes, cases, strict=True):
        for row in rows:
            if (row["what"], row["shape"]) == (what, shape):
                place, length = names.index(row["contender"]), row["bytes"] / row["logits"]
                axis.barh(place, length, color=STYLES[row["contender"]][0], height=0.7)
                where = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
                axis.annotate(f"{length:.2f}", (length, place), **where)
        axis.set_title(f"{TITLES[what]}, {shape} float32", fontsize=10)
        axis.set_xlabel("growth at the peak / size of the logits", fontsize=9)
        axis.grid(visible=False, axis="y")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[0].margins(x=0.1)
    return figure
