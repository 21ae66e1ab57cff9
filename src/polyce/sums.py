"""Sums over the classes and over all rows, with all their digits on every library."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from polyce.arrays import cast, device_kind

# What adds one by one along an axis, as NumPy does along all but the innermost.
_ONE_BY_ONE = ("numpy", "array-api-strict", "marray")
FEW = 128
"""So many numbers may be added one by one."""


def class_sum(xp: Any, backend: str, values: Any, axis: int, dtype: Any) -> Any:
    """Sum over the classes, accurately for any layout, into a dtype at least as wide.

    The class axis stays, of length 1.
    """
    if backend == "torch":
        # torch adds in a cascade, whatever the axis, and would copy all values to widen them.
        return cast(xp, xp.sum(values, axis=axis, keepdims=True), dtype)
    if backend == "mlx":
        return cast(xp, xp.sum(_summable(xp, values), axis=axis, keepdims=True), dtype)
    if values.dtype == dtype and values.shape[axis] > FEW:
        # Nothing is widened, which would be right for all orders.
        if backend == "dask":
            return _chunk_by_chunk(values, axis, dtype)
        # mparray does along the innermost too: its numbers are objects.
        if backend == "mparray" or (backend in _ONE_BY_ONE and not _innermost(values, axis)):
            return _by_blocks(xp, values, axis)
    add = np.add.reduce if backend == "numpy" else xp.sum
    return add(values, axis=axis, dtype=dtype, keepdims=True)


def _innermost(values: Any, axis: int) -> bool:
    if hasattr(values, "strides"):
        return abs(values.strides[axis]) == values.itemsize
    return axis == values.ndim - 1


def _by_blocks(xp: Any, values: Any, axis: int) -> Any:
    """Sum blocks as long as there are many, then what they give: an error of two square roots."""
    before, size, after = values.shape[:axis], values.shape[axis], values.shape[axis + 1 :]
    block = math.isqrt(size)
    whole = size // block * block
    head = values[(*(slice(None),) * axis, slice(whole), ...)]
    tail = values[(*(slice(None),) * axis, slice(whole, None), ...)]
    parts = xp.sum(xp.reshape(head, (*before, size // block, block, *after)), axis=axis + 1)
    return xp.sum(parts, axis=axis, keepdims=True) + xp.sum(tail, axis=axis, keepdims=True)


def _chunk_by_chunk(values: Any, axis: int, dtype: Any) -> Any:
    import dask.array as da

    return da.reduction(values, _chunk_sum, _chunk_sum, axis=axis, keepdims=True, dtype=dtype)


def _chunk_sum(values: Any, axis: Any, keepdims: bool) -> Any:
    from polyce import libraries

    (along,) = axis
    xp, backend, _ = libraries.of(input=values)
    return class_sum(xp, backend, values, along, values.dtype)


def total(xp: Any, backend: str, values: Any) -> Any:
    """Sum over everything."""
    if backend == "mlx":
        return cast(xp, xp.sum(_summable(xp, values)), values.dtype)
    if backend == "dask":
        # dask by itself adds up two such numbers a task, as if they were large.
        return values.sum(split_every=dict.fromkeys(range(values.ndim), 16))
    return np.add.reduce(values, axis=None) if backend == "numpy" else xp.sum(values)


def _summable(xp: Any, values: Any) -> Any:
    """Widen mlx's values on a CPU, which adds one by one and loses 3e-4 of 35000; GPUs do not."""
    return cast(xp, values, xp.float64) if device_kind(values, "mlx") == "cpu" else values
