"""What `polyce.log_prob` and `polyce.entropy` have to return for the arrays of a case."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .answers import exact_answer
from .case import Case
from .dtypes import Array, Floats
from .oracle import Answer
from .tolerances import Accuracy, loss_tolerance, rounded, stats_tolerances

TRANSFORMS = ("axis", "logit_scale", "logit_softcap")


@dataclass(frozen=True, eq=False)
class Expected:
    """A call and its exact result.

    Attributes
    ----------
    options : dict
        Keyword arguments of the call that are not arrays.
    index : ndarray or None
        The index of `log_prob`.
    values : ndarray of float64
        The exact result.
    dtype : dtype
        The dtype that the result must have.
    tolerance : callable
        The largest errors allowed, for a required `Accuracy`.
    """

    options: dict[str, Any]
    index: Array | None
    values: Floats
    dtype: np.dtype[Any]
    tolerance: Callable[[Accuracy], Floats]


def expectations(case: Case, what: str) -> Iterator[Expected]:
    """Yield calls of `log_prob` or of `entropy`.

    Parameters
    ----------
    case : Case
        A case with class indices, without weights, smoothing or z-loss.
    what : str
        "log_prob": with one class of each row and with several; or "entropy".
    """
    options = {name: case.options[name] for name in TRANSFORMS if name in case.options}
    if what == "entropy":
        yield _entropy(case, options)
        return
    more = {n: case.options[n] for n in ("ignore_index", "validate") if n in case.options}
    ignored = case.options.get("ignore_index", -100)
    rank, axis = case.logits.ndim, case.options.get("axis")
    at = (min(1, rank - 1) if axis is None else axis) % rank
    rows = case.logits.shape[:at] + case.logits.shape[at + 1 :]
    label = case.target.reshape(rows)
    last = max(case.logits.shape[at] - 1, 0)
    several = [label]
    if case.logits.shape[at]:
        several = [np.where(label == ignored, label, 0), label, np.where(label == ignored, 0, last)]
    if last:
        yield _log_prob(case, options, more, [label], None)
    yield _log_prob(case, options, more, several, at)


def _log_prob(
    case: Case,
    options: dict[str, Any],
    more: dict[str, Any],
    labels: list[Array],
    at: int | None,
) -> Expected:
    ignored = more.get("ignore_index", -100)
    answers = [
        exact_answer(case.logits, one, reduction="none", ignore_index=ignored, **options)
        for one in labels
    ]

    def together(arrays: list[Floats]) -> Floats:
        return arrays[0] if at is None else np.stack(arrays, axis=at)

    def tolerance(rule: Accuracy) -> Floats:
        return together(
            [loss_tolerance(answer, case.logits.dtype.name, rule) for answer in answers]
        )

    index = labels[0] if at is None else np.stack(labels, axis=at)
    values = together([0.0 - answer.loss for answer in answers])
    return Expected(options | more, index, values, case.logits.dtype, tolerance)


def _entropy(case: Case, options: dict[str, Any]) -> Expected:
    rank, axis = case.logits.ndim, case.options.get("axis")
    at = (min(1, rank - 1) if axis is None else axis) % rank
    rows = case.logits.shape[:at] + case.logits.shape[at + 1 :]
    label = 0 if case.logits.shape[at] else -100
    answer: Answer = exact_answer(case.logits, np.full(rows, label), reduction="none", **options)
    values, name = answer.stats.entropy, case.logits.dtype.name

    def tolerance(rule: Accuracy) -> Floats:
        return rounded(values, stats_tolerances(answer, rule)["entropy"], name, rule)

    return Expected(options, None, values, case.logits.dtype, tolerance)
