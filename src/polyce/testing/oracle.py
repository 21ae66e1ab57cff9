"""Exact answers of whole calls: rows of `oracle_row`, weighted, reduced and put in their place.

Rules decide what arithmetic on infinities would decide otherwise:

- a row that is ignored or has sample weight 0 has loss 0 and gradient 0, whatever it holds;
- a label outside 0 .. C-1 makes its row nan; the row counts as if its class weight were 1;
- a row with a nan, a +inf or nothing but -inf is nan;
- a term r_c * x_c with r_c = 0 is left out where x_c is -inf;
- a mean over no weight divides by 0: 0/0 is nan, a positive loss gives inf.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from .dtypes import Array, Floats, is_float, promote
from .oracle_row import Row, measures, row_answer
from .oracle_softmax import DIGITS, ONE, ZERO, context
from .oracle_stats import stats_gradients, target_stats
from .oracle_target import SparseRow, Target, TeacherRow, likeliest

NOTHING = Row(ZERO, ZERO, ZERO, (), (), (), (), -1)
"""The answer of a row that does not count."""
PARTS = ("grad", "softmax_part", "pull_part", "coefficient_part", "target_part")
PER_CLASS = (*PARTS, "stats_part", "gap", "angle", "pivot")
STATS = (
    *("lse", "entropy", "prediction", "correct", "top_probability", "brier", "rank"),
    *("lse_scale", "entropy_spread", "entropy_lead"),
    *("brier_scale", "brier_gap", "brier_reach", "brier_square"),
)
"""All that `ExactStats` has but `valid`."""


@dataclass(frozen=True)
class ExactStats:
    """The exact stats of the rows, all of the rows' shape, and their magnitudes.

    Attributes
    ----------
    lse, entropy : ndarray of float64
        Of the transformed logits, in nats; nan where the row does not count or has no softmax.
    prediction : ndarray of int64
        The first class with the largest logit before any transform; -1 where there is no lse.
    correct, valid : ndarray of bool
        Whether the prediction is the label, or the first class of the largest probability; and
        whether the row counts.
    top_probability, brier : ndarray of float64
        The largest probability, and the sum of the squared differences between the softmax and the
        one-hot label or the probabilities; nan where there is no lse, the second for a bad label
        too.
    rank : ndarray of int64
        How many classes have a larger logit than the label, before any transform; -1 where there
        is no brier, and for probabilities.
    lse_scale : ndarray of float64
        Magnitude for errors of lse: the larger of the row's largest logit and what the log of the
        sum adds to it.
    entropy_spread, entropy_lead : ndarray of float64
        Error of the entropy for one unit of relative error in every gap, and in the `lead`.
    brier_scale, brier_gap, brier_reach, brier_square : ndarray of float64
        For probabilities t, with d_c = abs(p_c - t_c) and s_c = p_c, for the likeliest class
        min(p_c, 1 - p_c): Σ d (s + d), Σ d s gap, Σ d s, and Σ (s (1 + gap))². 0 for labels.
    """

    lse: Floats
    entropy: Floats
    prediction: npt.NDArray[np.int64]
    correct: npt.NDArray[np.bool_]
    top_probability: Floats
    brier: Floats
    rank: npt.NDArray[np.int64]
    valid: npt.NDArray[np.bool_]
    lse_scale: Floats
    entropy_spread: Floats
    entropy_lead: Floats
    brier_scale: Floats
    brier_gap: Floats
    brier_reach: Floats
    brier_square: Floats


@dataclass(frozen=True)
class Answer:
    """The exact result of one call, and the magnitudes against which errors are measured.

    Attributes
    ----------
    loss : ndarray
        The loss (row losses for reduction none), rounded once to float64.
    grad : ndarray
        The gradient with respect to the logits, in their shape, rounded once to float64.
    loss_dtype : dtype
        The dtype in which an implementation has to return the loss.
    transform : str
        What happens to the logits: "none", "scale" or "softcap" (with or without a scale).
    loss_scale : ndarray
        Magnitude for loss errors: the rows' losses as sums of non-negative terms, the z-loss with
        the square of ``|m| + h`` for lse = m + h, added up in magnitude.
    square_part : ndarray
        What the z-loss adds to `loss_scale`.
    loss_spread, loss_lead : ndarray
        The same, every row times its `spread` or its `lead`.
    softmax_part, coefficient_part : ndarray
        Magnitudes of the two parts that a gradient entry is made of, Z standing for
        ``2 * z_loss * (|m| + h)``: ``(R + Z) * softmax_c`` and ``|r_c|``, at the pivot
        ``R * (1 - softmax_k) + Z * softmax_k`` and the sum of the other ``|r_c|``, all times the
        row's scale and the slope of the transform. The pivot k is the label, for probabilities
        the class of the largest logit; there they are those of the other classes, if these are
        smaller together. 0 in rows that are not finite.
    pull_part : ndarray
        ``Z * softmax_c``, what the z-loss adds to `softmax_part`.
    target_loss, target_part : ndarray
        Errors of the loss and of the gradient for one unit of relative error in the exponentials
        and in the gaps of a teacher's softmax; 0 for other targets.
    stats_part : ndarray
        Magnitude of what the gradients of lse and entropy add to an entry: ``softmax_c`` times
        ``|g_lse| + |g_entropy| * (lse - x_c + entropy)``, for the likeliest class of a row with
        the other classes' probability in the place of the second 1.
    gap : ndarray
        How far a transformed logit lies below the largest one among the non-pivot classes; 0 at
        the pivot and at logits of -inf.
    angle : ndarray
        ``2 * |logit_scale * logit| / logit_softcap``, 0 without a softcap: the slope of the
        transform is the exponential of it, and so its error grows with it.
    pivot : ndarray of bool
        Where the pivot is.
    spread : ndarray
        Mean of a row's gaps, weighted by their exponentials, with length 1 along the class axis:
        the relative error of the sum of the exponentials for one unit in every gap.
    lead : ndarray
        Distance between the pivot and the largest other class, shaped as `spread`; 0 where it is
        infinite.
    stats : ExactStats
        The rows' stats.
    """

    loss: Floats
    grad: Floats
    loss_dtype: np.dtype[Any]
    transform: str
    loss_scale: Floats
    square_part: Floats
    loss_spread: Floats
    loss_lead: Floats
    softmax_part: Floats
    pull_part: Floats
    coefficient_part: Floats
    target_loss: Floats
    target_part: Floats
    stats_part: Floats
    gap: Floats
    angle: Floats
    pivot: npt.NDArray[np.bool_]
    spread: Floats
    lead: Floats
    stats: ExactStats

    @property
    def grad_scale(self) -> Floats:
        """Return the magnitude for gradient errors: both parts together."""
        return self.softmax_part + self.coefficient_part


@lru_cache(maxsize=512)
def scaled_row(row_key: tuple[Any, ...], scale: Decimal) -> dict[str, Floats]:
    """Return a row's gradient and its magnitudes, times the scale, as float64."""
    row = row_answer(*row_key)
    with decimal.localcontext(context(2 * DIGITS)):
        found = {
            name: np.array([float(scale * value) for value in getattr(row, name)]) for name in PARTS
        }
    return found | {name: _magnitude(found[name]) for name in PARTS[1:]}


def _magnitude(values: Floats) -> Floats:
    # Magnitudes say how wrong a finite number may be; other numbers are compared exactly.
    return np.where(np.isfinite(values), np.abs(values), 0.0)


def exact_answer(
    logits: Array,
    target: Array,
    weight: Array | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    axis: int | None = None,
    sample_weight: Array | None = None,
    normalizer: Array | float | None = None,
    z_loss: float = 0.0,
    logit_scale: float | None = None,
    logit_softcap: float | None = None,
    grad_output: Array | float | None = None,
    grad_lse: Array | None = None,
    grad_entropy: Array | None = None,
    target_probability: Array | None = None,
    teacher_scale: float | None = None,
) -> Answer:
    """Return the exact result of ``cross_entropy_with_grad`` on NumPy arrays.

    Parameters
    ----------
    logits, target, weight : ndarray
        As in `polyce.cross_entropy`. A floating target holds probabilities.
    ignore_index, reduction, label_smoothing, axis, sample_weight, normalizer, z_loss, \
logit_scale, logit_softcap, grad_output
        As in `polyce.cross_entropy_with_grad`.
    grad_lse, grad_entropy : ndarray, optional
        Its `grad_stats`.
    target_probability : ndarray, optional
        The probabilities of a `SparseTarget`, whose index is `target`.
    teacher_scale : float, optional
        The scale of `TeacherLogits`, whose logits are `target`.

    Returns
    -------
    Answer
        Exact results, and the magnitudes against which rounding errors are measured.
    """
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction is one of none, sum and mean, got {reduction!r}")
    soft_array = target if target_probability is None else target_probability
    soft = is_float(soft_array)
    class_axis = (1 if logits.ndim > 1 else 0) if axis is None else axis % logits.ndim
    rows_last = np.moveaxis(logits, class_axis, -1)
    shape, classes = rows_last.shape[:-1], rows_last.shape[-1]
    count = math.prod(shape)

    def as_rows(array: Array) -> list[tuple[float, ...]]:
        return [tuple(row) for row in array.astype(np.float64).reshape(count, classes).tolist()]

    xs = as_rows(rows_last)
    targets: Sequence[Target]
    if target_probability is not None:
        targets = _sparse_rows(target, target_probability, class_axis, ignore_index)
    elif teacher_scale is not None:
        given = as_rows(np.moveaxis(target, class_axis, -1))
        targets = [TeacherRow(row, teacher_scale) for row in given]
    elif soft:
        targets = as_rows(np.moveaxis(target, class_axis, -1))
    else:
        targets = target.reshape(-1).tolist()
    weights = None if weight is None else tuple(weight.astype(np.float64).tolist())
    row_weights = np.ones(count) if sample_weight is None else sample_weight.astype(np.float64)
    v = [
        Decimal(value) if soft or label != ignore_index else ZERO
        for value, label in zip(row_weights.reshape(-1).tolist(), targets, strict=True)
    ]
    upstream = np.ones(()) if grad_output is None else np.asarray(grad_output)
    cotangents = np.broadcast_to(upstream.astype(np.float64), shape).reshape(-1).tolist()
    change = (logit_scale, logit_softcap)
    options = (weights, float(label_smoothing), float(z_loss), *change)
    keys = [(x, t, *options) for x, t in zip(xs, targets, strict=True)]

    with decimal.localcontext(context(2 * DIGITS)):
        divisor, condition = ONE, ONE
        if reduction == "mean":
            parts = [
                v_i * row_weight(t, weights, classes) if v_i else ZERO
                for v_i, t in zip(v, targets, strict=True)
            ]
            divisor = sum(parts, ZERO) if normalizer is None else Decimal(float(normalizer))
            if normalizer is None and divisor:
                # Weights of both signs cancel: their sum is less exact than any of them.
                condition = sum(map(abs, parts), ZERO) / abs(divisor)
        rows = [row_answer(*key) if v_i else NOTHING for key, v_i in zip(keys, v, strict=True)]
        losses = [v_i * row.loss for v_i, row in zip(v, rows, strict=True)]
        total = np.array(float(sum(losses, ZERO) / divisor))
        shares = [condition * abs(v_i / divisor) if v_i else ZERO for v_i in v]
        sizes = [share * row.loss_scale for share, row in zip(shares, rows, strict=True)]
        squares = [share * row.square_part for share, row in zip(shares, rows, strict=True)]
        offs = [share * row.target_loss for share, row in zip(shares, rows, strict=True)]
        scales = [Decimal(g) * v_i / divisor for g, v_i in zip(cotangents, v, strict=True)]

    loss_sizes, square_sizes, target_sizes = (
        _magnitude(np.array(list(map(float, values)))) for values in (sizes, squares, offs)
    )
    columns = _columns(keys, rows, scales, float(condition), classes)
    of_stats = {"lse": grad_lse, "entropy": grad_entropy}
    for name, cotangent in of_stats.items():
        if cotangent is not None and classes:
            _add_stats(columns, keys, rows, name, cotangent.astype(np.float64).reshape(-1))

    def reduced(values: Floats) -> Floats:
        return values.reshape(shape) if reduction == "none" else np.array(values.sum())

    def in_place(name: str) -> npt.NDArray[Any]:
        values = columns[name]
        width = values.shape[1] if values.ndim > 1 else 1
        return np.moveaxis(values.reshape(*shape, width), -1, class_axis)

    scaled = logit_scale not in (None, 1)
    floats = [logits, *([soft_array] if soft else []), *([] if weight is None else [weight])]
    return Answer(
        loss=np.array(list(map(float, losses))).reshape(shape) if reduction == "none" else total,
        loss_dtype=promote(a.dtype for a in floats if is_float(a)) if soft else logits.dtype,
        transform="softcap" if logit_softcap else "scale" if scaled else "none",
        loss_scale=reduced(loss_sizes),
        square_part=reduced(square_sizes),
        target_loss=reduced(target_sizes),
        loss_spread=reduced(loss_sizes * columns["spread"]),
        loss_lead=reduced(loss_sizes * columns["lead"]),
        **{name: in_place(name) for name in (*PER_CLASS, "spread", "lead")},
        stats=ExactStats(
            **{name: columns[name].reshape(shape) for name in STATS},
            valid=np.array([v_i != 0 for v_i in v], dtype=bool).reshape(shape),
        ),
    )


def _sparse_rows(
    index: Array, probability: Array, class_axis: int, ignore_index: int
) -> list[Target]:
    """Return the rows of a sparse target, without the entries that are ignored."""
    width = index.shape[class_axis]
    count = math.prod(index.shape[:class_axis] + index.shape[class_axis + 1 :])
    classes, probabilities = (
        np.moveaxis(array, class_axis, -1).reshape(count, width)
        for array in (index, probability.astype(np.float64))
    )
    rows: list[Target] = []
    for own, values in zip(classes.tolist(), probabilities.tolist(), strict=True):
        kept = [pair for pair in zip(own, values, strict=True) if pair[0] != ignore_index]
        rows.append(SparseRow(tuple(c for c, _ in kept), tuple(p for _, p in kept)))
    return rows


def _columns(
    keys: Sequence[tuple[Any, ...]],
    rows: Sequence[Row],
    scales: Sequence[Decimal],
    condition: float,
    classes: int,
) -> dict[str, npt.NDArray[Any]]:
    """Return the answer's arrays with an entry for every class, or for every row."""
    count = len(keys)
    found: dict[str, npt.NDArray[Any]] = {name: np.zeros((count, classes)) for name in PER_CLASS}
    found |= {name: np.zeros(count) for name in ("spread", "lead", *STATS)}
    for name in ("lse", "entropy", "top_probability", "brier"):
        found[name][:] = np.nan
    found["pivot"] = np.zeros((count, classes), dtype=bool)
    found["correct"] = np.zeros(count, dtype=bool)
    found["prediction"], found["rank"] = np.full(count, -1), np.full(count, -1)
    for i, (key, row, scale) in enumerate(zip(keys, rows, scales, strict=True)):
        if row is NOTHING or not classes:
            continue
        for name, value in scaled_row(key, scale).items():
            found[name][i] = value if name == "grad" else condition * value
        logits, target, *_, logit_scale, logit_softcap = key
        seen = measures(logits, row.pivot, logit_scale, logit_softcap)
        if seen is None:
            continue
        beside = target_stats(logits, target, logit_scale, logit_softcap)
        for name, value in (vars(seen) | ({} if beside is None else vars(beside))).items():
            found[name][i] = value
        found["pivot"][i, row.pivot] = row.pivot >= 0
        found["correct"][i] = seen.prediction == likeliest(target)
    return found


def _add_stats(
    columns: dict[str, npt.NDArray[Any]],
    keys: Sequence[tuple[Any, ...]],
    rows: Sequence[Row],
    name: str,
    cotangents: Floats,
) -> None:
    """Add the gradient of a stat to the answer's arrays."""
    for i, (key, row) in enumerate(zip(keys, rows, strict=True)):
        logits, *_, logit_scale, logit_softcap = key
        found = stats_gradients(logits, logit_scale, logit_softcap)
        # Without a softmax, or with a bad label, the loss's gradient is nan already.
        if row is not NOTHING and found is not None:
            columns["grad"][i] += cotangents[i] * getattr(found, name)
            part = found.lse if name == "lse" else found.entropy_part
            columns["stats_part"][i] += _magnitude(cotangents[i] * part)


def row_weight(target: Target, weight: tuple[float, ...] | None, classes: int) -> Decimal:
    """Return what a row adds to the denominator of the mean, for a sample weight of 1."""
    if not isinstance(target, int):
        # torch counts rows as the number of logits over C, so it finds none if C is 0.
        return ONE if classes else ZERO
    if weight is None or not 0 <= target < classes:
        return ONE
    return Decimal(weight[target])
