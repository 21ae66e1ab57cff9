"""jax: chunks as the steps of a scan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from polyce.arrays import dtypes
from polyce.call.problem import Head, Operands
from polyce.formula.stats import Stats
from polyce.formula.targets import Plan
from polyce.linear import by_steps, chunks
from polyce.linear.call import Gradients, HeadCall


def run(
    call: HeadCall, wanted: Gradients, cotangents: Mapping[str, Any]
) -> tuple[Any, Gradients, Stats | None]:
    """Compute what `in_place.run` does."""
    call = with_plain_labels(call, call.plan)
    return traced(call.without_arrays(), wanted, call.operands, call.head, dict(cotangents))


def with_plain_labels(call: HeadCall, plan: Plan) -> HeadCall:
    """Return the call with jax labels: -1 for a row that does not count, C for a bad label.

    So are the classes of a sparse target, -1 where they are ignored, all C in a row with a bad one.
    The caller's may be NumPy labels, with values that jax without 64-bit types cannot hold.
    """
    whole, label, kept = call.whole, plan.label, plan.counted
    if whole.kind == "sparse":
        label, kept = plan.entries, plan.kept
    if label is None:
        return call
    if plan.invalid is not None:
        label = jnp.where(plan.invalid, whole.classes, label)
    if kept is not None:
        label = jnp.where(kept, label, -1)
    whole = whole.with_options(ignore_index=-1)
    whole = whole._replace(target_dtype=dtypes.dtype_name(label), check_labels=False)
    label = jnp.reshape(label, whole.target_shape)
    return replace(call, whole=whole, operands=call.operands._replace(target=label))


def spans(call: HeadCall) -> tuple[int, int]:
    """Return how many chunks are full, and the rows of the last one that is not."""
    return divmod(call.chunks.total, call.chunks.rows)


def cut(arrays: Any, start: Any, rows: int) -> Any:
    """Cut some rows out of each of the arrays."""
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, rows), arrays)


def described(bare: HeadCall, operands: Operands, head: Head) -> HeadCall:
    """Return the call with arrays and with its target read, but without reduction."""
    whole = bare.whole.with_options(reduction="none")._replace(normalized=False)
    return replace(bare, whole=whole, operands=operands, head=head).planned()


# The trace depends on the bare call alone, so each call is traced once.
@partial(jax.jit, static_argnums=(0, 1))
def traced(
    bare: HeadCall,
    wanted: Gradients,
    operands: Operands,
    head: Head,
    cotangents: Mapping[str, Any],
) -> tuple[Any, Gradients, Stats | None]:
    """Compute the losses of all rows, the sums of the gradients wanted, and the stats."""
    call = described(bare, operands, head)
    of_rows = (call.of_rows(cotangents), call.counted)

    def step(sums: Gradients, start: Any, rows: int) -> tuple[Gradients, Any]:
        of_weight = partial(_add_product, call, sums.linear_weight)
        part = cut(of_rows, start, rows)
        losses, found, stats = by_steps.step(call, wanted, *part, of_weight=of_weight)
        of_bias = found.linear_bias
        if of_bias is not None:
            of_bias = sums.linear_bias + of_bias
        return Gradients(None, found.linear_weight, of_bias), (losses, found.input, stats)

    full, tail = spans(call)
    size = min(call.chunks.rows, call.chunks.total)

    def add(sums: Gradients, number: Any) -> tuple[Gradients, Any]:
        return step(sums, number * size, size)

    sums = Gradients(None, *_zeros(call, wanted, cotangents))
    sums, parts = jax.lax.scan(add, sums, jnp.arange(full))
    parts = flat(parts)
    if tail:
        sums, last = step(sums, full * size, tail)
        parts = joined(parts, last)
    rows, of_input, stats = parts
    return rows, sums._replace(input=of_input), stats


def _add_product(call: HeadCall, total: Any, grad: Any, hidden: Any) -> Any:
    """Add a chunk's part of the head's gradient, on a CPU by blocks of classes.

    XLA cannot add a product in place there, and would hold one as large as the head. With several
    devices the classes may be sharded, and blocks would cut across the shards.
    """
    width, classes = call.chunks.classes, call.whole.classes
    is_alone = chunks.limits_of(call.whole) is chunks.CPU and jax.device_count() == 1
    if width >= classes or not is_alone:
        return total + by_steps.product(call, grad.T, hidden)

    def add(start: Any, total: Any, width: int) -> Any:
        block = jax.lax.dynamic_slice_in_dim(grad, start, width, axis=1)
        part = cut(total, start, width) + by_steps.product(call, block.T, hidden)
        return jax.lax.dynamic_update_slice_in_dim(total, part, start, axis=0)

    full, tail = divmod(classes, width)
    total = jax.lax.fori_loop(0, full, lambda i, total: add(i * width, total, width), total)
    return add(full * width, total, tail) if tail else total


def flat(parts: Any) -> Any:
    """Reshape the rows of chunks, (chunks, rows, ...), of each array into one axis."""
    return jax.tree.map(lambda a: jnp.reshape(a, (a.shape[0] * a.shape[1], *a.shape[2:])), parts)


def joined(parts: Any, last: Any) -> Any:
    """Append the rows of a last chunk to each array."""
    return jax.tree.map(lambda *pair: jnp.concatenate(pair), parts, last)


def _zeros(call: HeadCall, wanted: Gradients, cotangents: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return zeros to sum the head's gradient in, varying over the same mesh axes as the arrays."""
    given = jax.tree.leaves((call.operands, call.head, cotangents))
    zero = sum(jnp.zeros_like(array, call.sum_dtype, shape=()) for array in given)
    shapes = ((call.whole.classes, call.features), (call.whole.classes,))
    of_weight, of_bias = (jnp.broadcast_to(zero, shape) for shape in shapes)
    return of_weight if wanted.linear_weight else None, of_bias if wanted.linear_bias else None
