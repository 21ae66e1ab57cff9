"""The loss of a call and its gradients: which loop runs, and where a mean's scale is applied."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from polyce.formula.stats import Stats
from polyce.linear import by_steps, in_place
from polyce.linear.call import NONE, Gradients, HeadCall


def _loop(call: HeadCall) -> ModuleType:
    """Choose the module that runs the chunks."""
    if _writes(call):
        return in_place
    if call.whole.backend == "jax":
        from polyce.linear import jax_scan

        return jax_scan
    return by_steps


def _computing(call: HeadCall) -> Any:
    head = {"linear_weight": call.head.weight, "linear_bias": call.head.bias}
    return call.whole.library.multiplying(call.operands.named() | head)


def _writes(call: HeadCall) -> bool:
    return call.whole.backend in in_place.PRODUCTS and call.whole.is_concrete


def loss(call: HeadCall) -> tuple[Any, Stats | None]:
    """Compute the loss and the stats, without any gradient."""
    with _computing(call):
        call = call.planned()
        rows, _, stats = _loop(call).run(call, NONE, {})
        return call.reduce(rows), call.shaped(stats)


def loss_and_sums(call: HeadCall, wanted: Gradients) -> tuple[Any, Gradients, Any, Stats | None]:
    """Compute the loss, the sums of the gradients wanted, a factor of these, and the stats.

    The factor is still to be applied, None for 1.
    """
    with _computing(call):
        call = call.planned()
        cotangents, factor = call.cotangents()
        rows, sums, stats = _loop(call).run(call, wanted, cotangents)
        return call.reduce(rows), sums, factor, call.shaped(stats)


def finish(call: HeadCall, sums: Gradients, *factors: Any) -> Gradients:
    """Return the gradients, scaled, in the shapes and dtypes of what they belong to."""
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


def select_counted(call: HeadCall, of_input: Any) -> Any:
    """Replace rows that do not count by 0: a factor of infinity or nan has made them nan."""
    counted = call.planned().plan.counted
    return of_input if counted is None else call.whole.xp.where(counted, of_input, 0.0)


def _finished(call: HeadCall, array: Any, like: Any, scales: Sequence[Any]) -> Any:
    for scale in scales:
        array = _scaled(call, array, scale)
    array = call.whole.library.cast(array, like.dtype)
    return array if array.ndim == like.ndim else call.whole.xp.reshape(array, like.shape)


def _scaled(call: HeadCall, array: Any, factor: Any) -> Any:
    if not isinstance(factor, float):
        factor = call.whole.library.cast(factor, array.dtype)
    if not _writes(call):
        return array * factor
    array *= factor
    return array


def loss_and_gradients(call: HeadCall, wanted: Gradients) -> tuple[Any, Gradients, Stats | None]:
    """Compute the loss, the gradients wanted and the stats."""
    result, sums, factor, stats = loss_and_sums(call, wanted)
    return result, finish(call, sums, factor), stats
