"""The kernels of the gradient, which read the logits once more and write it once.

What a row needs was saved, so no program reads a logit that another may have overwritten.
"""

import triton
import triton.language as tl

from polyce.implementations.triton.arithmetic import narrow
from polyce.implementations.triton.entries import classes_at, entries_at
from polyce.implementations.triton.records import Inputs
from polyce.implementations.triton.row import difference, numbers, slope
from polyce.implementations.triton.saving import read_saved
from polyce.implementations.triton.teacher import teacher_coefficients
from polyce.implementations.triton.tiles import (
    body,
    coefficients,
    edge,
    far_steps,
    lanes,
    neighbours,
    target,
    to_load,
)


@triton.jit
def row_cotangent(
    cotangent_ptr, cotangent, denominator, row, here, sample, given,
    MEAN: tl.constexpr, BY_ROW: tl.constexpr, NUMBER: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Compute what the gradients of rows are multiplied by."""
    if NUMBER:
        g = tl.full((1,), cotangent, tl.float64)
    elif BY_ROW:
        g = tl.load(cotangent_ptr + row, mask=here, other=0.0).to(tl.float64)
    else:
        g = tl.load(cotangent_ptr + tl.arange(0, 1)).to(tl.float64)
    if FORM.SAMPLED:
        g = g * sample
    if MEAN:
        g = g / denominator
    if FORM.TRANSFORM == "scale":
        g = g * given.scale
    return g.to(FORM.DTYPE)


@triton.jit
def _besides_the_pivot(x, r, g, given, saved, SPREAD: tl.constexpr, FORM: tl.constexpr):
    """Compute the gradient of classes besides the pivot; r is 0 without SPREAD."""
    gap = difference(x, saved.top, given, FORM)
    p = tl.exp(gap)
    grad = p * (saved.factor * g)
    if SPREAD:
        # Scaled last: an infinite scale, from a total weight of 0, would leave inf - inf.
        grad = (saved.factor * p - r) * g
    if FORM.VALUED:
        grad += tl.where(p == 0.0, 0.0, p * (saved.more - gap * saved.by_gap))
    if FORM.TRANSFORM == "softcap":
        grad = grad * slope(x, given, FORM)
    return grad


@triton.jit
def _gradient(
    x_ptr, target_ptr, weight_ptr, grad_ptr, c, inside, meaning, classes, given, g, saved,
    FORM: tl.constexpr,
):  # fmt: skip
    """Write a tile of the gradient, possibly over its logits, which are read first."""
    x = tl.load(x_ptr, mask=to_load(inside, meaning.counted), other=float("-inf")).to(FORM.DTYPE)
    put_gradient(
        x, target_ptr, weight_ptr, grad_ptr, c, inside, meaning, classes, given, g, saved, FORM
    )


@triton.jit
def put_gradient(
    x, target_ptr, weight_ptr, grad_ptr, c, inside, meaning, classes, given, g, saved,
    FORM: tl.constexpr,
):  # fmt: skip
    """Write a tile of the gradient."""
    counted = meaning.counted
    loaded = to_load(inside, counted)
    r = x
    if FORM.TEACHER:
        r = teacher_coefficients(target_ptr, weight_ptr, c, loaded, classes, given, saved, FORM)
    elif FORM.SPREAD:
        r, _ = coefficients(x, target_ptr, weight_ptr, c, loaded, loaded, classes, given, FORM)
    grad = _besides_the_pivot(x, r, g, given, saved, FORM.SPREAD, FORM)
    pivot_grad = saved.pivot_grad * g
    if FORM.VALUED:
        pivot_grad += saved.pivot_more
    grad = tl.where(c[:, None] == saved.pivot_class, pivot_grad, grad)
    if FORM.VALUED and FORM.LABELED:
        label_grad = saved.label_grad * g + saved.label_more
        grad = tl.where(c[:, None] == meaning.label, label_grad, grad)
    grad = tl.where(counted, grad, 0.0)
    grad = tl.where(meaning.invalid, float("nan"), grad)
    tl.store(grad_ptr, narrow(grad, grad_ptr.dtype.element_ty, FORM.EMULATED), mask=inside)


@triton.jit
def backward(
    x_ptr, target_ptr, weight_ptr, sample_ptr, chance_ptr,
    saved_ptr, denominator_ptr, cotangent_ptr, grad_ptr,
    units, inner, blocks, chunk, lead, entries,
    x_outer, x_lane, x_class, t_outer, t_lane, t_class, g_outer, g_lane, g_class,
    ignore_index: tl.int64,
    kept: tl.float64, share: tl.float64, scale: tl.float64, cap: tl.float64,
    teacher_scale: tl.float64, cotangent: tl.float64,
    FORM: tl.constexpr, MEAN: tl.constexpr, BY_ROW: tl.constexpr, NUMBER: tl.constexpr,
    PEEL: tl.constexpr, IN_STEP: tl.constexpr, GRAD_IN_STEP: tl.constexpr,
    UNIT: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
    BY_TWO: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the classes that the program's second number selects.

    What a row needs was saved, so no program reads a logit that another may have overwritten.
    """
    outer, line, lane, here = lanes(inner, blocks, LANES)
    row = outer * inner + lane
    classes = units * UNIT
    given = numbers(kept, share, scale, cap, teacher_scale)
    inputs = Inputs(target_ptr, weight_ptr, sample_ptr, chance_ptr, entries)
    meaning = target(inputs, row, here, classes, ignore_index, FORM)
    saved = read_saved(saved_ptr, row, here, meaning.label, FORM)
    denominator = tl.load(denominator_ptr) if MEAN else cotangent
    g = row_cotangent(
        cotangent_ptr, cotangent, denominator, row, here, meaning.sample, given,
        MEAN, BY_ROW, NUMBER, FORM,
    )  # fmt: skip
    x_at = outer * x_outer + line * x_lane
    t_at = outer * t_outer + line * t_lane
    g_at = outer * g_outer + line * g_lane
    if LANES > 1:
        others = neighbours(LANES, BY_TWO)
        x_at = x_at + others * x_lane
        t_at = t_at + others * t_lane
        g_at = g_at + others * g_lane

    part = tl.program_id(1)
    start = 0
    stop = classes
    if PEEL:
        start, stop = body(x_at + lead, classes, VECTOR)
        if part == 0:
            c, ends = edge(start, stop, classes, VECTOR)
            wide = c[:, None].to(tl.int64)
            _gradient(
                x_ptr + x_at + wide * x_class, target_ptr + t_at + wide * t_class,
                weight_ptr, grad_ptr + g_at + wide * g_class, c, ends[:, None] & here[None, :],
                meaning, classes, given, g, saved, FORM,
            )  # fmt: skip
    # Rows begin on 16-byte boundaries here. The division tells the compiler so; the promise does
    # where the array itself does not begin on one.
    x_row = x_ptr + x_at
    t_row = target_ptr + t_at + start * t_class
    g_row = grad_ptr + g_at + start * g_class
    if PEEL or UNIT > 1:
        x_row = x_ptr - lead + (x_at + lead + start) // VECTOR * VECTOR
        x_row = tl.multiple_of(x_row, 16 if LANES == 1 else (16, 16))
    if IN_STEP:
        t_row = target_ptr - lead + (t_at + lead + start) // VECTOR * VECTOR
        t_row = tl.multiple_of(t_row, 16 if LANES == 1 else (16, 16))
    if GRAD_IN_STEP:
        g_row = grad_ptr - lead + (g_at + lead + start) // VECTOR * VECTOR
        g_row = tl.multiple_of(g_row, 16 if LANES == 1 else (16, 16))
    length = stop - start
    begin = part * chunk
    end = tl.minimum(begin + chunk, length)
    for done in range(begin, end, TILE):
        step = done + tl.arange(0, TILE)
        wide = far_steps(step, LANES, BY_TWO)
        _gradient(
            x_row + wide * x_class, t_row + wide * t_class,
            weight_ptr, g_row + wide * g_class, start + step,
            (step < length)[:, None] & here[None, :],
            meaning, classes, given, g, saved, FORM,
        )  # fmt: skip


@triton.jit
def at_entries(
    x_ptr, target_ptr, weight_ptr, sample_ptr, chance_ptr,
    saved_ptr, denominator_ptr, cotangent_ptr, found_ptr,
    classes, inner, rows, entries,
    x_outer, x_lane, x_class,
    ignore_index: tl.int64,
    kept: tl.float64, share: tl.float64, scale: tl.float64, cap: tl.float64,
    teacher_scale: tl.float64, cotangent: tl.float64,
    FORM: tl.constexpr, MEAN: tl.constexpr, BY_ROW: tl.constexpr, NUMBER: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Compute the gradient at the classes of entries, before it may overwrite their logits."""
    place, row, here = _places(rows, entries, TILE)
    given = numbers(kept, share, scale, cap, teacher_scale)
    inputs = Inputs(target_ptr, weight_ptr, sample_ptr, chance_ptr, entries)
    meaning = target(inputs, row, here, classes, ignore_index, FORM)
    saved = read_saved(saved_ptr, row, here, meaning.label, FORM)
    denominator = tl.load(denominator_ptr) if MEAN else cotangent
    g = row_cotangent(
        cotangent_ptr, cotangent, denominator, row, here, meaning.sample, given,
        MEAN, BY_ROW, NUMBER, FORM,
    )  # fmt: skip
    counted = meaning.counted
    own = entries_at(inputs, place, counted, classes, ignore_index, given, FORM)
    x_at = row // inner * x_outer + row % inner * x_lane + own.number.to(tl.int64) * x_class
    x = tl.load(x_ptr + x_at, mask=own.used, other=0.0).to(FORM.DTYPE)
    r = tl.zeros_like(x)
    if FORM.SMOOTHED:
        r += given.share.to(FORM.DTYPE)
        if FORM.WEIGHTED:
            r = r * tl.load(weight_ptr + own.number, mask=own.used, other=0.0).to(FORM.DTYPE)
    # Those of one class add up.
    for k in range(entries):
        other = entries_at(inputs, row * entries + k, counted, classes, ignore_index, given, FORM)
        r += tl.where(other.used & (other.number == own.number), other.coefficient, 0.0)
    grad = _besides_the_pivot(x, r, g, given, saved, True, FORM)
    grad = narrow(grad, found_ptr.dtype.element_ty, FORM.EMULATED)
    tl.store(found_ptr + place, grad, mask=own.used)


@triton.jit
def put_entries(
    target_ptr, weight_ptr, sample_ptr, chance_ptr, saved_ptr, found_ptr, grad_ptr,
    classes, inner, rows, entries,
    g_outer, g_lane, g_class,
    ignore_index: tl.int64,
    FORM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write what `at_entries` has found over the gradient without entries, but at the pivot."""
    place, row, here = _places(rows, entries, TILE)
    inputs = Inputs(target_ptr, weight_ptr, sample_ptr, chance_ptr, entries)
    counted = target(inputs, row, here, classes, ignore_index, FORM).counted
    number, used, _ = classes_at(inputs, place, counted, classes, ignore_index, FORM)
    saved = read_saved(saved_ptr, row, here, number, FORM)
    used = used & (number != saved.pivot_class)
    grad = tl.load(found_ptr + place, mask=used, other=0.0)
    g_at = row // inner * g_outer + row % inner * g_lane + number.to(tl.int64) * g_class
    tl.store(grad_ptr + g_at, grad, mask=used)


@triton.jit
def _places(rows, entries, TILE: tl.constexpr):
    """Return this program's entries, their rows, and which exist."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    row = place // entries
    return place, row, row < rows
