"""What happens to the logits before the softmax: logit_scale and logit_softcap.

    x = s·logits, then, with a softcap, cap·tanh(x / cap);  -inf stays -inf

Softmax and loss need only differences of the x. Taken after the transform they would lose digits to
a large common offset, and where tanh is flat. So the logits are kept as they came, and the
difference of two transformed ones is computed from them, in a form in which nothing cancels. With
u = s·logit/cap and p = exp(-2|u|):

    tanh(u) - tanh(v) = tanh(u - v) (1 - tanh(u) tanh(v))
    1 - tanh(u) tanh(v) = 2 (p + q, or 1 + p q where the signs differ) / ((1 + p) (1 + q))
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from polyce.arrays import dtypes
from polyce.call.problem import Problem


def scale_of(problem: Problem) -> Any:
    """Return s, 1 where the logits are not scaled."""
    scale = problem.options.logit_scale
    return 1.0 if scale is None else scale


def is_capped(problem: Problem) -> bool:
    """Tell whether there is a softcap; without one, x and its derivative are linear."""
    return problem.options.logit_softcap is not None


def scale_and_cap(problem: Problem) -> tuple[float, float]:
    """Return a and b such that x is b·tanh(a·logits) with a softcap, and a·logits without."""
    scale, cap = scale_of(problem), problem.options.logit_softcap
    return (scale, 1.0) if cap is None else (scale / cap, cap)


def difference(problem: Problem, logits: Any, reference: Any, *, owned: bool = False) -> Any:
    """Compute x(logits) - x(reference); the logits may be overwritten if they are `owned`."""
    xp, library, cap = problem.xp, problem.library, problem.options.logit_softcap
    if cap is None:
        gap = _subtract(problem, logits, reference, owned)
        if problem.options.logit_scale is None:
            return gap
        return library.overwrite(xp.multiply, gap, problem.options.logit_scale)
    p, q = _decay(problem, logits), _decay(problem, reference)
    share = xp.where((logits < 0.0) == (reference < 0.0), p + q, 1.0 + p * q)
    share = share * (2.0 * cap) / ((1.0 + p) * (1.0 + q))
    masked = (logits == -math.inf) | (reference == -math.inf)
    gap = _subtract(problem, logits, reference, owned)
    return xp.where(masked, gap, share * xp.tanh(gap * (scale_of(problem) / cap)))


def _subtract(problem: Problem, logits: Any, reference: Any, owned: bool) -> Any:
    if owned:
        return problem.library.overwrite(problem.xp.subtract, logits, reference)
    return logits - reference


def difference_error(problem: Problem, logits: Any, reference: Any) -> Any:
    """Compute the rounding error of `difference`; with a softcap it is unknown, and 0 here."""
    xp, scale = problem.xp, scale_of(problem)
    if is_capped(problem):
        return xp.zeros_like(reference)
    gap = logits - reference
    # Selected before the arithmetic: `where` would pass on the derivative of what is not finite.
    factor = Factor.of(scale, problem.row_dtype)
    finite = xp.isfinite(gap * (factor.splitter * max(scale, 1.0)))
    a, b, gap = (xp.where(finite, array, 0.0) for array in (logits, reference, gap))
    error = difference_rounding(a, b, gap)
    return error if scale == 1.0 else error * scale + product_rounding(gap, factor)


class Factor(NamedTuple):
    """A number, cut so that what rounding takes from a product with it can be computed."""

    number: Any
    """As rounded to the dtype."""
    high: Any
    low: Any
    """Its halves."""
    rest: Any
    """What rounding took from it."""
    splitter: Any
    """What a number of the dtype is multiplied by to be cut in halves."""

    @classmethod
    def of(cls, number: float, dtype: Any) -> Factor:
        """Cut a number for products of a dtype."""
        digits = 53 if dtypes.name_of(dtype) == "float64" else 24
        rounded, high = _rounded(number, digits), _rounded(number, digits // 2)
        splitter = 2.0 ** ((digits + 1) // 2) + 1.0
        return cls(rounded, high, rounded - high, number - rounded, splitter)


def difference_rounding(a: Any, b: Any, gap: Any) -> Any:
    """Compute what rounding took from a - b, which left `gap`: exactly (Knuth's two-sum)."""
    b_part = a - gap
    a_part = gap + b_part
    return (a - a_part) + (b_part - b)


def product_rounding(gap: Any, factor: Factor) -> Any:
    """Compute what rounding took from a product: exactly but for `rest` (Dekker's two-product)."""
    product = gap * factor.number
    split = gap * factor.splitter
    high = split - (split - gap)
    low = gap - high
    lost = (high * factor.high - product) + high * factor.low + low * factor.high
    return (lost + low * factor.low) + gap * factor.rest


def _rounded(number: float, digits: int) -> float:
    """Round to this many binary digits."""
    mantissa, exponent = math.frexp(number)
    return math.ldexp(round(mantissa * 2.0**digits) * 2.0**-digits, exponent)


def value(problem: Problem, logits: Any) -> Any:
    """Compute x itself."""
    xp, scale, cap = problem.xp, scale_of(problem), problem.options.logit_softcap
    if cap is None:
        return logits if scale == 1.0 else logits * scale
    return xp.where(logits == -math.inf, logits, cap * xp.tanh(logits * (scale / cap)))


def value_by_decay(problem: Problem, logits: Any) -> Any:
    """Compute x itself with a softcap, in a form whose derivative keeps its digits."""
    e = _decay(problem, logits)
    size = problem.options.logit_softcap * ((1.0 - e) / (1.0 + e))
    return problem.xp.where(logits < 0.0, -size, size)


def slope(problem: Problem, logits: Any) -> Any:
    """Compute dx/dlogits: a number without a softcap; with one, 0 at -inf."""
    if not is_capped(problem):
        return scale_of(problem)
    e = _decay(problem, logits)
    return (4.0 * scale_of(problem)) * e / ((1.0 + e) * (1.0 + e))


def _decay(problem: Problem, logits: Any) -> Any:
    """Compute exp(-2|u|)."""
    twice = logits * (2.0 * scale_of(problem) / problem.options.logit_softcap)
    # Not abs: at 0 its derivative would be wrong, and so would the loss's second derivative.
    return problem.xp.exp(problem.xp.where(twice < 0.0, twice, -twice))
