"""Whether confidence agrees with accuracy: bins of confidences, and the errors over them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

AT_ONCE = 1 << 20
"""How many rows are put into bins at once."""


def equal_width(bins: int) -> Any:
    """Return the edges of bins of equal width."""
    return np.linspace(0.0, 1.0, bins + 1)


def equal_mass(confidence: Any, bins: int) -> Any:
    """Return the edges of bins with about as many rows in each; equal confidences stay together."""
    if not confidence.size:
        return equal_width(bins)
    # As numpy.percentile has them, which at its first call imports numpy.ma for 20 to 40 ms.
    ordered = np.sort(confidence)
    below, share = np.divmod(equal_width(bins) * (confidence.size - 1), 1.0)
    low = ordered[below.astype(np.int64)]
    high = ordered[np.minimum(below.astype(np.int64) + 1, confidence.size - 1)]
    return low + (high - low) * share


def binned(confidence: Any, correct: Any, edges: Any) -> Any:
    """Sum up the rows of each bin: rows, confidences, correct ones; shape (3, bins).

    A confidence that is an edge belongs to the bin below, so that 1 needs no bin of its own.
    """
    bins = len(edges) - 1
    sums = np.zeros((3, bins))
    for start in range(0, confidence.size, AT_ONCE):
        some = slice(start, start + AT_ONCE)
        number = np.searchsorted(edges[1:-1], confidence[some])
        columns = (None, confidence[some], correct[some])
        sums += [np.bincount(number, values, bins) for values in columns]
    return sums


def expected_error(sums: Any) -> float:
    """Return the distance between confidence and accuracy, averaged over the rows."""
    rows, confidence, correct = sums
    total = float(rows.sum())
    return float(np.abs(correct - confidence).sum()) / total if total else math.nan


def largest_error(sums: Any) -> float:
    """Return the largest distance between confidence and accuracy of a bin that has rows."""
    rows, confidence, correct = sums[:, sums[0] > 0]
    return float(np.max(np.abs(correct - confidence) / rows)) if rows.size else math.nan


def reliability(sums: Any, edges: Any) -> Any:
    """Return the table of bins."""
    rows, confidence, correct = sums
    names = ("low", "high", "rows", "confidence", "accuracy")
    table = np.empty(len(rows), [(name, "i8" if name == "rows" else "f8") for name in names])
    with np.errstate(invalid="ignore"):
        columns = (edges[:-1], edges[1:], rows, confidence / rows, correct / rows)
    for name, column in zip(names, columns, strict=True):
        table[name] = column
    return table
