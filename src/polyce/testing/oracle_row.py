"""The exact answer of one row, computed with the decimal arithmetic of Python's standard library.

For a row of transformed logits x with coefficients r, R their sum and lse the log of the sum of
exp::

    loss = R * lse - sum of r_c * x_c + l * lse**2
    dloss/dlogit_c = ((R + 2 * l * lse) * softmax_c - r_c) * slope_c

================================  =======================================
target                            r_c
================================  =======================================
index y                           w_y if c = y else 0
index y, label smoothing e        (1 - e) * w_y * [c = y] + (e / C) * w_c
probabilities p                   w_c * p_c
probabilities p, smoothing e      w_c * ((1 - e) * p_c + e / C)
================================  =======================================

A sparse target is probabilities of some classes, which add up where a class is named twice, and a
teacher's logits t with scale s are the probabilities softmax(s t).

l is the z-loss, times w_y for an index. x is logit_scale * logit, and with a softcap
cap * tanh(that / cap), of slope logit_scale * (1 - tanh**2); -inf stays -inf, with slope 0.

In floating point this textbook form loses every digit of a confident row. Here it is computed with
as many decimal digits as the row needs, so it shares neither formula nor arithmetic with what it
judges. Inputs are taken as exactly the numbers that their floats hold.
"""

from __future__ import annotations

import decimal
import math
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache

import numpy as np

from .dtypes import Floats
from .oracle_softmax import DIGITS, NAN, ONE, ZERO, context, softmax_of
from .oracle_target import SparseRow, Target, coefficients, reach


@dataclass(frozen=True)
class Measures:
    """A row's stats, and measures of its rounding errors; see `ExactStats` and `Answer`."""

    lse: float
    entropy: float
    top_probability: float
    prediction: int
    gap: Floats
    angle: Floats
    spread: float
    lead: float
    lse_scale: float
    entropy_spread: float
    entropy_lead: float


@dataclass(frozen=True)
class Row:
    """A row's unreduced answer: exact loss and gradient, magnitudes, pivot class (-1: nan row).

    `target_part` and `target_loss` are the errors of gradient and loss for one unit of relative
    error in the exponentials and gaps of a teacher's softmax.
    """

    loss: Decimal
    loss_scale: Decimal
    square_part: Decimal
    grad: tuple[Decimal, ...]
    softmax_part: tuple[Decimal, ...]
    pull_part: tuple[Decimal, ...]
    coefficient_part: tuple[Decimal, ...]
    pivot: int
    target_part: tuple[Decimal, ...] = ()
    target_loss: Decimal = ZERO


def without_noise(difference: Decimal, size: Decimal) -> Decimal:
    """Return a difference of numbers of some size, or 0 if it consists of rounding alone.

    Where logits tie, three times a third must be one: an exact 0 times an infinite scale is nan.
    """
    noise = size.scaleb(DIGITS // 6 - decimal.getcontext().prec)
    return ZERO if abs(difference) <= noise else difference


@lru_cache(maxsize=512)
def row_answer(
    logits: tuple[float, ...],
    target: Target,
    weight: tuple[float, ...] | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float | None = None,
    logit_softcap: float | None = None,
) -> Row:
    """Compute the exact answer of one row that counts, before its weight v_i."""
    classes = len(logits)
    named = target.classes if isinstance(target, SparseRow) else (target,)
    bad_label = any(isinstance(c, int) and not 0 <= c < classes for c in named)
    if classes == 0 and not bad_label:
        return Row(ZERO, ZERO, ZERO, (), (), (), (), -1)
    row = softmax_of(logits, logit_scale, logit_softcap)
    if bad_label or row is None:
        zeros = (ZERO,) * classes
        return Row(NAN, ZERO, ZERO, (NAN,) * classes, zeros, zeros, zeros, -1, zeros)

    pivot = target if isinstance(target, int) else max(range(classes), key=lambda c: logits[c])
    with decimal.localcontext(context(row.digits)):
        r = coefficients(target, classes, weight, label_smoothing)
        # Loss and softmax do not change when all logits are shifted.
        total_r = sum(r, ZERO)
        if total_r.is_infinite():
            # Multiplied as torch does: R times a log of 0 would be nan.
            loss = sum(
                (c * (row.log_sum - z) for c, z in zip(r, row.shifted, strict=True) if c), ZERO
            )
        else:
            loss = total_r * row.log_sum
            for coefficient, z in zip(r, row.shifted, strict=True):
                # A nan coefficient is not 0 and reaches the loss.
                if coefficient != 0:
                    loss -= coefficient * z
        plain, square_part, pull, pull_size = abs(loss), ZERO, ZERO, ZERO
        if z_loss:
            # lse may be a small sum of two large parts of opposite sign.
            zeta, size = Decimal(z_loss), abs(row.top) + row.log_sum
            if isinstance(target, int) and weight is not None:
                zeta *= Decimal(weight[target])
            loss += zeta * row.lse**2
            square_part = abs(zeta) * size**2
            pull, pull_size = 2 * zeta * row.lse, 2 * abs(zeta) * size
        grad = [
            without_noise((total_r + pull) * s - coefficient, abs(coefficient))
            for s, coefficient in zip(row.softmax, r, strict=True)
        ]
        coefficient_part = [abs(coefficient) for coefficient in r]
        magnitude = sum(coefficient_part, ZERO)
        pull_part = [pull_size * s for s in row.softmax]
        softmax_part = [magnitude * s + z for s, z in zip(row.softmax, pull_part, strict=True)]
        off = [
            c * reach if c else ZERO
            for c, reach in zip(coefficient_part, reach(target, classes), strict=True)
        ]
        shared = sum(off, ZERO)
        target_part = [own + shared * s for own, s in zip(off, row.softmax, strict=True)]
        rest = sum(row.exps[:pivot] + row.exps[pivot + 1 :], ZERO)
        other_softmax = magnitude * rest / (rest + row.exps[pivot]) + pull_part[pivot]
        other_r = sum(coefficient_part[:pivot] + coefficient_part[pivot + 1 :], ZERO)
        # The likeliest class uses the form with the smaller terms, a label always this one.
        if isinstance(target, int) or not (
            softmax_part[pivot] + coefficient_part[pivot] < other_softmax + other_r
        ):
            softmax_part[pivot], coefficient_part[pivot] = other_softmax, other_r
            target_part[pivot] = shared - off[pivot] + shared * (ONE - row.softmax[pivot])
        target_loss = sum(
            (c * (row.log_sum - z) for c, z in zip(off, row.shifted, strict=True) if c), ZERO
        )
        if logit_scale is not None or logit_softcap is not None:
            grad, softmax_part, pull_part, coefficient_part, target_part = (
                [slope * value for slope, value in zip(row.slopes, values, strict=True)]
                for values in (grad, softmax_part, pull_part, coefficient_part, target_part)
            )
    return Row(
        loss, plain + square_part, square_part, tuple(grad), tuple(softmax_part),
        tuple(pull_part), tuple(coefficient_part), pivot, tuple(target_part), target_loss,
    )  # fmt: skip


@lru_cache(maxsize=512)
def measures(
    logits: tuple[float, ...],
    pivot: int,
    logit_scale: float | None = None,
    logit_softcap: float | None = None,
) -> Measures | None:
    """Compute a row's stats and measures relative to a pivot; for -1 the worst of all classes."""
    row = softmax_of(logits, logit_scale, logit_softcap)
    if row is None:
        return None
    z, p = (np.array([float(value) for value in values]) for values in (row.shifted, row.softmax))
    entropy, finite, rest = float(row.entropy), np.isfinite(z), np.arange(z.size) != pivot
    top: float = z[rest].max(initial=-math.inf)
    gap = np.where(rest & finite, top - np.where(finite, z, 0.0), 0.0)
    decay = np.where(rest & finite, np.exp(-gap), 0.0)
    # The effect of one unit of relative error in every gap on the sum, and on the entropy.
    spread = float((gap * decay).sum() / decay.sum()) if decay.any() else 0.0
    lacking = np.where(finite, float(row.log_sum) - z, 0.0)
    reach = p * np.abs(lacking - entropy)
    if pivot < 0:
        lead, at_pivot = float(gap.max()), float(reach.max())
    else:
        lead, at_pivot = abs(float(z[pivot]) - top), float(reach[pivot])
        lead = lead if math.isfinite(lead) else 0.0
    return Measures(
        lse=float(row.lse),
        entropy=entropy,
        top_probability=float(max(row.softmax)),
        prediction=max(range(len(logits)), key=lambda c: logits[c]),
        gap=gap,
        angle=np.array(row.angles),
        spread=spread,
        lead=lead,
        lse_scale=float(max(abs(row.top), row.log_sum)),
        entropy_spread=float((reach * gap).sum()),
        entropy_lead=lead * at_pivot,
    )
