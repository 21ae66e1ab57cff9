"""dask: lazy arrays in chunks, which are kept cut as the logits are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import array_api_compat.dask.array as xp
import dask
import dask.array as da
import numpy as np
from dask.array.core import elemwise

from polyce.arrays.library import (
    Library,
    WithNumPyDtypes,
    along_axis,
    cut_alike,
    widens_nothing,
)

Find = Callable[..., tuple[Library, list[Any]]]


class _Dask(WithNumPyDtypes):
    is_lazy = True
    takes_numpy = True
    find: Find
    """What tells the library of a chunk; `find`, which imports this file, puts it here."""

    def device_kind(self, array: Any) -> str:
        """Return "cpu", which is true of NumPy chunks."""
        return "cpu"

    def align(self, array: Any, logits: Any) -> Any:
        """Rechunk along every axis on which the array has the logits' size."""
        return cut_alike(array, logits)

    def one_hot(self, labels: Any, logits: Any, axis: int, *, beside_logits: bool = True) -> Any:
        """Make masks cut as the classes are; with `beside_logits` each waits for its logits.

        dask computes what it can as soon as it can: masks that need no logits would all be made
        before the gradient, which waits for the mean's denominator, and fill the memory.
        """
        classes = self.xp.arange(
            logits.shape[axis], dtype=labels.dtype, chunks=(logits.chunks[axis],)
        )
        classes = along_axis(classes, axis, logits.ndim)
        if beside_logits:
            return elemwise(_is_label, classes, labels, logits, dtype=bool)
        return classes == labels

    def to_numpy(self, *arrays: Any) -> list[Any]:
        """Compute them together, from chunks of any library."""
        found = []
        for computed in dask.compute(*arrays):
            library, (array,) = self.find(input=computed)
            found += library.to_numpy(array)
        return found

    def class_sum(self, values: Any, axis: int, dtype: Any) -> Any:
        """Sum within each chunk as the chunk's own library does."""
        if widens_nothing(values, axis, dtype):
            add = partial(_chunk_sum, self.find)
            return da.reduction(values, add, add, axis=axis, keepdims=True, dtype=dtype)
        return self.xp.sum(values, axis=axis, dtype=dtype, keepdims=True)

    def total(self, values: Any) -> Any:
        """Add up 16 numbers a task; dask's default is two, which suits large arrays."""
        return values.sum(split_every=dict.fromkeys(range(values.ndim), 16))

    def divide(self, values: Any, divisor: Any) -> Any:
        """Divide in tasks that silence NumPy's warnings themselves, whatever the caller has set."""
        return elemwise(_divided, values, divisor)


def _is_label(classes: Any, labels: Any, logits: Any) -> Any:
    return classes == labels


def _chunk_sum(find: Find, values: Any, axis: Any, keepdims: bool) -> Any:
    (along,) = axis
    library, _ = find(input=values)
    return library.class_sum(values, along, values.dtype)


def _divided(values: Any, divisor: Any) -> Any:
    with np.errstate(all="ignore"):
        return values / divisor


LIBRARY = _Dask("dask", xp, "dask.array.from_array")
