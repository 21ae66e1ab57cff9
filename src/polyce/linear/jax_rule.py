"""jax's transformations: chunks as the steps of a scan, which also computes the derivatives.

The rule is one of tangents, so that every transformation works with it; in reverse mode the
gradients are computed with the loss and only scaled later. For reduction 'none', and for stats that
have gradients, the steps are computed a second time.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from polyce.arrays import jax_mesh
from polyce.call.options import STATS_WITH_GRADIENT
from polyce.call.problem import Head, Operands
from polyce.formula import stats, targets
from polyce.formula.stats import Stats
from polyce.graphs import jax_rows
from polyce.linear import compute, jax_scan, unfused
from polyce.linear.call import NONE, Gradients, HeadCall, without_gradient


def loss(call: HeadCall) -> tuple[Any, Stats | None]:
    """Compute the loss and the stats, with their derivative rule."""
    plan, whole = call.planned().plan, call.whole
    call = jax_scan.with_plain_labels(call, plan)
    bare, of_rows = call.without_arrays(), _spec_of_rows(call)
    if whole.options.reduction == "none" or whole.asks(*STATS_WITH_GRADIENT):

        def rows(hidden: Any, weight: Any, bias: Any, rest: Operands) -> Any:
            found = _rows(bare, rest._replace(logits=hidden), Head(weight, bias))
            return jax.tree.map(lambda array: jnp.reshape(array, whole.row_shape), found)

        losses, found = jax_mesh.automatically(
            rows, (of_rows, _stats_specs(call)), *_inputs(call), _constant(whole.kind, _rest(call))
        )
        return targets.reduce(whole, plan, losses[..., None]), found

    def total(hidden: Any, weight: Any, bias: Any, rest: Operands) -> Any:
        summed, found = _total(bare, hidden, weight, bias, rest)
        return summed, call.shaped(found)

    summed, found = jax_mesh.automatically(
        total, (P(), _stats_specs(call)), *_inputs(call), _rest(call)
    )
    if whole.options.reduction == "mean":
        summed = summed / plan.denominator
    return whole.library.cast(summed, whole.result_dtype), found


def loss_and_gradients(call: HeadCall, wanted: Gradients) -> tuple[Any, Gradients, Stats | None]:
    """Compute the loss, the gradients wanted and the stats, cut from any derivative."""
    call = jax_scan.with_plain_labels(call, call.planned().plan)
    like = Gradients(*_inputs(call))
    pairs = zip(like, wanted, strict=True)
    specs = Gradients(*(jax_mesh.spec(array) if on else None for array, on in pairs))

    def compute_all(operands: Operands, head: Head) -> tuple[Any, Gradients, Stats | None]:
        given = replace(call, operands=operands, head=head)
        return compute.loss_and_gradients(given, wanted)

    of_loss = _spec_of_rows(call) if call.whole.options.reduction == "none" else P()
    results = (of_loss, specs, _stats_specs(call))
    return jax_mesh.automatically(compute_all, results, call.operands, call.head)


def _spec_of_rows(call: HeadCall) -> Any:
    """Return how the rows, and so their values, are sharded over a mesh."""
    return P(*jax_mesh.spec(call.operands.logits)[:-1])


def _stats_specs(call: HeadCall) -> Stats | None:
    """Return how each of the stats is sharded over a mesh."""
    of_rows = _spec_of_rows(call)
    return stats.unfilled(call.whole, lambda shape, dtype: of_rows)


def _inputs(call: HeadCall) -> tuple[Any, ...]:
    return call.operands.logits, *call.head


def _rest(call: HeadCall) -> Operands:
    return call.operands._replace(logits=None, normalizer=None, grad_output=None)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _total(
    bare: HeadCall, hidden: Any, weight: Any, bias: Any, rest: Operands
) -> tuple[Any, Stats | None]:
    """Compute the sum of the rows' losses, and stats without gradients."""
    operands, head = rest._replace(logits=hidden), Head(weight, bias)
    rows, _, found = jax_scan.traced(bare, NONE, operands, head, {})
    return jnp.sum(rows), found


@partial(_total.defjvp, symbolic_zeros=True)
def _total_jvp(bare: HeadCall, primals: Any, tangents: Any) -> tuple[Any, Any]:
    hidden, weight, bias, rest = primals
    *inputs, of_rest = tangents
    _refuse(bare.whole.kind, of_rest)
    wanted = Gradients(*(not _is_constant(tangent) for tangent in inputs))
    operands, head = rest._replace(logits=hidden), Head(weight, bias)
    rows, found, of_rows = jax_scan.traced(bare, wanted, operands, head, {})
    counted = jax_scan.described(bare, operands, head).counted
    parts = []
    for grad, given in zip(found, inputs, strict=True):
        if grad is None:
            continue
        tangent = jnp.reshape(given, grad.shape).astype(grad.dtype)
        if counted is not None and grad is found.input:
            tangent = jnp.where(counted[:, None], tangent, 0.0)
        parts.append(jnp.sum(grad * tangent))
    total = jnp.sum(rows)
    tangent = sum(parts, start=jnp.zeros_like(total))
    if counted is not None:
        # Selected: the cotangent is infinite if no row counts.
        tangent = jnp.where(jnp.any(counted), tangent, 0.0)
    return (total, of_rows), (tangent, jax.tree.map(jax_rows.no_tangent, of_rows))


def _refuse(kind: str, tangents: Operands) -> None:
    for name, tangent in without_gradient(kind, tangents).items():
        if tangent is not None and not _is_constant(tangent):
            of_logits = ", or give the logits to cross_entropy"
            is_teacher = kind == "teacher" and name.startswith("target")
            raise TypeError(
                "linear_cross_entropy has derivatives with respect to input, linear_weight and "
                f"linear_bias, but {name} is being differentiated; pass {name} through "
                f"jax.lax.stop_gradient{'' if is_teacher else of_logits}"
            )


def _is_constant(tangent: Any) -> bool:
    is_float0 = getattr(tangent, "dtype", None) == jax.dtypes.float0
    return jax_rows.is_constant(tangent) or is_float0


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _constant(kind: str, rest: Operands) -> Operands:
    """Return arrays through which no derivative may pass, of a call with this kind of target."""
    return rest


@partial(_constant.defjvp, symbolic_zeros=True)
def _constant_jvp(kind: str, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (rest,), (of_rest,) = primals, tangents
    _refuse(kind, of_rest)
    return rest, jax.tree.map(jax_rows.no_tangent, rest)


@partial(jax.jit, static_argnums=(0,))
def _rows(bare: HeadCall, operands: Operands, head: Head) -> tuple[Any, Stats | None]:
    """Compute the rows' losses and stats, whose derivatives compute each chunk's logits again."""
    call = replace(bare, operands=operands, head=head)
    if call.chunk_size is None and call.whole.asks(*STATS_WITH_GRADIENT):
        # For the gradients of stats XLA keeps about twice as many arrays of a chunk's size.
        call = replace(call, chunk_size=-(-call.chunks.rows // 2))
    # The gradient is summed in the dtype of what goes into the scan.
    head = Head(*(a if a is None else call.whole.library.cast(a, call.sum_dtype) for a in head))
    of_rows = call.of_rows({})
    names = ("weight", "teacher_weight", "teacher_bias")
    of_classes = {name: getattr(operands, name) for name in names}
    full, tail = jax_scan.spans(call)
    size = min(call.chunks.rows, call.chunks.total)

    @partial(jax.checkpoint, static_argnums=(1,))
    def step(start: Any, rows: int, of_rows: Operands, of_classes: Any, head: Head) -> Any:
        operands = jax_scan.cut(of_rows, start, rows)._replace(**of_classes)
        part = replace(call, whole=call.part(rows), operands=operands, head=head)
        return unfused.loss(part)

    def one(_: None, number: Any) -> tuple[None, Any]:
        return None, step(number * size, size, of_rows, of_classes, head)

    _, parts = jax.lax.scan(one, None, jnp.arange(full))
    parts = jax_scan.flat(parts)
    if tail:
        last = step(full * size, tail, of_rows, of_classes, head)
        parts = jax_scan.joined(parts, last)
    return parts
