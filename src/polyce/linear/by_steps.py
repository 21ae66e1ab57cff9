"""One chunk as a step from arrays to arrays, for libraries whose arrays cannot be written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from polyce.call.problem import Operands
from polyce.linear.call import Gradients, HeadCall


def run(call: HeadCall, wanted: Gradients, cotangent: Any) -> tuple[Any, Gradients]:
    """Compute what `in_place.run` does."""
    xp = call.whole.xp
    spans = call.chunks.spans() or [slice(0, 0)]
    steps = [step(call, wanted, *inputs(call, cotangent, span)) for span in spans]
    parts = Gradients(*zip(*(found for _, found in steps), strict=True))
    found = Gradients(
        _joined(xp, parts.input), _added(parts.linear_weight), _added(parts.linear_bias)
    )
    return _joined(xp, [rows for rows, _ in steps]), found


def _joined(xp: Any, parts: Sequence[Any]) -> Any:
    return parts[0] if len(parts) == 1 or parts[0] is None else xp.concat(list(parts), axis=0)


def _added(parts: Sequence[Any]) -> Any:
    return parts[0] if parts[0] is None else sum(parts[1:], start=parts[0])


def inputs(call: HeadCall, cotangent: Any, span: slice) -> tuple[Any, ...]:
    """Return a step's arguments for the rows of a chunk."""
    target, sample_weight, counted = call.target, call.sample_weight, call.counted
    of_rows = (call.hidden, target, sample_weight, counted, cotangent)
    return tuple(None if array is None else array[span, ...] for array in of_rows)


def step(
    call: HeadCall,
    wanted: Gradients,
    hidden: Any,
    target: Any,
    sample_weight: Any,
    counted: Any,
    cotangent: Any,
    *,
    of_weight: Callable[[Any, Any], Any] | None = None,
) -> tuple[Any, Gradients]:
    """Compute the losses of a chunk's rows, and its parts of the gradients wanted.

    `of_weight` replaces the product of the logits' gradient and the hidden states, which is the
    chunk's part of the weight's gradient.
    """
    xp, (weight, bias) = call.whole.xp, call.head
    if counted is not None:
        # A row that does not count may hold infinities, and 0 times these is nan.
        hidden = xp.where(counted[:, None], hidden, xp.zeros_like(hidden))
    part = call.part(hidden.shape[0])
    logits = product(call, hidden, weight.T)
    if bias is not None:
        logits = logits + call.whole.library.cast(bias, logits.dtype)
    operands = Operands(logits, target, call.operands.weight, sample_weight, None, cotangent)
    if not any(wanted):
        losses, _ = call.implementation.cross_entropy(part, operands)
        return losses, Gradients(None, None, None)
    losses, grad, _ = call.implementation.cross_entropy_with_grad(part, operands, None)
    of_bias = xp.sum(grad, axis=0) if wanted.linear_bias else None
    if call.rounds_gradient:
        grad = call.whole.library.cast(grad, hidden.dtype)
    of_weight = of_weight or (lambda grad, hidden: product(call, grad.T, hidden))
    return losses, Gradients(
        product(call, grad, weight) if wanted.input else None,
        of_weight(grad, hidden) if wanted.linear_weight else None,
        of_bias,
    )


def product(call: HeadCall, a: Any, b: Any) -> Any:
    """Multiply two matrices into the dtype that the gradients add up in."""
    return call.whole.library.matmul(a, b, call.sum_dtype, **call.product_options)
