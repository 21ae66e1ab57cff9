"""Array libraries: where their arrays lie, and the few calls in which they differ.

Whose arrays they are is told by `libraries`. Every other difference between libraries that the
rest of polyce must know of is decided here.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from polyce.eager import ON_NUMPY, has_values

FLOATS = ("float16", "bfloat16", "float32", "float64")
# Of jax, and of NumPy by ml_dtypes.
SUB_BYTE = {"int2": (-2, 1), "int4": (-8, 7), "uint2": (0, 3), "uint4": (0, 15)}
INTEGERS = {
    "int8": (-(2**7), 2**7 - 1),
    "int16": (-(2**15), 2**15 - 1),
    "int32": (-(2**31), 2**31 - 1),
    "int64": (-(2**63), 2**63 - 1),
    "uint8": (0, 2**8 - 1),
    "uint16": (0, 2**16 - 1),
    "uint32": (0, 2**32 - 1),
    "uint64": (0, 2**64 - 1),
    **SUB_BYTE,
}

# NumPy works its dtypes' names out each time they are asked for.
_NUMPY_DTYPES = {
    name: np.dtype(name)
    for name in (*FLOATS, *INTEGERS)
    if name != "bfloat16" and name not in SUB_BYTE
}
_NUMPY_NAMES = {dtype: name for name, dtype in _NUMPY_DTYPES.items()}


def dtype_name(array: Any) -> str:
    """Name an array's dtype as the standard does, bfloat16 of any library included."""
    return name_of(array.dtype)


def name_of(dtype: Any) -> str:
    """Name a dtype as the standard does."""
    if isinstance(dtype, np.dtype):
        return _NUMPY_NAMES.get(dtype) or dtype.name
    name = getattr(dtype, "name", None)
    return name if isinstance(name, str) else str(dtype).rpartition(".")[2]


def holds_integers(array: Any) -> bool:
    """Tell whether an array is of integers that can be computed with."""
    name = dtype_name(array)
    # torch has names for those below a byte, and not a single operation.
    return name in INTEGERS and (name not in SUB_BYTE or isinstance(array.dtype, np.dtype))


def float_dtype(xp: Any, backend: str, name: str) -> Any:
    """Give float32 or float64 as an array of the library shows it."""
    if backend in ("numpy", "cupy", "dask", "jax", "cubed", "mparray"):
        return _NUMPY_DTYPES[name]
    dtype = getattr(xp, name)
    return np.dtype(dtype) if backend == "marray" and isinstance(dtype, type) else dtype


def device(array: Any, backend: str) -> Any:
    """Tell the device of an array as its library compares them, or None where it has no say."""
    if backend in ("torch", "cupy", "array-api-strict", "marray"):
        return array.device
    # A jax array's new companions are uncommitted and follow it; dask's chunks live anywhere, and
    # mlx's arrays wherever they are computed with.
    return None


def device_kind(array: Any, backend: str) -> str:
    """Tell what kind of device holds an array: cpu, cuda, ..., or unknown while tracing."""
    if backend in (*ON_NUMPY, "dask", "cubed") or isinstance(array, np.ndarray):
        return "cpu"
    if backend == "torch":
        return str(array.device.type)
    if backend == "cupy":
        return "cuda"
    if backend == "jax" and has_values(array, backend):
        return str(next(iter(array.devices())).platform)
    if backend == "mlx":
        import mlx.core

        return str(mlx.core.default_device().type.name)
    return "unknown"


def are_at_hand(array: Any, backend: str) -> bool:
    """Tell whether a look at an array's values costs no more than the look."""
    if backend == "mlx":
        # All is put off there, so that a look would compute; and under its compile and vmap, which
        # nothing tells of, a look is an error.
        return False
    # On an accelerator it would stall the host.
    return has_values(array, backend) and device_kind(array, backend) in ("cpu", "unknown")


def has_float64(xp: Any, backend: str, where: Any) -> bool:
    """Tell whether the library computes in float64 on the device that holds `where`."""
    if backend in ("numpy", "dask", "cupy", "cubed", "ndonnx", "mparray"):
        return True
    if backend == "torch":
        return bool(where.device.type != "mps")
    if backend == "mlx":
        # Only on a CPU, and exp and log1p of float64 are no better than those of float32.
        return False
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


def autocast_product(backend: str, dtype: Any, where: Any) -> Any:
    """Give the dtype that torch's autocast has a matrix product take an operand of `dtype` in."""
    if backend == "torch" and name_of(dtype) != "float64":
        import torch

        kind = where.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
    return dtype


def product_dtype(xp: Any, backend: str, dtype: Any, where: Any) -> Any:
    """Give the dtype in which logits are best made as a product of two arrays of `dtype`.

    Only torch keeps 16 bits, for which its libraries have units of their own; but on a CPU its
    float16 takes a hundred times as long as float32.
    """
    name = name_of(dtype)
    keeps = backend == "torch" and (name == "bfloat16" or where.device.type != "cpu")
    return dtype if name in ("float32", "float64") or keeps else float_dtype(xp, backend, "float32")


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
    if backend in ("numpy", "torch", "dask", "cupy", "cubed", "ndonnx", "mparray"):
        return xp.int64
    if backend == "mlx":
        return xp.int32
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
    if backend not in ("dask", "cubed"):
        return array
    pairs = zip(array.shape, logits.shape, logits.chunks, strict=True)
    return array.rechunk(tuple(cuts if size == full else (size,) for size, full, cuts in pairs))


def one_hot(
    xp: Any, backend: str, labels: Any, logits: Any, axis: int, *, beside_logits: bool = True
) -> Any:
    """Mark in every row of the logits the class that labels name: booleans of the logits' shape."""
    where = device(logits, backend)
    options = {} if where is None else {"device": where}
    if backend in ("dask", "cubed"):
        # The same cuts as the logits, or the library would cut both to fit.
        options["chunks"] = (logits.chunks[axis],)
    if backend == "cubed":
        options["spec"] = logits.spec
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
    # ONNX does not broadcast what it gathers from.
    fits = backend != "ndonnx" or values.shape == logits.shape
    if hasattr(xp, "take_along_axis") and fits:
        return xp.take_along_axis(values, labels, axis=axis)
    # dask has no gather; it sees that this mask is the one the loss needs and makes it once.
    of_logits = values.shape == logits.shape
    mask = one_hot(xp, backend, labels, logits, axis, beside_logits=of_logits)
    return xp.sum(xp.where(mask, values, 0.0), axis=axis, keepdims=True)


def _jax_take(values: Any, labels: Any, axis: int) -> Any:
    import jax

    from polyce.graphs import jax_mesh

    def take(values: Any, labels: Any) -> Any:
        return jax.numpy.take_along_axis(values, labels, axis=axis)

    specs = map(jax_mesh.spec, (values, labels))
    rows = [one if one is not None else other for one, other in zip(*specs, strict=True)]
    rows[axis] = None
    return jax_mesh.automatically(take, jax.sharding.PartitionSpec(*rows), values, labels)


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
    if backend == "jax":
        # XLA's takes ten times as long on a CPU, and gathers where the classes are sharded.
        top = xp.max(values, axis=axis, keepdims=True)
        classes = along_axis(xp.arange(values.shape[axis]), axis, values.ndim)
        places = xp.where(values == top, classes, values.shape[axis])
        first = xp.min(places, axis=axis, keepdims=True)
        return xp.where(top == top, first, 0)
    found = xp.argmax(values, axis=axis, keepdims=True)
    if backend == "mlx":
        # Unsigned, so that there were no -1 for a row without one, and not to be differentiated.
        return xp.stop_gradient(cast(xp, found, xp.int32))
    return found


def row_count(problem: Any, logits: Any) -> Any:
    """Count a problem's rows: a float, or a 0-d array where only a run will tell."""
    if problem.backend != "ndonnx" or None not in problem.row_shape:
        count = math.prod(problem.row_shape)
        if isinstance(count, int):
            return float(count)
        # The exports of jax and torch know a size by name, which has no float.
        if problem.backend == "jax":
            return problem.xp.asarray(count, dtype=problem.row_dtype)
        return sys.modules["torch"].sym_float(count)
    one_class = logits[(slice(None),) * problem.axis + (slice(0, 1),)]
    return problem.xp.sum(problem.xp.ones_like(one_class, dtype=problem.row_dtype))


def exact(number: float) -> Any:
    """Give a number as mparray computes with them, to any number of digits."""
    import mpmath

    return mpmath.mpf(number)


def divide(backend: str, values: Any, divisor: Any) -> Any:
    """Divide by what may be 0, the denominator of a mean over nothing."""
    if backend != "dask":
        return values / divisor
    from dask.array.core import elemwise

    return elemwise(_divided, values, divisor)


def _divided(values: Any, divisor: Any) -> Any:
    """Divide in a task of dask's, which does not know what its caller keeps quiet."""
    with np.errstate(all="ignore"):
        return values / divisor


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


def computing(backend: str, operands: Mapping[str, Any]) -> contextlib.AbstractContextManager[Any]:
    """Prepare for computing with the arrays of a call, by what the caller calls them.

    NumPy is kept quiet, the device of CuPy's arrays made the current one, and torch's storages are
    looked at.
    """
    if backend == "torch":
        from polyce import torch_checks

        torch_checks.check_storages(**operands)
    return operands["input"].device if backend == "cupy" else quiet(backend)


def quiet(backend: str) -> contextlib.AbstractContextManager[Any]:
    """Keep NumPy's warnings away: an infinity or nan here is selected away or is the answer."""
    if backend in ON_NUMPY:
        return np.errstate(all="ignore")
    return contextlib.nullcontext()


def installed(module: str) -> bool:
    """Tell whether a module is or could be imported, without importing it."""
    if module in sys.modules:
        return True
    import importlib.util

    return importlib.util.find_spec(module) is not None
