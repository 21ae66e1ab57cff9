"""Which arrays hold values now, that can be looked at or lie in memory for a kernel to read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

# Libraries whose arrays hold no values before a computation is asked for, or polyce must not ask.
LAZY = ("dask", "cubed", "ndonnx")
# Libraries that compute in NumPy as soon as they are called.
ON_NUMPY = ("numpy", "array-api-strict", "marray", "mparray")


def has_values(array: Any, backend: str) -> bool:
    """Tell whether an array's values can be looked at now: not traced, lazy, vmapped or meta."""
    if backend in (*ON_NUMPY, "cupy", "mlx") or isinstance(array, np.ndarray):
        return True
    if backend in LAZY:
        return False
    if backend == "torch":
        import torch

        return not (
            _is_traced(torch)
            or not is_plain(torch, array)
            or torch._C._functorch.is_functorch_wrapped_tensor(array)
        )
    if backend == "jax":
        import jax

        return not isinstance(array, jax.core.Tracer)
    import array_api_compat

    return not array_api_compat.is_lazy_array(array)


def _is_traced(torch: Any) -> bool:
    return bool(
        torch.compiler.is_compiling()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)  # make_fx
        or torch.jit.is_tracing()
    )


def _is_transformed(torch: Any) -> bool:
    """Tell whether a torch.func transform or a level of forward mode is active."""
    return bool(
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    )


def are_concrete(arrays: Iterable[Any], backend: str) -> bool:
    """Tell whether all arrays are memory that a kernel may read, and no derivative waits for it.

    Under a transform or at a level of forward mode torch wants to see operations of its own.
    """
    if backend == "numpy":
        return True
    if not all(array is None or has_values(array, backend) for array in arrays):
        return False
    return backend != "torch" or not _is_transformed(sys.modules["torch"])


def are_compiled(arrays: Iterable[Any], backend: str) -> bool:
    """Tell whether torch.compile traces these arrays, all plain ones that will hold values.

    torch.export wants operations of torch alone, and so do transforms and forward mode.
    """
    if backend != "torch":
        return False
    torch = sys.modules["torch"]
    if not torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():
        return False
    return not _is_transformed(torch) and all(
        array is None or is_plain(torch, array) for array in arrays
    )


def is_plain(torch: Any, array: Any) -> bool:
    """Tell whether something is a tensor of torch's own kinds, on a device that holds values."""
    kind = type(array)
    return kind in (torch.Tensor, torch.nn.Parameter) and array.device.type != "meta"


class _Probes(NamedTuple):
    """What is asked of torch at each call, looked up once."""

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


def plain_facts(*arrays: Any) -> tuple[Any, ...] | None:
    """Give shape and dtype of each array where that is all that a description depends on.

    So it is for NumPy's own arrays, for CuPy's with their devices, and for torch's own on a CPU
    while nothing but its autograd watches. None stands for an array that is not there.
    """
    kind = type(arrays[0])
    if kind is not np.ndarray:
        cupy = sys.modules.get("cupy")
        if cupy is not None and kind is cupy.ndarray:
            return _plain_cupy_facts(kind, arrays)
        return _plain_torch_facts(arrays)
    facts: list[Any] = []
    for array in arrays:
        if array is None:
            facts.append(None)
        elif type(array) is kind:
            facts.append((array.shape, array.dtype))
        else:
            return None
    return tuple(facts)


def _plain_cupy_facts(kind: Any, arrays: tuple[Any, ...]) -> tuple[Any, ...] | None:
    facts: list[Any] = []
    for array in arrays:
        if array is None:
            facts.append(None)
        elif type(array) is kind:
            facts.append((array.shape, array.dtype, array.data.device_id))
        else:
            return None
    return tuple(facts)


def _plain_torch_facts(arrays: tuple[Any, ...]) -> tuple[Any, ...] | None:
    torch = sys.modules.get("torch")
    if torch is None or torch.compiler.is_compiling():
        return None
    ask = _probes_of(torch)
    facts: list[Any] = []
    for array in arrays:
        if array is None:
            facts.append(None)
        elif (
            type(array) is ask.tensor
            and array.is_cpu
            and array.layout is ask.strided
            and not array.is_nested
        ):
            facts.append((array.shape, array.dtype))
        else:
            return None
    if ask.modes() or ask.tracing() is not None or ask.transformed():
        return None
    if ask.forward_mode._current_level >= 0 or ask.autocast("cpu"):
        return None
    return tuple(facts)
