"""The array of the emulated CuPy: a NumPy array reached only through CuPy's own operations."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import emulation
from ._memory import Memory, MemoryPointer
from .cuda import device

# The class has methods of these names, which hide the types.
_bool, _float, _int = bool, float, int


class Flags:
    """How an array lies in memory."""

    def __init__(self, flags: Any, owns: bool) -> None:
        self.c_contiguous = flags.c_contiguous
        self.f_contiguous = flags.f_contiguous
        self.owndata = owns
        self.fnc = flags.fnc
        self.forc = flags.forc

    def __getitem__(self, name: str) -> bool:
        return getattr(self, name.lower())


def checked_dtype(dtype: Any) -> np.dtype:
    """Return the dtype, after checking that CuPy makes arrays of it."""
    dtype = np.dtype(dtype)
    if dtype.byteorder == ">":
        raise ValueError(f"Unsupported dtype {dtype} with big-endian byte-order")
    if dtype.kind not in "biufcV" or dtype.char == "g":
        raise ValueError(f"Unsupported dtype {dtype}")
    return dtype


def like(array: np.ndarray, dtype: np.dtype, order: str) -> tuple[str, tuple[int, ...] | None]:
    """Return order and strides of a copy, as CuPy works them out for `empty_like` and `astype`."""
    c_contiguous, f_contiguous = array.flags.c_contiguous, array.flags.f_contiguous
    order = order.upper()
    if order not in tuple("CFKA"):
        raise ValueError(f"order not understood: {order}")
    if order == "A":
        return ("F" if f_contiguous and not c_contiguous else "C"), None
    if order != "K":
        return order, None
    if c_contiguous or f_contiguous:
        return ("C" if c_contiguous else "F"), None
    strides, step = [0] * array.ndim, dtype.itemsize
    for _, axis in sorted((abs(stride), -axis) for axis, stride in enumerate(array.strides)):
        strides[-axis] = step
        step *= array.shape[-axis]
    return "C", tuple(strides)


class ndarray:
    """An array; the arguments are those of `cupy.ndarray`."""

    __array_priority__ = 100
    __hash__ = None  # type: ignore[assignment]
    __module__ = "cupy"

    def __init__(
        self,
        shape: Any,
        dtype: Any = float,
        memptr: MemoryPointer | None = None,
        strides: Any = None,
        order: str = "C",
    ) -> None:
        shape = tuple(map(int, shape)) if isinstance(shape, Sequence) else (operator.index(shape),)
        dtype = np.dtype(dtype) if memptr is not None else checked_dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        memory = Memory(size) if memptr is None else memptr.mem
        offset = 0 if memptr is None else memptr.ptr - memory.ptr
        self._memory = memory
        self._array = np.ndarray(shape, dtype, memory.values, offset, strides, order or "C")
        self.base: ndarray | None = None

    @classmethod
    def _of(cls, array: np.ndarray, memory: Memory, base: ndarray | None) -> ndarray:
        self = object.__new__(cls)
        self._array, self._memory, self.base = array, memory, base
        return self

    shape = property(lambda self: self._array.shape)
    strides = property(lambda self: self._array.strides)
    dtype = property(lambda self: self._array.dtype)
    itemsize = property(lambda self: self._array.itemsize)
    ndim = property(lambda self: self._array.ndim)
    size = property(lambda self: self._array.size)
    nbytes = property(lambda self: self._array.nbytes)
    flags = property(lambda self: Flags(self._array.flags, self.base is None))
    device = property(lambda self: self._memory.device)
    T = property(lambda self: self.transpose())

    @property
    def data(self) -> MemoryPointer:
        """Return where the first entry lies."""
        if not self._memory.size:
            return MemoryPointer(self._memory, 0)
        address = self._array.__array_interface__["data"][0]
        return MemoryPointer(self._memory, address - self._memory.address)

    def __array__(self, dtype: Any = None) -> Any:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct "
            "a NumPy array explicitly."
        )

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        import cupy

        function = getattr(cupy, ufunc.__name__, None)
        if method != "__call__" or function is None:
            return NotImplemented
        out = options.pop("out", None)
        return function(*inputs, out=out[0] if out else None, **options)

    def __array_function__(self, function: Any, types: Any, args: Any, options: Any) -> Any:
        import cupy

        own = getattr(cupy, function.__name__, function)
        return NotImplemented if own is function else own(*args, **options)

    def get(
        self, stream: Any = None, order: str = "C", out: Any = None, blocking: _bool = True
    ) -> Any:
        """Copy to the host."""
        if blocking:
            emulation.synchronizations += 1
        if out is None:
            return np.array(self._array, order=order)
        out[...] = self._array
        return out

    def item(self) -> Any:
        """Return the only entry."""
        if self.size != 1:
            raise ValueError("can only convert an array of size 1 to a Python scalar")
        return self.get().item()

    def tolist(self) -> Any:
        """Return nested lists."""
        return self.get().tolist()

    def tobytes(self, order: str = "C") -> bytes:
        """Return the bytes of the entries."""
        return self.get().tobytes(order)

    def __bool__(self) -> _bool:
        if self.size == 0:
            text = "The truth value of an empty array is ambiguous. Returning False"
            warnings.warn(text, DeprecationWarning, stacklevel=2)
            return False
        if self.size > 1:
            raise ValueError(
                "The truth value of an array with more than one element is ambiguous. Use a.any() "
                "or a.all()"
            )
        return bool(self.get())

    # CuPy's array has no __index__.
    def __int__(self) -> _int:
        return int(self.get())

    def __float__(self) -> _float:
        return float(self.get())

    def __repr__(self) -> str:
        return repr(self.get())

    def __str__(self) -> str:
        return str(self.get())

    def __format__(self, spec: str) -> str:
        return format(self.get(), spec)

    def __len__(self) -> _int:
        if self.ndim == 0:
            raise TypeError("len() of unsized object")
        return self.shape[0]

    def __iter__(self) -> Any:
        if self.ndim == 0:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(self.shape[0]))

    def __getitem__(self, key: Any) -> ndarray:
        raw = _index(key)
        if not any(isinstance(part, np.ndarray | list) for part in raw):
            # An array even where NumPy would return a scalar.
            raw = raw if Ellipsis in raw else (*raw, Ellipsis)
        return wrap(self._array[raw], self)

    def __setitem__(self, key: Any, value: Any) -> None:
        raw = _index(key)
        if isinstance(value, np.ndarray):
            if value.shape != ():
                raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
        else:
            value = unwrap(value)
        check_device(self)
        if self._array[raw].size:
            emulation.other_kernels += 1
        with np.errstate(all="ignore"):
            self._array[raw] = value

    def fill(self, value: Any) -> None:
        """Set all entries to one value."""
        self[...] = value

    def astype(
        self, dtype: Any, order: str = "K", casting: None = None, subok: None = None, copy: Any = 1
    ) -> ndarray:
        """Convert; if there is no need to, `copy=False` returns the array itself."""
        if casting is not None or subok is not None:
            raise TypeError("casting and subok are not supported yet")
        dtype = np.dtype(dtype)
        order = order or "K"
        given = self._array.flags
        fits = {"K": True, "A": given.forc, "C": given.c_contiguous, "F": given.f_contiguous}
        if dtype == self.dtype and not copy and fits[order]:
            return self
        check_device(self)
        order, strides = like(self._array, dtype, order)
        result = ndarray(self.shape, dtype, order=order)
        if strides is not None:
            pointer = MemoryPointer(result._memory, 0)
            result = ndarray(self.shape, dtype, pointer, strides)
        if self.size:
            emulation.other_kernels += 1
            with np.errstate(all="ignore"):
                result._array[...] = self._array
        return result

    def copy(self, order: str = "C") -> ndarray:
        """Copy, to the current device."""
        with self.device:
            made = self.astype(self.dtype, order=order)
        if self._memory.device_id == device.get_device_id():
            return made
        result = ndarray(made.shape, made.dtype, order="C" if made.flags.c_contiguous else "F")
        result._array[...] = made._array
        return result

    def view(self, dtype: Any = None, type: Any = None) -> ndarray:
        """View the same memory as another dtype."""
        array = self._array.view() if dtype is None else self._array.view(dtype)
        return ndarray._of(array, self._memory, self)

    def reshape(self, *shape: Any, order: str = "C") -> ndarray:
        """Reshape, with a copy only if the strides need one."""
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return wrap(self._array.reshape(shape, order=order), self)

    def ravel(self, order: str = "C") -> ndarray:
        """Reshape to one axis."""
        return wrap(self._array.ravel(order=order), self)

    def flatten(self, order: str = "C") -> ndarray:
        """Reshape to one axis, always with a copy."""
        return self.copy(order=order).ravel(order=order)

    def transpose(self, *axes: Any) -> ndarray:
        """Put the axes into another order."""
        return wrap(self._array.transpose(*axes), self)

    def swapaxes(self, one: int, other: int) -> ndarray:
        """Swap two axes."""
        return wrap(self._array.swapaxes(one, other), self)

    def squeeze(self, axis: Any = None) -> ndarray:
        """Leave out axes of length 1."""
        return wrap(self._array.squeeze(axis), self)


def _index(key: Any) -> tuple[Any, ...]:
    """Return a key as NumPy takes it. A mask is counted first, which waits for the device."""
    parts = key if isinstance(key, tuple) else (key,)
    raw = tuple(unwrap(part, "index") for part in parts)
    emulation.synchronizations += any(getattr(part, "dtype", None) == np.bool_ for part in raw)
    return raw


def check_device(array: ndarray) -> None:
    """Refuse an array that a kernel on the current device could not reach."""
    here, there = device.get_device_id(), array._memory.device_id
    if here != there:
        raise ValueError(
            f"The device where the array resides ({there}) is different from the current device "
            f"({here}). Peer access is unavailable between these devices."
        )


def unwrap(value: Any, role: str = "operand") -> Any:
    """Return what NumPy is to compute with; like CuPy, refuse host arrays that are no scalars."""
    if isinstance(value, ndarray):
        check_device(value)
        return value._array
    if isinstance(value, int | float | complex | np.generic):
        return value
    if role == "index" and (value is None or value is Ellipsis or isinstance(value, slice | list)):
        return value
    raise TypeError(f"Unsupported type {type(value)}")


def wrap(result: Any, *sources: ndarray) -> Any:
    """Wrap NumPy's result: a view shares the source's memory, anything else gets its own."""
    if isinstance(result, tuple | list):
        return type(result)(wrap(one, *sources) for one in result)
    if not isinstance(result, np.ndarray | np.generic):
        return result
    array = np.asarray(result)
    address = array.__array_interface__["data"][0]
    for source in sources:
        if source._memory.holds(address):
            return ndarray._of(array, source._memory, source)
    made = ndarray(array.shape, array.dtype, order="F" if array.flags.fnc else "C")
    if array.size:
        emulation.other_kernels += 1
        made._array[...] = array
    return made


def elementwise(ufunc: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Make CuPy's ufunc from NumPy's."""

    def function(*inputs: Any, out: Any = None, dtype: Any = None, casting: Any = None) -> Any:
        if len(inputs) == ufunc.nin + 1 and out is None:
            *inputs, out = inputs  # type: ignore[assignment]
        raw = [unwrap(value) for value in inputs]
        options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        if casting is not None:
            options["casting"] = casting
        with np.errstate(all="ignore"):
            if out is None:
                # CuPy's results are in C order, whatever the operands' is.
                result = ufunc(*raw, order="C", **options)
                return wrap(result)
            if not isinstance(out, ndarray):
                raise TypeError("Output arguments type must be cupy.ndarray")
            if np.broadcast_shapes(out.shape, *(np.shape(value) for value in raw)) != out.shape:
                raise ValueError("Out shape is mismatched")
            for one in inputs:
                is_other = isinstance(one, ndarray) and one is not out
                if is_other and np.may_share_memory(one._array, out._array):
                    one.copy()
            ufunc(*raw, out=unwrap(out), **options)
        if out.size:
            emulation.other_kernels += 1
        return out

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"Do as numpy.{name} does."
    function.nin = ufunc.nin  # type: ignore[attr-defined]
    return function


def _add_operators() -> None:
    binary = {
        "add": "add",
        "sub": "subtract",
        "mul": "multiply",
        "truediv": "true_divide",
        "floordiv": "floor_divide",
        "mod": "remainder",
        "pow": "power",
        "and": "bitwise_and",
        "or": "bitwise_or",
        "xor": "bitwise_xor",
        "lshift": "left_shift",
        "rshift": "right_shift",
    }
    compared = {
        "lt": "less",
        "le": "less_equal",
        "eq": "equal",
        "ne": "not_equal",
        "gt": "greater",
        "ge": "greater_equal",
    }
    unary = {"neg": "negative", "pos": "positive", "abs": "absolute", "invert": "invert"}
    for name, ufunc in (binary | compared | unary).items():
        function = elementwise(getattr(np, ufunc), ufunc)
        setattr(ndarray, f"__{name}__", lambda self, *others, _do=function: _do(self, *others))
        if name in binary:
            reflected = lambda self, other, _do=function: _do(other, self)  # noqa: E731
            in_place = lambda self, other, _do=function: _do(self, other, out=self)  # noqa: E731
            setattr(ndarray, f"__r{name}__", reflected)
            setattr(ndarray, f"__i{name}__", in_place)


_add_operators()
