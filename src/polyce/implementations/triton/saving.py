"""What a forward pass saves of each row for a backward pass: computed, written and read."""

import triton
import triton.language as tl

from polyce.implementations.triton.records import Saved
from polyce.implementations.triton.row import slope


@triton.jit
def saved_of_a_row(FORM: tl.constexpr):
    """Return how many numbers are kept of a row for a backward pass."""
    count: tl.constexpr = (9 if FORM.VALUED else 4) + (2 if FORM.TEACHER else 0)
    return count


@triton.jit
def as_number(saved_class, FORM: tl.constexpr):
    """Return a class as it is saved: float32 has not as many digits, so its bits are taken."""
    if FORM.DTYPE == tl.float32:
        return saved_class.to(tl.int32).to(tl.float32, bitcast=True)
    else:
        return saved_class.to(tl.float64)


@triton.jit
def as_class(number, FORM: tl.constexpr):
    """Return the class that a saved number stands for."""
    if FORM.DTYPE == tl.float32:
        return number.to(tl.int32, bitcast=True)
    else:
        return number.to(tl.int32)


@triton.jit
def saved_of(
    of_lse_ptr, of_entropy_ptr, row, here,
    state, pivot, label, result, invalid, teacher_top, unit, given,
    FORM: tl.constexpr,
):  # fmt: skip
    """Compute what the gradient of whole rows is made of, and with the cotangents of stats."""
    DTYPE: tl.constexpr = FORM.DTYPE
    factor, pivot_grad = result.factor, result.pivot_grad
    top, saved_x, saved_class = state.top, pivot.logit, pivot.number
    if FORM.ENTRIES > 0:
        # So that a backward pass need not look for bad entries.
        factor = tl.where(invalid, float("nan"), factor)
        pivot_grad = tl.where(invalid, float("nan"), pivot_grad)
    label_grad = pivot_grad
    more, by_gap, pivot_more, label_more = factor, factor, factor, factor
    if FORM.LARGEST and FORM.LABELED:
        label_grad = result.sum_of_r * (label.p * factor) - label.coefficient
    if FORM.VALUED:
        of_lse = tl.zeros_like(result.lse)
        if FORM.OF_LSE:
            of_lse = tl.load(of_lse_ptr + row, mask=here, other=0.0).to(DTYPE)
        inner = of_lse
        pivot_more = of_lse * result.probability
        by_gap = tl.zeros_like(result.lse)
        if FORM.OF_ENTROPY:
            of_entropy = tl.load(of_entropy_ptr + row, mask=here, other=0.0).to(DTYPE)
            inner = inner + of_entropy * (result.lead - result.entropy)
            pivot_more += of_entropy * result.entropy_at_pivot
            by_gap = factor * of_entropy
        # The lead may overflow where the others have no probability left.
        more = tl.where(factor == 0.0, 0.0, factor * inner)
        pivot_more = pivot_more * slope(saved_x, given, FORM)
        label_more = pivot_more
        if FORM.LARGEST and FORM.LABELED:
            label_more = label.p * (more + tl.where(label.p == 0.0, 0.0, label.gap) * by_gap)
            label_more = label_more * slope(label.logit, given, FORM)
            label_more = tl.where(label.leads, pivot_more, label_more)
            label_grad = tl.where(label.leads, pivot_grad, label_grad)
        if FORM.TRANSFORM == "softcap":
            label_x = label.logit if FORM.LABELED else saved_x
            label_grad = label_grad * slope(label_x, given, FORM)
        else:
            more = more * given.scale.to(DTYPE)
            by_gap = by_gap * given.scale.to(DTYPE)
    elif FORM.LARGEST and FORM.LABELED:
        # The backward pass does not know the stats: there the label is the pivot.
        pivot_grad = tl.where(label.leads, pivot_grad, label_grad)
        factor = tl.where(label.leads, factor, result.probability)
        top = tl.where(label.leads, top, saved_x)
        saved_x, saved_class = label.logit, label.number
    factor = factor * result.sum_of_r
    if FORM.TRANSFORM == "softcap":
        pivot_grad = pivot_grad * slope(saved_x, given, FORM)
    return Saved(
        tl.where(top == float("-inf"), 0.0, top).to(DTYPE),
        factor.to(DTYPE),
        pivot_grad.to(DTYPE),
        saved_class,
        more.to(DTYPE),
        by_gap.to(DTYPE),
        pivot_more.to(DTYPE),
        label_grad.to(DTYPE),
        label_more.to(DTYPE),
        teacher_top.to(DTYPE),
        unit.to(DTYPE),
    )


@triton.jit
def save(saved_ptr, row, here, saved, FORM: tl.constexpr):
    """Save what a backward pass needs of rows, if there will be one."""
    if FORM.KEEP:
        place = saved_ptr + row * saved_of_a_row(FORM)
        tl.store(place, saved.top, mask=here)
        tl.store(place + 1, saved.factor, mask=here)
        tl.store(place + 2, saved.pivot_grad, mask=here)
        tl.store(place + 3, as_number(saved.pivot_class, FORM), mask=here)
        if FORM.VALUED:
            tl.store(place + 4, saved.more, mask=here)
            tl.store(place + 5, saved.by_gap, mask=here)
            tl.store(place + 6, saved.pivot_more, mask=here)
            tl.store(place + 7, saved.label_grad, mask=here)
            tl.store(place + 8, saved.label_more, mask=here)
        if FORM.TEACHER:
            behind = place + (9 if FORM.VALUED else 4)
            tl.store(behind, saved.teacher_top, mask=here)
            tl.store(behind + 1, saved.teacher_factor, mask=here)


@triton.jit
def read_saved(saved_ptr, row, here, label, FORM: tl.constexpr):
    """Read what the forward pass saved of rows."""
    place = saved_ptr + row * saved_of_a_row(FORM)
    top = tl.load(place, mask=here, other=0.0)
    factor = tl.load(place + 1, mask=here, other=0.0)
    pivot_grad = tl.load(place + 2, mask=here, other=0.0)
    pivot_class = label
    if FORM.VALUED or not FORM.LABELED:
        # Only compared, never an address: a number outside the row is the pivot nowhere.
        pivot_class = as_class(tl.load(place + 3, mask=here, other=0.0), FORM)
    more, by_gap, pivot_more, label_grad, label_more = factor, factor, factor, factor, factor
    if FORM.VALUED:
        more = tl.load(place + 4, mask=here, other=0.0)
        by_gap = tl.load(place + 5, mask=here, other=0.0)
        pivot_more = tl.load(place + 6, mask=here, other=0.0)
        label_grad = tl.load(place + 7, mask=here, other=0.0)
        label_more = tl.load(place + 8, mask=here, other=0.0)
    teacher_top, teacher_factor = factor, factor
    if FORM.TEACHER:
        behind = place + (9 if FORM.VALUED else 4)
        teacher_top = tl.load(behind, mask=here, other=0.0)
        teacher_factor = tl.load(behind + 1, mask=here, other=0.0)
    return Saved(
        top, factor, pivot_grad, pivot_class,
        more, by_gap, pivot_more, label_grad, label_more, teacher_top, teacher_factor,
    )  # fmt: skip
