"""What a target is in exact numbers: a coefficient for every class of one row."""

from __future__ import annotations

import decimal
from decimal import Decimal
from typing import NamedTuple

from .oracle_softmax import DIGITS, NAN, ONE, ZERO, context, softmax_of


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


def reach(target: Target, classes: int) -> list[Decimal]:
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
