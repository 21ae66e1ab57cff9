"""The functions of the emulated CuPy's namespace, most of them wrappers of NumPy's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import _products, emulation
from ._ndarray import check_device, elementwise, like, ndarray, unwrap, wrap
from .cuda import device

# Elementwise: lists and host arrays are refused as operands.
UFUNCS = (
    "absolute add arccos arccosh arcsin arcsinh arctan arctan2 arctanh bitwise_and bitwise_or "
    "bitwise_xor ceil conjugate copysign cos cosh divide equal exp exp2 expm1 floor "
    "floor_divide fmax fmin fmod greater greater_equal hypot invert isfinite isinf isnan "
    "ldexp left_shift less less_equal log log10 log1p log2 logaddexp logical_and logical_not "
    "logical_or logical_xor maximum minimum mod multiply negative nextafter not_equal "
    "positive power reciprocal remainder right_shift rint sign signbit sin sinh sqrt square "
    "subtract tan tanh true_divide trunc"
)
# Arrays among the arguments, or in a list among them, must be CuPy's; NumPy checks the rest.
FUNCTIONS = (
    "all allclose amax amin any argmax argmin argsort argwhere around array_equal atleast_1d "
    "atleast_2d average bincount broadcast_arrays concatenate count_nonzero cumprod cumsum "
    "diag diff dot einsum expand_dims flip hstack isclose max mean median meshgrid min moveaxis "
    "nan_to_num nanmax nansum nonzero outer partition percentile prod ravel repeat "
    "reshape roll rollaxis round searchsorted sort split squeeze stack std sum swapaxes take "
    "take_along_axis tensordot tile trace transpose tril triu unique var vdot vecdot vstack"
)
# The values that the result's shape depends on are read first.
WAIT = ("argwhere", "nonzero", "unique")
# These return no array.
PLAIN = (
    "bool_ broadcast_shapes can_cast complex128 complex64 complexfloating dtype e euler_gamma "
    "finfo float16 float32 float64 floating generic iinfo inexact inf int16 int32 int64 int8 "
    "integer intp isdtype isscalar issubdtype nan ndindex newaxis number pi promote_types s_ "
    "signedinteger uint16 uint32 uint64 uint8 uintp unsignedinteger"
)


def _deep(value: Any, sources: list[ndarray]) -> Any:
    if isinstance(value, ndarray):
        sources.append(value)
        return unwrap(value)
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    if isinstance(value, tuple | list):
        return type(value)(_deep(one, sources) for one in value)
    return value


def _lifted(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def lifted(*args: Any, out: ndarray | None = None, **options: Any) -> Any:
        sources: list[ndarray] = []
        raw = _deep(args, sources)
        raw_options = {key: _deep(value, sources) for key, value in options.items()}
        if not sources:
            raise TypeError(f"{name} takes arrays of cupy, got {[type(value) for value in args]}")
        with np.errstate(all="ignore"):
            result = function(*raw, **raw_options)
        emulation.synchronizations += name in WAIT
        if out is None:
            return wrap(result, *sources)
        np.copyto(unwrap(out), result, casting="unsafe")
        emulation.other_kernels += bool(out.size)
        return out

    lifted.__name__ = lifted.__qualname__ = name
    lifted.__doc__ = f"Do as numpy.{name} does; what NumPy gives as a scalar is a 0-d array."
    return lifted


def _sum(a: Any, axis: Any = None, dtype: Any = None, keepdims: bool = False) -> Any:
    """Add pairwise along any one axis, as a block's threads do; NumPy does so along the last."""
    if not isinstance(axis, int):
        return np.sum(a, axis, dtype, keepdims=keepdims)
    last = np.ascontiguousarray(np.moveaxis(a, axis, -1))
    result = np.sum(last, -1, dtype)
    return np.expand_dims(result, axis) if keepdims else result


# All of these but one are NumPy's functions.
_FOUND = {name: getattr(np, name) for name in FUNCTIONS.split()} | {"sum": _sum}


def names() -> dict[str, Any]:
    """Return the namespace, without the names that have functions of their own below."""
    found: dict[str, Any] = {name: getattr(np, name) for name in PLAIN.split()}
    found |= {name: elementwise(getattr(np, name), name) for name in UFUNCS.split()}
    found |= {name: _lifted(function, name) for name, function in _FOUND.items()}
    return found | {"abs": found["absolute"], "conj": found["conjugate"]}


def add_methods() -> None:
    """Add those of the functions that are also methods to the array class."""
    for name in (
        *("all", "any", "argmax", "argmin", "argsort", "cumsum", "dot", "max", "mean", "min"),
        *("nonzero", "prod", "repeat", "round", "std", "sum", "take", "trace", "var"),
    ):
        setattr(ndarray, name, _lifted(_FOUND.get(name) or getattr(np, name), name))
    ndarray.__matmul__ = _products.matmul  # type: ignore[attr-defined]
    ndarray.conj = elementwise(np.conjugate, "conjugate")  # type: ignore[attr-defined]


def empty(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    """Make an array without setting its values."""
    return ndarray(shape, dtype, order=order)


def empty_like(
    prototype: ndarray, dtype: Any = None, order: str = "K", subok: None = None, shape: Any = None
) -> ndarray:
    """Make an array laid out like another, without setting its values."""
    dtype = np.dtype(prototype.dtype if dtype is None else dtype)
    if shape is not None:
        return ndarray(shape, dtype, order="C" if order in "KA" else order)
    order, strides = like(prototype._array, dtype, order)
    made = ndarray(prototype.shape, dtype, order=order)
    return made if strides is None else ndarray(made.shape, dtype, made.data, strides)


def zeros(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    """Make an array of zeros, without a kernel."""
    made = ndarray(shape, dtype, order=order)
    made._array[...] = np.zeros((), made.dtype)
    return made


def zeros_like(
    a: ndarray, dtype: Any = None, order: str = "K", subok: None = None, shape: Any = None
) -> ndarray:
    """Make an array of zeros laid out like another."""
    made = empty_like(a, dtype, order, shape=shape)
    made._array[...] = np.zeros((), made.dtype)
    return made


def full(shape: Any, fill_value: Any, dtype: Any = None, order: str = "C") -> ndarray:
    """Make an array of one value."""
    if dtype is None:
        dtype = fill_value.dtype if hasattr(fill_value, "dtype") else np.array(fill_value).dtype
    made = ndarray(shape, dtype, order=order)
    made.fill(fill_value)
    return made


def full_like(
    a: ndarray,
    fill_value: Any,
    dtype: Any = None,
    order: str = "K",
    subok: None = None,
    shape: Any = None,
) -> ndarray:
    """Make an array of one value laid out like another."""
    made = empty_like(a, dtype, order, shape=shape)
    made.fill(fill_value)
    return made


def ones(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    """Make an array of ones."""
    return full(shape, 1, dtype, order)


def ones_like(
    a: ndarray, dtype: Any = None, order: str = "K", subok: None = None, shape: Any = None
) -> ndarray:
    """Make an array of ones laid out like another."""
    return full_like(a, 1, dtype, order, shape=shape)


def arange(start: Any, stop: Any = None, step: Any = 1, dtype: Any = None) -> ndarray:
    """Make an array of evenly spaced numbers, by their step."""
    start, stop = (0, start) if stop is None else (start, stop)
    return wrap(np.arange(start, stop, step, dtype))


def linspace(*args: Any, **options: Any) -> ndarray:
    """Make an array of evenly spaced numbers, by how many there are."""
    return wrap(np.linspace(*args, **options))


def eye(rows: int, columns: Any = None, k: int = 0, dtype: Any = float) -> ndarray:
    """Make an identity matrix."""
    return wrap(np.eye(rows, columns, k, dtype))


def array(
    obj: Any, dtype: Any = None, copy: Any = True, order: str | None = "K", *, blocking: Any = False
) -> ndarray:
    """Make an array on the current device of one of CuPy's, of NumPy's or of lists."""
    order = order or "K"
    if isinstance(obj, ndarray):
        dtype = obj.dtype if dtype is None else dtype
        if obj._memory.device_id == device.get_device_id():
            return obj.astype(dtype, order=order, copy=copy)
        return obj.copy(order=order).astype(dtype, copy=False)
    if isinstance(obj, tuple | list) and obj and isinstance(obj[0], ndarray):
        return wrap(np.stack([unwrap(one) for one in obj])).astype(
            dtype or obj[0].dtype, copy=False
        )
    given = np.asarray(obj, dtype)
    # Numbers in the other byte order are converted.
    given = given.astype(given.dtype.newbyteorder("="), copy=False)
    if order in ("K", "A"):
        order = "F" if isinstance(obj, np.ndarray) and obj.flags.fnc else "C"
    made = ndarray(given.shape, given.dtype, order=order)
    if given.ndim == 0:
        emulation.other_kernels += 1
    made._array[...] = given
    if blocking:
        emulation.synchronizations += 1
    return made


def asarray(a: Any, dtype: Any = None, order: str | None = None, *, blocking: Any = False) -> Any:
    """Do as `array` does, without a copy if none is needed."""
    if isinstance(a, ndarray):
        copy = a.device != device.Device() or (dtype is not None and np.dtype(dtype) != a.dtype)
        fits = {"C": a.flags.c_contiguous, "F": a.flags.f_contiguous}.get(order or "K", True)
        return array(a, dtype, copy or not fits, order)
    return array(a, dtype, True, order, blocking=blocking)


def ascontiguousarray(a: Any, dtype: Any = None) -> ndarray:
    """Return the array in C order, with at least one axis, as CuPy does."""
    a = asarray(a)
    check_device(a)
    made = a.astype(a.dtype if dtype is None else dtype, order="C", copy=False)
    return made if made.ndim else made.reshape(1)


def asnumpy(a: Any, stream: Any = None, order: str = "C", out: Any = None, *, blocking: Any = True):
    """Copy an array to the host; host arrays are returned as they are."""
    if isinstance(a, ndarray):
        return a.get(stream, order, out, blocking)
    return np.asarray(a, order=order)


def copy(a: ndarray, order: str = "K") -> ndarray:
    """Copy."""
    return a.copy(order=order)


def copyto(dst: ndarray, src: Any, casting: str = "same_kind", where: Any = None) -> None:
    """Copy one array's values into another."""
    if where is None:
        dst[...] = src
    else:
        np.copyto(unwrap(dst), unwrap(src), casting, where=unwrap(where))
        emulation.other_kernels += 1


def where(condition: ndarray, x: Any = None, y: Any = None) -> Any:
    """Choose between two by a mask."""
    if not isinstance(condition, ndarray):
        raise TypeError(f"Unsupported type {type(condition)}")
    if x is None or y is None:
        emulation.synchronizations += 1
        return wrap(unwrap(condition).nonzero())
    return wrap(np.where(unwrap(condition), _choice(x), _choice(y)))


def _choice(value: Any) -> Any:
    raw = unwrap(value)
    is_array = isinstance(raw, np.ndarray | np.generic)
    # CuPy has no kernel for bfloat16 and takes the one for the next dtype.
    return raw.astype(np.float32) if is_array and raw.dtype.name == "bfloat16" else raw


def clip(a: ndarray, a_min: Any = None, a_max: Any = None, out: Any = None) -> ndarray:
    """Limit values to bounds."""
    low, high = (None if bound is None else unwrap(bound) for bound in (a_min, a_max))
    result = wrap(np.clip(unwrap(a), low, high))
    if out is None:
        return result
    out[...] = result
    return out


def broadcast_to(array: ndarray, shape: Any) -> ndarray:
    """Repeat along axes without a copy; the result is writable, as all of CuPy's arrays are."""
    raw = unwrap(array)
    strides = np.broadcast_to(raw, shape).strides
    return wrap(np.lib.stride_tricks.as_strided(raw, shape, strides), array)


def may_share_memory(a: ndarray, b: ndarray, max_work: Any = None) -> bool:
    """Tell whether the stretches of memory that two arrays lie in overlap."""
    return bool(np.may_share_memory(a._array, b._array))


def result_type(*values: Any) -> np.dtype:
    """Return the dtype that these promote to."""
    return np.result_type(*(v._array if isinstance(v, ndarray) else v for v in values))


def get_array_module(*values: Any) -> Any:
    """Return cupy if one of its arrays is among the values, else numpy."""
    import cupy

    return cupy if any(isinstance(value, ndarray) for value in values) else np
