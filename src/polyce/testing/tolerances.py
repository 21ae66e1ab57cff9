"""How far an implementation may be from the exact answer: one table, and the comparison.

Losses and pivot entries of the gradient are sums of terms that do not cancel, so their errors are
limited to a few ulps. The other gradient entries are ``R * softmax_c - r_c``: the rounding of
``x_c - max`` alone costs them half an ulp for every unit of that gap, which the table allows for,
and the two parts may cancel, so errors are measured against the parts.

If the logits are transformed, every gap is rounded a few times more. A relative error of a gap is
an absolute error of its exponent, so its cost grows with the gap: `Transformed` says by how much.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .dtypes import FORMATS, Array, FloatFormat, Floats
from .oracle import Answer, ExactStats


@dataclass(frozen=True)
class Transformed:
    """What is allowed beyond `Accuracy` if the logits are transformed.

    Attributes
    ----------
    spread : float
        Ulps of loss, lse, entropy and pivot entry for every unit of the row's spread, its mean gap
        weighted by the exponentials.
    lead : float
        The same for every unit of the gap between the pivot and the largest other class.
    gap : float
        Unit roundoffs of a gradient entry's softmax part for every unit of its gap.
    slope, slope_angle : float
        Unit roundoffs of the slope that multiplies the gradient, and the same for every unit of
        its angle.
    value : float
        Ulps of a transformed logit, which lse starts from: lse has as many more, and its square in
        the z-loss twice as many.
    """

    spread: float = 0.0
    lead: float = 0.0
    gap: float = 0.0
    slope: float = 0.0
    slope_angle: float = 0.0
    value: float = 0.0


# The scale as a number of the arithmetic, and the product with the gap: half an ulp each, which
# is up to two of the result. In the gradient it is one more factor beside weight and cotangent.
_SCALED = Transformed(spread=2.0, gap=2.0, slope=3.0, value=1.0)
# A difference of two tanh is a tanh of the difference and a quotient; the slope is an exponential
# of the angle, which the scale, the product and the quotient by the cap have rounded.
_CAPPED = Transformed(spread=4.0, gap=6.0, slope=8.0, slope_angle=2.0, value=2.0)
# The pivot's gap is as inexact if there is no wider arithmetic for it.
_CAPPED_NARROW = replace(_CAPPED, lead=4.0)
# XLA's tanh is off by up to 4 ulps in float32 and 7 in float64.
_CAPPED_XLA = replace(_CAPPED, spread=8.0, lead=8.0, gap=16.0, value=8.0)


@dataclass(frozen=True)
class Accuracy:
    """The accuracy that is required of one result dtype.

    Attributes
    ----------
    arithmetic : str
        The dtype whose ulps and roundoffs are meant below. If the result is narrower, its one
        rounding at the end (half an ulp of the result dtype) is added.
    loss_ulp, pivot_ulp : float
        Ulps of the loss, and of the pivot's gradient entry.
    entry : float
        Unit roundoffs of a gradient entry, relative to its two parts.
    entry_gap : float
        Unit roundoffs of the entry's softmax part, for every unit of its gap.
    lse_ulp : float
        Ulps of lse, measured at the larger of the two numbers that it is the sum of.
    entropy_ulp : float
        Ulps of the entropy: three terms, each of them a product of two numbers as inexact as a
        loss is.
    top_ulp, brier_ulp : float
        Ulps of the largest probability, and of the Brier score. That of probabilities may be off
        by more: each difference by ``entry`` unit roundoffs of the probability and of itself.
    teacher : float
        Unit roundoffs of a teacher's probability for every unit of its gap: 0 where what rounding
        takes from the gap is multiplied back.
    flush : float
        Results may be off by this much whatever their size: the subnormal spacing, or the
        smallest normal number where a library computes without subnormal numbers.
    scaled, capped : Transformed
        What is allowed in addition with a logit_scale, and with a logit_softcap.
    """

    arithmetic: str
    loss_ulp: float = 8.0
    pivot_ulp: float = 8.0
    entry: float = 8.0
    entry_gap: float = 2.4
    lse_ulp: float = 8.0
    entropy_ulp: float = 12.0
    top_ulp: float = 8.0
    brier_ulp: float = 8.0
    teacher: float = 0.0
    flush: float = 0.0
    scaled: Transformed = _SCALED
    capped: Transformed = _CAPPED

    def transformed(self, answer: Answer) -> Transformed:
        """Return what is allowed for the transform of an answer's logits."""
        rules = {"none": Transformed(), "scale": self.scaled, "softcap": self.capped}
        return rules[answer.transform]


_SINGLE = Accuracy("float32", flush=8 * FORMATS["float32"].subnormal)
_DOUBLE = Accuracy("float64", flush=8 * FORMATS["float64"].subnormal, capped=_CAPPED_NARROW)
# XLA's CPU code treats subnormal numbers as 0.
_SINGLE_XLA = replace(_SINGLE, flush=8 * FORMATS["float32"].tiny, capped=_CAPPED_XLA)
_DOUBLE_XLA = replace(_DOUBLE, flush=8 * FORMATS["float64"].tiny, capped=_CAPPED_XLA)

# CuPy compiles all kernels so that they treat subnormal float32 numbers as 0.
_SINGLE_CUPY = replace(_SINGLE, flush=8 * FORMATS["float32"].tiny)

# mlx's exp is off by 0.75 unit roundoffs of float32 for each unit of its argument, and is 0 below
# the smallest normal number; that of float64 is off by twice as much, and a sum over a thousand
# classes by the errors of all of them.
_MLX = replace(
    _SINGLE_XLA,
    loss_ulp=72.0,
    pivot_ulp=72.0,
    entry=72.0,
    entropy_ulp=216.0,
    top_ulp=72.0,
    brier_ulp=144.0,
    teacher=2.0,
)
_MLX_DOUBLE = replace(
    _MLX,
    loss_ulp=144.0,
    pivot_ulp=144.0,
    entry=144.0,
    entropy_ulp=432.0,
    top_ulp=144.0,
    brier_ulp=288.0,
    flush=1024 * FORMATS["float32"].tiny,
)

ACCURACY: dict[tuple[str | None, str], Accuracy] = {
    (None, "float16"): _SINGLE,
    (None, "bfloat16"): _SINGLE,
    (None, "float32"): _SINGLE,
    (None, "float64"): _DOUBLE,
    ("jax", "float16"): _SINGLE_XLA,
    ("jax", "bfloat16"): _SINGLE_XLA,
    ("jax", "float32"): _SINGLE_XLA,
    ("jax", "float64"): _DOUBLE_XLA,
    ("cupy", "float16"): _SINGLE_CUPY,
    ("cupy", "bfloat16"): _SINGLE_CUPY,
    ("cupy", "float32"): _SINGLE_CUPY,
    ("mlx", "float16"): _MLX,
    ("mlx", "bfloat16"): _MLX,
    ("mlx", "float32"): _MLX,
    ("mlx", "float64"): _MLX_DOUBLE,
}
"""The accuracy required of a result dtype, by (backend or None for all others, dtype)."""


def accuracy(dtype: str, backend: str | None = None) -> Accuracy:
    """Return the table's entry for a result dtype, a backend's own if there is one.

    Parameters
    ----------
    dtype : str
        Name of the dtype of the result.
    backend : str, optional
        Name of the array library.
    """
    return ACCURACY.get((backend, dtype), ACCURACY[None, dtype])


def rounded(want: Floats, tolerance: Floats, dtype: str, rule: Accuracy) -> Floats:
    """Add the rounding to a result dtype that is narrower than the arithmetic."""
    if dtype != rule.arithmetic:
        tolerance = tolerance + FORMATS[dtype].spacing(np.abs(want) + tolerance) / 2
    return np.where(np.isfinite(want), tolerance, 0.0)


def loss_tolerance(answer: Answer, dtype: str, rule: Accuracy) -> Floats:
    """Return the largest error allowed in each loss.

    Parameters
    ----------
    answer : Answer
        The exact answer.
    dtype : str
        Name of the dtype of the loss.
    rule : Accuracy
        What is required, see `accuracy`.
    """
    arithmetic = FORMATS[rule.arithmetic]
    more = rule.transformed(answer)
    tolerance = rule.loss_ulp * arithmetic.spacing(answer.loss_scale) + rule.flush
    reach = more.spread * answer.loss_spread + more.lead * answer.loss_lead
    reach = reach + 2.0 * more.value * answer.square_part
    tolerance = tolerance + 2.0 * arithmetic.unit * reach
    tolerance = tolerance + rule.teacher * arithmetic.unit * answer.target_loss
    return rounded(answer.loss, tolerance, dtype, rule)


def grad_tolerance(answer: Answer, dtype: str, rule: Accuracy) -> Floats:
    """Return the largest error allowed in each entry of the gradient.

    Parameters
    ----------
    answer : Answer
        The exact answer.
    dtype : str
        Name of the dtype of the gradient.
    rule : Accuracy
        What is required, see `accuracy`.
    """
    arithmetic, more = FORMATS[rule.arithmetic], rule.transformed(answer)
    scale, part = answer.grad_scale, answer.softmax_part
    gap = np.where(part > 0, answer.gap, 0.0)
    at_pivot = rule.pivot_ulp * arithmetic.spacing(scale)
    elsewhere = arithmetic.unit * (rule.entry * scale + (rule.entry_gap + more.gap) * gap * part)
    reach = more.spread * answer.spread + more.lead * answer.lead
    slope = more.slope + more.slope_angle * answer.angle
    shared = 2.0 * (reach * np.where(answer.pivot, scale, part) + more.value * answer.pull_part)
    shared = arithmetic.unit * (shared + slope * scale)
    # An exponential below the smallest normal number may be treated as 0.
    vanishing = _exponential_underflows(gap, arithmetic) & ~answer.pivot
    tolerance = np.where(answer.pivot, at_pivot, elsewhere) + shared + rule.flush
    tolerance = tolerance + np.where(vanishing, part, 0.0)
    flat = _exponential_underflows(answer.angle, arithmetic)
    tolerance = tolerance + np.where(flat, scale + answer.stats_part, 0.0)
    tolerance = tolerance + _stats_gradient_tolerance(answer, rule)
    tolerance = tolerance + rule.teacher * arithmetic.unit * answer.target_part
    return rounded(answer.grad, tolerance, dtype, rule)


def _stats_gradient_tolerance(answer: Answer, rule: Accuracy) -> Floats:
    """Return what the gradients of lse and entropy add to the errors allowed in the gradient.

    An entry is as inexact as any, and the entropy in it as inexact as it is allowed to be.
    """
    arithmetic, more, part = FORMATS[rule.arithmetic], rule.transformed(answer), answer.stats_part
    # Gaps count from the largest class here, also that of a label.
    gap = np.where(part > 0, np.where(answer.pivot, answer.lead, answer.gap), 0.0)
    reach = 2.0 * (more.spread * answer.spread + more.lead * answer.lead)
    slope = more.slope + more.slope_angle * answer.angle
    units = rule.entry + rule.entropy_ulp + (rule.entry_gap + more.gap) * gap + reach + slope
    vanishing = np.where(_exponential_underflows(gap, arithmetic), part, 0.0)
    flushed = np.where(part > 0, -rule.flush * np.log(arithmetic.tiny), 0.0)
    return arithmetic.unit * units * part + vanishing + flushed


def stats_tolerances(answer: Answer, rule: Accuracy) -> dict[str, Floats]:
    """Return the largest errors allowed in the stats that are floats, by name.

    They are those of the dtype of the arithmetic.

    Parameters
    ----------
    answer : Answer
        The exact answer.
    rule : Accuracy
        What is required, see `accuracy`.
    """
    arithmetic, more, stats = FORMATS[rule.arithmetic], rule.transformed(answer), answer.stats
    spread, lead = (a.reshape(stats.lse.shape) for a in (answer.spread, answer.lead))
    shared = reach = 2.0 * arithmetic.unit * (more.spread * spread + more.lead * lead)
    ulps = rule.lse_ulp + more.value
    lse = ulps * arithmetic.spacing(stats.lse_scale) + reach * stats.lse_scale + rule.flush
    reach = more.spread * stats.entropy_spread + more.lead * stats.entropy_lead
    entropy = rule.entropy_ulp * arithmetic.spacing(stats.entropy)
    # An exponential treated as 0 loses a term that is larger by the factor of its exponent.
    entropy = entropy + 2.0 * arithmetic.unit * reach - rule.flush * np.log(arithmetic.tiny)
    top = rule.top_ulp * arithmetic.spacing(stats.top_probability) + shared * stats.top_probability
    found = {"lse": lse, "entropy": entropy, "top_probability": top}
    found["brier"] = _brier_tolerance(stats, rule, more, shared)
    return {
        name: np.where(np.isfinite(getattr(stats, name)), tolerance, 0.0)
        for name, tolerance in found.items()
    }


def _brier_tolerance(
    stats: ExactStats, rule: Accuracy, more: Transformed, shared: Floats
) -> Floats:
    """Return the largest error allowed in the Brier score; `shared` is that of all probabilities.

    The squares count where probabilities are met exactly.
    """
    arithmetic = FORMATS[rule.arithmetic]
    gap = rule.entry_gap + more.gap
    off = arithmetic.unit * (rule.entry * stats.brier_scale + gap * stats.brier_gap)
    off = 2.0 * (off + shared * stats.brier_reach)
    unit = arithmetic.unit * (rule.entry + gap) + shared
    own = rule.brier_ulp * arithmetic.spacing(stats.brier) + 2.0 * shared * stats.brier
    return own + off + unit * unit * stats.brier_square + rule.flush


def _exponential_underflows(gap: Floats, arithmetic: FloatFormat) -> Array:
    return np.asarray(gap > -np.log(arithmetic.tiny) - 1.0)


def compare(
    got: Array, want: Floats, tolerance: Floats, *, dtype: np.dtype[Any], what: str = "result"
) -> None:
    """Raise AssertionError unless an array is what it has to be.

    The dtype, the shape, nans and infinities must be exactly right; finite numbers may be off by
    the tolerance, and the sign of zero is free. A number too large for the dtype must be infinity.

    Parameters
    ----------
    got : ndarray
        What came out.
    want : ndarray of float64
        The exact answer.
    tolerance : ndarray of float64
        The largest error allowed in each entry.
    dtype : dtype
        The dtype that the result must have.
    what : str
        What the array is, for the message.

    Raises
    ------
    AssertionError
        With the worst entry in numbers.
    """
    if got.dtype != dtype:
        raise AssertionError(f"{what}: dtype {got.dtype}, expected {dtype}")
    if got.shape != want.shape:
        raise AssertionError(f"{what}: shape {got.shape}, expected {want.shape}")
    values = got.astype(np.float64)
    size = np.abs(want)
    form = FORMATS[np.dtype(dtype).name]
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(values - want)
        same = (values == want) | (np.isnan(values) & np.isnan(want))
        # Near the largest number, whether a result overflows depends on its last digits.
        overflow = np.isinf(values) & (np.sign(values) == np.sign(want))
        overflow &= np.isfinite(want) & form.overflows(size + tolerance)
        near = np.isfinite(values) & np.isfinite(want) & (error <= tolerance)
    wrong = ~(same | overflow | near)
    if not wrong.any():
        return
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        # nan and infinity in the wrong place count as worse than any number of ulps.
        excess = np.nan_to_num(error / tolerance, nan=np.inf, posinf=np.inf)
    index = np.unravel_index(int(np.argmax(np.where(wrong, excess, -1.0))), want.shape)
    place = f"[{', '.join(map(str, index))}]" if index else ""
    raise AssertionError(
        f"{what}{place}: got {values[index]:.17g}, expected {want[index]:.17g}, error "
        f"{error[index]:.3g} is {excess[index]:.3g} of the allowed {tolerance[index]:.3g} "
        f"({int(wrong.sum())} of {want.size} entries are wrong)"
    )
