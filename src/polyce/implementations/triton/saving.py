"""What a forward pass saves of each row for a backward pass, in memory."""

import triton
import triton.language as tl

from polyce.implementations.triton.records import Saved


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
