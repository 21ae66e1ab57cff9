"""The checks of torch tensors before their memory is read.

A storage can be resized under its tensors, even to nothing, and hooks can return other tensors than
autograd has saved. Most of torch's own operations check neither, and would read or write memory
that is gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch


def is_plain(array: Any) -> bool:
    """Tell whether something is a plain tensor or parameter, on a device that holds values."""
    return type(array) in (torch.Tensor, torch.nn.Parameter) and array.device.type != "meta"


def check_storages(**tensors: Any) -> None:
    """Refuse tensors that reach beyond their storages; only plain tensors have one."""
    if torch.compiler.is_compiling():
        return
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)  # noqa: PLW2901
        is_batched = torch._C._functorch.is_legacy_batchedtensor(tensor)
        if is_batched or not is_plain(tensor) or not tensor.numel():
            continue
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        end = tensor.storage_offset() + sum((size - 1) * step for size, step in steps) + 1
        reach, held = end * tensor.itemsize, tensor.untyped_storage().nbytes()
        if reach > held:
            raise RuntimeError(
                f"{name} must lie within its storage, but its shape {tuple(tensor.shape)} and "
                f"strides reach over {reach} bytes of it and it has {held}; do not resize the "
                "storage of a tensor in use"
            )


def kinds(tensors: Iterable[Any]) -> list[Any] | None:
    """Return shape and dtype of the tensors that autograd saves and a backward pass expects back.

    While a graph is being compiled there are no hooks, and the result is None.
    """
    if torch.compiler.is_compiling():
        return None
    return [None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors]


def check_returned(expected: Sequence[Any] | None, tensors: Sequence[Any]) -> None:
    """Refuse saved tensors that have another shape or dtype now, or whose memory is gone."""
    if expected is None:
        return
    for tensor in tensors:
        check_storages(**{"a tensor that autograd has saved": tensor})
    for kind, tensor in zip(expected, tensors, strict=True):
        found = None if tensor is None else (tensor.shape, tensor.dtype)
        if kind is None or kind == found:
            continue
        shape, dtype = kind
        given = "nothing" if found is None else f"{found[1]} of shape {tuple(found[0])}"
        raise RuntimeError(
            f"what autograd has saved must come back as {dtype} of shape {tuple(shape)}, got "
            f"{given}; let the hooks for saved tensors give back what they were given"
        )
