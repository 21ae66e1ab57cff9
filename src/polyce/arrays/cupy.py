"""CuPy: arrays are computed on the device that holds them, whichever is the current one."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import array_api_compat.cupy as xp

from polyce.arrays.library import Place, WithNumPyDtypes


class _CuPy(WithNumPyDtypes):
    is_writable = True
    swaps_bytes = False

    def has_values(self, array: Any) -> bool:
        """Return True: CuPy is eager."""
        return True

    def device(self, array: Any) -> Any:
        """Return the array's device."""
        return array.device

    def device_kind(self, array: Any) -> str:
        """Return "cuda", as CuPy calls ROCm devices too."""
        return "cuda"

    def computing(self, operands: Mapping[str, Any]) -> contextlib.AbstractContextManager[Any]:
        """Make the arrays' device the current one."""
        device: contextlib.AbstractContextManager[Any] = operands["input"].device
        return device

    def place(self, array: Any) -> Place | None:
        """Return where an array lies."""
        if not hasattr(array, "dtype"):
            return None
        return Place(array.data.ptr, array.shape, array.strides, array.itemsize)

    def to_numpy(self, *arrays: Any) -> list[Any]:
        """Bring the arrays to the host."""
        return [array.get() for array in arrays]

    def overwrite(self, function: Any, array: Any, *others: Any) -> Any:
        """Write the result over the array."""
        return function(array, *others, out=array)


LIBRARY = _CuPy("cupy", xp, "cupy.asarray")
