"""CuPy: arrays on the device that they lie on, whichever is the current one."""

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
        """Tell that it has."""
        return True

    def device(self, array: Any) -> Any:
        """Return its own."""
        return array.device

    def device_kind(self, array: Any) -> str:
        """Return what CuPy calls ROCm's too."""
        return "cuda"

    def computing(self, operands: Mapping[str, Any]) -> contextlib.AbstractContextManager[Any]:
        """Make the arrays' device the current one."""
        device: contextlib.AbstractContextManager[Any] = operands["input"].device
        return device

    def place(self, array: Any) -> Place | None:
        """Tell where an array lies."""
        if not hasattr(array, "dtype"):
            return None
        return Place(array.data.ptr, array.shape, array.strides, array.itemsize)

    def overwrite(self, function: Any, array: Any, *others: Any) -> Any:
        """Write over the array."""
        return function(array, *others, out=array)


LIBRARY = _CuPy("cupy", xp, "cupy.asarray")
