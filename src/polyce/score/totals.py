"""What some blocks of rows add to the figures; the totals of blocks add up to those of all rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from polyce.arrays import dtypes, find
from polyce.functional import cross_entropy
from polyce.score import calibration

Box = tuple[slice, ...]
STATS = ("entropy", "correct", "top_probability", "brier", "rank")
BY_CLASS = ("rows", "predicted", "loss", "correct", "brier")
"""What is summed up for each class."""


class Question(NamedTuple):
    """What is asked of each block: the options of a score."""

    shape: tuple[int, ...]
    """Of all logits."""
    axis: int
    ignore_index: int
    weight: Any
    """One for each class, in NumPy, or None."""
    softcap: float | None
    bins: int
    by_class: bool
    implementation: str | None

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Return the labels' shape."""
        return without(self.shape, self.axis)


def without(entries: tuple[Any, ...], axis: int) -> tuple[Any, ...]:
    """Leave out the entry of the class axis."""
    return entries[:axis] + entries[axis + 1 :]


class Mean(NamedTuple):
    """A weighted mean Σv / Σw of rows, and the squares from which its error follows.

    They are about the mean itself, r = v - mean·w, so that no digits are lost.
    """

    rows: int = 0
    weight: float = 0.0
    total: float = 0.0
    ww: float = 0.0
    rw: float = 0.0
    rr: float = 0.0

    @classmethod
    def of(cls, values: Any, weights: Any) -> Mean:
        """Sum up rows; their values are weighted already."""
        weight, total = float(weights.sum()), float(values.sum())
        residual = values - (total / weight if weight else 0.0) * weights
        squares = weights @ weights, residual @ weights, residual @ residual
        return cls(values.size, weight, total, *map(float, squares))

    @property
    def value(self) -> float:
        """Return the mean."""
        return self.total / self.weight if self.weight else math.nan

    @property
    def error(self) -> float:
        """Return the mean's standard error, for independent rows."""
        if self.rows < 2 or not self.weight:
            return math.nan
        return math.sqrt(self.rr * self.rows / (self.rows - 1)) / abs(self.weight)

    def about(self, mean: float) -> tuple[float, float, float]:
        """Return the squares about another mean."""
        shift = (self.value if self.weight else 0.0) - mean
        rr = self.rr + 2 * shift * self.rw + shift * shift * self.ww
        return self.ww, self.rw + shift * self.ww, max(rr, 0.0)

    def __add__(self, other: Mean) -> Mean:  # type: ignore[override]
        """Add up."""
        joined = Mean(self.rows + other.rows, self.weight + other.weight, self.total + other.total)
        mean = joined.value if joined.weight else 0.0
        squares = zip(self.about(mean), other.about(mean), strict=True)
        return Mean(*joined[:3], *(one + two for one, two in squares))


class Means(NamedTuple):
    """The means of a score."""

    loss: Mean
    accuracy: Mean
    top5_accuracy: Mean
    brier: Mean
    entropy: Mean
    slope: Mean
    """Of the loss, by the logarithm of the scale: the loss less the entropy, weighted."""


@dataclass(frozen=True)
class Totals:
    """The sums over some blocks."""

    rows: int
    ignored: int
    undefined: int
    bad_labels: int
    first_undefined: int | None
    first_bad_label: int | None
    """Positions are counted in C order."""
    means: Means
    bins: Any
    classes: Any
    """An array of shape (5, C), or None."""

    def __add__(self, other: Totals) -> Totals:
        """Add up."""
        return Totals(
            self.rows + other.rows,
            self.ignored + other.ignored,
            self.undefined + other.undefined,
            self.bad_labels + other.bad_labels,
            _earlier(self.first_undefined, other.first_undefined),
            _earlier(self.first_bad_label, other.first_bad_label),
            Means(*(one + two for one, two in zip(self.means, other.means, strict=True))),
            self.bins + other.bins,
            None if self.classes is None else self.classes + other.classes,
        )


def _earlier(one: int | None, other: int | None) -> int | None:
    return min((place for place in (one, other) if place is not None), default=None)


class OfBlocks(NamedTuple):
    """What is kept of some blocks of rows."""

    totals: Totals
    confidence: Any
    """Of each row that counts, in the dtype of the arithmetic."""
    correct: Any


def nothing(question: Question) -> Totals:
    """Return the totals of no rows."""
    classes = question.shape[question.axis]
    return Totals(
        *(0, 0, 0, 0, None, None),
        Means(*(Mean() for _ in Means._fields)),
        np.zeros((3, question.bins)),
        np.zeros((len(BY_CLASS), classes)) if question.by_class else None,
    )


def columns(question: Question, scale: float, logits: Any, target: Any) -> tuple[Any, ...]:
    """Compute what is known of each row of a block, labels first, in one pass over its logits."""
    library, (logits, target) = find.of(input=logits, target=target)
    # A loss has the dtype of its logits, and a mean of many should not be made of 16-bit numbers.
    if dtypes.dtype_name(logits) not in ("float32", "float64"):
        logits = library.cast(logits, library.float_dtype("float32"))
    losses, stats = cross_entropy(
        logits,
        target,
        ignore_index=question.ignore_index,
        reduction="none",
        axis=question.axis,
        logit_scale=scale,
        logit_softcap=question.softcap,
        return_stats=(*STATS, "prediction") if question.by_class else STATS,
        validate=False,
        implementation=question.implementation,
    )
    prediction = (stats.prediction,) if question.by_class else ()
    arrays = (target, losses, *(getattr(stats, name) for name in STATS), *prediction)
    return tuple(array.reshape(-1) for array in library.to_numpy(*arrays))


def of_blocks(question: Question, boxes: list[Box], rows: list[tuple[Any, ...]]) -> OfBlocks:
    """Sum up the rows of some blocks, `boxes` of all logits, from what is known of each."""
    labels, *known = (np.concatenate(column) for column in zip(*rows, strict=True))
    ignored, bad = left_out(question, labels)
    undefined = np.isnan(known[3]) & ~ignored & ~bad
    counts = ~(ignored | bad | undefined)
    labels = labels[counts].astype(np.int64)
    loss, entropy, correct, confidence, brier, rank, *predicted = (
        column[counts] for column in known
    )
    with np.errstate(invalid="ignore"):  # a loss of inf has no error
        means = _means(question, labels, loss, entropy, correct, brier, rank)
    totals = Totals(
        int(counts.size),
        int(ignored.sum()),
        int(undefined.sum()),
        int(bad.sum()),
        first(question, boxes, undefined),
        first(question, boxes, bad),
        means,
        calibration.binned(confidence, correct, calibration.equal_width(question.bins)),
        _classes(question, labels, predicted[0], loss, correct, brier) if predicted else None,
    )
    return OfBlocks(totals, confidence, correct)


def left_out(question: Question, labels: Any) -> tuple[Any, Any]:
    """Mark the labels that are ignored, and those that are no class."""
    ignored = labels == question.ignore_index
    return ignored, ~ignored & ((labels < 0) | (labels >= question.shape[question.axis]))


def first(question: Question, boxes: list[Box], marked: Any) -> int | None:
    """Return the place among all rows of the first marked one of some blocks, in C order."""
    if not marked.any():
        return None
    found, start = None, 0
    for box in boxes:
        rows = without(box, question.axis)
        sizes = [cut.stop - cut.start for cut in rows]
        end = start + math.prod(sizes)
        if marked[start:end].any():
            inside = np.unravel_index(int(np.argmax(marked[start:end])), sizes) if sizes else ()
            place = tuple(int(i) + cut.start for i, cut in zip(inside, rows, strict=True))
            number = int(np.ravel_multi_index(place, question.row_shape)) if place else 0
            found = _earlier(found, number)
        start = end
    return found


def _means(
    question: Question, labels: Any, loss: Any, entropy: Any, correct: Any, brier: Any, rank: Any
) -> Means:
    ones = np.ones(labels.size)
    weights = ones if question.weight is None else question.weight[labels]
    loss, entropy = loss.astype(np.float64), entropy.astype(np.float64)
    # A class of weight 0 takes no part, whatever its loss.
    weighted = np.where(weights == 0.0, 0.0, loss * weights)

    def of_rows(values: Any) -> Mean:
        return Mean.of(values.astype(np.float64), ones)

    return Means(
        loss=Mean.of(weighted, weights),
        accuracy=of_rows(correct),
        top5_accuracy=of_rows(rank < 5),
        brier=of_rows(brier),
        entropy=of_rows(entropy),
        slope=Mean.of(weighted - entropy * weights, weights),
    )


def _classes(
    question: Question, labels: Any, predicted: Any, loss: Any, correct: Any, brier: Any
) -> Any:
    classes = question.shape[question.axis]
    by_label = [np.bincount(labels, values, classes) for values in (None, loss, correct, brier)]
    rows, losses, hits, briers = by_label
    return np.stack([rows, np.bincount(predicted, None, classes), losses, hits, briers])


def class_table(sums: Any) -> Any:
    """Return the table of classes."""
    rows, predicted, loss, correct, brier = sums
    with np.errstate(invalid="ignore"):
        of_rows = [values / rows for values in (loss, correct, brier)]
        columns = {
            "class": np.arange(rows.size),
            "rows": rows,
            "predicted": predicted,
            "loss": of_rows[0],
            "accuracy": of_rows[1],
            "precision": correct / predicted,
            "brier": of_rows[2],
        }
    counts = ("class", "rows", "predicted")
    table = np.empty(rows.size, [(name, "i8" if name in counts else "f8") for name in columns])
    for name, column in columns.items():
        table[name] = column
    return table
