"""Which library the arrays of a call come from, and the errors about those that are not taken."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

import numpy as np

from polyce.arrays import numpy, others
from polyce.arrays.library import Library

# Libraries whose arrays are not taken, by top-level module: why, and what to do instead. Some look
# like arrays of the standard and would raise errors from deep inside, or return wrong numbers.
NOT_TAKEN = {
    "blosc2": ("whose lazy where sums up wrongly", "pass {name}[:], a NumPy array"),
    "sparse": ("which has no gather and whose losses would be dense", "pass {name}.todense()"),
    "xarray": ("whose axes have names", "pass {name}.data, or use xarray.apply_ufunc"),
    "pint": ("whose units a logarithm has no meaning for", "pass {name}.magnitude"),
    "tensorflow": (
        "which lacks the array API standard",
        "pass {name}.numpy(), or torch.from_dlpack({name})",
    ),
    "paddle": (
        "which lacks the array API standard",
        "pass {name}.numpy(), or torch.from_dlpack({name})",
    ),
}

# Arguments by which a function sees that a call is on a mesh of processes.
_FIRST = ("input", "linear_weight")
_OF_LABELS = ("target", "target.index")
# The libraries under which marray is taken: in others a look at the mask could start a computation,
# or be impossible.
_UNDER_MARRAY = ("numpy", "array_api_compat.numpy", "array_api_strict")


def _torch() -> Library:
    from polyce.arrays import torch

    return torch.LIBRARY


def _jax() -> Library:
    from polyce.arrays import jax

    return jax.LIBRARY


def _cupy() -> Library:
    from polyce.arrays import cupy

    return cupy.LIBRARY


def _dask() -> Library:
    from polyce.arrays import dask

    dask.LIBRARY.find = of
    return dask.LIBRARY


# Libraries with a file of their own, which is imported when the first of their arrays is seen.
_IN_FILES = {"torch": _torch, "jax": _jax, "cupy": _cupy, "dask": _dask}
# The others seen so far, by namespace. None that torch.compile traces: it guards what it has read,
# and would find it changed by the very call that it traced.
_known: dict[str, Library] = {}


def named(name: str) -> Library:
    """Return a library that has a file of its own; importing that imports the library."""
    return _IN_FILES[name]()


def _of_namespace(name: str, xp: Any) -> Library:
    """Return a library that has no file of its own, by its name and its namespace."""
    full = xp.__name__
    found = _known.get(full)
    # marray makes a namespace of one name, with a class of arrays of its own, as often as asked.
    if found is None or found.xp is not xp:
        kind, converter = others.CLASSES.get(name, (Library, ""))
        found = _known[full] = kind(name, xp, converter)
    return found


def of(**arrays: Any) -> tuple[Library, list[Any]]:
    """Find the one library of the arguments, and return it with the arrays.

    The first argument decides. Arguments that are None stay None.
    """
    values = list(arrays.values())
    if all(type(value) is np.ndarray or value is None for value in values):
        return numpy.LIBRARY, values

    found = {name: _find(name, value) for name, value in arrays.items() if value is not None}
    first = next(iter(found))
    library = found[first]
    for index, name in enumerate(arrays):
        if name not in found:
            continue
        other = found[name]
        if other.name == library.name:
            if library is numpy.LIBRARY:
                values[index] = np.asarray(values[index])
        elif other is numpy.LIBRARY and library.takes_numpy:
            values[index] = np.asarray(values[index])
            if name not in _OF_LABELS or values[index].dtype.kind not in "iu":
                # Labels stay in NumPy, where they have values, and where jax without 64-bit types
                # does not truncate them.
                values[index] = library.xp.asarray(values[index])
        else:
            raise TypeError(
                f"all arrays must come from one library, but {first} is {library.name} and {name} "
                f"is {other.name}; convert {name} with {library.converter}"
            )
    return library, values


def _find(name: str, value: Any) -> Library:
    """Return the library that made the array called `name`."""
    if isinstance(value, (np.ndarray, np.generic)):
        if isinstance(value, (np.ma.MaskedArray, np.matrix)):
            raise TypeError(
                f"{name} must be a plain array, got {_kind(value)}, whose own meaning polyce would "
                f"lose; pass numpy.asarray({name}), and mark rows to leave out with ignore_index"
            )
        # NumPy 2 is a namespace of the standard itself; array-api-compat's wrapper takes a tenth of
        # a second on first use and adds nothing that is needed here.
        return numpy.LIBRARY
    # Not by array_api_compat.array_namespace: torch.compile warns about its caches. A library that
    # is not loaded has made no array.
    loaded = sys.modules
    if "torch" in loaded and isinstance(value, loaded["torch"].Tensor):
        if is_dtensor(value):
            if name in _FIRST:
                raise TypeError(
                    f"{name} must be a tensor of one process for explain, score, group= and "
                    f"inplace_backward=, got a DTensor; pass {name}.full_tensor(), or "
                    f"{name}.to_local() for what lies in this process"
                )
            raise TypeError(
                f"{name} must be a tensor of one process where input is one, got a DTensor; pass "
                f"{name}.full_tensor(), or input as a DTensor of its mesh too"
            )
        masked = loaded.get("torch.masked")
        if masked is not None and isinstance(value, masked.MaskedTensor):
            raise TypeError(
                f"{name} must be a plain tensor, got {_kind(value)}, whose own meaning polyce "
                f"would lose; pass {name}.get_data(), and mark rows to leave out with ignore_index"
            )
        if value.layout is not loaded["torch"].strided or value.is_nested:
            layout = "a nested one" if value.is_nested else f"layout {value.layout}"
            raise TypeError(
                f"{name} must be a dense tensor, got {layout}; "
                "call to_dense() or to_padded_tensor() first"
            )
        return named("torch")
    if "jax" in loaded and isinstance(value, loaded["jax"].Array):
        return named("jax")
    if "dask.array" in loaded and isinstance(value, loaded["dask.array"].Array):
        if isinstance(value._meta, np.ma.MaskedArray):
            raise TypeError(
                f"{name} must have plain chunks, got {_kind(value._meta)}, whose own meaning "
                f"polyce would lose; pass dask.array.ma.getdata({name}), and mark rows to leave "
                "out with ignore_index"
            )
        return named("dask")
    if "cupy" in loaded and isinstance(value, loaded["cupy"].ndarray):
        return named("cupy")
    _check_taken(name, value)
    import array_api_compat

    if not array_api_compat.is_array_api_obj(value):
        raise TypeError(
            f"{name} must be an array of an array-API library, got {_kind(value)}; "
            f"{_conversion(name, value)}"
        )
    xp = array_api_compat.array_namespace(value)
    full = xp.__name__.removeprefix("array_api_compat.")
    backend = full.partition(".")[0].replace("array_api_strict", "array-api-strict")
    if backend == "marray":
        _check_unmasked(name, value, xp)
    return _of_namespace(backend, xp)


def _check_taken(name: str, value: Any) -> None:
    for kind in type(value).__mro__:
        module = kind.__module__.partition(".")[0]
        if module in NOT_TAKEN:
            why, instead = NOT_TAKEN[module]
            raise TypeError(
                f"{name} must not be {_kind(value)}, {why}; {instead.format(name=name)}"
            )


def _conversion(name: str, value: Any) -> str:
    for method in ("to_numpy", "toarray"):  # of pandas, polars and pyarrow; of scipy.sparse
        if hasattr(value, method):
            return f"convert it with {name}.{method}()"
    return (
        "convert it to the library of the other arrays, with numpy.asarray, torch.as_tensor or "
        "jax.numpy.asarray"
    )


def _check_unmasked(name: str, value: Any, xp: Any) -> None:
    under = xp.__name__.removeprefix("marray.")
    if under not in _UNDER_MARRAY:
        raise TypeError(
            f"{name} must be an marray over numpy or array_api_strict, got one over {under}; "
            f"pass {name}.data, and mark rows to leave out with ignore_index"
        )
    masked = int(np.count_nonzero(np.asarray(value.mask)))
    if masked:
        # marray's sums skip masked entries: which rows the mean is over, and whether smoothing
        # counts a masked class, would depend on how the loss is written.
        raise ValueError(
            f"{name} must have no masked entries, got {masked}: they might stand for rows or for "
            "classes to leave out; fill them, with ignore_index in target to leave out rows, "
            "with -inf in input to leave out classes"
        )


def _kind(value: Any) -> str:
    kind = type(value)
    module = kind.__module__
    return kind.__qualname__ if module == "builtins" else f"{module}.{kind.__qualname__}"


def is_dtensor(array: Any) -> bool:
    """Tell whether an array is one of torch's that lie on a mesh of processes."""
    sharded = sys.modules.get("torch.distributed.tensor")
    return sharded is not None and isinstance(_unwrapped(array), sharded.DTensor)


def _unwrapped(array: Any) -> Any:
    """Return what the transforms of torch.func have made an array of."""
    torch = sys.modules["torch"]
    if not isinstance(array, torch.Tensor) or torch.compiler.is_compiling():
        return array
    while torch._C._functorch.is_functorch_wrapped_tensor(array):
        array = torch._C._functorch.get_unwrapped(array)
    return array


def installed(module: str) -> bool:
    """Tell whether a module is imported or could be, without importing it."""
    if module in sys.modules:
        return True
    return importlib.util.find_spec(module) is not None
