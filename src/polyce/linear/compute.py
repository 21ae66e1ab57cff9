"""The loss of a call and its gradients: which loop runs, and where the scale of a mean comes in."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from polyce.linear import by_steps, in_place
from polyce.linear.call import NONE, Call, Gradients


def _loop(call: Call) -> ModuleType:
    """Choose the module that runs the chunks."""
    if _writes(call):
        return in_place
    if call.whole.backend == "jax":
        from polyce.linear import jax_scan

        return jax_scan
    return by_steps


def _computing(call: Call) -> Any:
    head = {"linear_weight": call.head.weight, "linear_bias": call.head.bias}
    return call.whole.library.multiplying(call.operands.named() | head)


def _writes(call: Call) -> bool:
    return call.whole.backend in in_place.MEMORIES and call.whole.is_concrete


def loss(call: Call) -> Any:
    """Give the loss; no gradient is made."""
    with _computing(call):
        call = call.planned()
        rows, _ = _loop(call).run(call, NONE, None)
        return call.reduce(rows)


def loss_and_sums(call: Call, wanted: Gradients) -> tuple[Any, Gradients, Any]:
    """Give the loss, the gradients wanted as they were added up, and a factor that they lack.

    The factor is None for 1. A gradient of logits that is held in 16 bits is not divided by what a
    mean divides by: its small entries would be 0. The sums, of 32 bits, are.
    """
    with _computing(call):
        call = call.planned()
        if call.scales_sums:
            scale, factor = None, call.scale_of_sums()
        else:
            scale, factor = call.cotangent(), None
        rows, sums = _loop(call).run(call, wanted, scale)
        return call.reduce(rows), sums, factor


def finish(call: Call, sums: Gradients, *factors: Any) -> Gradients:
    """Give the gradients in the shapes and dtypes of what they belong to."""
    scales = [factor for factor in factors if factor is not None]
    given = Gradients(call.operands.logits, *call.head)
    with _computing(call):
        found = [
            None if array is None else _finished(call, array, like, scales)
            for array, like in zip(sums, given, strict=True)
        ]
        if found[0] is not None and scales:
            found[0] = select_counted(call, found[0])
    return Gradients(*found)


def select_counted(call: Call, of_input: Any) -> Any:
    """Give 0 for rows that do not count, which a factor of infinity or nan has made nan."""
    counted = call.planned().plan.counted
    return of_input if counted is None else call.whole.xp.where(counted, of_input, 0.0)


def _finished(call: Call, array: Any, like: Any, scales: Sequence[Any]) -> Any:
    for scale in scales:
        array = _scaled(call, array, scale)
    array = call.whole.library.cast(array, like.dtype)
    return array if array.ndim == like.ndim else call.whole.xp.reshape(array, like.shape)


def _scaled(call: Call, array: Any, factor: Any) -> Any:
    if not isinstance(factor, float):
        factor = call.whole.library.cast(factor, array.dtype)
    if not _writes(call):
        return array * factor
    array *= factor
    return array


def loss_and_gradients(call: Call, wanted: Gradients) -> tuple[Any, Gradients]:
    """Give the loss and the gradients wanted."""
    result, sums, factor = loss_and_sums(call, wanted)
    return result, finish(call, sums, factor)
