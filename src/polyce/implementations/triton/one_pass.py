"""The kernels of loss and gradient in one pass: the logits stay in registers between the two.

Each program has whole rows in one tile. It reads all of them before it writes, so the gradient may
take the logits' place.
"""

import triton
import triton.language as tl

from polyce.implementations.triton.gradient import put_gradient, row_cotangent
from polyce.implementations.triton.records import Inputs, Outputs
from polyce.implementations.triton.row import numbers
from polyce.implementations.triton.tiles import (
    body,
    conclude,
    edge,
    far_steps,
    lanes,
    neighbours,
    nothing_read,
    take,
    target,
    to_load,
)


@triton.jit
def both(
    x_ptr, target_ptr, weight_ptr, sample_ptr, chance_ptr,
    loss_ptr, sums_ptr,
    lse_ptr, entropy_ptr, prediction_ptr, correct_ptr, valid_ptr,
    top_probability_ptr, brier_ptr, rank_ptr,
    weights_ptr, normalizer_ptr, cotangent_ptr, grad_ptr,
    units, inner, blocks, lead, entries, weighers,
    x_outer, x_lane, x_class, g_outer, g_lane, g_class,
    ignore_index: tl.int64,
    kept: tl.float64, share: tl.float64, z_loss: tl.float64, scale: tl.float64, cap: tl.float64,
    teacher_scale: tl.float64, normalizer: tl.float64, cotangent: tl.float64,
    FORM: tl.constexpr, MEAN: tl.constexpr, NORMALIZER: tl.constexpr, WEIGHERS: tl.constexpr,
    BY_ROW: tl.constexpr, NUMBER: tl.constexpr,
    PEEL: tl.constexpr, GRAD_IN_STEP: tl.constexpr,
    UNIT: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
    BY_TWO: tl.constexpr,
):  # fmt: skip
    """Read rows of labels once, and write their losses, stats and gradient."""
    outer, line, lane, here = lanes(inner, blocks, LANES)
    row = outer * inner + lane
    classes = units * UNIT
    given = numbers(kept, share, scale, cap, teacher_scale)
    inputs = Inputs(target_ptr, weight_ptr, sample_ptr, chance_ptr, entries)
    # What is not asked for, or not kept in memory, is not written.
    outputs = Outputs(
        loss_ptr, x_ptr, sums_ptr, lse_ptr, entropy_ptr, prediction_ptr, correct_ptr, valid_ptr,
        top_probability_ptr, brier_ptr, rank_ptr, x_ptr, x_ptr, x_ptr,
    )  # fmt: skip
    meaning = target(inputs, row, here, classes, ignore_index, FORM)
    x_at = outer * x_outer + line * x_lane
    g_at = outer * g_outer + line * g_lane
    if LANES > 1:
        others = neighbours(LANES, BY_TWO)
        x_at = x_at + others * x_lane
        g_at = g_at + others * g_lane
    seen = nothing_read(LANES, FORM)
    label_x = seen.state.top
    if FORM.RANK:
        label_at = outer * x_outer + lane * x_lane + meaning.label.to(tl.int64) * x_class
        label_x = tl.load(x_ptr + label_at, mask=meaning.counted, other=0.0).to(FORM.DTYPE)

    start = 0
    stop = classes
    x_row = x_ptr + x_at
    g_row = grad_ptr + g_at
    if PEEL:
        start, stop = body(x_at + lead, classes, VECTOR)
        g_row = grad_ptr + g_at + start * g_class
    if PEEL or UNIT > 1:
        x_row = x_ptr - lead + (x_at + lead + start) // VECTOR * VECTOR
        x_row = tl.multiple_of(x_row, 16 if LANES == 1 else (16, 16))
    if GRAD_IN_STEP:
        g_row = grad_ptr - lead + (g_at + lead + start) // VECTOR * VECTOR
        g_row = tl.multiple_of(g_row, 16 if LANES == 1 else (16, 16))
    step = tl.arange(0, TILE)
    wide = far_steps(step, LANES, BY_TWO)
    there = (step < stop - start)[:, None] & here[None, :]
    loaded = to_load(there, meaning.counted)
    x = tl.load(x_row + wide * x_class, mask=loaded, other=float("-inf")).to(FORM.DTYPE)
    if PEEL:
        c, ends = edge(start, stop, classes, VECTOR)
        c_wide = c[:, None].to(tl.int64)
        at_ends = ends[:, None] & here[None, :]
        loaded = to_load(at_ends, meaning.counted)
        x_ends = tl.load(x_ptr + x_at + c_wide * x_class, mask=loaded, other=float("-inf"))
        x_ends = x_ends.to(FORM.DTYPE)
        seen = take(
            x_ends, target_ptr, weight_ptr, c, at_ends, meaning, label_x, classes, given, seen, FORM
        )
    seen = take(
        x, target_ptr, weight_ptr, start + step, there, meaning, label_x, classes, given, seen, FORM
    )
    saved = conclude(
        x_ptr + outer * x_outer + lane * x_lane, inputs, outputs,
        row, here, classes, x_class, ignore_index, given, tl.full((1,), z_loss, tl.float64), seen,
        FORM,
    )  # fmt: skip

    denominator = normalizer
    if MEAN:
        if NORMALIZER == "tensor":
            denominator = tl.load(normalizer_ptr).to(tl.float64)
        elif NORMALIZER == "none":
            weigher = tl.arange(0, WEIGHERS)
            weights = tl.load(weights_ptr + weigher, mask=weigher < weighers, other=0.0)
            denominator = tl.sum(weights, 0)
    g = row_cotangent(
        cotangent_ptr, cotangent, denominator, row, here, meaning.sample, given,
        MEAN, BY_ROW, NUMBER, FORM,
    )  # fmt: skip
    # All threads have read the label's logit now.
    tl.debug_barrier()
    if PEEL:
        put_gradient(
            x_ends, target_ptr, weight_ptr, grad_ptr + g_at + c_wide * g_class, c, at_ends,
            meaning, classes, given, g, saved, FORM,
        )  # fmt: skip
    put_gradient(
        x, target_ptr, weight_ptr, g_row + wide * g_class, start + step, there,
        meaning, classes, given, g, saved, FORM,
    )  # fmt: skip


@triton.jit
def weigh(
    target_ptr, weight_ptr, sample_ptr, chance_ptr, weights_ptr,
    classes, rows, chunk, entries,
    ignore_index: tl.int64,
    FORM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Add up the weights of a chunk of the rows, from their labels alone."""
    program = tl.program_id(0).to(tl.int64)
    inputs = Inputs(target_ptr, weight_ptr, sample_ptr, chance_ptr, entries)
    total = tl.zeros((TILE,), tl.float64)
    begin = program * chunk
    # A chunk is a whole number of tiles.
    for done in range(0, chunk, TILE):
        row = begin + done + tl.arange(0, TILE)
        meaning = target(inputs, row, row < rows, classes, ignore_index, FORM)
        total += tl.where(meaning.counted, meaning.sample * meaning.weight, 0.0)
    tl.store(weights_ptr + program, tl.sum(total, 0))
