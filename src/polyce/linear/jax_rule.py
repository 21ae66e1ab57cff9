"""jax's transformations: chunks as the steps of a scan, and derivatives that are made beside them.

The rule is one of tangents, so that every transformation goes through it; in reverse mode the
gradients are made with the loss and only multiplied later. Of the losses of rows, reduction 'none',
the steps are computed a second time.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from polyce import arrays
from polyce.call.problem import Head, Operands
from polyce.formula.targets import Plan
from polyce.graphs import jax_mesh, jax_rows
from polyce.linear import by_steps, chunks, compute, unfused
from polyce.linear.call import NONE, Call, Gradients


def loss(call: Call) -> Any:
    """Give the loss, with its derivative rule."""
    plan, whole = call.planned().plan, call.whole
    call = _with_plain_labels(call, plan)
    facts = call.without_arrays()
    if whole.options.reduction == "none":

        def rows(hidden: Any, weight: Any, bias: Any, rest: Operands) -> Any:
            losses = _rows(facts, rest._replace(logits=hidden), Head(weight, bias))
            return jnp.reshape(losses, whole.row_shape)

        result = jax_mesh.automatically(
            rows, _rows_spec(call), *_inputs(call), _constant(_rest(call))
        )
        return arrays.cast(jnp, result, whole.result_dtype)
    total = jax_mesh.automatically(partial(_total, facts), P(), *_inputs(call), _rest(call))
    if whole.options.reduction == "mean":
        total = total / plan.denominator
    return arrays.cast(jnp, total, whole.result_dtype)


def loss_and_gradients(call: Call, wanted: Gradients) -> tuple[Any, Gradients]:
    """Give the loss and the gradients wanted, cut from any derivative."""
    call = call.detached(jax_rows.detach)
    call = _with_plain_labels(call, call.planned().plan)
    like = Gradients(*_inputs(call))
    pairs = zip(like, wanted, strict=True)
    specs = Gradients(*(jax_mesh.spec(array) if on else None for array, on in pairs))

    def compute_all(operands: Operands, head: Head) -> tuple[Any, Gradients]:
        given = replace(call, operands=operands, head=head)
        return compute.loss_and_gradients(given, wanted)

    return jax_mesh.automatically(compute_all, (_rows_spec(call), specs), call.operands, call.head)


def _rows_spec(call: Call) -> Any:
    """Tell how a loss is spread over a mesh: that of each row as the row is."""
    by_row = call.whole.options.reduction == "none"
    return P(*jax_mesh.spec(call.operands.logits)[:-1]) if by_row else P()


def run(call: Call, wanted: Gradients, cotangent: Any) -> tuple[Any, Gradients]:
    """Give what `in_place.run` gives."""
    call = _with_plain_labels(call, call.plan)
    return _run(call.without_arrays(), wanted, call.operands, call.head, cotangent)


def _with_plain_labels(call: Call, plan: Plan) -> Call:
    """Give the call with labels of jax's own: -1 where a row does not count, C where one is bad.

    Those of a caller may be NumPy's, of values that jax without 64-bit types does not have.
    """
    whole = call.whole
    if whole.kind != "index":
        return call
    label = plan.label
    if plan.invalid is not None:
        label = jnp.where(plan.invalid, whole.classes, label)
    if plan.counted is not None:
        label = jnp.where(plan.counted, label, -1)
    whole = whole.with_options(ignore_index=-1)
    whole = whole._replace(target_dtype=arrays.dtype_name(label), check_labels=False)
    label = jnp.reshape(label, whole.row_shape)
    return replace(call, whole=whole, operands=call.operands._replace(target=label))


def _spans(call: Call) -> tuple[int, int]:
    """Give how many chunks are full, and the rows of the last one that is not."""
    return divmod(call.chunks.total, call.chunks.rows)


def _slice(array: Any, start: Any, rows: int) -> Any:
    return None if array is None else jax.lax.dynamic_slice_in_dim(array, start, rows)


def _call(facts: Call, operands: Operands, head: Head) -> Call:
    """Give a call whose rows are not reduced, with what its target means."""
    whole = facts.whole.with_options(reduction="none")._replace(normalized=False)
    return replace(facts, whole=whole, operands=operands, head=head).planned()


# What is traced depends on the facts alone, and so is traced once for each.
@partial(jax.jit, static_argnums=(0, 1))
def _run(
    facts: Call, wanted: Gradients, operands: Operands, head: Head, cotangent: Any
) -> tuple[Any, Gradients]:
    call = _call(facts, operands, head)
    of_rows = (call.hidden, call.target, call.sample_weight, call.counted, cotangent)

    def step(sums: Gradients, start: Any, rows: int) -> tuple[Gradients, Any]:
        of_weight = partial(_add_product, call, sums.linear_weight)
        parts = (_slice(array, start, rows) for array in of_rows)
        losses, found = by_steps.step(call, wanted, *parts, of_weight=of_weight)
        of_bias = found.linear_bias
        if of_bias is not None:
            of_bias = sums.linear_bias + of_bias
        return Gradients(None, found.linear_weight, of_bias), (losses, found.input)

    full, tail = _spans(call)
    size = min(call.chunks.rows, call.chunks.total)

    def add(sums: Gradients, number: Any) -> tuple[Gradients, Any]:
        return step(sums, number * size, size)

    sums = Gradients(None, *_zeros(call, wanted, cotangent))
    sums, parts = jax.lax.scan(add, sums, jnp.arange(full))
    rows, of_input = (_flat(array) for array in parts)
    if tail:
        sums, (last, of_last) = step(sums, full * size, tail)
        rows = jnp.concatenate([rows, last])
        of_input = None if of_input is None else jnp.concatenate([of_input, of_last])
    return rows, sums._replace(input=of_input)


def _add_product(call: Call, total: Any, grad: Any, hidden: Any) -> Any:
    """Add a chunk's part of the head's gradient, on a CPU by blocks of classes.

    XLA adds no product in place there: it would hold one as large as the head. With several devices
    the classes may lie on several, and a block then on none.
    """
    width, classes = call.chunks.classes, call.whole.classes
    is_alone = chunks.limits_of(call.whole) is chunks.CPU and jax.device_count() == 1
    if width >= classes or not is_alone:
        return total + by_steps.product(call, grad.T, hidden)

    def add(start: Any, total: Any, width: int) -> Any:
        block = jax.lax.dynamic_slice_in_dim(grad, start, width, axis=1)
        part = _slice(total, start, width) + by_steps.product(call, block.T, hidden)
        return jax.lax.dynamic_update_slice_in_dim(total, part, start, axis=0)

    full, tail = divmod(classes, width)
    total = jax.lax.fori_loop(0, full, lambda i, total: add(i * width, total, width), total)
    return add(full * width, total, tail) if tail else total


def _flat(parts: Any) -> Any:
    """Put the rows of chunks, (chunks, rows, ...), into one axis."""
    if parts is None:
        return None
    return jnp.reshape(parts, (parts.shape[0] * parts.shape[1], *parts.shape[2:]))


def _zeros(call: Call, wanted: Gradients, cotangent: Any) -> tuple[Any, Any]:
    """Give what the head's gradient is added to, for whatever axes of a mesh it will vary over."""
    given = jax.tree.leaves((call.operands, call.head, cotangent))
    zero = sum(jnp.zeros_like(array, call.sum_dtype, shape=()) for array in given)
    shapes = ((call.whole.classes, call.features), (call.whole.classes,))
    of_weight, of_bias = (jnp.broadcast_to(zero, shape) for shape in shapes)
    return of_weight if wanted.linear_weight else None, of_bias if wanted.linear_bias else None


def _inputs(call: Call) -> tuple[Any, ...]:
    return call.operands.logits, *call.head


def _rest(call: Call) -> Operands:
    return call.operands._replace(logits=None, normalizer=None, grad_output=None)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _total(facts: Call, hidden: Any, weight: Any, bias: Any, rest: Operands) -> Any:
    """Give the sum of the rows' losses."""
    rows, _ = _run(facts, NONE, rest._replace(logits=hidden), Head(weight, bias), None)
    return jnp.sum(rows)


@partial(_total.defjvp, symbolic_zeros=True)
def _total_jvp(facts: Call, primals: Any, tangents: Any) -> tuple[Any, Any]:
    hidden, weight, bias, rest = primals
    *inputs, of_rest = tangents
    _refuse(of_rest)
    wanted = Gradients(*(not _is_constant(tangent) for tangent in inputs))
    operands, head = rest._replace(logits=hidden), Head(weight, bias)
    rows, found = _run(facts, wanted, operands, head, None)
    counted = _call(facts, operands, head).counted
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
        # Selected, for the cotangent is infinite where no row counts.
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
    """Give arrays that no derivative may come through."""
    return rest


@partial(_constant.defjvp, symbolic_zeros=True)
def _constant_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    (rest,), (of_rest,) = primals, tangents
    _refuse(of_rest)
    return rest, jax.tree.map(jax_rows.no_tangent, rest)


@partial(jax.jit, static_argnums=(0,))
def _rows(facts: Call, operands: Operands, head: Head) -> Any:
    """Give the rows' losses, whose derivatives compute each chunk's logits again."""
    call = replace(facts, operands=operands, head=head)
    # The gradient adds up in what goes into the scan.
    weight = arrays.cast(jnp, head.weight, call.sum_dtype)
    of_rows = (call.hidden, call.target, call.sample_weight)
    of_all = (operands.weight, weight, head.bias)
    full, tail = _spans(call)
    size = min(call.chunks.rows, call.chunks.total)

    @partial(jax.checkpoint, static_argnums=(1,))
    def step(start: Any, rows: int, *given: Any) -> Any:
        hidden, target, sample_weight, class_weight, weight, bias = given
        hidden, target, sample_weight = (
            _slice(array, start, rows) for array in (hidden, target, sample_weight)
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
    rows = _flat(rows)
    if tail:
        rows = jnp.concatenate([rows, step(full * size, tail, *of_rows, *of_all)])
    return rows
