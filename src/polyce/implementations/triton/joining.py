"""The kernel that merges the states of parts of rows, which `forward` has read apart.

The states of many parts are moved to their common maximum and added up at once, as the logits of a
tile are: a tree within a program. So the same parts give the same bits.
"""

import triton
import triton.language as tl

from polyce.implementations.triton.records import Inputs, Outputs, Pivot, Seen, State, Teacher
from polyce.implementations.triton.row import add_states, numbers
from polyce.implementations.triton.saving import save
from polyce.implementations.triton.teacher import to_one_teacher
from polyce.implementations.triton.tiles import (
    choose_pivot,
    conclude,
    first_besides,
    lanes,
    merge_seen,
    nothing_read,
)


@triton.jit
def join(
    x_ptr, target_ptr, weight_ptr, sample_ptr, chance_ptr,
    loss_ptr, saved_ptr, sums_ptr, parts_ptr,
    lse_ptr, entropy_ptr, prediction_ptr, correct_ptr, valid_ptr,
    top_probability_ptr, brier_ptr, rank_ptr, softmax_ptr, of_lse_ptr, of_entropy_ptr,
    classes, inner, blocks, rows, parts, entries,
    x_outer, x_lane, x_class,
    ignore_index: tl.int64,
    kept: tl.float64, share: tl.float64, z_loss: tl.float64, scale: tl.float64, cap: tl.float64,
    teacher_scale: tl.float64,
    FORM: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Merge the states of the parts of rows, TILE parts at once."""
    outer, _line, lane, here = lanes(inner, blocks, LANES)
    row = outer * inner + lane
    given = numbers(kept, share, scale, cap, teacher_scale)
    z_loss = tl.full((1,), z_loss, tl.float64)
    inputs = Inputs(target_ptr, weight_ptr, sample_ptr, chance_ptr, entries)
    outputs = Outputs(
        loss_ptr, saved_ptr, sums_ptr, lse_ptr, entropy_ptr, prediction_ptr, correct_ptr, valid_ptr,
        top_probability_ptr, brier_ptr, rank_ptr, softmax_ptr, of_lse_ptr, of_entropy_ptr,
    )  # fmt: skip
    seen = joined(parts_ptr, parts, rows, row, here, given, FORM, TILE, LANES)
    saved = conclude(
        x_ptr + outer * x_outer + lane * x_lane, inputs, outputs,
        row, here, classes, x_class, ignore_index, given, z_loss, seen, FORM,
    )  # fmt: skip
    save(saved_ptr, row, here, saved, FORM)


@triton.jit
def joined(
    parts_ptr, parts, rows, row, here, given,
    FORM: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Return what is known of rows from all their parts."""
    seen = nothing_read(LANES, FORM)
    plane = tl.full((1,), rows, tl.int64)
    for done in range(0, parts, TILE):
        part = done + tl.arange(0, TILE)
        inside = (part < parts)[:, None] & here[None, :]
        place = parts_ptr + plane * part[:, None].to(tl.int64) + row[None, :]
        found = _stored(place, plane * parts, inside, FORM)
        seen = merge_seen(seen, _joined(found, given, FORM), given, FORM)
    return seen


@triton.jit
def _stored(place, step, inside, FORM: tl.constexpr):
    """Read what `forward` has stored of a tile of parts; nothing is known of absent ones."""
    lowest = float("-inf")
    top = tl.load(place, mask=inside, other=lowest).to(FORM.DTYPE)
    total = tl.load(place + step, mask=inside, other=0.0)
    nothing = tl.zeros_like(total)
    rest, excess, entropy, squares = nothing, nothing, nothing, nothing
    even, even_excess = nothing, nothing
    if FORM.SPREAD:
        rest = tl.load(place + 2 * step, mask=inside, other=0.0)
        excess = tl.load(place + 3 * step, mask=inside, other=0.0)
    if FORM.SURPRISE:
        entropy = tl.load(place + 4 * step, mask=inside, other=0.0)
    most, rank = top, tl.zeros(top.shape, tl.int32)
    number = rank + 0x7FFFFFFF
    pivot = Pivot(top, nothing.to(tl.float64 if FORM.TEACHER else FORM.DTYPE), number, top)
    most_class = number
    if FORM.LARGEST:
        logit = tl.load(place + 5 * step, mask=inside, other=lowest).to(FORM.DTYPE)
        r = tl.load(place + 6 * step, mask=inside, other=0.0).to(pivot.coefficient.dtype)
        # Read as a number, since it is stored as one.
        number = tl.load(place + 7 * step, mask=inside, other=2147483647.0).to(tl.int32)
        pivot = Pivot(logit, r, number, top)
    if FORM.PROBABILITY and FORM.CORRECT:
        most = tl.load(place + 8 * step, mask=inside, other=lowest).to(FORM.DTYPE)
        most_class = tl.load(place + 9 * step, mask=inside, other=2147483647.0).to(tl.int32)
    if FORM.SQUARES:
        squares = tl.load(place + 10 * step, mask=inside, other=0.0)
    if FORM.RANK:
        rank = tl.load(place + 11 * step, mask=inside, other=0.0).to(tl.int32)
    teacher = Teacher(top, total)
    if FORM.TEACHER:
        teacher_top = tl.load(place + 12 * step, mask=inside, other=lowest).to(FORM.DTYPE)
        teacher = Teacher(teacher_top, tl.load(place + 13 * step, mask=inside, other=0.0))
    if FORM.EVEN:
        even = tl.load(place + 14 * step, mask=inside, other=0.0)
        even_excess = tl.load(place + 15 * step, mask=inside, other=0.0)
        pivot_even = tl.load(place + 16 * step, mask=inside, other=0.0).to(FORM.DTYPE)
        pivot = Pivot(pivot.logit, pivot.coefficient, pivot.number, pivot_even)
    first = number
    if FORM.FIRST:
        first = tl.load(place + 17 * step, mask=inside, other=2147483647.0).to(tl.int32)
    state = State(top, total, rest, excess, entropy, squares, even, even_excess)
    return Seen(state, pivot, most, most_class, rank, first, teacher)


@triton.jit
def _joined(parts, given, FORM: tl.constexpr):
    """Merge a tile of parts, along its first axis."""
    state, pivot, teacher = parts.state, parts.pivot, parts.teacher
    most, most_class, rank = parts.most, parts.most_class, parts.rank
    if FORM.RANK:
        rank = tl.sum(rank, 0)
    if FORM.PROBABILITY and FORM.CORRECT:
        most = tl.max(parts.most, 0)
        # Parts are in the order of their classes, but the first also read the row's end.
        is_most = parts.most == most[None, :]
        most_class = tl.min(tl.where(is_most, parts.most_class, 0x7FFFFFFF), 0)
    if FORM.TEACHER:
        state, pivot, teacher = to_one_teacher(state, pivot, teacher, given, FORM)
    if FORM.LARGEST:
        logit = tl.max(pivot.logit, 0)
        number = tl.min(tl.where(pivot.logit == logit[None, :], pivot.number, 0x7FFFFFFF), 0)
        leads = pivot.number == number[None, :]
        r = tl.sum(tl.where(leads, pivot.coefficient, 0.0), 0)
        even = logit
        if FORM.EVEN:
            even = tl.sum(tl.where(leads, pivot.even, 0.0), 0)
        # All other pivots count among the rest, each first in its own part.
        others = Pivot(
            tl.where(leads, float("-inf"), pivot.logit),
            tl.where(leads, 0.0, pivot.coefficient),
            tl.where(leads, 0x7FFFFFFF, pivot.number),
            tl.where(leads, 0.0, pivot.even),
        )
        leader = Pivot(logit[None, :], r[None, :], number[None, :], even[None, :])
        state, _leader = choose_pivot(state, leader, others, given, FORM)
        pivot = Pivot(logit, r, number, even)
    state, first = add_states(state, given, FORM), pivot.number
    if FORM.FIRST:
        each = first_besides(parts, state.top[None, :], pivot.number[None, :], FORM)
        first = tl.min(each, 0)
    return Seen(state, pivot, most, most_class, rank, first, teacher)
