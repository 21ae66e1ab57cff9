"""What polyce asks of an array library, as one that follows the array API standard answers.

A library that deviates has a class of its own in this folder, which says how and nothing else.
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
        """The addresses from the first byte to behind the last one."""
        steps = [(size - 1) * step for size, step in zip(self.shape, self.strides, strict=True)]
        first = self.address + sum(step for step in steps if step < 0)
        last = self.address + sum(step for step in steps if step > 0)
        return first, last + self.itemsize

    @property
    def overlaps_itself(self) -> bool:
        """Whether two entries may share memory: each stride should reach over what is within it."""
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
        """Tell whether two arrays lie in a common stretch of memory."""
        if 0 in self.shape or 0 in other.shape:
            return False
        (first, last), (there, end) = self.extent, other.extent
        return first < end and there < last


class Library:
    """An array library: its namespace, and what is asked of it."""

    is_lazy = False
    """Whether its arrays hold no values before a computation is asked for."""
    takes_numpy = False
    """Whether its functions take NumPy arrays among its own."""
    is_writable = False
    """Whether its arrays can be written in place."""
    swaps_bytes = True
    """Whether it computes with bytes in another order than this processor's, if they can be."""
    cuts_heads = True
    """Whether the logits of a linear head are made for some rows at a time."""
    rounds_gradients = False
    """Whether such logits have their gradient in 16 bits, however wide they are themselves."""
    stored_only: tuple[str, ...] = ()
    """Integer dtypes that it stores but hardly computes with."""
    is_exact = False
    """Whether its numbers have any number of digits, and options should have as many."""
    quiet_numpy = False
    """Whether it computes in NumPy as soon as it is called, whose warnings are kept away."""

    exact_products: Mapping[str, Any] = MappingProxyType({})
    """What its matmul is told for products of float32 in no fewer bits."""

    def __init__(self, name: str, xp: Any, converter: str = "") -> None:
        self.name = name
        self.xp = xp
        self.converter = converter or f"{name}'s asarray"
        """How a user turns another library's array into one of this."""

    def __repr__(self) -> str:
        """Show its name."""
        return f"<array library {self.name}>"

    def __getstate__(self) -> dict[str, Any]:
        """Name the namespace: not all picklers can send a module to another process."""
        return self.__dict__ | {"xp": self.xp.__name__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Import the namespace again."""
        self.__dict__.update(state, xp=importlib.import_module(state["xp"]))

    # Values and devices

    def has_values(self, array: Any) -> bool:
        """Tell whether an array's values can be looked at: not traced, lazy, vmapped or meta."""
        if isinstance(array, np.ndarray):
            return True
        if self.is_lazy:
            return False
        import array_api_compat

        return not array_api_compat.is_lazy_array(array)

    def are_concrete(self, arrays: Iterable[Any]) -> bool:
        """Tell whether all arrays are memory that a kernel may read, and no derivative waits."""
        return all(array is None or self.has_values(array) for array in arrays)

    def are_compiled(self, arrays: Iterable[Any]) -> bool:
        """Tell whether torch.compile traces these arrays, all plain ones that will hold values."""
        return False

    def fuses(self, array: Any) -> bool:
        """Tell whether a compiler will take what is written for this array apart, and fuse it."""
        return False

    def device(self, array: Any) -> Any:
        """Tell the device of an array as the library compares them, None where it has no say."""
        return None

    def device_kind(self, array: Any) -> str:
        """Tell what kind of device holds an array: cpu, cuda, ..., or unknown while tracing."""
        return "cpu" if isinstance(array, np.ndarray) else "unknown"

    def is_at_hand(self, array: Any) -> bool:
        """Tell whether a look at an array's values costs no more than the look."""
        # On an accelerator it would stall the host.
        return self.has_values(array) and self.device_kind(array) in ("cpu", "unknown")

    def default_device_kind(self) -> str:
        """Tell on what kind of device traced arrays will be computed."""
        return "cpu"

    def to_look_at(self, labels: Any) -> Any:
        """Return labels of known values as they can be looked at."""
        return labels

    def computing(self, operands: Mapping[str, Any]) -> contextlib.AbstractContextManager[Any]:
        """Prepare for computing with the arrays of a call, by what the caller calls them."""
        return self.quiet()

    def multiplying(self, operands: Mapping[str, Any]) -> contextlib.AbstractContextManager[Any]:
        """Prepare for matrix products as well, in the dtypes that the operands have."""
        return self.computing(operands)

    def quiet(self) -> contextlib.AbstractContextManager[Any]:
        """Keep NumPy's warnings away: an infinity or nan is selected away or is the answer."""
        if self.quiet_numpy:
            return np.errstate(all="ignore")
        return contextlib.nullcontext()

    def place(self, array: Any) -> Place | None:
        """Tell where an array lies; None for what is none, and where the library does not say."""
        return None

    def unwritable(self, out: Any) -> str | None:
        """Say why results cannot go into an array, as what it must be and how; None if they can."""
        return None

    def check_memory(self, arrays: Mapping[str, Any]) -> None:
        """Refuse arrays that reach beyond their memory, by what the caller calls them."""

    # Dtypes

    def float_dtype(self, name: str) -> Any:
        """Return float32 or float64 as an array of the library shows it."""
        return getattr(self.xp, name)

    def has_float64(self, where: Any) -> bool:
        """Tell whether it computes in float64 on the device that holds `where`."""
        return "float64" in self.xp.__array_namespace_info__().dtypes(device=where.device)

    def label_dtype(self, labels: Any) -> Any:
        """Return the integer dtype for positions along the class axis, beside these labels."""
        # Not all have 64-bit integers everywhere.
        return self.xp.__array_namespace_info__().default_dtypes(device=labels.device)["indexing"]

    def result_dtype(self, dtype: Any, where: Any) -> Any:
        """Return the dtype of a loss on the device of `where`, which would be `dtype`."""
        return dtype

    def factor_dtype(self, dtype: Any, where: Any) -> Any:
        """Return the dtype that a matrix product takes a factor of `dtype` in."""
        return dtype

    def product_dtype(self, dtype: Any, where: Any) -> Any:
        """Return the dtype in which logits are best made, as a product of two such arrays."""
        return dtype if name_of(dtype) in ("float32", "float64") else self.float_dtype("float32")

    def cast(self, array: Any, dtype: Any) -> Any:
        """Convert an array, or the scalar that a NumPy reduction returns, to a dtype."""
        if array.dtype is dtype or array.dtype == dtype:
            return array
        if isinstance(array, (np.ndarray, np.generic)):
            # The method takes NumPy's scalars too, and starts in a quarter of the function's time.
            return array.astype(dtype)
        return self.xp.astype(array, dtype)

    def integer(self, value: int, like: Any) -> Any:
        """Return an integer as an array's entries are compared with it."""
        return value

    def exact(self, number: float) -> Any:
        """Return a number with as many digits as the arrays have."""
        return number

    # Rows and classes

    def align(self, array: Any, logits: Any) -> Any:
        """Cut an array that broadcasts against the logits as they are cut, so that they stay so."""
        return array

    def one_hot(self, labels: Any, logits: Any, axis: int, *, beside_logits: bool = True) -> Any:
        """Mark in every row of the logits the class that labels name, in the logits' shape."""
        return self.classes(labels, logits, axis) == labels

    def classes(self, labels: Any, logits: Any, axis: int, **options: Any) -> Any:
        """Return the numbers of the classes along the class axis, in the labels' dtype."""
        where = self.device(logits)
        if where is not None:
            options["device"] = where
        numbers = self.xp.arange(logits.shape[axis], dtype=labels.dtype, **options)
        return along_axis(numbers, axis, logits.ndim)

    def pick(self, values: Any, labels: Any, logits: Any, axis: int) -> Any:
        """Take each row's value at its label, all in range; values broadcast against the logits."""
        if hasattr(self.xp, "take_along_axis"):
            return self.xp.take_along_axis(values, labels, axis=axis)
        return self.pick_by_mask(values, labels, logits, axis)

    def pick_by_mask(self, values: Any, labels: Any, logits: Any, axis: int) -> Any:
        """Do what `pick` does where there is no gather."""
        # The mask is the one that the loss needs: who puts off computing makes it once.
        of_logits = values.shape == logits.shape
        mask = self.one_hot(labels, logits, axis, beside_logits=of_logits)
        return self.xp.sum(self.xp.where(mask, values, 0.0), axis=axis, keepdims=True)

    def class_max(self, values: Any, axis: int) -> Any:
        """Return the largest value over the classes; the class axis stays, of length 1.

        It only serves to move a row to a place where exponentials do not overflow, and no
        derivative depends on it.
        """
        return self.xp.max(values, axis=axis, keepdims=True)

    def argmax(self, values: Any, axis: int) -> Any:
        """Return the first class with the largest value; the class axis stays, of length 1."""
        return self.xp.argmax(values, axis=axis, keepdims=True)

    def class_sum(self, values: Any, axis: int, dtype: Any) -> Any:
        """Sum over the classes, accurately for any layout, into a dtype at least as wide.

        The class axis stays, of length 1.
        """
        if self.adds_one_by_one(values, axis) and widens_nothing(values, axis, dtype):
            return self.sum_by_blocks(values, axis)
        return self.xp.sum(values, axis=axis, dtype=dtype, keepdims=True)

    def adds_one_by_one(self, values: Any, axis: int) -> bool:
        """Tell whether a sum along an axis adds one number after the other, as NumPy's may."""
        return False

    def sum_by_blocks(self, values: Any, axis: int) -> Any:
        """Sum blocks as long as there are many, then what they give: an error of two roots."""
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
        """Count rows: a float, or a 0-d array of `dtype` where only a run will tell."""
        return float(math.prod(row_shape))

    def divide(self, values: Any, divisor: Any) -> Any:
        """Divide by what may be 0, the denominator of a mean over nothing."""
        return values / divisor

    def replace(self, mask: Any, value: Any, array: Any, *, owned: bool) -> Any:
        """Put value where the mask is True; an array that is `owned` may be changed."""
        return self.xp.where(mask, value, array)

    def overwrite(self, function: Any, array: Any, *others: Any) -> Any:
        """Apply an elementwise function to an array that nobody else holds, in place if it can."""
        return function(array, *others)

    def is_any(self, mask: Any) -> bool:
        """Tell whether a mask whose values are at hand is True anywhere."""
        return bool(self.xp.any(mask))

    def matmul(self, a: Any, b: Any, dtype: Any, **options: Any) -> Any:
        """Multiply two matrices into a dtype at least as wide."""
        return self.xp.matmul(self.cast(a, dtype), self.cast(b, dtype), **options)


def expand(array: Any, axis: int) -> Any:
    """View an array over the rows with the class axis put back, of length 1."""
    slices = (slice(None),)
    return array[slices * axis + (None,) + slices * (array.ndim - axis)]


def along_axis(vector: Any, axis: int, ndim: int) -> Any:
    """View a vector of length C as an array of ndim dimensions with the classes along axis."""
    return vector[(None,) * axis + (slice(None),) + (None,) * (ndim - axis - 1)]


def cut_alike(array: Any, logits: Any) -> Any:
    """Rechunk an array that broadcasts against the logits as they are cut."""
    pairs = zip(array.shape, logits.shape, logits.chunks, strict=True)
    return array.rechunk(tuple(cuts if size == full else (size,) for size, full, cuts in pairs))


FEW = 128
"""So many numbers may be added one by one."""


def widens_nothing(values: Any, axis: int, dtype: Any) -> bool:
    """Tell whether a sum of many numbers is in their own dtype, so that its order matters."""
    return values.dtype == dtype and values.shape[axis] > FEW


class WithNumPyDtypes(Library):
    """A library whose arrays show NumPy's dtypes, all of which it computes in."""

    def float_dtype(self, name: str) -> Any:
        """Return NumPy's."""
        return NUMPY_DTYPES[name]

    def has_float64(self, where: Any) -> bool:
        """Tell that it has."""
        return True

    def label_dtype(self, labels: Any) -> Any:
        """Return what numbers every axis."""
        return self.xp.int64
