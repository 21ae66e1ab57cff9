"""The exact softmax of one row, by decimal arithmetic with as many digits as it needs."""

from __future__ import annotations

import decimal
import math
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache

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


def context(digits: int) -> decimal.Context:
    """Return decimal arithmetic that treats inf and nan as IEEE arithmetic does."""
    return decimal.Context(
        prec=digits, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN, rounding=decimal.ROUND_HALF_EVEN,
        traps=[],
    )  # fmt: skip


def exp(exponent: Decimal) -> Decimal:
    """Compute the exponential of a number that is at most 0."""
    return exponent.exp() if exponent > NEGLIGIBLE else ZERO


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
