"""A toy array library around NumPy that deviates from the array API standard in four ways."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np


class Array(np.lib.mixins.NDArrayOperatorsMixin):
    """An array with what the standard requires, and nothing else of NumPy's."""

    def __init__(self, data: Any) -> None:
        self._data = np.asarray(data)
        self.shape, self.ndim, self.dtype = self._data.shape, self._data.ndim, self._data.dtype

    def __array_namespace__(self, *, api_version: str | None = None) -> Any:
        return sys.modules[__name__]

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        return Array(getattr(ufunc, method)(*map(to_numpy, inputs), **options))

    def __getitem__(self, key: Any) -> Array:
        return Array(self._data[key])

    def __bool__(self) -> bool:
        return bool(self._data)

    def __int__(self) -> int:
        return int(self._data)


def to_numpy(value: Any) -> Any:
    return value._data if isinstance(value, Array) else value


def of_numpy(function: Any) -> Any:
    return lambda *given, **options: Array(function(*map(to_numpy, given), **options))


# 1: there is no __array_namespace_info__, which lists the dtypes. 2: nor take_along_axis.
int64, uint8, float32, float64 = np.int64, np.uint8, np.float32, np.float64
FUNCTIONS = (
    "abs any arange asarray astype exp full_like isfinite isinf log1p max maximum multiply "
    "ones_like reshape squeeze subtract tanh where zeros_like"
)
globals().update((name, of_numpy(getattr(np, name))) for name in FUNCTIONS.split())


# 3: argmax drops the axis.
def argmax(x: Array, axis: int | None = None) -> Array:
    return Array(np.argmax(x._data, axis=axis))


# 4: sum takes no dtype, and adds in its argument's.
def sum(x: Array, axis: int | None = None, *, keepdims: Any = False) -> Array:  # noqa: A001
    return Array(np.sum(x._data, axis=axis, keepdims=keepdims))
