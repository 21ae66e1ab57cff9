"""How CuPy passes a kernel's arguments, and whether that is what the kernel expects.

CuPy does not look at a kernel's signature. What it passes, by cupy/cuda/function.pyx `_pointer` and
cupy/_core/_scalar.pyx `CScalar`:

| argument | CuPy 14.2.0 | CuPy 13.2.0 |
| --- | --- | --- |
| `None` | a null pointer | no parameter at all: a crash |
| `0` | 8 bytes, a null pointer | the same |
| `cupy.ndarray` | its address; shape, strides and device are not looked at | the same |
| `cupy.cuda.MemoryPointer` | its address | the same |
| `numpy.ndarray` with size 1, of any shape and dtype | its bytes | the same |
| `numpy.ndarray` with any other size | TypeError | the same |
| `int` | int64; uint64 from 2**63 on | int64, else OverflowError |
| `float`, `complex` | float64, complex128 | the same |
| `bool` | bool, 1 byte | int64, 8 bytes |
| `numpy.generic` of a builtin number dtype | its bytes | the same |
| `numpy.void`, `ml_dtypes.bfloat16` | its bytes | TypeError |
| anything else | TypeError | TypeError |

Where the two versions differ, the emulation refuses the argument.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from ._build import Kernel, Parameter
from ._memory import MemoryPointer
from ._ndarray import ndarray
from .cuda import device
from .emulation import EmulationError

_KINDS = {b"p": "a pointer", b"f": "a float", b"i": "an integer", b"b": "a bool", b"s": "a struct"}
_KIND_OF = {"f": b"f", "i": b"i", "u": b"i", "b": b"b", "V": b"s"}


def pack(name: str, kernel: Kernel, arguments: tuple[Any, ...]) -> list[bytes]:
    """Return the bytes of each argument, after checking that the kernel takes all of them."""
    if not isinstance(arguments, tuple | list):
        raise EmulationError(f"{name}: arguments must be a tuple, got {type(arguments).__name__}")
    if len(arguments) != kernel.count:
        raise EmulationError(
            f"{name} takes {kernel.count} arguments, got {len(arguments)}; pass one for each"
        )
    packed = []
    for place, argument in enumerate(arguments):
        try:
            packed.append(_pack(argument, kernel.parameters[place]))
        except EmulationError as error:
            raise EmulationError(f"{name}, argument {place}: {error}") from None
    return packed


def _pack(argument: Any, wanted: Parameter) -> bytes:
    if argument is None:
        raise EmulationError("CuPy 13 crashes over None; pass 0 for a null pointer")
    if type(argument) is int and argument == 0 and wanted.kind == b"p":
        return bytes(8)
    if isinstance(argument, ndarray | MemoryPointer):
        if wanted.kind != b"p":
            raise EmulationError(
                f"the kernel takes {_say(wanted)}, got a pointer; pass a scalar of that width"
            )
        return _address(argument, wanted).to_bytes(8, "little")
    kind, value = _value(argument)
    if kind != wanted.kind or len(value) != wanted.size:
        raise EmulationError(
            f"the kernel takes {_say(wanted)}, but {type(argument).__name__} goes as "
            f"{_KINDS[kind]} of {len(value)} bytes; pass what has that kind and width"
        )
    return value


def _say(wanted: Parameter) -> str:
    return f"{_KINDS[wanted.kind]} of {wanted.size} bytes"


def _address(argument: ndarray | MemoryPointer, wanted: Parameter) -> int:
    pointer = argument.data if isinstance(argument, ndarray) else argument
    if pointer.device_id != device.get_device_id():
        raise EmulationError(
            f"the array lies on device {pointer.device_id}, but the kernel would be started on "
            f"device {device.get_device_id()}; enter `with array.device`"
        )
    if pointer.ptr % wanted.pointee_alignment:
        raise EmulationError(
            f"the kernel takes a pointer to what is aligned to {wanted.pointee_alignment} bytes, "
            f"got address {pointer.ptr:#x}"
        )
    if isinstance(argument, ndarray) and wanted.pointee in b"fib":
        # Bytes may stand for any dtype, on either side.
        sizes = (argument.itemsize, wanted.pointee_size)
        if 1 not in sizes and sizes[0] != sizes[1]:
            raise EmulationError(
                f"the kernel takes a pointer to {wanted.pointee_size} bytes each, got an array of "
                f"{argument.dtype}"
            )
    return pointer.ptr


def _value(argument: Any) -> tuple[bytes, bytes]:
    if isinstance(argument, np.ndarray):
        if argument.size != 1:
            raise TypeError(
                "You are trying to pass a numpy.ndarray of shape "
                f"{argument.shape} as a kernel parameter. Only numpy.ndarrays of size one can be "
                "passed by value. If you meant to pass a pointer to __global__ memory, you need "
                "to pass a cupy.ndarray instead."
            )
        return _KIND_OF.get(argument.dtype.kind, b"s"), argument.tobytes()
    # NumPy's float64 is a float as well, of the same width.
    if isinstance(argument, bool):
        raise EmulationError(
            "a bool goes as 1 byte with CuPy 14 and as 8 with CuPy 13; pass an integer of the "
            "kernel's width"
        )
    if isinstance(argument, np.generic):
        if argument.dtype.kind == "V":
            raise EmulationError(
                f"CuPy 13 does not take {type(argument).__name__}; pass a numpy.ndarray of size 1"
            )
        return _KIND_OF.get(argument.dtype.kind, b"s"), argument.tobytes()
    if isinstance(argument, int):
        if not -(2**63) <= argument < 2**63:
            raise EmulationError(f"{argument} does not fit int64, which a Python int goes as")
        return b"i", argument.to_bytes(8, "little", signed=True)
    if isinstance(argument, float):
        return b"f", bytes(ctypes.c_double(argument))
    raise TypeError(f"Unsupported type {type(argument)}")
