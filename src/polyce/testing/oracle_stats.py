"""The exact stats of one row that depend on its target, and the gradients of its stats."""

from __future__ import annotations

import decimal
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .dtypes import Floats
from .oracle_softmax import DIGITS, ONE, ZERO, context, softmax_of
from .oracle_target import SparseRow, Target, TeacherRow, target_probabilities


@dataclass(frozen=True)
class TargetStats:
    """A row's stats beside its target; the last four are 0 for a label, see `ExactStats`."""

    brier: float
    rank: int
    brier_scale: float = 0.0
    brier_gap: float = 0.0
    brier_reach: float = 0.0
    brier_square: float = 0.0


@lru_cache(maxsize=512)
def target_stats(
    logits: tuple[float, ...],
    target: Target,
    logit_scale: float | None,
    logit_softcap: float | None,
) -> TargetStats | None:
    """Compare a row with its label or probabilities.

    None for other targets, without a softmax, and for a bad label.
    """
    row = softmax_of(logits, logit_scale, logit_softcap)
    classes = len(logits)
    if row is None or isinstance(target, SparseRow | TeacherRow):
        return None
    if isinstance(target, int) and not 0 <= target < classes:
        return None
    with decimal.localcontext(context(DIGITS)):
        if isinstance(target, int):
            wanted = [ONE if c == target else ZERO for c in range(classes)]
        else:
            wanted = target_probabilities(target, classes)
        gaps = [p - t for p, t in zip(row.softmax, wanted, strict=True)]
        brier = float(sum((gap * gap for gap in gaps), ZERO))
    if isinstance(target, int):
        return TargetStats(brier, sum(logit > logits[target] for logit in logits))
    likeliest = max(range(classes), key=lambda c: logits[c])
    off, p, z = (
        np.array([float(value) for value in values]) for values in (gaps, row.softmax, row.shifted)
    )
    off = np.where(np.isfinite(off), np.abs(off), 0.0)
    others = np.arange(classes) != likeliest
    reached = others & (p > 0.0)
    below = np.zeros(classes)
    if reached.any():
        below[reached] = z[reached].max() - z[reached]
    # The likeliest class is computed as what is left of 1 if that is less.
    size = np.where(others, p, np.minimum(p, p[others].sum()))
    return TargetStats(
        brier,
        rank=-1,
        brier_scale=float((off * (size + off)).sum()),
        brier_gap=float((off * size * below).sum()),
        brier_reach=float((off * size).sum()),
        brier_square=float(((size * (1.0 + below)) ** 2).sum()),
    )


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
