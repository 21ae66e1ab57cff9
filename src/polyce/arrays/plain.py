"""The key of plain arrays, by which a call is found to repeat an earlier one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class _Probes(NamedTuple):
    """The functions of torch that are called for each key, looked up once."""

    tensor: Any
    strided: Any
    modes: Callable[[], int]
    tracing: Callable[[], Any]
    transformed: Callable[[], bool]
    forward_mode: Any
    autocast: Callable[[str], bool]


_probes: list[_Probes] = []


def _probes_of(torch: Any) -> _Probes:
    if not _probes:
        found = _Probes(
            tensor=torch.Tensor,
            strided=torch.strided,
            modes=torch._C._len_torch_dispatch_stack,
            tracing=torch._C._get_tracing_state,
            transformed=torch._C._are_functorch_transforms_active,
            forward_mode=torch.autograd.forward_ad,
            autocast=torch.is_autocast_enabled,
        )
        _probes.append(found)
    return _probes[0]


def is_compiling() -> bool:
    """Tell whether torch.compile or torch.export traces this."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.compiler.is_compiling())


def is_traced() -> bool:
    """Tell whether torch.compile reads this, rather than Python."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.compiler.is_dynamo_compiling()


def plain_key(*arrays: Any) -> tuple[Any, ...] | None:
    """Return shape and dtype of each array if a call's description depends on nothing else.

    That is true of NumPy's own arrays, of CuPy's and torch's own with their devices, and of torch's
    while nothing but its autograd is active; else return None. An absent array is None in the key.
    """
    kind = type(arrays[0])
    if kind is not np.ndarray:
        cupy = sys.modules.get("cupy")
        if cupy is not None and kind is cupy.ndarray:
            return _plain_cupy_key(kind, arrays)
        return _plain_torch_key(arrays)
    key: list[Any] = []
    for array in arrays:
        if array is None:
            key.append(None)
        elif type(array) is kind:
            key.append((array.shape, array.dtype))
        else:
            return None
    return tuple(key)


def _plain_cupy_key(kind: Any, arrays: tuple[Any, ...]) -> tuple[Any, ...] | None:
    key: list[Any] = []
    for array in arrays:
        if array is None:
            key.append(None)
        elif type(array) is kind:
            key.append((array.shape, array.dtype, array.data.device_id))
        else:
            return None
    return tuple(key)


def _plain_torch_key(arrays: tuple[Any, ...]) -> tuple[Any, ...] | None:
    torch = sys.modules.get("torch")
    if torch is None or torch.compiler.is_compiling():
        return None
    ask = _probes_of(torch)
    key: list[Any] = []
    # A call's arrays lie on one device.
    kind = "cpu"
    for array in arrays:
        if array is None:
            key.append(None)
        elif (
            type(array) is ask.tensor
            and (array.is_cpu or array.is_cuda)
            and array.layout is ask.strided
            and not array.is_nested
        ):
            device = None if array.is_cpu else array.device
            kind = "cpu" if device is None else "cuda"
            key.append((array.shape, array.dtype, device))
        else:
            return None
    if ask.modes() or ask.tracing() is not None or ask.transformed():
        return None
    if ask.forward_mode._current_level >= 0 or ask.autocast(kind):
        return None
    return tuple(key)
