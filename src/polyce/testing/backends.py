"""The array libraries that the conformance grid can be run on.

A library is imported when its backend is asked for, not before. A missing one is an ImportError:
nothing is skipped silently.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .dtypes import FLOAT_NAMES, INTEGER_NAMES, Array, dtype, missing

WITHOUT_BFLOAT16 = ("float16", "float32", "float64")


@dataclass(frozen=True)
class Backend:
    """How arrays get into a library and back.

    Attributes
    ----------
    name : str
        The backend's name, by which its own accuracy, if it has one, is found.
    asarray : callable
        NumPy array to the library's array, in memory of its own or in the memory given. It
        keeps the strides where the library can express them.
    to_numpy : callable
        The library's array (or scalar) to a NumPy array of the same dtype.
    owns : callable
        Whether something is an array of this library, as results have to be.
    floats, integers : tuple of str
        Names of the dtypes that the library has.
    stand_ins : dict
        Integer dtypes that the library lacks, each with the one that its users use instead.
        Labels that fit are converted.
    quiet : bool
        Whether a RuntimeWarning during a call counts as a failure.
    notes : dict
        Dtypes that are left out, with the reason.
    """

    name: str
    asarray: Callable[[Array], Any]
    to_numpy: Callable[[Any], Array]
    owns: Callable[[Any], bool]
    floats: tuple[str, ...] = FLOAT_NAMES
    integers: tuple[str, ...] = INTEGER_NAMES
    stand_ins: dict[str, str] = field(default_factory=dict)
    quiet: bool = False
    notes: dict[str, str] = field(default_factory=dict)

    def expressible(self, array: Array) -> tuple[Array, str]:
        """Return an array in a dtype that the library has, or the reason why that is impossible.

        Parameters
        ----------
        array : ndarray
            What is wanted.

        Returns
        -------
        array : ndarray
            The same numbers, with a stand-in for the dtype where there is one.
        reason : str
            Why they cannot be expressed; empty if they can.
        """
        name = array.dtype.name
        if name in (*self.floats, *self.integers):
            return array, ""
        if name in self.stand_ins:
            converted = array.astype(self.stand_ins[name])
            if np.array_equal(converted, array):
                return converted, ""
        return array, self.notes.get(name, f"{self.name} has no {name}")


def _numpy() -> Backend:
    return Backend(
        "numpy",
        lambda array: array,
        np.asarray,
        lambda result: isinstance(result, (np.ndarray, np.generic)),
        floats=tuple(name for name in FLOAT_NAMES if name not in missing()),
        quiet=True,
        notes=missing(),
    )


def _array_api_strict() -> Backend:
    xp = importlib.import_module("array_api_strict")
    return Backend(
        "array-api-strict",
        lambda array: xp.asarray(array.copy()),
        np.asarray,
        lambda result: type(result) is type(xp.zeros(1)),
        floats=("float32", "float64"),
        quiet=True,
    )


def _torch() -> Backend:
    torch = importlib.import_module("torch")

    def asarray(array: Array) -> Any:
        if array.dtype.name == "bfloat16":
            return asarray(array.view(np.int16)).view(torch.bfloat16)
        if array.size == 0 or min(array.strides, default=0) < 0:
            return torch.from_numpy(array.copy())
        # The memory between the elements is copied too, so that the strides are kept.
        steps = [step // array.itemsize for step in array.strides]
        extent = 1 + sum((n - 1) * step for n, step in zip(array.shape, steps, strict=True))
        memory = np.lib.stride_tricks.as_strided(array, (extent,), (array.itemsize,)).copy()
        return torch.as_strided(torch.from_numpy(memory), array.shape, steps)

    def to_numpy(tensor: Any) -> Array:
        tensor = tensor.detach().cpu().resolve_neg()
        if tensor.dtype == torch.bfloat16:
            return np.asarray(tensor.contiguous().view(torch.int16).numpy()).view(dtype("bfloat16"))
        return np.asarray(tensor.numpy())

    return Backend(
        "torch",
        asarray,
        to_numpy,
        torch.is_tensor,
        floats=tuple(name for name in FLOAT_NAMES if name not in missing()),
        notes=missing(),
    )


def _jax() -> Backend:
    jax = importlib.import_module("jax")
    wide = bool(jax.config.jax_enable_x64)
    names = ("float64", "int64", "uint64")
    return Backend(
        "jax",
        lambda array: jax.numpy.asarray(array.copy()),
        np.asarray,
        lambda result: isinstance(result, jax.Array),
        floats=tuple(n for n in FLOAT_NAMES if wide or n not in names),
        integers=tuple(n for n in INTEGER_NAMES if wide or n not in names),
        stand_ins={} if wide else {"int64": "int32", "uint64": "uint32"},
        notes=dict.fromkeys(names, "jax has no 64-bit numbers until jax_enable_x64 is set"),
    )


def dask(axis: int | None = None, size: int = 2, name: str = "dask") -> Backend:
    """Return the backend of dask arrays.

    Parameters
    ----------
    axis : int, optional
        The axis that arrays are cut along; -1 is the second one of arrays that have two, else
        the first, which is the default class axis. One chunk by default.
    size : int
        Length of a chunk along that axis, for axes of up to eight chunks; longer ones are cut in 8.
    name : str
        The name that the backend goes by.
    """
    da = importlib.import_module("dask.array")

    def asarray(array: Array) -> Any:
        chunks: list[int] = [-1] * array.ndim
        if axis is not None and array.ndim:
            cut = min(1, array.ndim - 1) if axis == -1 else axis
            chunks[cut] = max(size, -(-array.shape[cut] // 8))
        return da.from_array(array, chunks=tuple(chunks))

    def to_numpy(array: Any) -> Array:
        # NumPy computes here what dask has deferred; its warnings are no longer about the call.
        with np.errstate(all="ignore"):
            return np.asarray(array.compute(scheduler="synchronous"))

    return Backend(
        name,
        asarray,
        to_numpy,
        lambda result: isinstance(result, da.Array),
        floats=WITHOUT_BFLOAT16,
    )


def _cupy() -> Backend:
    cupy = importlib.import_module("cupy")
    return Backend(
        "cupy",
        cupy.asarray,
        cupy.asnumpy,
        lambda result: isinstance(result, cupy.ndarray),
        floats=tuple(name for name in FLOAT_NAMES if name not in missing()),
        notes=missing(),
    )


def _ndonnx() -> Backend:
    ndx = importlib.import_module("ndonnx")
    return Backend(
        "ndonnx",
        lambda array: ndx.asarray(array.copy()),
        # Arrays computed from known values have values too, computed by onnxruntime.
        lambda array: np.asarray(array.unwrap_numpy()),
        lambda result: isinstance(result, ndx.Array),
        floats=WITHOUT_BFLOAT16,
    )


def _cubed() -> Backend:
    cubed = importlib.import_module("cubed")
    # In one thread and in memory: there are many small computations.
    spec = cubed.Spec(allowed_mem="500MB", executor_name="single-threaded", intermediate_store={})

    def asarray(array: Array) -> Any:
        # Two chunks along the default class axis.
        chunks = list(array.shape)
        if array.ndim:
            cut = min(1, array.ndim - 1)
            chunks[cut] = -(-array.shape[cut] // 2)
        return cubed.from_array(array.copy(), chunks=tuple(max(1, n) for n in chunks), spec=spec)

    def to_numpy(array: Any) -> Array:
        # NumPy computes here what cubed has deferred; its warnings are no longer about the call.
        with np.errstate(all="ignore"):
            return np.asarray(array.compute())

    return Backend(
        "cubed",
        asarray,
        to_numpy,
        lambda result: isinstance(result, cubed.Array),
        floats=("float32", "float64"),
    )


def _mlx() -> Backend:
    mx = importlib.import_module("mlx.core")

    def asarray(array: Array) -> Any:
        if array.size == 0:
            # Computing with an empty array from NumPy sometimes deadlocks.
            return mx.zeros(array.shape, dtype=getattr(mx, array.dtype.name))
        array = array.copy(order="C")
        if array.dtype.name == "bfloat16":
            return mx.array(array.view(np.int16)).view(mx.bfloat16)
        return mx.array(array, dtype=getattr(mx, array.dtype.name))

    def to_numpy(array: Any) -> Array:
        if array.dtype == mx.bfloat16:
            return np.array(array.view(mx.int16)).view(dtype("bfloat16"))
        return np.array(array)

    return Backend(
        "mlx",
        asarray,
        to_numpy,
        lambda result: isinstance(result, mx.array),
        floats=tuple(name for name in FLOAT_NAMES if name not in missing()),
        notes=missing(),
    )


def _mparray() -> Backend:
    xp = importlib.import_module("mparray")

    def to_numpy(array: Any) -> Array:
        if xp.isdtype(array.dtype, "real floating"):
            # mpmath's numbers have no upper limit; those beyond the dtype become infinity.
            with np.errstate(over="ignore"):
                values = np.asarray(array._data, np.float64)
                # mpmath's nan is converted to one with a sign.
                return np.where(np.isnan(values), np.nan, values).astype(array.dtype)
        return np.asarray(array._data, array.dtype)

    return Backend(
        "mparray",
        xp.asarray,
        to_numpy,
        lambda result: isinstance(result, xp.MPArray),
        floats=("float32", "float64"),
        quiet=True,
    )


def _marray(under: str) -> Backend:
    xp = importlib.import_module("marray").masked_namespace(importlib.import_module(under))

    def to_numpy(array: Any) -> Array:
        if np.any(np.asarray(array.mask)):
            raise AssertionError("entries are masked")
        return np.asarray(array.data)

    return Backend(
        "marray",
        lambda array: xp.asarray(array.copy()),
        to_numpy,
        lambda result: isinstance(result, xp.MArray),
        floats=("float32", "float64"),
        quiet=True,
    )


BACKENDS: dict[str, Callable[[], Backend]] = {
    "numpy": _numpy,
    "array-api-strict": _array_api_strict,
    "torch": _torch,
    "jax": _jax,
    "dask": dask,
    "dask-rows": lambda: dask(0, 2, "dask-rows"),
    "dask-classes": lambda: dask(-1, 3, "dask-classes"),
    "cupy": _cupy,
    "ndonnx": _ndonnx,
    "cubed": _cubed,
    "mlx": _mlx,
    "mparray": _mparray,
    "marray": lambda: _marray("array_api_strict"),
    "marray-numpy": lambda: _marray("numpy"),
}
"""The backends by name; calling one imports the library."""


def get_backend(name: str) -> Backend:
    """Return a backend; ValueError for an unknown name, ImportError without its library.

    Parameters
    ----------
    name : str
        A name from `BACKENDS`.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; there are {', '.join(BACKENDS)}")
    return BACKENDS[name]()
