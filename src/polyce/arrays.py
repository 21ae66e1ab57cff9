"""Array libraries: whose arrays these are, where they lie, and the few calls in which they differ.

Every difference between libraries that the rest of polyce must know of is decided here.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import numpy as np

FLOATS = ("float16", "bfloat16", "float32", "float64")
INTEGERS = {
    "int8": (-(2**7), 2**7 - 1),
    "int16": (-(2**15), 2**15 - 1),
    "int32": (-(2**31), 2**31 - 1),
    "int64": (-(2**63), 2**63 - 1),
    "uint8": (0, 2**8 - 1),
    "uint16": (0, 2**16 - 1),
    "uint32": (0, 2**32 - 1),
    "uint64": (0, 2**64 - 1),
}

# How a user turns a NumPy array into one of these, for the error that asks for it.
_CONVERTERS = {
    "numpy": "numpy.asarray",
    "torch": "torch.as_tensor",
    "cupy": "cupy.asarray",
    "dask": "dask.array.from_array",
    "jax": "jax.numpy.asarray",
    "array-api-strict": "array_api_strict.asarray",
}
# jax and dask functions take NumPy arrays among their own, so polyce does as well.
_TAKES_NUMPY = ("jax", "dask")
# Libraries whose arrays hold no values before a computation is asked for, or polyce must not ask.
_LAZY = ("dask", "cubed", "ndonnx")


# NumPy works its dtypes' names out each time they are asked for.
_NUMPY_DTYPES = {name: np.dtype(name) for name in (*FLOATS, *INTEGERS) if name != "bfloat16"}
_NUMPY_NAMES = {dtype: name for name, dtype in _NUMPY_DTYPES.items()}


def of(**arrays: Any) -> tuple[Any, str, list[Any]]:
    """Find the one library of the arguments: its namespace, its name, and the arrays.

    The first argument decides. Those that are None stay None.
    """
    values = list(arrays.values())
    if all(type(value) is np.ndarray or value is None for value in values):
        # NumPy 2 is itself a namespace of the standard; array-api-compat's wrapper of it costs
        # a tenth of a second at its first use and adds nothing that is needed here.
        return np, "numpy", values

    namespaces: dict[str, tuple[Any, str]] = {}
    for name, value in arrays.items():
        if value is not None:
            namespaces[name] = _namespace(name, value)
    first = next(iter(namespaces))
    xp, backend = namespaces[first]
    for index, name in enumerate(arrays):
        if name not in namespaces:
            continue
        other = namespaces[name][1]
        if other == backend:
            if backend == "numpy":
                values[index] = np.asarray(values[index])
        elif other == "numpy" and backend in _TAKES_NUMPY:
            values[index] = np.asarray(values[index])
            if name != "target" or values[index].dtype.kind not in "iu":
                # Labels stay in NumPy, where they can be looked at, and where jax without 64-bit
                # types does not cut them down.
                values[index] = xp.asarray(values[index])
        else:
            converter = _CONVERTERS.get(backend, f"{backend}'s asarray")
            raise TypeError(
                f"all arrays must come from one library, but {first} is {backend} and {name} is "
                f"{other}; convert {name} with {converter}"
            )
    return xp, backend, values


def _namespace(name: str, value: Any) -> tuple[Any, str]:
    if isinstance(value, (np.ndarray, np.generic)):
        if isinstance(value, (np.ma.MaskedArray, np.matrix)):
            raise TypeError(
                f"{name} must be a plain array, got {_kind(value)}, whose own meaning polyce would "
                f"lose; pass numpy.asarray({name}), and mark rows to leave out with ignore_index"
            )
        return np, "numpy"
    # The classes are looked at here, not by array_api_compat.array_namespace, whose caches
    # torch.compile warns of. A library that is not loaded has made no array.
    loaded = sys.modules
    if "torch" in loaded and isinstance(value, loaded["torch"].Tensor):
        if value.layout is not loaded["torch"].strided or value.is_nested:
            raise TypeError(
                f"{name} must be a dense tensor, got layout {value.layout}; "
                "call to_dense() or to_padded_tensor() first"
            )
        import array_api_compat.torch

        return array_api_compat.torch, "torch"
    if "jax" in loaded and isinstance(value, loaded["jax"].Array):
        return loaded["jax"].numpy, "jax"
    if "dask.array" in loaded and isinstance(value, loaded["dask.array"].Array):
        import array_api_compat.dask.array

        return array_api_compat.dask.array, "dask"
    import array_api_compat

    if not array_api_compat.is_array_api_obj(value):
        raise TypeError(
            f"{name} must be an array of an array-API library, got {_kind(value)}; "
            "convert it with the asarray of the library that the other arrays are from"
        )
    xp = array_api_compat.array_namespace(value)
    full = xp.__name__.removeprefix("array_api_compat.")
    backend = full.partition(".")[0].replace("array_api_strict", "array-api-strict")
    return xp, backend


def _kind(value: Any) -> str:
    kind = type(value)
    module = kind.__module__
    return kind.__qualname__ if module == "builtins" else f"{module}.{kind.__qualname__}"


def dtype_name(array: Any) -> str:
    """Name an array's dtype as the standard does, bfloat16 of any library included."""
    return name_of(array.dtype)


def name_of(dtype: Any) -> str:
    """Name a dtype as the standard does."""
    if isinstance(dtype, np.dtype):
        return _NUMPY_NAMES.get(dtype) or dtype.name
    name = getattr(dtype, "name", None)
    return name if isinstance(name, str) else str(dtype).rpartition(".")[2]


def float_dtype(xp: Any, backend: str, name: str) -> Any:
    """Give float32 or float64 as an array of the library shows it."""
    numpy_like = backend in ("numpy", "cupy", "dask", "jax")
    return _NUMPY_DTYPES[name] if numpy_like else getattr(xp, name)


def device(array: Any, backend: str) -> Any:
    """Tell the device of an array as its library compares them, or None where it has no say."""
    if backend in ("torch", "cupy", "array-api-strict"):
        return array.device
    # A jax array's new companions are uncommitted and follow it; dask's chunks live anywhere.
    return None


def device_kind(array: Any, backend: str) -> str:
    """Tell what kind of device holds an array: cpu, cuda, ..., or unknown while tracing."""
    if backend in ("numpy", "array-api-strict", "dask") or isinstance(array, np.ndarray):
        return "cpu"
    if backend == "torch":
        return str(array.device.type)
    if backend == "cupy":
        return "cuda"
    if backend == "jax" and has_values(array, backend):
        return str(next(iter(array.devices())).platform)
    return "unknown"


def has_values(array: Any, backend: str) -> bool:
    """Tell whether an array's values can be looked at now: not traced, lazy, vmapped or meta."""
    if backend in ("numpy", "array-api-strict", "cupy") or isinstance(array, np.ndarray):
        return True
    if backend in _LAZY:
        return False
    if backend == "torch":
        import torch

        return not (
            torch.compiler.is_compiling()
            or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)  # make_fx
            or torch.jit.is_tracing()
            or array.device.type == "meta"
            or type(array) not in (torch.Tensor, torch.nn.Parameter)
            or torch._C._functorch.is_functorch_wrapped_tensor(array)
        )
    if backend == "jax":
        import jax

        return not isinstance(array, jax.core.Tracer)
    import array_api_compat

    return not array_api_compat.is_lazy_array(array)


def has_float64(xp: Any, backend: str, where: Any) -> bool:
    """Tell whether the library computes in float64 on the device that holds `where`."""
    if backend in ("numpy", "dask", "cupy"):
        return True
    if backend == "torch":
        return bool(where.device.type != "mps")
    info = xp.__array_namespace_info__()
    if backend == "jax":
        return str(info.default_dtypes()["real floating"]) == "float64"
    return "float64" in info.dtypes(device=where.device)


def autocast(backend: str, dtype: Any, where: Any) -> Any:
    """Widen the 16-bit dtype of a loss on the device of `where` as torch does in its autocast."""
    if backend == "torch" and name_of(dtype) in ("float16", "bfloat16"):
        import torch

        kind = where.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            return torch.float32
    return dtype


def cast(xp: Any, array: Any, dtype: Any) -> Any:
    """Convert an array, or the scalar a NumPy reduction returns, to a dtype of the library."""
    if array.dtype is dtype or array.dtype == dtype:
        return array
    if isinstance(array, (np.ndarray, np.generic)):
        # The method takes NumPy's scalars too, and starts in a quarter of the function's time.
        return array.astype(dtype)
    return xp.astype(array, dtype)


def label_dtype(xp: Any, backend: str, labels: Any) -> Any:
    """Give the integer dtype for positions along the class axis, beside these labels."""
    if backend in ("numpy", "torch", "dask", "cupy"):
        return xp.int64
    # Not all have 64-bit integers everywhere: jax by its settings, others by device.
    info = xp.__array_namespace_info__()
    options = {} if backend == "jax" else {"device": labels.device}
    return info.default_dtypes(**options)["indexing"]


def expand(array: Any, axis: int) -> Any:
    """View an array over the rows with the class axis put back, of length 1."""
    slices = (slice(None),)
    return array[slices * axis + (None,) + slices * (array.ndim - axis)]


def along_axis(vector: Any, axis: int, ndim: int) -> Any:
    """View a vector of length C as an array of ndim dimensions with the classes along axis."""
    return vector[(None,) * axis + (slice(None),) + (None,) * (ndim - axis - 1)]


def align(backend: str, array: Any, logits: Any) -> Any:
    """Cut a dask array that broadcasts against the logits as they are cut, so that they stay so."""
    if backend != "dask":
        return array
    pairs = zip(array.shape, logits.shape, logits.chunks, strict=True)
    return array.rechunk(tuple(cuts if size == full else (size,) for size, full, cuts in pairs))


def one_hot(
    xp: Any, backend: str, labels: Any, logits: Any, axis: int, *, beside_logits: bool = True
) -> Any:
    """Mark in every row of the logits the class that labels name: booleans of the logits' shape."""
    where = device(logits, backend)
    options = {} if where is None else {"device": where}
    if backend == "dask":
        # The same cuts as the logits, or dask would cut both to fit.
        options["chunks"] = (logits.chunks[axis],)
    classes = xp.arange(logits.shape[axis], dtype=labels.dtype, **options)
    classes = along_axis(classes, axis, logits.ndim)
    if backend == "dask" and beside_logits:
        import dask.array

        # dask makes what it can as soon as it can: masks that need no logits would all be made
        # ahead of the gradient, which waits for the mean's denominator, and fill the memory.
        return dask.array.core.elemwise(_is_label, classes, labels, logits, dtype=bool)
    return classes == labels


def _is_label(classes: Any, labels: Any, logits: Any) -> Any:
    return classes == labels


def pick(xp: Any, backend: str, values: Any, labels: Any, logits: Any, axis: int) -> Any:
    """Take each row's value at its label, all in range; values broadcast against the logits."""
    if backend == "torch":
        # The standard's function also minds negative labels, and fixes symbolic sizes.
        shape = labels.shape[:axis] + values.shape[axis : axis + 1] + labels.shape[axis + 1 :]
        return xp.gather(values if values.shape == shape else values.expand(shape), axis, labels)
    if backend == "numpy" and axis == 1 and values.ndim == 2 and len(values) == len(labels):
        # What take_along_axis does as well, in twice the time for a few rows.
        return values[np.arange(len(values))[:, None], labels]
    if backend == "jax":
        return _jax_take(values, labels, axis)
    if hasattr(xp, "take_along_axis"):
        return xp.take_along_axis(values, labels, axis=axis)
    # dask has no gather; it sees that this mask is the one the loss needs and makes it once.
    of_logits = values.shape == logits.shape
    mask = one_hot(xp, backend, labels, logits, axis, beside_logits=of_logits)
    return xp.sum(xp.where(mask, values, 0.0), axis=axis, keepdims=True)


def _jax_take(values: Any, labels: Any, axis: int) -> Any:
    import jax

    def take(values: Any, labels: Any) -> Any:
        return jax.numpy.take_along_axis(values, labels, axis=axis)

    shardings = [jax.typeof(array).sharding for array in (values, labels)]
    sharded = [s for s in shardings if any(part is not None for part in s.spec)]
    if not sharded:
        return take(values, labels)
    # On a mesh of explicit axes jax wants to be told how what it gathers is sharded. The rest is
    # left to the compiler, as on a mesh of automatic axes.
    rows = [a if a is not None else b for a, b in zip(*(s.spec for s in shardings), strict=True)]
    rows[axis] = None
    spec = jax.sharding.PartitionSpec(*rows)
    result = jax.sharding.NamedSharding(sharded[0].mesh, spec)
    return jax.sharding.auto_axes(take, out_sharding=result)(values, labels)


def class_sum(xp: Any, backend: str, values: Any, axis: int, dtype: Any) -> Any:
    """Sum over the classes, accurately for any layout, into a dtype at least as wide.

    The class axis stays, of length 1.
    """
    if backend == "torch":
        # torch adds in a cascade, whatever the axis, and would copy all values to widen them.
        return cast(xp, xp.sum(values, axis=axis, keepdims=True), dtype)
    # NumPy adds pairwise along the innermost axis only; widening on the way is right for all.
    add = np.add.reduce if backend == "numpy" else xp.sum
    return add(values, axis=axis, dtype=dtype, keepdims=True)


def class_max(xp: Any, backend: str, values: Any, axis: int) -> Any:
    """Give the largest value over the classes; the class axis stays, of length 1.

    It only serves to move a row to a place where exponentials do not overflow, and no derivative
    depends on it.
    """
    if backend == "torch":
        # torch would split the derivative among classes that tie, to cancel it later, if not quite.
        values = values.detach()
    # A ufunc's own reduction starts in half the time of NumPy's function.
    largest = np.maximum.reduce if backend == "numpy" else xp.max
    return largest(values, axis=axis, keepdims=True)


def argmax(xp: Any, backend: str, values: Any, axis: int) -> Any:
    """Give the first class with the largest value; the class axis stays, of length 1."""
    if backend != "jax":
        return xp.argmax(values, axis=axis, keepdims=True)
    # XLA's argmax takes ten times as long on a CPU, and gathers where the classes are sharded.
    top = xp.max(values, axis=axis, keepdims=True)
    classes = along_axis(xp.arange(values.shape[axis]), axis, values.ndim)
    places = xp.where(values == top, classes, values.shape[axis])
    first = xp.min(places, axis=axis, keepdims=True)
    return xp.where(top == top, first, 0)


def total(xp: Any, backend: str, values: Any) -> Any:
    """Sum over everything."""
    if backend == "dask":
        # dask by itself adds up two such numbers a task, as if they were large.
        return values.sum(split_every=dict.fromkeys(range(values.ndim), 16))
    return np.add.reduce(values, axis=None) if backend == "numpy" else xp.sum(values)


def any_true(xp: Any, mask: Any) -> bool:
    """Tell whether a mask whose values are at hand is True anywhere."""
    return bool(np.logical_or.reduce(mask, axis=None) if xp is np else xp.any(mask))


def replace(xp: Any, backend: str, mask: Any, value: Any, array: Any, *, owned: bool) -> Any:
    """Give the array with value where the mask is True; one that is `owned` may be changed."""
    if backend != "numpy":
        return xp.where(mask, value, array)
    # A copy and a masked store take half the time of NumPy's where.
    result = array if owned else array.copy(order="K")
    np.copyto(result, value, where=mask)
    return result


def overwrite(backend: str, function: Any, array: Any, *others: Any) -> Any:
    """Apply an elementwise function to an array that nobody else holds, in place where it can."""
    if backend in ("numpy", "cupy"):
        return function(array, *others, out=array)
    return function(array, *others)


def fuses(backend: str, array: Any) -> bool:
    """Tell whether a compiler will take what is written for this array apart and fuse it anew."""
    return backend == "jax" and not has_values(array, backend)


def quiet(backend: str) -> contextlib.AbstractContextManager[Any]:
    """Keep NumPy's warnings away: an infinity or nan here is selected away or is the answer."""
    if backend in ("numpy", "array-api-strict"):
        return np.errstate(all="ignore")
    return contextlib.nullcontext()


def installed(module: str) -> bool:
    """Tell whether a module is or could be imported, without importing it."""
    if module in sys.modules:
        return True
    import importlib.util

    return importlib.util.find_spec(module) is not None
