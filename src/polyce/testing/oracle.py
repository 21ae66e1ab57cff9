"""Exact answers, computed with the decimal arithmetic of Python's standard library.

For one row of logits x with coefficients r, R their sum and lse the log of the sum of exp::

    loss = R * lse - sum of r_c * x_c        dloss/dx_c = R * softmax_c - r_c

================================  =======================================
target                            r_c
================================  =======================================
index y                           w_y if c = y else 0
index y, label smoothing e        (1 - e) * w_y * [c = y] + (e / C) * w_c
probabilities p                   w_c * p_c
probabilities p, smoothing e      w_c * ((1 - e) * p_c + e / C)
================================  =======================================

This textbook form loses every digit of a confident row in floating point. Here it is taken with
as many decimal digits as the row needs, so it shares neither formula nor arithmetic with what it
judges. Inputs count as exactly the numbers that their floats hold.

What arithmetic on infinities would decide differently is decided by rule:

- an ignored row has loss 0 and gradient 0, whatever its logits are;
- a label outside 0 .. C-1 makes its row nan; the row counts with weight 1 in the denominator;
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

Target = int | tuple[float, ...]
"""A row's target: a class, or one number for each class."""

DIGITS = 60
"""Digits of every exponential, and of everything else beyond what cancellation takes."""
NEGLIGIBLE = -2000.0
"""exp of less than this is 0: it is far below the smallest float64 and any rounding here."""
ZERO, ONE, NAN = Decimal(0), Decimal(1), Decimal("nan")


@dataclass(frozen=True)
class Answer:
    """The exact loss and gradient of one call, and the magnitudes that errors are measured by.

    Attributes
    ----------
    loss : ndarray
        The loss (row losses for reduction none), rounded once to float64.
    grad : ndarray
        The gradient with respect to the logits, in their shape, rounded once to float64.
    loss_dtype : dtype
        The dtype in which an implementation has to return the loss.
    softmax_part, coefficient_part : ndarray
        Magnitudes of the two parts that a gradient entry is made of: ``R * softmax_c`` and
        ``|r_c|``, at the pivot ``R * (1 - softmax_k)`` and the sum of the other ``|r_c|``, all
        times the row's scale. The pivot k is the label, for probabilities the class of the
        largest logit. 0 in rows that are not finite.
    gap : ndarray
        How far a logit lies below the largest one among the non-pivot classes; 0 at the pivot
        and at logits of -inf.
    pivot : ndarray of bool
        Where the pivot is.
    """

    loss: Floats
    grad: Floats
    loss_dtype: np.dtype[Any]
    softmax_part: Floats
    coefficient_part: Floats
    gap: Floats
    pivot: npt.NDArray[np.bool_]

    @property
    def loss_scale(self) -> Floats:
        """Magnitude for loss errors: the loss itself, as a sum of non-negative terms."""
        return np.abs(self.loss)

    @property
    def grad_scale(self) -> Floats:
        """Magnitude for gradient errors: both parts together."""
        return self.softmax_part + self.coefficient_part


@dataclass(frozen=True)
class Row:
    """A row's unreduced answer: exact loss and gradient, magnitudes, pivot class (-1: nan row)."""

    loss: Decimal
    grad: tuple[Decimal, ...]
    softmax_part: tuple[Decimal, ...]
    coefficient_part: tuple[Decimal, ...]
    gap: tuple[float, ...]
    pivot: int


def context(digits: int) -> decimal.Context:
    """Return decimal arithmetic that treats inf and nan as IEEE arithmetic does."""
    return decimal.Context(
        prec=digits, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN, rounding=decimal.ROUND_HALF_EVEN,
        traps=[],
    )  # fmt: skip


def without_noise(difference: Decimal, size: Decimal) -> Decimal:
    """Return a difference of numbers of some size, 0 if only rounding is left of it.

    Where logits tie, a third times three is to be one: an exact 0 times an infinite scale is nan.
    """
    noise = size.scaleb(DIGITS // 6 - decimal.getcontext().prec)
    return ZERO if abs(difference) <= noise else difference


def coefficients(
    target: Target, classes: int, weight: tuple[float, ...] | None, label_smoothing: float
) -> list[Decimal]:
    """Return r_c of every class, in the current decimal context."""
    weights = [ONE] * classes if weight is None else [Decimal(value) for value in weight]
    smoothing = Decimal(label_smoothing)
    uniform = smoothing / classes if classes else ZERO
    if isinstance(target, tuple):
        probabilities = [Decimal(value) for value in target]
        if label_smoothing == 0:
            return [w * p for w, p in zip(weights, probabilities, strict=True)]
        return [
            w * ((1 - smoothing) * p + uniform) for w, p in zip(weights, probabilities, strict=True)
        ]
    # Without smoothing the other classes' weights are not looked at: a nan there is harmless.
    r = [ZERO] * classes if label_smoothing == 0 else [uniform * w for w in weights]
    r[target] += (1 - smoothing) * weights[target]
    return r


@lru_cache(maxsize=512)
def exponentials(x: tuple[float, ...]) -> tuple[int, tuple[Decimal, ...], tuple[Decimal, ...]]:
    """Return the digits a finite row needs, x - max(x), and the exponentials of that.

    1 + exp(-gap) has to be told from 1, so the largest gap at the top costs gap / ln 10 digits.
    An exponential itself does well with fewer: it is only ever added to larger ones.
    """
    top = max(x)
    below = sorted(x)[-2] if len(x) > 1 else top
    gap = min(top - below, -NEGLIGIBLE) if math.isfinite(below) else 0.0
    digits = DIGITS + math.ceil(gap / math.log(10))
    known: dict[float, Decimal] = {-math.inf: ZERO}
    with decimal.localcontext(context(2 * DIGITS)):
        shifted = [Decimal(value) - Decimal(top) for value in x]
    with decimal.localcontext(context(DIGITS)):
        for value, z in zip(x, shifted, strict=True):
            if value not in known:
                known[value] = z.exp() if z > NEGLIGIBLE else ZERO
    return digits, tuple(shifted), tuple(known[value] for value in x)


@lru_cache(maxsize=512)
def row_answer(
    x: tuple[float, ...], target: Target, weight: tuple[float, ...] | None, label_smoothing: float
) -> Row:
    """Return the exact answer of one row that is not ignored."""
    classes = len(x)
    bad_label = isinstance(target, int) and not 0 <= target < classes
    undefined = any(math.isnan(v) or v == math.inf for v in x) or not any(map(math.isfinite, x))
    if classes == 0 and not bad_label:
        return Row(ZERO, (), (), (), (), -1)
    if bad_label or undefined:
        zeros = (ZERO,) * classes
        return Row(NAN, (NAN,) * classes, zeros, zeros, (0.0,) * classes, -1)

    digits, shifted, exps = exponentials(x)
    with decimal.localcontext(context(digits)):
        r = coefficients(target, classes, weight, label_smoothing)
        # Both sums in the loss and every softmax are unchanged when all logits are shifted.
        total_r, total_exp = sum(r, ZERO), sum(exps, ZERO)
        log_sum = total_exp.ln()
        loss = total_r * log_sum
        for coefficient, z in zip(r, shifted, strict=True):
            # nan coefficients are not 0 and reach the loss.
            if coefficient != 0:
                loss -= coefficient * z
        softmax = [e / total_exp for e in exps]
        grad = [
            without_noise(total_r * s - coefficient, abs(coefficient))
            for s, coefficient in zip(softmax, r, strict=True)
        ]

        pivot = target if isinstance(target, int) else max(range(classes), key=lambda c: x[c])
        others = max((v for c, v in enumerate(x) if c != pivot), default=-math.inf)
        magnitude = sum((abs(coefficient) for coefficient in r), ZERO)
        softmax_part = [magnitude * s for s in softmax]
        coefficient_part = [abs(coefficient) for coefficient in r]
        softmax_part[pivot] = magnitude * sum(exps[:pivot] + exps[pivot + 1 :], ZERO) / total_exp
        coefficient_part[pivot] = sum(
            coefficient_part[:pivot] + coefficient_part[pivot + 1 :], ZERO
        )
    gap = [others - v if math.isfinite(v) else 0.0 for v in x]
    gap[pivot] = 0.0
    return Row(
        loss, tuple(grad), tuple(softmax_part), tuple(coefficient_part), tuple(gap), pivot
    )  # fmt: skip


@lru_cache(maxsize=512)
def scaled_row(row_key: tuple[Any, ...], scale: Decimal) -> tuple[Floats, Floats, Floats]:
    """Return a row's gradient and its two magnitudes, times the scale, as float64."""
    row = row_answer(*row_key)
    with decimal.localcontext(context(2 * DIGITS)):
        grad, softmax_part, coefficient_part = (
            np.array([float(scale * value) for value in values])
            for values in (row.grad, row.softmax_part, row.coefficient_part)
        )
    # Magnitudes say how wrong a finite number may be; there is nothing to measure at others.
    return (
        grad,
        np.where(np.isfinite(softmax_part), np.abs(softmax_part), 0.0),
        np.where(np.isfinite(coefficient_part), np.abs(coefficient_part), 0.0),
    )


def exact_answer(
    logits: Array,
    target: Array,
    weight: Array | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    axis: int | None = None,
    grad_output: Array | float | None = None,
) -> Answer:
    """Return the exact result of ``cross_entropy_with_grad`` on NumPy arrays.

    Parameters
    ----------
    logits, target, weight : ndarray
        As in `polyce.cross_entropy`. A floating target holds probabilities.
    ignore_index, reduction, label_smoothing, axis, grad_output
        As in `polyce.cross_entropy_with_grad`.

    Returns
    -------
    Answer
        Exact results, and the magnitudes that rounding errors are measured by.
    """
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction is one of none, sum and mean, got {reduction!r}")
    soft = is_float(target)
    class_axis = (1 if logits.ndim > 1 else 0) if axis is None else axis % logits.ndim
    rows_last = np.moveaxis(logits, class_axis, -1)
    shape, classes = rows_last.shape[:-1], rows_last.shape[-1]
    count = math.prod(shape)

    def as_rows(array: Array) -> list[tuple[float, ...]]:
        return [tuple(row) for row in array.astype(np.float64).reshape(count, classes).tolist()]

    xs = as_rows(rows_last)
    targets: Sequence[Target]
    targets = as_rows(np.moveaxis(target, class_axis, -1)) if soft else target.reshape(-1).tolist()
    weights = None if weight is None else tuple(weight.astype(np.float64).tolist())
    kept = [soft or label != ignore_index for label in targets]
    keys = [(x, t, weights, float(label_smoothing)) for x, t in zip(xs, targets, strict=True)]
    upstream = np.ones(()) if grad_output is None else np.asarray(grad_output)
    cotangents = np.broadcast_to(upstream.astype(np.float64), shape).reshape(-1).tolist()

    with decimal.localcontext(context(2 * DIGITS)):
        losses = [
            row_answer(*key).loss if keep else ZERO for key, keep in zip(keys, kept, strict=True)
        ]
        divisor = ONE
        if reduction == "mean":
            counted = (t for t, keep in zip(targets, kept, strict=True) if keep)
            divisor = sum((row_weight(t, weights, classes) for t in counted), ZERO)
        scales = [Decimal(g) / divisor for g in cotangents]
        if reduction == "none":
            loss = np.array([float(value) for value in losses]).reshape(shape)
        else:
            loss = np.array(float(sum(losses, ZERO) / divisor))

    grad, softmax_part, coefficient_part, gap = (np.zeros((count, classes)) for _ in range(4))
    pivot = np.zeros((count, classes), dtype=bool)
    for i, (key, keep, scale) in enumerate(zip(keys, kept, scales, strict=True)):
        if keep and classes:
            row = row_answer(*key)
            grad[i], softmax_part[i], coefficient_part[i] = scaled_row(key, scale)
            gap[i] = row.gap
            if row.pivot >= 0:
                pivot[i, row.pivot] = True

    def in_place(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.moveaxis(rows.reshape(*shape, classes), -1, class_axis)

    floats = [logits, *([target] if soft else []), *([] if weight is None else [weight])]
    return Answer(
        loss,
        in_place(grad),
        promote(a.dtype for a in floats if is_float(a)) if soft else logits.dtype,
        in_place(softmax_part),
        in_place(coefficient_part),
        in_place(gap),
        in_place(pivot),
    )


def row_weight(target: Target, weight: tuple[float, ...] | None, classes: int) -> Decimal:
    """Return what a kept row adds to the denominator of the mean."""
    if isinstance(target, tuple):
        # torch divides by the number of logits over C, and there are no rows when C is 0.
        return ONE if classes else ZERO
    if weight is None or not 0 <= target < classes:
        return ONE
    return Decimal(weight[target])
