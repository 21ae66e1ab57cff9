"""The kernels of the triton path: rows read once, and their gradient written once.

A program takes a block of rows (lanes), whose logits lie `x_lane` apart, and goes along their
classes, `x_class` apart, tile by tile; an outer index is `x_outer` apart. This covers (N, C) with
any row stride as well as (N, C, inner). Offsets have 64 bits; a program's number has 32, so it is
widened before it is multiplied.
"""

import triton
import triton.language as tl

from polyce.implementations.triton.arithmetic import narrow
from polyce.implementations.triton.gradient import at_entries, backward, put_entries
from polyce.implementations.triton.joining import join
from polyce.implementations.triton.one_pass import both, weigh
from polyce.implementations.triton.records import Inputs, Outputs
from polyce.implementations.triton.row import difference, numbers
from polyce.implementations.triton.saving import save
from polyce.implementations.triton.states import save_states, write_states, write_teachers
from polyce.implementations.triton.tiles import (
    body,
    conclude,
    edge,
    far_steps,
    lanes,
    neighbours,
    nothing_read,
    read,
    target,
)

__all__ = [
    "add_up",
    "at_entries",
    "backward",
    "both",
    "distance",
    "forward",
    "join",
    "put_entries",
    "reduce",
    "save_states",
    "weigh",
    "write_states",
    "write_teachers",
]


@triton.jit
def forward(
    x_ptr, target_ptr, weight_ptr, sample_ptr, chance_ptr,
    loss_ptr, saved_ptr, sums_ptr, parts_ptr,
    lse_ptr, entropy_ptr, prediction_ptr, correct_ptr, valid_ptr,
    top_probability_ptr, brier_ptr, rank_ptr, softmax_ptr, of_lse_ptr, of_entropy_ptr,
    units, inner, blocks, rows, chunk, lead, entries,
    x_outer, x_lane, x_class, t_outer, t_lane, t_class,
    ignore_index: tl.int64,
    kept: tl.float64, share: tl.float64, z_loss: tl.float64, scale: tl.float64, cap: tl.float64,
    teacher_scale: tl.float64,
    FORM: tl.constexpr, SPLIT: tl.constexpr, PEEL: tl.constexpr, IN_STEP: tl.constexpr,
    UNIT: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
    BY_TWO: tl.constexpr,
):  # fmt: skip
    """Read rows once, or the part of them that the program's second number selects."""
    outer, line, lane, here = lanes(inner, blocks, LANES)
    row = outer * inner + lane
    # This tells the compiler that 16-byte loads end with the row.
    classes = units * UNIT
    given = numbers(kept, share, scale, cap, teacher_scale)
    z_loss = tl.full((1,), z_loss, tl.float64)
    inputs = Inputs(target_ptr, weight_ptr, sample_ptr, chance_ptr, entries)
    outputs = Outputs(
        loss_ptr, saved_ptr, sums_ptr, lse_ptr, entropy_ptr, prediction_ptr, correct_ptr, valid_ptr,
        top_probability_ptr, brier_ptr, rank_ptr, softmax_ptr, of_lse_ptr, of_entropy_ptr,
    )  # fmt: skip
    meaning = target(inputs, row, here, classes, ignore_index, FORM)
    x_at = outer * x_outer + line * x_lane
    t_at = outer * t_outer + line * t_lane
    if LANES > 1:
        others = neighbours(LANES, BY_TWO)
        x_at = x_at + others * x_lane
        t_at = t_at + others * t_lane

    seen = nothing_read(LANES, FORM)
    label_x = seen.state.top
    if FORM.RANK:
        label_at = outer * x_outer + lane * x_lane + meaning.label.to(tl.int64) * x_class
        label_x = tl.load(x_ptr + label_at, mask=meaning.counted, other=0.0).to(FORM.DTYPE)

    part = tl.program_id(1)
    start = 0
    stop = classes
    if PEEL:
        start, stop = body(x_at + lead, classes, VECTOR)
        if part == 0:
            c, ends = edge(start, stop, classes, VECTOR)
            seen = read(
                x_ptr + x_at + c[:, None].to(tl.int64) * x_class,
                target_ptr + t_at + c[:, None].to(tl.int64) * t_class,
                weight_ptr, c, ends[:, None] & here[None, :], meaning, label_x,
                classes, given, seen, FORM,
            )  # fmt: skip
    # Rows begin on 16-byte boundaries here. The division tells the compiler so; the promise does
    # where the array itself does not begin on one.
    x_row = x_ptr + x_at
    t_row = target_ptr + t_at + start * t_class
    if PEEL or UNIT > 1:
        x_row = x_ptr - lead + (x_at + lead + start) // VECTOR * VECTOR
        x_row = tl.multiple_of(x_row, 16 if LANES == 1 else (16, 16))
    if IN_STEP:
        t_row = target_ptr - lead + (t_at + lead + start) // VECTOR * VECTOR
        t_row = tl.multiple_of(t_row, 16 if LANES == 1 else (16, 16))
    length = stop - start
    begin = 0
    end = length
    if SPLIT:
        begin = part * chunk
        end = tl.minimum(begin + chunk, length)
    # A chunk is a whole number of tiles, so only the row's end has to be masked.
    for done in range(begin, end, TILE):
        step = done + tl.arange(0, TILE)
        c = start + step
        wide = far_steps(step, LANES, BY_TWO)
        there = (step < length)[:, None] & here[None, :]
        seen = read(
            x_row + wide * x_class,
            t_row + wide * t_class,
            weight_ptr, c, there, meaning, label_x, classes, given, seen, FORM,
        )  # fmt: skip

    if SPLIT:
        place = parts_ptr + part.to(tl.int64) * rows + row
        step = tl.num_programs(1).to(tl.int64) * rows
        state, pivot = seen.state, seen.pivot
        tl.store(place, state.top.to(tl.float64), mask=here)
        tl.store(place + step, state.total, mask=here)
        if FORM.SPREAD:
            tl.store(place + 2 * step, state.rest, mask=here)
            tl.store(place + 3 * step, state.excess, mask=here)
        if FORM.SURPRISE:
            tl.store(place + 4 * step, state.entropy, mask=here)
        if FORM.LARGEST:
            tl.store(place + 5 * step, pivot.logit.to(tl.float64), mask=here)
            tl.store(place + 6 * step, pivot.coefficient.to(tl.float64), mask=here)
            tl.store(place + 7 * step, pivot.number.to(tl.float64), mask=here)
        if FORM.PROBABILITY and FORM.CORRECT:
            tl.store(place + 8 * step, seen.most.to(tl.float64), mask=here)
            tl.store(place + 9 * step, seen.most_class.to(tl.float64), mask=here)
        if FORM.SQUARES:
            tl.store(place + 10 * step, state.squares, mask=here)
        if FORM.RANK:
            tl.store(place + 11 * step, seen.rank.to(tl.float64), mask=here)
        if FORM.TEACHER:
            tl.store(place + 12 * step, seen.teacher.top.to(tl.float64), mask=here)
            tl.store(place + 13 * step, seen.teacher.total, mask=here)
        if FORM.EVEN:
            tl.store(place + 14 * step, state.even, mask=here)
            tl.store(place + 15 * step, state.even_excess, mask=here)
            tl.store(place + 16 * step, pivot.even.to(tl.float64), mask=here)
        if FORM.FIRST:
            tl.store(place + 17 * step, seen.first.to(tl.float64), mask=here)
    else:
        saved = conclude(
            x_ptr + outer * x_outer + lane * x_lane, inputs, outputs,
            row, here, classes, x_class, ignore_index, given, z_loss, seen, FORM,
        )  # fmt: skip
        save(saved_ptr, row, here, saved, FORM)


@triton.jit
def distance(
    x_ptr, target_ptr, softmax_ptr, brier_ptr,
    classes, inner, blocks,
    x_outer, x_lane, x_class, t_outer, t_lane, t_class,
    scale: tl.float64, cap: tl.float64,
    FORM: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Read rows once more, and write the squared distance of their softmax to the target."""
    outer, _line, lane, here = lanes(inner, blocks, LANES)
    row = outer * inner + lane
    given = numbers(scale, scale, scale, cap, scale)
    place = softmax_ptr + 5 * row
    top = tl.load(place, mask=here, other=0.0).to(FORM.DTYPE)
    factor = tl.load(place + 1, mask=here, other=0.0).to(FORM.DTYPE)
    near = tl.load(place + 2, mask=here, other=0.0).to(FORM.DTYPE)
    others = tl.load(place + 3, mask=here, other=0.0).to(FORM.DTYPE)
    pivot_class = tl.load(place + 4, mask=here, other=0.0).to(tl.int32)
    # nan where there is no score: such a row is not read.
    read_here = here & (factor == factor)
    score = (factor - factor).to(tl.float64)
    for done in range(0, classes, TILE):
        c = done + tl.arange(0, TILE)
        inside = (c < classes)[:, None] & read_here[None, :]
        wide = c[:, None].to(tl.int64)
        x_at = outer * x_outer + lane[None, :] * x_lane + wide * x_class
        t_at = outer * t_outer + lane[None, :] * t_lane + wide * t_class
        x = tl.load(x_ptr + x_at, mask=inside, other=float("-inf")).to(FORM.DTYPE)
        t = tl.load(target_ptr + t_at, mask=inside, other=0.0).to(FORM.DTYPE)
        gap = tl.exp(difference(x, top, given, FORM)) * factor - t
        # What is left of 1 has more digits than a probability near it.
        at_pivot = tl.where(others < 0.5, (1.0 - t) - others, near - t)
        gap = tl.where(c[:, None] == pivot_class, at_pivot, gap)
        score += tl.sum(tl.where(inside, gap * gap, 0.0), 0).to(tl.float64)
    tl.store(brier_ptr + row, score.to(FORM.DTYPE), mask=here)


@triton.jit
def _added(sums_ptr, begin, end, TILE: tl.constexpr):
    """Add up the sums of losses and of row weights of some programs, in a fixed order."""
    loss = tl.zeros((TILE,), tl.float64)
    weight = tl.zeros((TILE,), tl.float64)
    for done in range(begin, end, TILE):
        step = done + tl.arange(0, TILE)
        place = sums_ptr + 2 * step.to(tl.int64)
        loss += tl.load(place, mask=step < end, other=0.0)
        weight += tl.load(place + 1, mask=step < end, other=0.0)
    return tl.sum(loss, 0), tl.sum(weight, 0)


@triton.jit
def add_up(sums_ptr, added_ptr, programs, chunk, TILE: tl.constexpr):
    """Add up the sums of a chunk of the programs: where there are too many for one program."""
    program = tl.program_id(0)
    begin = program * chunk
    loss, weight = _added(sums_ptr, begin, tl.minimum(begin + chunk, programs), TILE)
    place = added_ptr + 2 * program.to(tl.int64)
    tl.store(place, loss)
    tl.store(place + 1, weight)


@triton.jit
def reduce(
    added_ptr, result_ptr, denominator_ptr, normalizer_ptr, programs, normalizer: tl.float64,
    MEAN: tl.constexpr, NORMALIZER: tl.constexpr, TILE: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """Add up what is left of the programs' sums in one program, and divide."""
    result, weight = _added(added_ptr, 0, programs, TILE)
    if MEAN:
        denominator = weight
        if NORMALIZER == "number":
            denominator = tl.sum(tl.full((1,), normalizer, tl.float64), 0)
        elif NORMALIZER == "tensor":
            denominator = tl.load(normalizer_ptr).to(tl.float64)
        tl.store(denominator_ptr, denominator)
        result = result / denominator
    tl.store(result_ptr, narrow(result, result_ptr.dtype.element_ty, EMULATED))
