"""How the benchmarks draw: styles, axes and legends, as SVG and PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

Styles = Mapping[str, tuple[str, str]]
# The colours of Okabe and Ito, which the colour-blind can tell apart; the markers differ too.
STYLES = {
    "polyce NumPy": ("#0072B2", "o"),
    "polyce torch": ("#009E73", "s"),
    "torch eager": ("#D55E00", "^"),
    "torch compiled": ("#E69F00", "v"),
    "jax jit": ("#CC79A7", "X"),
}


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


def legend(figure: Any, axes: Any, styles: Styles) -> None:
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
