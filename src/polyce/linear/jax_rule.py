"""jax's transformations: chunks as the steps of a scan, which also computes the derivatives.

The rule is one of tangents, so that every transformation works with it; in reverse mode the
gradients are computed with the loss and only scaled later. For reduction 'none' the steps are
computed a second time.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from polyce.arrays import jax_mesh
from polyce.call.problem import Head, Operands
from polyce.graphs import jax_rows
from polyce.linear import compute, jax_scan, unfused
from polyce.linear.call import NONE, Gradients, HeadCall


def loss(call: HeadCall) -> Any:
    """Compute the loss, with its derivative rule."""
    plan, whole = call.planned().plan, call.whole
    call = jax_scan.with_plain_labels(call, plan)
    bare = call.without_arrays()
    if whole.options.reduction == "none":

        def rows(hidden: Any, weight: Any, bias: Any, rest: Operands) -> Any:
            losses = _rows(bare, rest._replace(logits=hidden), Head(weight, bias))
            return jnp.reshape(losses, whole.row_shape)

        result = jax_mesh.automatically(
            rows, _rows_spec(call), *_inputs(call), _constant(_rest(call))
        )
        return whole.library.cast(result, whole.result_dtype)
    total = jax_mesh.automatically(partial(_total, bare), P(), *_inputs(call), _rest(call))
    if whole.options.reduction == "mean":
        total = total / plan.denominator
    return whole.library.cast(total, whole.result_dtype)


def loss_and_gradients(call: HeadCall, wanted: Gradients) -> tuple[Any, Gradients]:
    """Compute the loss and the gradients wanted, cut from any derivative."""
    call = jax_scan.with_plain_labels(call, call.planned().plan)
    like = Gradients(*_inputs(call))
    pairs = zip(like, wanted, strict=True)
    specs = Gradients(*(jax_mesh.spec(array) if on else None for array, on in pairs))

    def compute_all(operands: Operands, head: Head) -> tuple[Any, Gradients]:
        given = replace(call, operands=operands, head=head)
        return compute.loss_and_gradients(given, wanted)

    return jax_mesh.automatically(compute_all, (_rows_spec(call), specs), call.operands, call.head)


def _rows_spec(call: HeadCall) -> Any:
    """Return how a loss is sharded over a mesh: losses of rows as the rows are."""
    by_row = call.whole.options.reduction == "none"
    return P(*jax_mesh.spec(call.operands.logits)[:-1]) if by_row else P()


def _inputs(call: HeadCall) -> tuple[Any, ...]:
    return call.operands.logits, *call.head


def _rest(call: HeadCall) -> Operands:
    return call.operands._replace(logits=None, normalizer=None, grad_output=None)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _total(bare: HeadCall, hidden: Any, weight: Any, bias: Any, rest: Operands) -> Any:
    """Compute the sum of the rows' losses."""
    rows, _ = jax_scan.traced(bare, NONE, rest._replace(logits=hidden), Head(weight, bias), None)
    return jnp.sum(rows)


@partial(_total.defjvp, symbolic_zeros=True)
def _total_jvp(bare: HeadCall, primals: Any, tangents: Any) -> tuple[Any, Any]:
    hidden, weight, bias, rest = primals
    *inputs, of_rest = tangents
    _refuse(of_rest)
    wanted = Gradients(*(not _is_constant(tangent) for tangent in inputs))
    operands, head = rest._replace(logits=hidden), Head(weight, bias)
    rows, found = jax_scan.traced(bare, wanted, operands, head, None)
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
    return total, tangent


def _refuse(tangents: Operands) -> None:
    for name, tangent in zip(tangents._fields, tangents, strict=True):
        if tangent is not None and not _is_constant(tangent):
            raise TypeError(
                "linear_cross_entropy has derivatives with respect to input, linear_weight and "
                f"linear_bias, but {name} is being differentiated; pass {name} through "
                "jax.lax.stop_gradient, or give the logits to cross_entropy"
            )


def _is_constant(tangent: Any) -> bool:
    is_float0 = getattr(tangent, "dtype", None) == jax.dtypes.float0
    return jax_rows.is_constant(tangent) or is_float0


@jax.custom_jvp
def _constant(rest: Operands) -> Operands:
    """Return arrays through which no derivative may pass."""
    return rest


@partial(_constant.defjvp, symbolic_zeros=True)
def _constant_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    (rest,), (of_rest,) = primals, tangents
    _refuse(of_rest)
    return rest, jax.tree.map(jax_rows.no_tangent, rest)


@partial(jax.jit, static_argnums=(0,))
def _rows(bare: HeadCall, operands: Operands, head: Head) -> Any:
    """Compute the rows' losses, whose derivatives compute each chunk's logits again."""
    call = replace(bare, operands=operands, head=head)
    # The gradient is summed in the dtype of what goes into the scan.
    weight = call.whole.library.cast(head.weight, call.sum_dtype)
    of_rows = (call.hidden, call.target, call.sample_weight)
    of_all = (operands.weight, weight, head.bias)
    full, tail = jax_scan.spans(call)
    size = min(call.chunks.rows, call.chunks.total)

    @partial(jax.checkpoint, static_argnums=(1,))
    def step(start: Any, rows: int, *given: Any) -> Any:
        hidden, target, sample_weight, class_weight, weight, bias = given
        hidden, target, sample_weight = (
            jax_scan.cut(array, start, rows) for array in (hidden, target, sample_weight)
        )
        part = replace(
            call,
            whole=call.part(rows),
            operands=Operands(hidden, target, class_weight, sample_weight, None, None),
            head=Head(weight, bias),
        )
        return unfused.loss(part)

    def one(_: None, number: Any) -> tuple[None, Any]:
        return None, step(number * size, size, *of_rows, *of_all)

    _, rows = jax.lax.scan(one, None, jnp.arange(full))
    rows = jax_scan.flat(rows)
    if tail:
        rows = jnp.concatenate([rows, step(full * size, tail, *of_rows, *of_all)])
    return rows
