"""The kernels of rows whose classes lie in several parts, of which these are one.

`forward` leaves behind what its programs have read; from that comes the state of the part, of each
row the numbers that `part_rows` lists. From what the parts have joined to comes what `backward`
needs of a row. Labels and the classes of a sparse target count from the part's first class.
"""

import triton
import triton.language as tl

from polyce.implementations.triton.entries import with_entries
from polyce.implementations.triton.joining import joined
from polyce.implementations.triton.records import Inputs, Label, Pivot, State
from polyce.implementations.triton.row import finish, numbers
from polyce.implementations.triton.saving import save, saved_of
from polyce.implementations.triton.teacher import with_whole_teacher
from polyce.implementations.triton.tiles import lanes, target, with_labels


@triton.jit
def write_states(
    x_ptr, target_ptr, weight_ptr, sample_ptr, chance_ptr, parts_ptr, teacher_ptr, states_ptr,
    classes, first_class, inner, blocks, rows, parts, entries,
    x_outer, x_lane, x_class,
    ignore_index: tl.int64,
    kept: tl.float64, share: tl.float64, scale: tl.float64, cap: tl.float64,
    teacher_scale: tl.float64,
    FORM: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Join what `forward` has left behind of rows, and write it as the states of a part."""
    outer, _line, lane, here = lanes(inner, blocks, LANES)
    row = outer * inner + lane
    given = numbers(kept, share, scale, cap, teacher_scale)
    inputs = Inputs(target_ptr, weight_ptr, sample_ptr, chance_ptr, entries)
    seen = joined(parts_ptr, parts, rows, row, here, given, FORM, TILE, LANES)
    meaning = target(inputs, row, here, classes, ignore_index, FORM)
    x_row = x_ptr + outer * x_outer + lane * x_lane
    if FORM.ENTRIES > 0:
        # A class that is out of range here may lie in another part.
        seen, _bad = with_entries(
            x_row, inputs, row, meaning.counted, classes, x_class, ignore_index, given, seen, FORM
        )
    state, pivot = seen.state, seen.pivot
    place = states_ptr + row
    step = tl.full((1,), rows, tl.int64)
    if FORM.TEACHER:
        top, total = _whole_teacher(teacher_ptr, row, step, here, FORM)
        state, pivot = with_whole_teacher(seen, top, total, given, FORM)
    if FORM.LABELED:
        state, pivot, label = with_labels(
            x_row, x_class, meaning.label, meaning.weight, meaning.counted, classes,
            state, pivot, given, FORM,
        )  # fmt: skip
        if FORM.LARGEST:
            tl.store(place + 10 * step, label.logit.to(tl.float64), mask=here)
    tl.store(place, state.top.to(tl.float64), mask=here)
    tl.store(place + step, state.total, mask=here)
    tl.store(place + 2 * step, pivot.logit.to(tl.float64), mask=here)
    tl.store(place + 3 * step, pivot.coefficient.to(tl.float64), mask=here)
    if FORM.SPREAD or FORM.LARGEST:
        tl.store(place + 4 * step, state.rest, mask=here)
        tl.store(place + 5 * step, state.excess, mask=here)
    if FORM.SURPRISE:
        tl.store(place + 6 * step, state.entropy, mask=here)
    if FORM.FIRST:
        tl.store(place + 7 * step, _as_whole(seen.first, classes, first_class), mask=here)
    if FORM.SQUARES:
        tl.store(place + 8 * step, state.squares, mask=here)
    if FORM.LARGEST:
        tl.store(place + 9 * step, _as_whole(pivot.number, classes, first_class), mask=here)


@triton.jit
def _as_whole(number, classes, first_class):
    """Return classes as whole rows number them; for no class, which nobody looks at, the last."""
    return tl.minimum(number, classes - 1).to(tl.float64) + first_class


@triton.jit
def _whole_teacher(teacher_ptr, row, step, here, FORM: tl.constexpr):
    """Read what the parts of a teacher's rows have joined to."""
    top = tl.load(teacher_ptr + row, mask=here, other=0.0).to(FORM.DTYPE)
    return top, tl.load(teacher_ptr + step + row, mask=here, other=1.0)


@triton.jit
def write_teachers(
    parts_ptr, states_ptr,
    inner, blocks, rows, parts,
    kept: tl.float64, share: tl.float64, scale: tl.float64, cap: tl.float64,
    teacher_scale: tl.float64,
    FORM: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Join what `forward` has left behind of a teacher's rows, and write that."""
    outer, _line, lane, here = lanes(inner, blocks, LANES)
    row = outer * inner + lane
    given = numbers(kept, share, scale, cap, teacher_scale)
    teacher = joined(parts_ptr, parts, rows, row, here, given, FORM, TILE, LANES).teacher
    tl.store(states_ptr + row, teacher.top.to(tl.float64), mask=here)
    tl.store(states_ptr + tl.full((1,), rows, tl.int64) + row, teacher.total, mask=here)


@triton.jit
def save_states(
    x_ptr, target_ptr, weight_ptr, sample_ptr, chance_ptr, states_ptr, teacher_ptr, penalty_ptr,
    of_lse_ptr, of_entropy_ptr, saved_ptr,
    classes, first_class, inner, blocks, rows, entries,
    x_outer, x_lane, x_class,
    ignore_index: tl.int64,
    kept: tl.float64, share: tl.float64, scale: tl.float64, cap: tl.float64,
    teacher_scale: tl.float64,
    FORM: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Compute, from the states of whole rows, what a forward pass on these would have saved."""
    outer, _line, lane, here = lanes(inner, blocks, LANES)
    row = outer * inner + lane
    given = numbers(kept, share, scale, cap, teacher_scale)
    inputs = Inputs(target_ptr, weight_ptr, sample_ptr, chance_ptr, entries)
    meaning = target(inputs, row, here, classes, ignore_index, FORM)
    place = states_ptr + row
    step = tl.full((1,), rows, tl.int64)
    total = tl.load(place + step, mask=here, other=0.0)
    nothing = tl.zeros_like(total)
    rest, entropy = nothing, nothing
    if FORM.SPREAD or FORM.LARGEST:
        rest = tl.load(place + 4 * step, mask=here, other=0.0)
    if FORM.SURPRISE:
        entropy = tl.load(place + 6 * step, mask=here, other=0.0)
    top = tl.load(place, mask=here, other=0.0).to(FORM.DTYPE)
    state = State(top, total, rest, nothing, entropy, nothing, nothing, nothing)
    logit = tl.load(place + 2 * step, mask=here, other=0.0).to(FORM.DTYPE)
    coefficient = tl.load(place + 3 * step, mask=here, other=0.0).to(FORM.DTYPE)
    number = tl.load(place + 9 * step, mask=here, other=0.0) - first_class
    pivot = Pivot(logit, coefficient, number.to(tl.int32), logit)
    penalty = tl.zeros_like(logit)
    if FORM.PENALTY:
        penalty = tl.load(penalty_ptr + row, mask=here, other=0.0).to(FORM.DTYPE)
    teacher_top, unit = logit, logit
    if FORM.TEACHER:
        teacher_top, teacher_total = _whole_teacher(teacher_ptr, row, step, here, FORM)
        unit = given.kept / teacher_total
    weight = meaning.weight
    label = Label(meaning.label, weight, weight, here, weight, weight)
    if FORM.LABELED:
        # Only for the labels: the states hold their coefficients.
        _state, _pivot, label = with_labels(
            x_ptr + outer * x_outer + lane * x_lane, x_class, meaning.label, weight,
            meaning.counted, classes, state, pivot, given, FORM,
        )  # fmt: skip
    result = finish(state, pivot, penalty, given, FORM)
    # Of bad labels the cotangents are nan.
    fine = here & (here == 0)
    saved = saved_of(
        of_lse_ptr, of_entropy_ptr, row, here,
        state, pivot, label, result, fine, teacher_top, unit, given, FORM,
    )  # fmt: skip
    save(saved_ptr, row, here, saved, FORM)
