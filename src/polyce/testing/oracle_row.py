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
from typing import NamedTuple

import numpy as np

from .dtypes import Floats


class SparseRow(NamedTuple):
    """Classes of a row that are not ignored, and the probability of each."""

    classes: tuple[int, ...]
    probabilities: tuple[float, ...]


class TeacherRow(NamedTuple):
    """A teacher's logits for a row, and what multiplies them."""

    logits: tuple[float, ...]
    scale: float


Target = int | tuple[float, ...] | SparseRow | TeacherRow
"""A row's target: a class, one number for each class, or what stands for such numbers."""

DIGITS = 60
"""Digits of every exponential, and of everything else after cancellation."""
NEGLIGIBLE = -2000.0
"""exp of less is taken as 0: it is far below the smallest float64 and any rounding here."""
ZERO, ONE, NAN = Decimal(0), Decimal(1), Decimal("nan")


@dataclass(frozen=True)
class Softmax:
    """The softmax of a row of logits, whatever its target.

    Attributes
    ----------
    digits : int
        The decimal digits that the row needs.
    top : Decimal
        The largest transformed logit.
    shifted : tuple of Decimal
        The transformed logits minus `top`.
    exps, softmax : tuple of Decimal
        exp of `shifted`, and that over its sum.
    log_sum, lse, entropy : Decimal
        The log of the sum of `exps`, `top` more than that, and the entropy of `softmax` in nats.
    slopes : tuple of Decimal
        Derivatives of the transformed logits with respect to the logits.
    angles : tuple of float
        ``2 * |logit_scale * logit| / cap``, whose negative exponential the slope is made of; 0
        without a softcap and at -inf.
    """

    digits: int
    top: Decimal
    shifted: tuple[Decimal, ...]
    exps: tuple[Decimal, ...]
    softmax: tuple[Decimal, ...]
    log_sum: Decimal
    lse: Decimal
    entropy: Decimal
    slopes: tuple[Decimal, ...]
    angles: tuple[float, ...]


@dataclass(frozen=True)
class Measures:
    """A row's stats, and measures of its rounding errors; see `ExactStats` and `Answer`."""

    lse: float
    entropy: float
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


def context(digits: int) -> decimal.Context:
    """Return decimal arithmetic that treats inf and nan as IEEE arithmetic does."""
    return decimal.Context(
        prec=digits, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN, rounding=decimal.ROUND_HALF_EVEN,
        traps=[],
    )  # fmt: skip


def exp(exponent: Decimal) -> Decimal:
    """Compute the exponential of a number that is at most 0."""
    return exponent.exp() if exponent > NEGLIGIBLE else ZERO


def without_noise(difference: Decimal, size: Decimal) -> Decimal:
    """Return a difference of numbers of some size, or 0 if it consists of rounding alone.

    Where logits tie, three times a third must be one: an exact 0 times an infinite scale is nan.
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
    if not isinstance(target, int):
        probabilities = target_probabilities(target, classes)
        if label_smoothing == 0:
            return [w * p for w, p in zip(weights, probabilities, strict=True)]
        return [
            w * ((1 - smoothing) * p + uniform) for w, p in zip(weights, probabilities, strict=True)
        ]
    # Without smoothing the other classes' weights are not used: a nan there is harmless.
    r = [ZERO] * classes if label_smoothing == 0 else [uniform * w for w in weights]
    if label_smoothing != 1:
        # Nothing times an infinite weight is nothing.
        r[target] += (1 - smoothing) * weights[target]
    return r


def target_probabilities(
    target: tuple[float, ...] | SparseRow | TeacherRow, classes: int
) -> list[Decimal]:
    """Return the probability of every class, in the current decimal context."""
    if isinstance(target, SparseRow):
        found = [ZERO] * classes
        for at, probability in zip(*target, strict=True):
            found[at] += Decimal(probability)
        return found
    if isinstance(target, TeacherRow):
        teacher = softmax_of(target.logits, target.scale, None)
        return [NAN] * classes if teacher is None else list(teacher.softmax)
    return [Decimal(value) for value in target]


def likeliest(target: Target) -> int:
    """Return a target's class, or the first of its likeliest.

    -1 for a sparse target without a probability above 0, and for a teacher without a softmax.
    """
    if isinstance(target, int):
        return target
    if isinstance(target, SparseRow):
        with decimal.localcontext(context(DIGITS)):
            found = target_probabilities(target, max(target.classes, default=-1) + 1)
        best = max((p for p in found if not p.is_nan()), default=ZERO)
        return found.index(best) if best > 0 else -1
    if isinstance(target, TeacherRow):
        if softmax_of(target.logits, target.scale, None) is None:
            return -1
        target = target.logits
    return target.index(max(target))


def _reach(target: Target, classes: int) -> list[Decimal]:
    """Return how many units each probability of a teacher may be off, relatively.

    One for every unit of its gap, and what the sum of the exponentials is off; two beside.
    """
    teacher = None
    if isinstance(target, TeacherRow):
        teacher = softmax_of(target.logits, target.scale, None)
    if teacher is None:
        return [ZERO] * classes
    gaps = [-z if p else ZERO for z, p in zip(teacher.shifted, teacher.softmax, strict=True)]
    spread = sum((p * gap for p, gap in zip(teacher.softmax, gaps, strict=True)), ZERO)
    return [2 + gap + spread for gap in gaps]


def transform(
    logit: float, scale: Decimal, cap: Decimal | None
) -> tuple[Decimal, Decimal, Decimal]:
    """Return the transformed logit, its slope and its angle, in the current decimal context.

    Only the absolute error of a rounding matters: exp turns it into a relative one.
    """
    scaled = scale * Decimal(logit)
    if cap is None:
        return scaled, scale, ZERO
    if not scaled.is_finite():
        return scaled, ZERO, ZERO
    angle = 2 * abs(scaled) / cap
    decay = exp(-angle)
    tanh = (1 - decay) / (1 + decay)
    return cap * tanh.copy_sign(scaled), scale * 4 * decay / (1 + decay) ** 2, angle


@lru_cache(maxsize=512)
def softmax_of(
    logits: tuple[float, ...], logit_scale: float | None, logit_softcap: float | None
) -> Softmax | None:
    """Compute the softmax of a row; None if it holds nan, +inf or nothing but -inf.

    1 + exp(-gap) must differ from 1, so the gap below the largest logit costs gap / ln 10 digits.
    An exponential itself needs fewer digits: it is only added to larger ones.
    """
    if any(math.isnan(v) or v == math.inf for v in logits) or not any(map(math.isfinite, logits)):
        return None
    with decimal.localcontext(context(2 * DIGITS)):
        scale = ONE if logit_scale is None else Decimal(logit_scale)
        cap = None if logit_softcap is None else Decimal(logit_softcap)
        known = {value: transform(value, scale, cap) for value in set(logits)}
        x = [known[value][0] for value in logits]
        top = max(x)
        shifted = [value - top for value in x]
    with decimal.localcontext(context(DIGITS)):
        exponential = {z: exp(z) for z in set(shifted)}
    below = sorted(shifted)[-2] if len(x) > 1 else ZERO
    gap = min(-float(below), -NEGLIGIBLE) if below.is_finite() else 0.0
    digits = DIGITS + math.ceil(gap / math.log(10))
    exps = tuple(exponential[z] for z in shifted)
    with decimal.localcontext(context(digits)):
        total = sum(exps, ZERO)
        log_sum = total.ln()
        lse = top + log_sum
        softmax = tuple(e / total for e in exps)
    with decimal.localcontext(context(DIGITS)):
        terms = (p * (log_sum - z) for p, z in zip(softmax, shifted, strict=True) if p)
        entropy = sum(terms, ZERO)
    return Softmax(
        digits, top, tuple(shifted), exps, softmax, log_sum, lse, entropy,
        tuple(known[value][1] for value in logits), tuple(float(known[v][2]) for v in logits),
    )  # fmt: skip


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
            for c, reach in zip(coefficient_part, _reach(target, classes), strict=True)
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


@dataclass(frozen=True)
class StatsGradients:
    """The gradients of a row's lse and entropy, and how large the terms of the second are."""

    lse: Floats
    entropy: Floats
    entropy_part: Floats


@lru_cache(maxsize=512)
def stats_gradients(
    logits: tuple[float, ...], logit_scale: float | None, logit_softcap: float | None
) -> StatsGradients | None:
    """Compute dlse/dlogit and dH/dlogit = softmax (lse - x - H), times the slope; None for nan.

    Where a class has nearly all of the probability, its entry is measured by what the others are.
    """
    row = softmax_of(logits, logit_scale, logit_softcap)
    if row is None:
        return None
    likeliest = max(range(len(logits)), key=lambda c: logits[c])
    lse, entropy, parts = [], [], []
    with decimal.localcontext(context(row.digits)):
        lacking = [
            row.log_sum - z if p else ZERO for z, p in zip(row.shifted, row.softmax, strict=True)
        ]
        terms = [p * gap for p, gap in zip(row.softmax, lacking, strict=True)]
        others = sum(terms[:likeliest] + terms[likeliest + 1 :], ZERO)
        rest = sum(row.softmax[:likeliest] + row.softmax[likeliest + 1 :], ZERO)
        for c, (p, gap, slope) in enumerate(zip(row.softmax, lacking, row.slopes, strict=True)):
            lse.append(float(slope * p))
            if c == likeliest:
                entropy.append(float(slope * p * (gap * rest - others)))
                parts.append(float(slope * p * (gap * rest + others)))
            else:
                entropy.append(float(slope * p * (gap - others - terms[likeliest])))
                parts.append(float(slope * p * (gap + others + terms[likeliest])))
    return StatsGradients(*map(np.array, (lse, entropy, parts)))


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
        prediction=max(range(len(logits)), key=lambda c: logits[c]),
        gap=gap,
        angle=np.array(row.angles),
        spread=spread,
        lead=lead,
        lse_scale=float(max(abs(row.top), row.log_sum)),
        entropy_spread=float((reach * gap).sum()),
        entropy_lead=lead * at_pivot,
    )
