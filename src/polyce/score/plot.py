"""The reliability diagram, over the histogram of confidences."""

from __future__ import annotations

from pathlib import Path

from polyce.score.record import Score

FORMATS = (".svg", ".png", ".pdf")


def draw(found: Score, path: Path) -> None:
    """Draw both into one picture."""
    # Not pyplot, which looks for a screen.
    from matplotlib.figure import Figure

    table = found.reliability[found.reliability["rows"] > 0]
    low, width = table["low"], table["high"] - table["low"]
    figure = Figure(figsize=(5, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.bar(low, table["accuracy"], width, align="edge", edgecolor="white", label="accuracy")
    upper.plot((0, 1), (0, 1), "k--", linewidth=1, label="accuracy = confidence")
    upper.plot(table["confidence"], table["accuracy"], "k.", label="mean confidence of a bin")
    upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    upper.set_title(f"expected calibration error {found.ece:.3g}, largest {found.mce:.3g}")
    upper.legend(loc="upper left")
    lower.bar(low, table["rows"], width, align="edge", edgecolor="white")
    lower.set(xlabel="confidence", ylabel="rows")
    figure.savefig(path)
