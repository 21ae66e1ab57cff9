"""dask: a task for each block of rows, which does what a call on the block would do.

Every task gets the whole head. Their parts of its gradient are added up in pairs, since each is as
large as the head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from polyce.arrays import dtypes
from polyce.arrays.library import Library
from polyce.call.problem import Head, Operands
from polyce.formula import stats, targets
from polyce.formula.stats import Stats
from polyce.formula.targets import Plan
from polyce.implementations import registry
from polyce.implementations.dask import path as dask
from polyce.implementations.dask.blocks import itself, of_chunk, with_dtypes
from polyce.linear import compute
from polyce.linear.call import NONE, Gradients, HeadCall


def loss(call: HeadCall) -> tuple[Any, Stats | None]:
    """Compute the loss and the stats."""
    result, _, found = loss_and_gradients(call, NONE)
    return result, found


def loss_and_gradients(call: HeadCall, wanted: Gradients) -> tuple[Any, Gradients, Stats | None]:
    """Compute the loss, the gradients wanted and the stats, all of them lazy."""
    import dask.array as da

    whole, hidden = call.whole, call.operands.logits
    # Blocks of whole hidden states.
    hidden = hidden.rechunk({hidden.ndim - 1: -1})
    chunks = (*hidden.chunks[:-1], (whole.classes,))
    operands = dask.cut_beside(whole, call.operands, chunks)
    plan = _plan(call, operands)
    cotangent = targets.cotangent(whole, plan, operands.grad_output)
    axes, lead = tuple(range(hidden.ndim)), tuple(range(hidden.ndim - 1))
    results = da.blockwise(
        partial(_block, _bare(call), wanted, hidden.dtype),
        axes,
        *(hidden, axes),
        *(operands.target, lead if whole.kind == "index" else axes),
        *dask.paired(operands.sample_weight, lead),
        *dask.scale(whole, cotangent, hidden),
        *dask.in_one(operands.weight),
        *dask.in_one(call.head.weight),
        *dask.in_one(call.head.bias),
        *dask.paired(operands.grad_lse, lead),
        *dask.paired(operands.grad_entropy, lead),
        *dask.paired(operands.target_probability, axes),
        *dask.in_one(operands.teacher_weight),
        *dask.in_one(operands.teacher_bias),
        adjust_chunks={axes[-1]: 1},
        align_arrays=False,
        token="polyce-linear",
        meta=hidden._meta,
    )
    summed = whole.options.reduction != "none"
    cuts = (1,) * len(axes) if summed else results.chunks
    # A block's result is kept until all of it is taken. The parts of the head's gradient are as
    # large as the head: taken last, they are added up at once, and dask does not keep many.
    rows = dask.take(whole, results, 0, whole.row_dtype, cuts)
    of_rows = _stats(call, results)
    first, of_input = [rows, *(array for array in of_rows or () if array is not None)], None
    if wanted.input:
        of_input = dask.take(whole, results, 1, hidden.dtype, hidden.chunks)
        first.append(of_input)
        of_input = of_input.rechunk(call.operands.logits.chunks)
    of_bias = _of_head(call, results, 3, first) if wanted.linear_bias else None
    of_weight = _of_head(call, results, 2, first) if wanted.linear_weight else None
    found = Gradients(of_input, of_weight, of_bias)
    if summed:
        rows = rows.rechunk(dict.fromkeys(axes, dask.FAN_IN))
    if of_rows is not None:
        of_rows = Stats(*(a if a is None else da.squeeze(a, axis=axes[-1]) for a in of_rows))
    return targets.reduce(whole, plan, rows), found, of_rows


def _bare(call: HeadCall) -> HeadCall:
    """Return the call without its arrays; only the reference is named, for blocks too."""
    bare = call.without_arrays()
    return replace(bare, name=bare.name if bare.name == "reference" else None)


def _stats(call: HeadCall, results: Any) -> Stats | None:
    """Take the stats asked for out of the blocks' results, with a last axis of length 1."""
    asked = stats.unfilled(call.whole, lambda shape, dtype: dtype)
    if asked is None:
        return None
    entries = enumerate(asked, start=4)
    return Stats(
        *(
            None if dtype is None else dask.take(call.whole, results, index, dtype)
            for index, dtype in entries
        )
    )


def _plan(call: HeadCall, operands: Operands) -> Plan:
    """Read the target, and the mean's denominator block by block; NumPy labels are checked now."""
    whole, given = call.whole, call.operands
    # The blocks look up the class weights of their labels.
    found = replace(call, operands=given._replace(weight=None)).planned().plan
    denominator = found.denominator
    if whole.kind == "index" and whole.options.reduction == "mean" and not whole.normalized:
        denominator = dask.total_weight(whole, operands)
    return found._replace(denominator=denominator)


def _of_head(call: HeadCall, results: Any, index: int, first: Sequence[Any]) -> Any:
    """Add up the blocks' parts of the gradient of weight or bias, flat along the last axis."""
    import dask.array as da

    like = call.head[index - 2]
    lead = tuple(range(results.ndim - 1))
    cuts = (*(1,) * len(lead), (like.size,))
    parts = dask.take(call.whole, results, index, call.sum_dtype, cuts, first)
    if not parts.size:
        return da.zeros_like(like)
    total = da.reduction(
        parts,
        chunk=itself,
        combine=_added,
        aggregate=_added,
        axis=lead,
        keepdims=True,
        concatenate=False,
        split_every=dict.fromkeys(lead, 2),
        dtype=call.sum_dtype,
        meta=parts._meta,
    )
    return total.reshape(like.shape).astype(like.dtype)


# What dask's tasks run, on blocks of the chunk's own library.


def _block(
    bare: HeadCall,
    wanted: Gradients,
    dtype: Any,
    hidden: Any,
    target: Any,
    sample_weight: Any,
    cotangent: Any,
    class_weight: Any,
    weight: Any,
    bias: Any,
    grad_lse: Any,
    grad_entropy: Any,
    probability: Any,
    teacher_weight: Any,
    teacher_bias: Any,
) -> tuple[Any, ...]:
    """Compute a block's losses, or their sum, its parts of the gradients wanted, and the stats."""
    summed = bare.whole.options.reduction != "none"
    whole = of_chunk(bare.whole, hidden, (*hidden.shape[:-1], bare.whole.classes))
    library, xp = whole.library, whole.xp
    hidden, weight, bias = _in_one_dtype(library, hidden, weight, bias)
    if teacher_weight is not None:
        teacher = _in_one_dtype(library, target, teacher_weight, teacher_bias)
        target, teacher_weight, teacher_bias = teacher
    whole, _ = with_dtypes(whole, hidden, target, probability)
    product = library.product_dtype(hidden.dtype, hidden)
    whole = whole._replace(logits_dtype=product)
    if teacher_weight is not None:
        product = library.product_dtype(target.dtype, target)
        whole = whole._replace(teacher_dtype=product, target_dtype=dtypes.name_of(product))
    if cotangent is not None:
        ones = xp.ones(whole.row_shape, dtype=whole.row_dtype)
        cotangent = ones * (cotangent[..., 0] if getattr(cotangent, "ndim", 0) else cotangent)
    call = replace(
        bare,
        whole=whole._replace(result_dtype=whole.row_dtype),
        operands=Operands(
            *(hidden, target, class_weight, sample_weight, None, cotangent),
            *(grad_lse, grad_entropy, probability, teacher_weight, teacher_bias),
        ),
        head=Head(weight, bias),
    )
    # `use` applies to dask's arrays, not to chunks.
    name = bare.name or registry.select_within(call.part(call.chunks.rows)).name
    call = replace(call, name=name)
    rows, sums, _, found = compute.loss_and_sums(call, wanted)
    lead = (1,) * (hidden.ndim - 1)
    rows = xp.reshape(xp.sum(rows), (*lead, 1)) if summed else rows[..., None]
    of_hidden = compute.finish(call, sums._replace(linear_weight=None, linear_bias=None)).input
    if of_hidden is not None:
        of_hidden = library.cast(of_hidden, dtype)
    of_head = (
        None
        if a is None
        else xp.reshape(library.cast(a, bare.sum_dtype), (*lead, math.prod(a.shape)))
        for a in sums[1:]
    )
    of_rows = (None if a is None else a[..., None] for a in found or ())
    return rows, of_hidden, *of_head, *of_rows


def _in_one_dtype(library: Library, *arrays: Any) -> list[Any]:
    """Convert factors to the widest dtype: dask's arrays have one, but their chunks may deviate."""
    widest = max((a for a in arrays if a is not None), key=lambda a: a.itemsize)
    return [a if a is None else library.cast(a, widest.dtype) for a in arrays]


def _added(parts: Any, axis: Any, keepdims: Any) -> Any:
    while isinstance(parts, list) and len(parts) == 1:
        parts = parts[0]
    if not isinstance(parts, list):
        return parts
    first, *rest = (_added(part, axis, keepdims) for part in parts)
    return sum(rest, start=first)
