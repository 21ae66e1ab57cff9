"""The checks of each array of a call: its shape, dtype and device, and the errors about them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

from polyce.arrays import dtypes
from polyce.arrays.library import Library
from polyce.call import options


def logits_shape(logits: Any, axis: int | None, target: Any = None) -> tuple[tuple[int, ...], int]:
    """Check the logits; return their shape and the class axis, counted from the front."""
    if dtypes.dtype_name(logits) not in dtypes.FLOATS:
        advice = "convert it to one of these first"
        if _hold_labels(logits, target) and _fit_without_one_axis(target, logits):
            advice = _swapped("input and target", target)
        raise TypeError(
            f"input must be real floating point ({', '.join(dtypes.FLOATS)}), "
            f"got {show(logits)}; {advice}"
        )
    shape = _known_shape("input", logits)
    axis = options.class_axis(shape, axis)
    if shape[axis] is None:
        raise ValueError(
            f"the class axis of input must have a known length, got shape {shape}; "
            "only the others may be left open"
        )
    return shape, axis


def _hold_labels(array: Any, target: Any) -> bool:
    """Tell whether an array holds integers and the target floats, as if they were swapped."""
    return (
        target is not None
        and dtypes.holds_integers(array)
        and dtypes.dtype_name(target) in dtypes.FLOATS
    )


def _fit_without_one_axis(logits: Any, labels: Any) -> bool:
    """Tell whether labels have the logits' shape, or that shape without one of its axes."""
    whole, given = tuple(logits.shape), tuple(labels.shape)
    return given == whole or bool(_class_axes(whole, given))


def _class_axes(shape: tuple[int, ...], rows: tuple[int, ...]) -> list[int]:
    """List the axes whose removal turns a shape into that of the rows, the last one first."""
    every = range(len(shape) - 1, -1, -1)
    return [axis for axis in every if shape[:axis] + shape[axis + 1 :] == rows]


def _swapped(names: str, target: Any) -> str:
    return f"are {names} swapped, as target is {show(target)}?"


def product_dtype(
    library: Library, hidden: Any, weight: Any, bias: Any, target: Any = None, *, of: str = ""
) -> Any:
    """Return the one dtype of hidden states and head: torch's autocast dtype where that is on.

    As in torch's own product, none of them is promoted. `of` begins their names, for a teacher.
    """
    given = {f"{of}input": hidden, f"{of}linear_weight": weight, f"{of}linear_bias": bias}
    first = None
    for name, array in given.items():
        if array is None:
            continue
        if dtypes.dtype_name(array) not in dtypes.FLOATS:
            advice = "convert it to one of these first"
            if name == "linear_weight" and _hold_labels(array, target) and target.ndim == 2:
                advice = _swapped("linear_weight and target", target)
            raise TypeError(
                f"{name} must be real floating point ({', '.join(dtypes.FLOATS)}), "
                f"got {show(array)}; {advice}"
            )
        dtype = library.factor_dtype(array.dtype, hidden)
        if first is None:
            first = dtype
        elif dtype != first:
            raise TypeError(
                f"{', '.join(list(given)[:2])} and {of}linear_bias must have one dtype, but "
                f"{of}input is {dtypes.dtype_name(hidden)} and {name} is "
                f"{dtypes.dtype_name(array)}; convert one of them"
            )
    return first


def product_shape(hidden: Any, weight: Any, bias: Any, *, of: str = "") -> tuple[int, ...]:
    """Check hidden states and head; return the shape of their logits.

    `of` begins their names, for a teacher.
    """
    shape = _known_shape(f"{of}input", hidden)
    head = _known_shape(f"{of}linear_weight", weight)
    if not shape:
        raise ValueError(
            f"{of}input must have a feature axis, its last, got a 0-d array; pass hidden states of "
            "shape (N, F) or (F,)"
        )
    if len(head) != 2:
        raise ValueError(
            f"{of}linear_weight must be 2-D, classes by features, got shape {head}; pass the "
            "weight of a linear layer"
        )
    if head[1] != shape[-1]:
        raise ValueError(
            f"{of}input and {of}linear_weight must have as many features, their last axis, got "
            f"shapes {shape} and {head}; transpose {of}linear_weight if its classes come last"
        )
    if bias is not None and tuple(bias.shape) != head[:1]:
        raise ValueError(
            f"{of}linear_bias must be 1-D with one entry for each of the {head[0]} classes, got "
            f"shape {tuple(bias.shape)}; pass shape ({head[0]},)"
        )
    if head[0] is None:
        raise ValueError(
            f"the class axis of {of}linear_weight must have a known length, got shape {head}; only "
            "the number of rows may be left open"
        )
    return (*shape[:-1], head[0])


def promoted(library: Library, *given: Any) -> Any:
    """Promote floating dtypes; float16 with bfloat16 is float32, and other dtypes take no part."""
    found = {dtypes.name_of(each): each for each in given}
    for name in ("float64", "float32"):
        if name in found:
            return found[name]
    if "float16" in found and "bfloat16" in found:
        return library.float_dtype("float32")
    return found.get("float16", found.get("bfloat16"))


def show(array: Any) -> str:
    """Show an array's dtype and shape."""
    return f"{dtypes.dtype_name(array)} {tuple(array.shape)}"


def _known_shape(name: str, array: Any) -> tuple[int, ...]:
    # None is a size that an ONNX graph only learns when it runs.
    shape = tuple(array.shape)
    for size in shape:
        if isinstance(size, float) and math.isnan(size):
            raise ValueError(
                f"{name} must have a known shape, got {shape}; "
                "call compute_chunk_sizes() on a dask array first"
            )
    return shape


def devices(library: Library, operands: Mapping[str, Any]) -> None:
    """Refuse arrays that lie on different devices."""
    first = library.device(operands["input"])
    for name, array in operands.items():
        if array is not None and library.device(array) != first:
            raise TypeError(
                f"all arrays must lie on one device, but input is on {first} and {name} on "
                f"{library.device(array)}; move {name} first"
            )


def byte_order(operands: Mapping[str, Any]) -> None:
    """Refuse arrays whose bytes are swapped, for a library that cannot compute with them."""
    for name, array in operands.items():
        if array is not None and not array.dtype.isnative:
            raise TypeError(
                f"{name} must have its bytes in this processor's order, got dtype "
                f"{array.dtype.str}; convert it in NumPy, before it goes to the device"
            )


def target_kind(
    shape: tuple[int, ...],
    row_shape: tuple[int, ...],
    logits: Any,
    target: Any,
    probabilities: bool,
    takes_axis: bool,
) -> str:
    """Decide by shape, as torch does, what the target holds, and check that its dtype agrees."""
    target_shape = _known_shape("target", target)
    name = dtypes.dtype_name(target)
    is_integer = dtypes.holds_integers(target)
    if target_shape == shape and probabilities and not (is_integer and shape == (1,)):
        if name not in dtypes.FLOATS:
            raise TypeError(
                f"a target of the logits' shape {shape} holds class probabilities and must be real "
                f"floating point, got {show(target)}; for class indices drop the class axis, or "
                "cast it to a float dtype"
            )
        return "probability"
    # torch takes a target of shape (1,) for logits of shape (C,).
    if target_shape != row_shape and not (len(shape) == 1 and target_shape == (1,)):
        either = f", or probabilities of shape {shape}" if probabilities else ""
        raise ValueError(
            f"target must hold class indices of shape {row_shape}{either}, got {show(target)} "
            f"for input {show(logits)}; {_to_fit(shape, row_shape, target, takes_axis)}"
        )
    if not is_integer:
        either = f", or pass float probabilities of shape {shape}" if probabilities else ""
        raise TypeError(
            f"target of shape {target_shape} for input of shape {shape} holds class indices and "
            f"must be an integer dtype, got {name}; cast it to int64{either}"
        )
    return "index"


def looks_at_labels(name: str, labels: Any, library: Library, validate: bool | None) -> bool:
    """Tell whether labels are looked at; ValueError if they should be and have no values."""
    if validate is False:
        return False
    if not library.has_values(labels):
        if validate:
            raise ValueError(
                f"validate=True needs {name}'s values, but this {name} is traced or lazy and has "
                "none yet; leave validate at None (a bad label then gives nan)"
            )
        return False
    return bool(validate) or library.is_at_hand(labels)


def _to_fit(
    shape: tuple[int, ...], row_shape: tuple[int, ...], target: Any, takes_axis: bool
) -> str:
    """Return advice about a target whose shape fits neither indices nor probabilities."""
    given = tuple(target.shape)
    if given == shape:
        return "probabilities and one-hot targets are for cross_entropy"
    axes = _class_axes(shape, given) if takes_axis else []
    if axes:
        axis = -1 if axes[0] == len(shape) - 1 else axes[0]
        return f"pass axis={axis} if the classes of input are there"
    is_integer = dtypes.holds_integers(target)
    sized = None not in given + row_shape
    if is_integer and len(given) in (0, len(row_shape)) and sized:
        rows, labels = math.prod(row_shape), math.prod(given)
        if rows != labels:
            return f"there are {rows} rows, but {labels} labels: pass one label for each row"
    return "remove or add axes so that one of them fits"


def weight(weight: Any, classes: int) -> None:
    """Refuse class weights that are not one real number for each class."""
    if tuple(weight.shape) != (classes,):
        raise ValueError(
            f"weight must be 1-D with one entry for each of the {classes} classes, "
            f"got shape {tuple(weight.shape)}; pass shape ({classes},)"
        )
    _real_numbers("weight", weight)


def sample_weight(sample_weight: Any, row_shape: tuple[int, ...]) -> None:
    """Refuse sample weights that are not one real number for each row."""
    if tuple(sample_weight.shape) != row_shape:
        raise ValueError(
            f"sample_weight must have one entry for each row, of shape {row_shape}, got shape "
            f"{tuple(sample_weight.shape)}; reshape it or spread it over the rows"
        )
    _real_numbers("sample_weight", sample_weight)


def normalizer(normalizer: Any) -> None:
    """Refuse a normalizer that is not a single real number."""
    if tuple(normalizer.shape) != ():
        raise ValueError(
            "normalizer must be a number or a 0-d array, got shape "
            f"{tuple(normalizer.shape)}; pass what the whole sum is to be divided by"
        )
    _real_numbers("normalizer", normalizer)


def _real_numbers(name: str, array: Any) -> None:
    dtype = dtypes.dtype_name(array)
    if dtype not in dtypes.FLOATS and not dtypes.holds_integers(array):
        raise TypeError(
            f"{name} must be real numbers, got {dtype}; convert it to a floating-point dtype"
        )


def grad_output(
    number: float | None, grad_output: Any, row_shape: tuple[int, ...], reduction: str
) -> None:
    """Refuse a grad_output, a number or an array, whose shape is not the loss's."""
    expected = row_shape if reduction == "none" else ()
    if number is not None and expected:
        raise ValueError(
            f"grad_output must have the shape of the rows {row_shape} for reduction 'none', "
            f"got the number {number}; pass an array of that shape"
        )
    if grad_output is None:
        return
    if tuple(grad_output.shape) != expected:
        raise ValueError(
            f"grad_output must have the loss's shape {expected} for reduction "
            f"{reduction!r}, got shape {tuple(grad_output.shape)}; pass the gradient "
            "with respect to the loss"
        )
    _real_numbers("grad_output", grad_output)


def grad_stats(
    grad_stats: Any, stats: tuple[str, ...] | None
) -> tuple[dict[str, float], dict[str, Any]]:
    """Check the names of the stats' cotangents; return those that are numbers, and the arrays."""
    found: tuple[dict[str, float], dict[str, Any]] = ({}, {})
    if grad_stats is None:
        return found
    names = " and ".join(options.STATS_WITH_GRADIENT)
    if not isinstance(grad_stats, Mapping):
        raise TypeError(
            f"grad_stats must be a mapping from the names {names} to arrays, got "
            f"{type(grad_stats).__qualname__}; pass a dict"
        )
    for name in grad_stats:
        if name not in options.STATS_WITH_GRADIENT:
            raise ValueError(
                f"grad_stats takes the names {names}, which have a gradient, got {name!r}; "
                "leave it out or correct it"
            )
        if name not in (stats or ()):
            raise ValueError(
                f"grad_stats holds {name!r}, which return_stats does not ask for; add the name to "
                "return_stats"
            )
    for name in options.STATS_WITH_GRADIENT:
        if name in grad_stats:
            full = stats_name(name)
            if grad_stats[name] is None:
                raise TypeError(f"{full} must be an array, got None; leave the name out")
            number, array = number_or_array(full, grad_stats[name])
            if number is None:
                found[1][name] = array
            else:
                found[0][name] = number
    return found


def stats_name(name: str) -> str:
    """Return the caller's name for the cotangent of a stat."""
    return f"grad_stats[{name!r}]"


def stats_cotangent(name: str, cotangent: Any, row_shape: tuple[int, ...]) -> None:
    """Refuse a cotangent of a stat, a number or an array, that has not one number for each row."""
    full = stats_name(name)
    if isinstance(cotangent, float):
        if row_shape:
            raise ValueError(
                f"{full} must have the shape of the rows {row_shape}, got the number {cotangent}; "
                "pass an array of that shape"
            )
        return
    if tuple(cotangent.shape) != row_shape:
        raise ValueError(
            f"{full} must have the shape of the rows {row_shape}, got shape "
            f"{tuple(cotangent.shape)}; pass the gradient with respect to that stat of each row"
        )
    _real_numbers(full, cotangent)


def number_or_array(name: str, value: Any) -> tuple[float | None, Any]:
    """Tell a number from an array: (the number, None) or (None, the array)."""
    if value is None:
        return None, None
    if isinstance(value, (bool, complex)):
        raise TypeError(
            f"{name} must be a real number or an array, got {value!r}; leave it at None or "
            "pass a float"
        )
    if isinstance(value, numbers.Real):
        return float(value), None
    return None, value
