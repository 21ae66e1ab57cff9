"""Launches that are kept for calls like an earlier one.

To lay a call out and to let Triton find its kernels takes the host longer than a GPU takes for a
small loss. All of it follows from the problem and from the arrays' kinds: dtypes, shapes, strides,
and where they begin between two 16-byte boundaries. So a call of the same kinds launches the same
kernels, with other addresses and numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

_MOST_KNOWN = 1024
Key = tuple[Any, ...]


class Kept(NamedTuple):
    """A launch of a compiled kernel."""

    start: Callable[..., None]
    """Takes all arguments in order."""
    arguments: tuple[Any, ...]
    """Those that stay the same; None in the places of others, and of arrays that are absent."""
    places: tuple[tuple[int, str], ...]
    """The places and names of those that differ from call to call."""


class Plan(NamedTuple):
    """The launches of a pass."""

    launches: tuple[Kept, ...]
    reaches: tuple[tuple[int, int], ...]
    """How many bytes each tensor takes, from its first element on, and how many an element."""
    sizes: Any
    """What memory the pass takes besides its results."""


_plans: dict[Key, Plan] = {}


def forget() -> None:
    """Forget all plans: whoever changes kernels, or how they are launched, has to."""
    _plans.clear()


def key(*of_call: Any, tensors: Iterable[Any]) -> Key:
    """Return what a plan depends on: `of_call`, and the kinds of those that are tensors."""
    kinds = [
        (
            type(one), one.dtype, one.shape, one.stride(), one.data_ptr() & 15,
            one.is_neg(), one.get_device(),
        )
        if isinstance(one, torch.Tensor)
        else None
        for one in tensors
    ]  # fmt: skip
    return (*of_call, *kinds)


def find(key: Key | None, tensors: Iterable[Any]) -> Plan | None:
    """Return the plan of an earlier call like this one; None if there is none, or no memory.

    A storage can be resized under its tensors; whoever lays the call out refuses them.
    """
    plan = None if key is None else _plans.get(key)
    if plan is None:
        return None
    for (reach, size), one in zip(plan.reaches, tensors, strict=True):
        # Bytes, from the storage's first to the tensor's last.
        if reach and one.untyped_storage().nbytes() < reach + one.storage_offset() * size:
            return None
    return plan


def keep(key: Key, tensors: Iterable[Any], launches: tuple[Kept, ...], sizes: Any = None) -> None:
    """Keep the launches of a call."""
    if len(_plans) >= _MOST_KNOWN:
        _plans.clear()
    _plans[key] = Plan(launches, tuple(map(_reach, tensors)), sizes)


def _reach(value: Any) -> tuple[int, int]:
    if not isinstance(value, torch.Tensor) or not value.numel():
        return 0, 0
    steps = zip(value.shape, value.stride(), strict=True)
    count = 1 + sum((size - 1) * step for size, step in steps)
    return count * value.itemsize, value.itemsize


def run(launches: tuple[Kept, ...], values: Mapping[str, Any], logits: torch.Tensor) -> None:
    """Launch kernels again, on the current stream of the logits' device."""
    with torch.cuda.device_of(logits):
        for start, arguments, places in launches:
            given = list(arguments)
            for i, name in places:
                given[i] = values[name]
            start(*given)


def interpret(kernel: Callable[..., None], **arguments: Any) -> None:
    """Run a kernel in NumPy."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        # NumPy warns about rows that are nan; a kernel on a device does not.
        warnings.simplefilter("ignore", RuntimeWarning)
        kernel(**arguments)


def interpreted(kernel: Callable[..., None], names: Sequence[str]) -> Callable[..., None]:
    """Return what runs a kernel in NumPy with arguments in order, as a compiled one takes them."""

    def start(*arguments: Any) -> None:
        # The interpreter knows no null pointer.
        array = next(one for one in arguments if isinstance(one, torch.Tensor))
        filled = (array if one is None else one for one in arguments)
        interpret(kernel, **dict(zip(names, filled, strict=True)))

    return start
