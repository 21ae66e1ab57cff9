"""The softmax of a teacher's logits, by their own maximum, in the pass that reads the student's.

Until a row has been read, the coefficients are in units of the exponential of the largest of the
teacher's logits so far.
"""

import triton
import triton.language as tl

from polyce.implementations.triton.arithmetic import exp, split
from polyce.implementations.triton.records import Pivot, Seen, Teacher
from polyce.implementations.triton.row import with_coefficients


@triton.jit
def teacher_exp(t, top, given, FORM: tl.constexpr):
    """Compute exp(scale (t - top)); what rounding takes from the exponent is multiplied back.

    Half a unit in the last place of an exponent of 80 is 64 units of the result.
    """
    reference = tl.where(top == float("-inf"), 0.0, top)
    gap = t - reference
    # Knuth's two-sum, and Dekker's two-product with the scale.
    kept = t - gap
    error = (t - (gap + kept)) + (kept - reference)
    exponent = gap
    if FORM.TEMPERED:
        scale = given.teacher_scale.to(FORM.DTYPE)
        scale_lost = (given.teacher_scale - scale.to(tl.float64)).to(FORM.DTYPE)
        exponent = gap * scale
        high, low = split(gap)
        scale_high, scale_low = split(scale)
        lost = (high * scale_high - exponent) + high * scale_low + low * scale_high
        error = error * scale + ((lost + low * scale_low) + gap * scale_lost)
    found = exp(exponent, FORM.DTYPE)
    # Where something is infinite or nan there is nothing to be made good.
    return found + found * tl.where(tl.abs(error) < 1.0, error, 0.0)


@triton.jit
def join_teachers(one, other, state, other_state, pivot, other_pivot, given, FORM: tl.constexpr):
    """Join what is known of a teacher from two parts of rows, and bring both to the same units."""
    top = tl.maximum(one.top, other.top)
    total, state, pivot = _carried(one, state, pivot, top, given, FORM)
    added, other_state, other_pivot = _carried(other, other_state, other_pivot, top, given, FORM)
    return state, other_state, pivot, other_pivot, Teacher(top, total + added)


@triton.jit
def to_one_teacher(state, pivot, teacher, given, FORM: tl.constexpr):
    """Bring parts of rows, along the first axis, to the same units; join what is known of it."""
    top = tl.max(teacher.top, 0)
    total, state, pivot = _carried(teacher, state, pivot, top[None, :], given, FORM)
    return state, pivot, Teacher(top, tl.sum(total, 0))


@triton.jit
def _carried(teacher, state, pivot, top, given, FORM: tl.constexpr):
    """Move what is in units of a teacher's largest logit to a larger one, `top`."""
    lower = teacher_exp(teacher.top, top, given, FORM).to(tl.float64)
    lower = tl.where(teacher.top == top, 1.0, lower)
    # What no longer has a coefficient takes no part, not even as 0 times infinity.
    excess = tl.where(lower == 0.0, 0.0, state.excess * lower)
    state = with_coefficients(state, state.rest * lower, excess)
    pivot = Pivot(pivot.logit, pivot.coefficient * lower, pivot.number, pivot.even)
    return teacher.total * lower, state, pivot


@triton.jit
def with_teacher(seen, given, FORM: tl.constexpr):
    """Return state and pivot of whole rows with their coefficients; nan without a softmax."""
    state, pivot = seen.state, seen.pivot
    unit = given.kept / seen.teacher.total
    rest, excess, r = state.rest * unit, state.excess * unit, pivot.coefficient * unit
    if FORM.EVEN:
        rest += state.even * given.share
        excess += state.even_excess * given.share
        r += pivot.even * given.share
    pivot = Pivot(pivot.logit, r.to(FORM.DTYPE), pivot.number, pivot.even)
    return with_coefficients(state, rest, excess), pivot, unit


@triton.jit
def with_whole_teacher(seen, top, total, given, FORM: tl.constexpr):
    """Return state and pivot of a part of rows, whose teacher has other classes too."""
    _, state, pivot = _carried(seen.teacher, seen.state, seen.pivot, top, given, FORM)
    whole = Seen(
        state, pivot, seen.most, seen.most_class, seen.rank, seen.first, Teacher(top, total)
    )
    state, pivot, _ = with_teacher(whole, given, FORM)
    return state, pivot


@triton.jit
def teacher_coefficients(
    target_ptr, weight_ptr, c, inside, classes, given, saved, FORM: tl.constexpr
):
    """Compute a tile of the r_c, of whole rows that have been read before."""
    t = tl.load(target_ptr, mask=inside, other=float("-inf")).to(FORM.DTYPE)
    r = teacher_exp(t, saved.teacher_top, given, FORM) * saved.teacher_factor
    if FORM.SMOOTHED:
        r += given.share.to(FORM.DTYPE)
    if FORM.WEIGHTED:
        known = (c < classes)[:, None]
        r = r * tl.load(weight_ptr + c[:, None], mask=known, other=0.0).to(FORM.DTYPE)
    return r
