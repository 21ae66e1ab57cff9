"""What the triton kernels do with a tile: read its target and logits, and write the results.

A tile has classes along its first axis and rows, the lanes, along its second.
"""

import triton
import triton.language as tl

from polyce.implementations.triton.row import (
    count_label,
    finish,
    merge,
    narrow,
    slope,
    tile_state,
)


@triton.jit
def lanes(inner, blocks, LANES: tl.constexpr):
    """Return this program's outer index, its first row within that, its rows, and which exist."""
    program = tl.program_id(0)
    outer = (program // blocks).to(tl.int64)
    first = (program % blocks).to(tl.int64) * LANES
    lane = first + tl.arange(0, LANES)
    return outer, first, lane, lane < inner


@triton.jit
def body(offset, classes, VECTOR: tl.constexpr):
    """Return the range of a row's classes that whole 16-byte loads cover.

    `offset` is where the row begins, in elements from a 16-byte boundary.
    """
    start = tl.minimum((VECTOR - offset % VECTOR) % VECTOR, classes).to(tl.int32)
    return start, start + (classes - start) // VECTOR * VECTOR


@triton.jit
def edge(start, stop, classes, VECTOR: tl.constexpr):
    """Return the classes before and after that range as one small tile, and which of them exist."""
    step = tl.arange(0, 2 * VECTOR)
    c = tl.where(step < VECTOR, step, stop + step - VECTOR)
    return c, tl.where(step < VECTOR, step < start, c < classes)


@triton.jit
def target(
    target_ptr,
    weight_ptr,
    sample_ptr,
    row,
    here,
    classes,
    ignore_index,
    DTYPE: tl.constexpr,
    PROBABILITY: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SAMPLED: tl.constexpr,
    IGNORES: tl.constexpr,
):
    """Return each row's label, always in range, class weight, sample weight, counted, invalid."""
    counted = here
    sample = tl.full(row.shape, 1.0, tl.float64)
    if SAMPLED:
        sample = tl.load(sample_ptr + row, mask=here, other=0.0).to(tl.float64)
        counted = counted & (sample != 0.0)
    label = tl.zeros(row.shape, tl.int32)
    weight = tl.full(row.shape, 1.0, DTYPE)
    invalid = here & (label != 0)
    if not PROBABILITY:
        given = tl.load(target_ptr + row, mask=here, other=0).to(tl.int64)
        if IGNORES:
            counted = counted & (given != ignore_index)
        invalid = counted & ((given < 0) | (given >= classes))
        label = tl.where(counted & (invalid == 0), given, 0).to(tl.int32)
        if WEIGHTED:
            weight = tl.load(weight_ptr + label, mask=here, other=1.0).to(DTYPE)
            weight = tl.where(invalid, 1.0, weight)
    return label, weight, sample, counted, invalid


@triton.jit
def coefficients(
    x,
    target_ptr,
    weight_ptr,
    c,
    inside,
    classes,
    kept,
    share,
    DTYPE: tl.constexpr,
    PROBABILITY: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SMOOTHED: tl.constexpr,
):
    """Compute a tile of the r_c without the label's own share, and of the probabilities."""
    probability = x
    r = tl.zeros_like(x)
    if PROBABILITY:
        probability = tl.load(target_ptr, mask=inside, other=0.0).to(DTYPE)
        r = probability
        if SMOOTHED:
            r = r * kept.to(DTYPE) + share.to(DTYPE)
    elif SMOOTHED:
        r += share.to(DTYPE)
    if WEIGHTED and (PROBABILITY or SMOOTHED):
        known = (c < classes)[:, None]
        r = r * tl.load(weight_ptr + c[:, None], mask=known, other=0.0).to(DTYPE)
    return tl.where(inside, r, 0.0), probability


@triton.jit
def choose_pivot(
    top, total, rest, excess, entropy,
    pivot, pivot_r, pivot_class,
    other, other_r, other_class,
    scale, cap,
    TRANSFORM: tl.constexpr, DTYPE: tl.constexpr, SPREAD: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """Choose the larger of two pivots, the first if equal, and count the other among the rest."""
    wins = (other > pivot) | ((other == pivot) & (other_class < pivot_class))
    loser = tl.where(wins, pivot, other)
    loser_r = tl.where(wins, pivot_r, other_r)
    # A masked class adds nothing to the sum; with a coefficient it makes the loss infinite, when
    # the merge moves it up from -inf.
    found = tl.where(loser == float("-inf"), 0.0, 1.0).to(tl.float64)
    top, total, rest, excess, entropy = merge(
        top, total, rest, excess, entropy,
        loser, found, loser_r.to(tl.float64), tl.zeros_like(total), tl.zeros_like(total),
        scale, cap, TRANSFORM, DTYPE, SPREAD, ENTROPY,
    )  # fmt: skip
    pivot = tl.where(wins, other, pivot)
    pivot_r = tl.where(wins, other_r, pivot_r)
    pivot_class = tl.where(wins, other_class, pivot_class)
    return top, total, rest, excess, entropy, pivot, pivot_r, pivot_class


@triton.jit
def nothing_read(LANES: tl.constexpr, DTYPE: tl.constexpr):
    """Return the state of rows before any class is read; 0x7FFFFFFF stands for no class."""
    lowest = tl.full((LANES,), float("-inf"), DTYPE)
    none = tl.full((LANES,), 0x7FFFFFFF, tl.int32)
    zero = tl.zeros((LANES,), tl.float64)
    return (
        lowest, zero, zero, zero, zero,
        lowest, tl.zeros((LANES,), DTYPE), none, lowest, none,
    )  # fmt: skip


@triton.jit
def read(
    x_ptr, target_ptr, weight_ptr, c, inside, label, classes, kept, share, scale, cap,
    top, total, rest, excess, entropy,
    pivot, pivot_r, pivot_class, likeliest, likeliest_class,
    TRANSFORM: tl.constexpr, DTYPE: tl.constexpr, PROBABILITY: tl.constexpr,
    WEIGHTED: tl.constexpr, SMOOTHED: tl.constexpr, SPREAD: tl.constexpr,
    LARGEST: tl.constexpr, ENTROPY: tl.constexpr, CORRECT: tl.constexpr,
):  # fmt: skip
    """Read a tile, once, into the state of its rows.

    LARGEST tells whether the pivot is the class of the largest logit, not the label. A label then
    gets its share of the smoothing here, and the rest of its coefficient in `conclude`.
    """
    x = tl.load(x_ptr, mask=inside, other=float("-inf")).to(DTYPE)
    r, probability = coefficients(
        x, target_ptr, weight_ptr, c, inside, classes, kept, share,
        DTYPE, PROBABILITY, WEIGHTED, SMOOTHED,
    )  # fmt: skip
    number = c[:, None]
    if LARGEST:
        new = tl.max(x, 0)
        # The largest 32-bit number stands for no class, in an empty tile.
        new_class = tl.min(tl.where((x == new) & inside, number, 0x7FFFFFFF), 0)
        excluded = number == new_class
        new_r = tl.sum(tl.where(excluded, r, 0.0), 0)
        if PROBABILITY and CORRECT:
            known = tl.where(inside, probability, float("-inf"))
            most = tl.max(known, 0)
            most_class = tl.min(tl.where((known == most) & inside, number, 0x7FFFFFFF), 0)
            better = (most > likeliest) | ((most == likeliest) & (most_class < likeliest_class))
            likeliest = tl.where(better, most, likeliest)
            likeliest_class = tl.where(better, most_class, likeliest_class)
    else:
        excluded = number == label
    t_top, t_total, t_rest, t_excess, t_entropy = tile_state(
        x, r, excluded, scale, cap, TRANSFORM, DTYPE, SPREAD, ENTROPY
    )
    top, total, rest, excess, entropy = merge(
        top, total, rest, excess, entropy, t_top, t_total, t_rest, t_excess, t_entropy,
        scale, cap, TRANSFORM, DTYPE, SPREAD, ENTROPY,
    )  # fmt: skip
    if LARGEST:
        top, total, rest, excess, entropy, pivot, pivot_r, pivot_class = choose_pivot(
            top, total, rest, excess, entropy, pivot, pivot_r, pivot_class,
            new, new_r, new_class, scale, cap, TRANSFORM, DTYPE, SPREAD, ENTROPY,
        )  # fmt: skip
    return (
        top, total, rest, excess, entropy,
        pivot, pivot_r, pivot_class, likeliest, likeliest_class,
    )  # fmt: skip


@triton.jit
def conclude(
    x_row, target_ptr, weight_ptr, sample_ptr,
    loss_ptr, saved_ptr, sums_ptr,
    lse_ptr, entropy_ptr, prediction_ptr, correct_ptr, valid_ptr,
    row, here, classes, x_class, ignore_index, kept, share, z_loss, scale, cap,
    top, total, rest, excess, entropy,
    pivot, pivot_r, pivot_class, likeliest_class,
    TRANSFORM: tl.constexpr, DTYPE: tl.constexpr, PROBABILITY: tl.constexpr,
    WEIGHTED: tl.constexpr, SAMPLED: tl.constexpr, SMOOTHED: tl.constexpr,
    SPREAD: tl.constexpr, LARGEST: tl.constexpr, PENALTY: tl.constexpr, IGNORES: tl.constexpr,
    REDUCED: tl.constexpr, KEEP: tl.constexpr, STATS: tl.constexpr,
    LSE: tl.constexpr, ENTROPY: tl.constexpr, PREDICTION: tl.constexpr, CORRECT: tl.constexpr,
    EMULATED: tl.constexpr,
):  # fmt: skip
    """Write the results of whole rows: losses or their sums, stats, what backward needs."""
    label, weight, sample, counted, invalid = target(
        target_ptr, weight_ptr, sample_ptr, row, here, classes, ignore_index,
        DTYPE, PROBABILITY, WEIGHTED, SAMPLED, IGNORES,
    )  # fmt: skip
    if not PROBABILITY:
        # Labels that are used are in range, so nothing outside is read.
        at = x_row + label.to(tl.int64) * x_class
        label_x = tl.load(at, mask=counted & (label < classes), other=0.0).to(DTYPE)
        label_r = weight
        if SMOOTHED:
            label_r = weight * (kept + share).to(DTYPE)
        if LARGEST:
            leads = label == pivot_class
            pivot_r = tl.where(leads, label_r, pivot_r)
            added = tl.where(leads | (kept == 0.0), 0.0, weight * kept.to(DTYPE))
            rest, excess, label_p = count_label(
                top, rest, excess, label_x, added, scale, cap, TRANSFORM, DTYPE
            )
        else:
            pivot, pivot_r, pivot_class = label_x, label_r, label
    loss, lse, entropy, factor, probability, sum_of_r, pivot_grad = finish(
        top, total, rest, excess, entropy, pivot, pivot_r, weight * z_loss.to(DTYPE), scale, cap,
        TRANSFORM, DTYPE, SPREAD or LARGEST, LARGEST, PENALTY, STATS, ENTROPY,
    )  # fmt: skip
    loss = tl.where(counted, loss.to(tl.float64) * sample, 0.0)
    loss = tl.where(invalid, float("nan"), loss)
    if REDUCED:
        place = sums_ptr + 2 * tl.program_id(0).to(tl.int64)
        tl.store(place, tl.sum(loss, 0))
        tl.store(place + 1, tl.sum(tl.where(counted, sample * weight, 0.0), 0))
    else:
        tl.store(loss_ptr + row, narrow(loss, loss_ptr.dtype.element_ty, EMULATED), mask=here)
    predicted = pivot_class
    if KEEP:
        if LARGEST and not PROBABILITY:
            # The backward pass does not know the stats: there the label is the pivot.
            pivot_grad = tl.where(leads, pivot_grad, sum_of_r * (label_p * factor) - label_r)
            factor = tl.where(leads, factor, probability)
            top = tl.where(leads, top, pivot)
            pivot, pivot_class = label_x, label
        factor = factor * sum_of_r
        if TRANSFORM == "softcap":
            pivot_grad = pivot_grad * slope(pivot, scale, cap, TRANSFORM, DTYPE)
        place = saved_ptr + 4 * row
        tl.store(place, tl.where(top == float("-inf"), 0.0, top).to(tl.float64), mask=here)
        tl.store(place + 1, factor.to(tl.float64), mask=here)
        tl.store(place + 2, pivot_grad.to(tl.float64), mask=here)
        tl.store(place + 3, pivot_class.to(tl.float64), mask=here)
    if STATS:
        tl.store(valid_ptr + row, counted.to(tl.uint8), mask=here)
        defined = counted & (lse == lse)
        if LSE:
            tl.store(lse_ptr + row, tl.where(counted, lse, float("nan")), mask=here)
        if ENTROPY:
            tl.store(entropy_ptr + row, tl.where(counted, entropy, float("nan")), mask=here)
        if PREDICTION or CORRECT:
            if PREDICTION:
                found = tl.where(defined, predicted, -1).to(tl.int64)
                tl.store(prediction_ptr + row, found, mask=here)
            if CORRECT:
                wanted = likeliest_class if PROBABILITY else label
                right = defined & (predicted == wanted) & (invalid == 0)
                tl.store(correct_ptr + row, right.to(tl.uint8), mask=here)
