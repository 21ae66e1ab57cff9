"""One chunk as a step from arrays to arrays, for libraries whose arrays cannot be written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from polyce.call.problem import Head, Operands
from polyce.formula.stats import Stats
from polyce.linear.call import Gradients, HeadCall


def run(
    call: HeadCall, wanted: Gradients, cotangents: Mapping[str, Any]
) -> tuple[Any, Gradients, Stats | None]:
    """Compute what `in_place.run` does."""
    xp = call.whole.xp
    of_rows = (*call.of_rows(cotangents), call.counted)
    steps = []
    for span in call.chunks.spans() or [slice(0, 0)]:
        *operands, counted = (None if array is None else array[span, ...] for array in of_rows)
        steps.append(step(call, wanted, Operands(*operands), counted))
    rows, gradients, stats = zip(*steps, strict=True)
    parts = Gradients(*zip(*gradients, strict=True))
    found = Gradients(
        _joined(xp, parts.input), _added(parts.linear_weight), _added(parts.linear_bias)
    )
    if stats[0] is None:
        return _joined(xp, rows), found, None
    entries = (_joined(xp, each) for each in zip(*stats, strict=True))
    return _joined(xp, rows), found, Stats(*entries)


def _joined(xp: Any, parts: Sequence[Any]) -> Any:
    return parts[0] if len(parts) == 1 or parts[0] is None else xp.concat(list(parts), axis=0)


def _added(parts: Sequence[Any]) -> Any:
    return parts[0] if parts[0] is None else sum(parts[1:], start=parts[0])


def step(
    call: HeadCall,
    wanted: Gradients,
    of_rows: Operands,
    counted: Any,
    *,
    of_weight: Callable[[Any, Any], Any] | None = None,
) -> tuple[Any, Gradients, Stats | None]:
    """Compute the losses of a chunk's rows, its parts of the gradients wanted, and the stats.

    `of_rows` is the chunk's part of `HeadCall.of_rows`. `of_weight` replaces the product of the
    logits' gradient and the hidden states, which is the chunk's part of the weight's gradient.
    """
    xp, hidden = call.whole.xp, of_rows.logits
    if counted is not None:
        # A row that does not count may hold infinities, and 0 times these is nan.
        hidden = xp.where(counted[:, None], hidden, xp.zeros_like(hidden))
    part = call.part(hidden.shape[0])
    logits = _logits(call, hidden, call.head, call.sum_dtype)
    operands = of_rows._replace(logits=logits, weight=call.operands.weight)
    if call.teacher is not None:
        teacher = _logits(call, of_rows.target, call.teacher, call.whole.teacher_dtype)
        operands = operands._replace(target=teacher)
    if not any(wanted):
        losses, stats = call.implementation.cross_entropy(part, operands)
        return losses, Gradients(None, None, None), stats
    losses, grad, stats = call.implementation.cross_entropy_with_grad(part, operands, None)
    of_bias = xp.sum(grad, axis=0) if wanted.linear_bias else None
    if call.rounds_gradient:
        grad = call.whole.library.cast(grad, hidden.dtype)
    of_weight = of_weight or (lambda grad, hidden: product(call, grad.T, hidden))
    found = Gradients(
        product(call, grad, call.head.weight) if wanted.input else None,
        of_weight(grad, hidden) if wanted.linear_weight else None,
        of_bias,
    )
    return losses, found, stats


def _logits(call: HeadCall, hidden: Any, head: Head, dtype: Any) -> Any:
    """Compute the logits of a head, the student's or a teacher's."""
    library = call.whole.library
    found = library.matmul(hidden, head.weight.T, dtype, **call.product_options(hidden))
    return found if head.bias is None else found + library.cast(head.bias, dtype)


def product(call: HeadCall, a: Any, b: Any) -> Any:
    """Multiply two matrices into the dtype that the gradients add up in."""
    return call.whole.library.matmul(a, b, call.sum_dtype, **call.product_options(a))
