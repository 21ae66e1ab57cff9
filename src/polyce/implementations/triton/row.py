"""The row formula of `polyce.formula.rowstate`, for Triton: tiles of classes, one row to each lane.

A tile has classes along its first axis and rows along its second, so a value per row is a vector
with an entry for each lane. The state of a tile's classes is formed around the tile's own maximum,
and `merge` joins it to the state of the classes before. The same rule joins the parts of a row that
several programs have read.

Only sums run in float64, one addition for each tile. What follows from them stays in float32 for
float32, with the gap of the pivot as two numbers: each thread of a program computes it, which in
float64 would take longer than reading the row.

With a softcap, x = cap·tanh(scale·logit): `scale` has been divided by the cap already.
"""

# Triton compiles these functions from source. Names in capitals are compile-time constants.

import triton
import triton.language as tl

from polyce.implementations.triton.arithmetic import exp, log1p, split, tanh, term
from polyce.implementations.triton.records import Numbers, Outcome, State


@triton.jit
def numbers(kept, share, scale, cap, teacher_scale):
    """Return a call's numbers."""
    return Numbers(
        tl.full((1,), kept, tl.float64),
        tl.full((1,), share, tl.float64),
        tl.full((1,), scale, tl.float64),
        tl.full((1,), cap, tl.float64),
        tl.full((1,), teacher_scale, tl.float64),
    )


@triton.jit
def _capped_decay(x, scale, DTYPE: tl.constexpr):
    """Compute exp(-2 |u|), where u = scale x."""
    return tl.exp(tl.abs(x * scale.to(DTYPE)) * -2.0)


@triton.jit
def difference(x, reference, given, FORM: tl.constexpr):
    """Compute the difference of two transformed logits, in their dtype.

    It has the form of `formula.transform`. `given` are the call's `Numbers`.
    """
    DTYPE: tl.constexpr = x.dtype
    gap = x - reference
    if FORM.TRANSFORM == "scale":
        gap = gap * given.scale.to(DTYPE)
    elif FORM.TRANSFORM == "softcap":
        p = _capped_decay(x, given.scale, DTYPE)
        q = _capped_decay(reference, given.scale, DTYPE)
        share = tl.where((x < 0.0) == (reference < 0.0), p + q, 1.0 + p * q)
        share = share * (2.0 * given.cap).to(DTYPE) / ((1.0 + p) * (1.0 + q))
        masked = (x == float("-inf")) | (reference == float("-inf"))
        gap = tl.where(masked, gap, share * tanh(gap * given.scale.to(DTYPE), DTYPE))
    return gap


@triton.jit
def slope(x, given, FORM: tl.constexpr):
    """Compute the derivative of a transformed logit by the logit."""
    if FORM.TRANSFORM == "softcap":
        e = _capped_decay(x, given.scale, FORM.DTYPE)
        result = (4.0 * given.scale * given.cap).to(FORM.DTYPE) * e / ((1.0 + e) * (1.0 + e))
    else:
        result = given.scale.to(FORM.DTYPE)
    return result


@triton.jit
def _value(x, given, FORM: tl.constexpr):
    if FORM.TRANSFORM == "scale":
        x = x * given.scale.to(FORM.DTYPE)
    elif FORM.TRANSFORM == "softcap":
        masked = x == float("-inf")
        cap = given.cap.to(FORM.DTYPE)
        x = tl.where(masked, x, cap * tanh(x * given.scale.to(FORM.DTYPE), FORM.DTYPE))
    return x


@triton.jit
def tile_state(x, coefficient, weight, excluded, given, FORM: tl.constexpr):
    """Compute the state of a tile's classes but the excluded; `weight` is those of the classes."""
    x = tl.where(excluded, float("-inf"), x)
    top = tl.max(x, 0)
    # What a program does not ask for stays 0 and is not computed.
    nothing = tl.zeros_like(top).to(tl.float64)
    rest, excess, entropy, squares = nothing, nothing, nothing, nothing
    even, even_excess = nothing, nothing
    reference = tl.where(top == float("-inf"), 0.0, top)
    gap = difference(x, reference, given, FORM)
    p = term(gap)
    if FORM.SPREAD:
        r = tl.where(excluded, 0.0, coefficient)
        rest = tl.sum(r, 0).to(tl.float64)
        # A class of coefficient 0 has no effect, not even as 0 times infinity.
        excess = tl.sum(tl.where(r == 0.0, 0.0, r * -gap), 0).to(tl.float64)
    if FORM.EVEN:
        w = tl.where(excluded, 0.0, weight)
        even = tl.sum(w, 0).to(tl.float64)
        even_excess = tl.sum(tl.where(w == 0.0, 0.0, w * -gap), 0).to(tl.float64)
    if FORM.SURPRISE:
        entropy = tl.sum(tl.where(p == 0.0, 0.0, p * -gap), 0).to(tl.float64)
    if FORM.SQUARES:
        squares = tl.sum(p * p, 0).to(tl.float64)
    total = tl.sum(p, 0).to(tl.float64)
    return State(top, total, rest, excess, entropy, squares, even, even_excess)


@triton.jit
def _carried(part, top, given, FORM: tl.constexpr):
    """Move a part's sums to the larger maximum `top`."""
    reference = tl.where(top == float("-inf"), 0.0, top)
    gap = difference(part.top, reference, given, FORM)
    decay = tl.exp(gap).to(tl.float64)
    # Infinite if all classes of the part are masked; its excess is then 0 or infinite already.
    risen = difference(reference, part.top, given, FORM).to(tl.float64)
    excess, entropy, squares = part.excess, part.entropy, part.squares
    even_excess = part.even_excess
    if FORM.SPREAD:
        excess = tl.where(part.rest == 0.0, excess, excess + part.rest * risen)
    if FORM.EVEN:
        even_excess = tl.where(part.even == 0.0, even_excess, even_excess + part.even * risen)
    if FORM.SURPRISE:
        moved = (entropy + part.total * risen) * decay
        entropy = tl.where(part.total * decay == 0.0, 0.0, moved)
    if FORM.SQUARES:
        squares = tl.where(part.total == 0.0, 0.0, squares * decay * decay)
    total = tl.where(part.total == 0.0, 0.0, part.total * decay)
    return State(top, total, part.rest, excess, entropy, squares, part.even, even_excess)


@triton.jit
def merge(one, other, given, FORM: tl.constexpr):
    """Merge the states of two parts of each row, over disjoint classes; either may be empty."""
    top = tl.maximum(one.top, other.top)
    one = _carried(one, top, given, FORM)
    other = _carried(other, top, given, FORM)
    return State(
        top,
        one.total + other.total,
        one.rest + other.rest,
        one.excess + other.excess,
        one.entropy + other.entropy,
        one.squares + other.squares,
        one.even + other.even,
        one.even_excess + other.even_excess,
    )


@triton.jit
def add_states(parts, given, FORM: tl.constexpr):
    """Merge the states of many parts of each row, which lie along the first axis."""
    top = tl.max(parts.top, 0)
    moved = _carried(parts, top[None, :], given, FORM)
    return State(
        top,
        tl.sum(moved.total, 0),
        tl.sum(moved.rest, 0),
        tl.sum(moved.excess, 0),
        tl.sum(moved.entropy, 0),
        tl.sum(moved.squares, 0),
        tl.sum(moved.even, 0),
        tl.sum(moved.even_excess, 0),
    )


@triton.jit
def exact_gap(top, x, given, FORM: tl.constexpr):
    """Compute how far a class lies below the largest non-pivot class of its row, as two numbers.

    For the pivot that is δ. The second number is the rounding error of the first.
    """
    error = tl.zeros_like(top)
    if tl.float32 == FORM.DTYPE:
        wide_top, wide_x = top.to(tl.float64), x.to(tl.float64)
        exact = difference(wide_top, wide_x, given, FORM)
        delta = exact.to(tl.float32)
        error = (exact - delta.to(tl.float64)).to(tl.float32)
    elif FORM.TRANSFORM == "softcap":
        delta = difference(top, x, given, FORM)
    else:
        # Knuth's two-sum, and Dekker's two-product with the scale.
        delta = top - x
        x_part = top - delta
        top_part = delta + x_part
        error = (top - top_part) + (x_part - x)
        if FORM.TRANSFORM == "scale":
            product = delta * given.scale
            high, low = split(delta)
            scale_high, scale_low = split(given.scale)
            lost = (high * scale_high - product) + high * scale_low + low * scale_high
            error = (lost + low * scale_low) + error * given.scale
            delta = product
    # With an infinity or a nan there is no error to correct.
    finite = (error == error) & (tl.abs(delta) < 1e30)
    return delta, tl.where(finite, error, 0.0)


@triton.jit
def with_coefficients(state, rest, excess):
    """Return a state with other sums of coefficients."""
    return State(
        state.top, state.total, rest, excess,
        state.entropy, state.squares, state.even, state.even_excess,
    )  # fmt: skip


@triton.jit
def count_label(state, x, coefficient, given, FORM: tl.constexpr):
    """Add a label's coefficient, at logit x, to R' and q'.

    Return the state, exp(x - m') and m' - x.
    """
    reference = tl.where(state.top == float("-inf"), 0.0, state.top)
    gap, error = exact_gap(reference, x, given, FORM)
    p = exp(-gap, FORM.DTYPE)
    r = coefficient.to(tl.float64)
    added = r * gap.to(tl.float64) + r * error.to(tl.float64)
    rest = state.rest + r
    excess = state.excess + tl.where(r == 0.0, 0.0, added)
    return with_coefficients(state, rest, excess), p - p * error, gap


@triton.jit
def likelier(most, most_class, other, other_class):
    """Return the larger of two probabilities and its class, the first class if they are equal."""
    better = (other > most) | ((other == most) & (other_class < most_class))
    return tl.where(better, other, most), tl.where(better, other_class, most_class)


@triton.jit
def finish(state, pivot, penalty, given, FORM: tl.constexpr):
    """Compute loss, lse and entropy of whole rows, and what their gradient is made of."""
    at_pivot = pivot.coefficient
    total = state.total
    delta, error = exact_gap(state.top, pivot.logit, given, FORM)
    below = delta <= 0.0
    opposite = -delta
    decay = exp(tl.where(below, delta, opposite), FORM.DTYPE)
    decay = decay + decay * tl.where(below, error, -error)
    # 0, or nan where the pivot is at +inf: such a row has no softmax.
    nothing = pivot.logit - pivot.logit
    wide = decay.to(tl.float64)
    e = tl.where(below, total * wide + nothing, (total - 1.0) + wide).to(FORM.DTYPE)
    h = log1p(e, FORM.DTYPE)
    behind = tl.where(below, 0.0, delta)
    loss = at_pivot * (tl.where(at_pivot == 0.0, 0.0, behind) + h)
    factor = tl.where(below, decay, 1.0) / (1.0 + e)
    probability = tl.where(below, 1.0, decay) / (1.0 + e)
    others = (total * factor).to(FORM.DTYPE)
    sum_of_r = at_pivot
    if FORM.SPREAD or FORM.LARGEST:
        rest = state.rest.to(FORM.DTYPE)
        ahead = tl.where(below & (rest != 0.0), opposite, 0.0)
        # It is nan where an infinite coefficient meets a gap of 0: the other term suffices then.
        excess = state.excess.to(FORM.DTYPE)
        loss += tl.where(excess == excess, excess, 0.0) + rest * (ahead + h)
        sum_of_r = at_pivot + rest
        pivot_grad = rest - sum_of_r * others
    else:
        pivot_grad = -at_pivot * others
    # Another form of the same number: torch's, where the terms are infinite.
    share = sum_of_r * probability
    if FORM.LARGEST:
        # The form with the smaller terms loses fewer digits.
        larger = tl.abs(share) + tl.abs(at_pivot) > tl.abs(rest) + tl.abs(sum_of_r * others)
    else:
        larger = tl.abs(sum_of_r) < float("inf")
    pivot_grad = tl.where(larger, pivot_grad, share - at_pivot)
    lse = h
    if FORM.STATS or FORM.PENALTY:
        largest = tl.where(below, pivot.logit, state.top)
        lse = _value(largest, given, FORM) + h
    if FORM.PENALTY:
        loss += penalty * lse * lse
        pull = 2.0 * penalty * lse
        sum_of_r += pull
        pivot_grad += pull * probability
    entropy, lead, entropy_at_pivot = state.entropy, h, h
    if FORM.SURPRISE:
        gap_ahead = tl.where(below & (total != 0.0), opposite, 0.0)
        gap_behind = tl.where(probability == 0.0, 0.0, behind)
        # The lead may overflow where the others have no probability left.
        lacking = tl.where(others == 0.0, 0.0, others * (gap_ahead + h))
        entropy = (factor * entropy).to(FORM.DTYPE) + lacking
        lead = gap_ahead + h
        entropy_at_pivot = probability * ((gap_behind + h) * others - entropy)
        entropy += probability * (gap_behind + h)
    return Outcome(
        loss,
        lse,
        entropy.to(FORM.DTYPE),
        factor,
        probability,
        others,
        1.0 / (1.0 + e),
        sum_of_r,
        pivot_grad,
        lead,
        entropy_at_pivot,
    )
