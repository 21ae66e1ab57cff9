"""The figures of a score, as they are returned and printed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

FIGURES = (
    "rows",
    "ignored",
    "undefined",
    "bad_labels",
    "loss",
    "bits",
    "perplexity",
    "accuracy",
    "top5_accuracy",
    "brier",
    "entropy",
    "ece",
    "mce",
    "ece_mass",
    "temperature",
)
"""The names that are written to files, each with its error after it where there is one."""


@dataclass(frozen=True, eq=False, repr=False)
class Score:
    """What logits are worth, given their labels: the figures that `score` returns.

    Means are over the rows that count: those that are not ignored, have a softmax, and have a label
    that is a class. Each ``…_error`` is the standard error of the figure, and assumes independent
    rows; it is nan with fewer than two rows. A figure over no rows is nan.

    Parameters
    ----------
    rows : int
        How many rows were read.
    ignored : int
        How many of them have the label ignore_index.
    undefined : int
        How many others have no softmax: a nan, +inf or nothing but -inf among their logits.
    bad_labels : int
        How many others have a label that is not a class; 0 unless ``validate=False``.
    first_undefined, first_bad_label : tuple of int or None
        The position of the first of each, in the labels' shape.
    loss, loss_error : float
        Mean cross-entropy in nats; weighted, as in `cross_entropy`, if there is a `weight`.
    bits, bits_error : float
        The same in bits: loss / log 2.
    perplexity, perplexity_error : float
        exp(loss).
    accuracy, accuracy_error : float
        Share of rows in which the first of the largest logits is the label's.
    top5_accuracy, top5_accuracy_error : float
        Share of rows in which fewer than five classes have a larger logit than the label.
    brier, brier_error : float
        Mean of Σ (p_c - [c = label])², from 0 to 2.
    entropy, entropy_error : float
        Mean entropy of the softmax in nats.
    ece : float
        Expected calibration error: the distance between accuracy and confidence, which is the
        largest probability, in each of `bins` bins of equal width, averaged over the rows.
    mce : float
        The largest of these distances.
    ece_mass : float
        As `ece`, but with bins between quantiles of the confidences, so that each has about as many
        rows.
    temperature, temperature_error : float
        Divisor of the logits. The error is that of a fit; without one it is nan.
    reliability : numpy.ndarray, shape (bins,)
        The bins of equal width, with fields low, high, rows, confidence and accuracy. A confidence
        on an edge is in the bin below.
    by_class : numpy.ndarray, shape (C,), or None
        Only with ``by_class=True``: fields class, rows (of that label), predicted (as that class),
        loss, accuracy (recall), precision and brier.

    Examples
    --------
    >>> import numpy as np
    >>> import polyce
    >>> logits = np.array([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0], [1.0, 4.0, 2.0]])
    >>> found = polyce.score(logits, np.array([0, 2, 0]))
    >>> print(found.rows, round(found.loss, 4), round(found.accuracy, 4))
    3 1.1638 0.6667
    """

    rows: int
    ignored: int
    undefined: int
    bad_labels: int
    first_undefined: tuple[int, ...] | None
    first_bad_label: tuple[int, ...] | None
    loss: float
    loss_error: float
    bits: float
    bits_error: float
    perplexity: float
    perplexity_error: float
    accuracy: float
    accuracy_error: float
    top5_accuracy: float
    top5_accuracy_error: float
    brier: float
    brier_error: float
    entropy: float
    entropy_error: float
    ece: float
    mce: float
    ece_mass: float
    temperature: float
    temperature_error: float
    reliability: Any
    by_class: Any

    def as_dict(self) -> dict[str, int | float]:
        """Return the numbers by their names, errors included, in the order of the table."""
        has = {field.name for field in fields(self)}
        names = (name for figure in FIGURES for name in (figure, f"{figure}_error") if name in has)
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        """Return a table of the figures with their standard errors."""
        values = self.as_dict()
        return "\n".join(
            f"{name:<14} {_shown(name, values)}" for name in FIGURES if _is_told(name, values)
        )


def _is_told(name: str, values: Mapping[str, int | float]) -> bool:
    """Leave out what was not found, where that is the usual."""
    return name not in ("undefined", "bad_labels") or values[name] > 0


def _shown(name: str, values: Mapping[str, int | float]) -> str:
    value, error = values[name], values.get(f"{name}_error", math.nan)
    if isinstance(value, int):
        return str(value)
    return f"{value:.6g}" if math.isnan(error) else f"{value:<12.6g} ± {error:.2g}"
