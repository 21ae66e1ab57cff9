"""What polyce asks of an array library, answered as for one that follows the array API standard.

A library that deviates has a class of its own in this folder, which holds only the differences.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from polyce.arrays.dtypes import NUMPY_DTYPES, name_of


class Place(NamedTuple):
    """Where an array lies."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In bytes."""
    itemsize: int

    @property
    def extent(self) -> tuple[int, int]:
        """Return the addresses of the first byte and of the one after the last."""
        steps = [(size - 1) * step for size, step in zip(self.shape, self.strides, strict=True)]
        first = self.address + sum(step for step in steps if step < 0)
        last = self.address + sum(step for step in steps if step > 0)
        return first, last + self.itemsize

    @property
    def overlaps_itself(self) -> bool:
        """Tell whether two entries may share memory: a stride is too short for the axes within."""
        reach = self.itemsize
        for step, size in sorted(
            (abs(step), size) for step, size in zip(self.strides, self.shape, strict=True)
        ):
            if size > 1:
                if step < reach:
                    return True
                reach = step * (size - 1) + reach
        return False

    def meets(self, other: Place) -> bool:
        """Tell whether the address ranges of two arrays overlap."""
        if 0 in self.shape or 0 in other.shape:
            return False
        (first, last), (there, end) = self.extent, other.extent
        return first < end and there < last


class Library:
    """An array library: its namespace, and all that polyce asks of it."""

    is_lazy = False
    """Whether its arrays hold no values until a computation is requested."""
    takes_numpy = False
    """Whether its functions accept NumPy arrays along with its own."""
    is_writable = False
    """Whether its arrays can be written in place."""
    swaps_bytes = True
    """Whether it computes with arrays whose bytes are not in this processor's order, if any."""
    cuts_heads = True
    """Whether a linear head computes its logits for some rows at a time."""
    rounds_gradients = False
    """Whether such logits have their gradient in input's 16 bits, even if they are wider."""
    stored_only: tuple[str, ...] = ()
    """Integer dtypes that it stores but hardly computes with."""
    is_exact = False
    """Whether its numbers have arbitrarily many digits, and options should have as many."""
    quiet_numpy = False
    """Whether it computes in NumPy at once, so that NumPy's warnings must be silenced."""

    exact_products: Mapping[str, Any] = MappingProxyType({})
    """Options of its matmul that keep products of float32 in float32."""

    def __init__(self, name: str, xp: Any, converter: str = "") -> None:
        self.name = name
        self.xp = xp
        self.converter = converter or f"{name}'s asarray"
        """How a user converts another library's array to this one's."""

    def __repr__(self) -> str:
        """Show the library's name."""
        return f"<array library {self.name}>"

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the namespace by name: not every pickler can send a module."""
        return self.__dict__ | {"xp": self.xp.__name__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Import the namespace again."""
        self.__dict__.update(state, xp=importlib.import_module(state["xp"]))

    # Values and devices

    def has_values(self, array: Any) -> bool:
        """Tell whether an array's values can be read: it is not traced, lazy, vmapped or meta."""
        if isinstance(array, np.ndarray):
            return True
        if self.is_lazy:
            return False
        import array_api_compat

        return not array_api_compat.is_lazy_array(array)

    def are_concrete(self, arrays: Iterable[Any]) -> bool:
        """Tell whether all arrays are memory that a kernel may read, outside of any transform."""
        return all(array is None or self.has_values(array) for array in arrays)

    def are_compiled(self, arrays: Iterable[Any]) -> bool:
        """Tell whether torch.compile traces these arrays, all plain ones that will hold values."""
        return False

    def fuses(self, array: Any) -> bool:
        """Tell whether a compiler will rearrange and fuse the operations on this array."""
        return False

    def device(self, array: Any) -> Any:
        """Return an array's device, to compare; None if the library does not say."""
        return None

    def device_kind(self, array: Any) -> str:
        """Return the kind of device of an array: cpu, cuda, ..., or unknown while tracing."""
        return "cpu" if isinstance(array, np.ndarray) else "unknown"

    def is_at_hand(self, array: Any) -> bool:
        """Tell whether reading an array's values neither computes nor waits."""
        # On an accelerator it would stall the host.
        return self.has_values(array) and self.device_kind(array) in ("cpu", "unknown")

    def default_device_kind(self) -> str:
        """Return the kind of device that will compute traced arrays."""
        return "cpu"

    def to_look_at(self, labels: Any) -> Any:
        """Return labels that have values in a form in which these can be read."""
        return labels

    def computing(self, operands: Mapping[str, Any]) -> contextlib.AbstractContextManager[Any]:
        """Prepare for computing with the arrays of a call, by the caller's names for them."""
        return self.quiet()

    def multiplying(self, operands: Mapping[str, Any]) -> contextlib.AbstractContextManager[Any]:
        """Prepare for matrix products as well, in the dtypes that the operands have."""
        return self.computing(operands)

    def quiet(self) -> contextlib.AbstractContextManager[Any]:
        """Silence NumPy's warnings: an infinity or nan is selected away or is the answer."""
        if self.quiet_numpy:
            return np.errstate(all="ignore")
        return contextlib.nullcontext()

    def place(self, array: Any) -> Place | None:
        """Return where an array lies; None for other values, or if the library does not say."""
        return None

    def unwritable(self, out: Any) -> str | None:
        """Return what an array must be for results to go into it and is not; None if it is."""
        return None

    def check_memory(self, arrays: Mapping[str, Any]) -> None:
        """Refuse arrays that reach beyond their memory, by the caller's names for them."""

    def to_numpy(self, *arrays: Any) -> list[Any]:
        """Copy arrays into NumPy, those that are lazy computed together."""
        return [np.asarray(array) for array in arrays]

    # Dtypes

    def float_dtype(self, name: str) -> Any:
        """Return float32 or float64 as the library's arrays show it."""
        return getattr(self.xp, name)

    def has_float64(self, where: Any) -> bool:
        """Tell whether the library computes in float64 on the device that holds `where`."""
        return "float64" in self.xp.__array_namespace_info__().dtypes(device=where.device)

    def label_dtype(self, labels: Any) -> Any:
        """Return the integer dtype for positions along the class axis, given the labels."""
        # Not every library has 64-bit integers on every device.
        return self.xp.__array_namespace_info__().default_dtypes(device=labels.device)["indexing"]

    def result_dtype(self, dtype: Any, where: Any) -> Any:
        """Return the dtype of a loss whose arrays promote to `dtype`, on the device of `where`."""
        return dtype

    def factor_dtype(self, dtype: Any, where: Any) -> Any:
        """Return the dtype to which a matrix product converts a factor of `dtype`."""
        return dtype

    def product_dtype(self, dtype: Any, where: Any) -> Any:
        """Return the best dtype for logits that are a product of two arrays of `dtype`."""
        return dtype if name_of(dtype) in ("float32", "float64") else self.float_dtype("float32")

    def cast(self, array: Any, dtype: Any) -> Any:
        """Convert an array, or the scalar that a NumPy reduction returns, to a dtype."""
        if array.dtype is dtype or array.dtype == dtype:
            return array
        if isinstance(array, (np.ndarray, np.generic)):
            # The method also takes NumPy's scalars, in a quarter of the function's overhead.
            return array.astype(dtype)
        return self.xp.astype(array, dtype)

    def integer(self, value: int, like: Any) -> Any:
        """Return an integer in a form that compares with the array's entries."""
        return value

    def exact(self, number: float) -> Any:
        """Return a number with as many digits as the arrays have."""
        return number

    # Rows and classes

    def align(self, array: Any, logits: Any) -> Any:
        """Cut an array that broadcasts against the logits as they are cut, so they stay cut so."""
        return array

    def one_hot(self, labels: Any, logits: Any, axis: int, *, beside_logits: bool = True) -> Any:
        """Mark each row's label, in the logits' shape."""
        return self.classes(labels, logits, axis) == labels

    def classes(self, labels: Any, logits: Any, axis: int, **options: Any) -> Any:
        """Return 0, ..., C - 1 along the class axis, in the labels' dtype."""
        where = self.device(logits)
        if where is not None:
            options["device"] = where
        numbers = self.xp.arange(logits.shape[axis], dtype=labels.dtype, **options)
        return along_axis(numbers, axis, logits.ndim)

    def pick(self, values: Any, labels: Any, logits: Any, axis: int) -> Any:
        """Take each row's value at its label, all in range; values broadcast against the logits.

        Of several labels of each row, along the class axis, it takes as many values.
        """
        if hasattr(self.xp, "take_along_axis"):
            return self.xp.take_along_axis(values, labels, axis=axis)
        return self.pick_by_mask(values, labels, logits, axis)

    def pick_by_mask(self, values: Any, labels: Any, logits: Any, axis: int) -> Any:
        """Do what `pick` does where there is no gather."""
        if labels.shape[axis] != 1:
            found = [self.pick_by_mask(values, one, logits, axis) for one in columns(labels, axis)]
            if not found:
                return self.xp.zeros_like(labels, dtype=values.dtype)
            return self.xp.concat(found, axis=axis)
        # The loss needs the same mask: a lazy library computes it once.
        of_logits = values.shape == logits.shape
        mask = self.one_hot(labels, logits if of_logits else values, axis, beside_logits=of_logits)
        return self.xp.sum(self.xp.where(mask, values, 0.0), axis=axis, keepdims=True)

    def add_at(self, array: Any, labels: Any, values: Any, axis: int) -> Any:
        """Add values at several labels of each row, which may be equal, to an array.

        All have the logits' shape, but for the length of the class axis. The array is not used
        again, and may be overwritten.
        """
        for label, value in zip(columns(labels, axis), columns(values, axis), strict=True):
            array = self.xp.where(self.one_hot(label, array, axis), array + value, array)
        return array

    def first_class(self, logits: Any, axis: int) -> Any:
        """Return each row's logit of the first class."""
        return logits[(*(slice(None),) * axis, 0, ...)]

    def class_max(self, values: Any, axis: int) -> Any:
        """Return the largest value over the classes; the class axis stays, of length 1.

        It only shifts a row so that exponentials do not overflow; no derivative depends on it.
        """
        return self.xp.max(values, axis=axis, keepdims=True)

    def argmax(self, values: Any, axis: int) -> Any:
        """Return the first class with the largest value; the class axis stays, of length 1."""
        return self.xp.argmax(values, axis=axis, keepdims=True)

    def class_sum(self, values: Any, axis: int, dtype: Any) -> Any:
        """Sum over the classes, accurately in any layout, into a dtype at least as wide.

        The class axis stays, of length 1.
        """
        if self.adds_one_by_one(values, axis) and widens_nothing(values, axis, dtype):
            return self.sum_by_blocks(values, axis)
        return self.xp.sum(values, axis=axis, dtype=dtype, keepdims=True)

    def adds_one_by_one(self, values: Any, axis: int) -> bool:
        """Tell whether a sum along an axis adds numbers one by one, as NumPy's may."""
        return False

    def sum_by_blocks(self, values: Any, axis: int) -> Any:
        """Sum in √n blocks of √n, then add these up: the error grows with √n, not with n."""
        before, size, after = values.shape[:axis], values.shape[axis], values.shape[axis + 1 :]
        block = math.isqrt(size)
        whole = size // block * block
        head = values[(*(slice(None),) * axis, slice(whole), ...)]
        tail = values[(*(slice(None),) * axis, slice(whole, None), ...)]
        split = self.xp.reshape(head, (*before, size // block, block, *after))
        parts = self.xp.sum(split, axis=axis + 1)
        rest = self.xp.sum(tail, axis=axis, keepdims=True)
        return self.xp.sum(parts, axis=axis, keepdims=True) + rest

    def total(self, values: Any) -> Any:
        """Sum over everything."""
        return self.xp.sum(values)

    def row_count(self, row_shape: tuple[Any, ...], logits: Any, axis: int, dtype: Any) -> Any:
        """Count rows: a float, or a 0-d array of `dtype` if only a run will tell."""
        return float(math.prod(row_shape))

    def divide(self, values: Any, divisor: Any) -> Any:
        """Divide by a denominator that is 0 in a mean over nothing."""
        return values / divisor

    def replace(self, mask: Any, value: Any, array: Any, *, owned: bool) -> Any:
        """Put `value` where the mask is True; the array may be overwritten if it is `owned`."""
        return self.xp.where(mask, value, array)

    def overwrite(self, function: Any, array: Any, *others: Any) -> Any:
        """Apply an elementwise function to an array that is not used again, in place if it can."""
        return function(array, *others)

    def is_any(self, mask: Any) -> bool:
        """Tell whether a mask, whose values can be read, is True anywhere."""
        return bool(self.xp.any(mask))

    def matmul(self, a: Any, b: Any, dtype: Any, **options: Any) -> Any:
        """Multiply two matrices into a dtype at least as wide."""
        return self.xp.matmul(self.cast(a, dtype), self.cast(b, dtype), **options)


def expand(array: Any, axis: int) -> Any:
    """View an array over the rows with the class axis put back, of length 1."""
    slices = (slice(None),)
    return array[slices * axis + (None,) + slices * (array.ndim - axis)]


def columns(array: Any, axis: int) -> list[Any]:
    """View an array as its entries along the class axis, each keeping that axis, of length 1."""
    return [array[(*(slice(None),) * axis, slice(k, k + 1), ...)] for k in range(array.shape[axis])]


def along_axis(vector: Any, axis: int, ndim: int) -> Any:
    """View a vector of length C as an array of ndim dimensions with the classes along axis."""
    return vector[(None,) * axis + (slice(None),) + (None,) * (ndim - axis - 1)]


def cut_alike(array: Any, logits: Any) -> Any:
    """Rechunk an array that broadcasts against the logits to match their chunks."""
    pairs = zip(array.shape, logits.shape, logits.chunks, strict=True)
    return array.rechunk(tuple(cuts if size == full else (size,) for size, full, cuts in pairs))


FEW = 128
"""Up to this many numbers may be added one by one."""


def widens_nothing(values: Any, axis: int, dtype: Any) -> bool:
    """Tell whether a sum of many numbers stays in their dtype, so that its order matters."""
    return values.dtype == dtype and values.shape[axis] > FEW


class WithNumPyDtypes(Library):
    """A library whose arrays have NumPy's dtypes and which computes in all of them."""

    def float_dtype(self, name: str) -> Any:
        """Return NumPy's dtype."""
        return NUMPY_DTYPES[name]

    def has_float64(self, where: Any) -> bool:
        """Return True."""
        return True

    def label_dtype(self, labels: Any) -> Any:
        """Return int64, which can number every axis."""
        return self.xp.int64
