"""What a call asks for, before any value is looked at: every shape, dtype and option error.

`describe` turns the arguments of a call into a `Problem`, hashable and free of arrays, so that a
traced or lazy call takes the same way as an eager one.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any, NamedTuple

from polyce import arrays, options


class Problem(NamedTuple):
    """The static facts of one call."""

    xp: Any
    """The array library's namespace."""
    backend: str
    device: str
    """The kind of device: cpu, cuda, ..., or unknown while tracing."""
    kind: str
    """What the target holds: index, probability, or none where there is no target."""
    shape: tuple[int, ...]
    axis: int
    """The class axis, counted from the front."""
    row_shape: tuple[int, ...]
    """`shape` without the class axis: one softmax, one loss and one index target per entry."""
    logits_dtype: Any
    target_dtype: str
    result_dtype: Any
    arithmetic_dtype: Any
    """float64 for float64, else float32: what is computed for every logit."""
    row_dtype: Any
    """What is computed for every row: float64 where the library has it."""
    weighted: bool
    ignore_index: int
    label_smoothing: float
    reduction: str
    check_labels: bool
    sample_weighted: bool = False
    normalized: bool = False
    """Whether the call brings what the mean divides by."""
    z_loss: float = 0.0
    logit_scale: float = 1.0
    logit_softcap: float = math.inf
    """inf for none."""
    stats: tuple[str, ...] = ()
    """What to report of each row beside its loss."""

    @property
    def classes(self) -> int:
        """C, the length of the class axis."""
        return self.shape[self.axis]

    @property
    def is_empty(self) -> bool:
        """Whether there are no logits: no rows or no classes."""
        return 0 in self.shape

    @property
    def logits_dtype_name(self) -> str:
        """The dtype of the logits, as the standard names it."""
        return arrays.name_of(self.logits_dtype)

    @property
    def options(self) -> tuple[str, ...]:
        """The options that are on and that an implementation may lack."""
        on = {"weight": self.weighted, "label_smoothing": self.label_smoothing > 0}
        return tuple(name for name, is_on in on.items() if is_on)


class Operands(NamedTuple):
    """The arrays of one call, all of one library."""

    logits: Any
    target: Any
    weight: Any
    sample_weight: Any
    normalizer: Any
    grad_output: Any


def describe(
    input: Any,
    target: Any,
    weight: Any = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    axis: int | None = None,
    validate: bool | None = None,
    grad_output: Any = None,
    probabilities: bool = True,
) -> tuple[Problem, Operands]:
    """Check the arguments of a call and state its static facts.

    Without `probabilities`, as for nll_loss, the target is class indices whatever its shape.
    """
    options.check_reduction(reduction)
    if input is None or target is None:
        missing = "input" if input is None else "target"
        raise TypeError(f"{missing} must be an array, got None; pass the logits and their target")
    if isinstance(grad_output, (bool, complex)):
        raise TypeError(
            f"grad_output must be a real number or an array, got {grad_output!r}; "
            "leave it at None for 1"
        )
    number = isinstance(grad_output, numbers.Real)
    xp, backend, (logits, target, weight, cotangent) = arrays.of(
        input=input, target=target, weight=weight, grad_output=None if number else grad_output
    )
    if arrays.device(logits, backend) is not None:
        _check_devices(
            backend,
            {"input": logits, "target": target, "weight": weight, "grad_output": cotangent},
        )
    shape, axis = _logits_shape(logits, axis)
    row_shape = shape[:axis] + shape[axis + 1 :]
    kind = _target_kind(shape, row_shape, logits, target, probabilities)
    ignore_index = options.check_ignore_index(ignore_index, kind)
    label_smoothing = options.check_smoothing(label_smoothing)
    if weight is not None:
        _check_weight(weight, shape[axis])
    result_dtype = logits.dtype
    if kind == "probability":
        result_dtype = _promote(xp, logits, target, weight)

    problem = Problem(
        xp=xp,
        backend=backend,
        device=arrays.device_kind(logits, backend),
        kind=kind,
        shape=shape,
        axis=axis,
        row_shape=row_shape,
        logits_dtype=logits.dtype,
        target_dtype=arrays.dtype_name(target),
        **_dtypes(xp, backend, logits, result_dtype),
        weighted=weight is not None,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        check_labels=_checks_labels(kind, target, backend, validate),
    )
    if number:
        if reduction == "none" and row_shape:
            raise ValueError(
                f"grad_output must have the shape of the rows {row_shape} for reduction 'none', "
                f"got the number {grad_output}; pass an array of that shape"
            )
        cotangent = float(grad_output)
    elif cotangent is not None:
        _check_grad_output(cotangent, problem)
    return problem, Operands(logits, target, weight, None, None, cotangent)


def describe_logits(input: Any, axis: int | None) -> tuple[Problem, Any]:
    """Check the arguments of a function of logits alone and state its static facts."""
    if input is None:
        raise TypeError("input must be an array, got None; pass the logits")
    xp, backend, (logits,) = arrays.of(input=input)
    shape, axis = _logits_shape(logits, axis)
    problem = Problem(
        xp=xp,
        backend=backend,
        device=arrays.device_kind(logits, backend),
        kind="none",
        shape=shape,
        axis=axis,
        row_shape=shape[:axis] + shape[axis + 1 :],
        logits_dtype=logits.dtype,
        target_dtype="none",
        **_dtypes(xp, backend, logits, logits.dtype),
        weighted=False,
        ignore_index=-100,
        label_smoothing=0.0,
        reduction="none",
        check_labels=False,
    )
    return problem, logits


def _dtypes(xp: Any, backend: str, logits: Any, result_dtype: Any) -> dict[str, Any]:
    is_double = arrays.name_of(result_dtype) == "float64"
    wide = is_double or arrays.has_float64(xp, backend, logits)
    return {
        "result_dtype": result_dtype,
        "arithmetic_dtype": arrays.float_dtype(xp, backend, "float64" if is_double else "float32"),
        "row_dtype": arrays.float_dtype(xp, backend, "float64" if wide else "float32"),
    }


def _logits_shape(logits: Any, axis: int | None) -> tuple[tuple[int, ...], int]:
    if arrays.dtype_name(logits) not in arrays.FLOATS:
        raise TypeError(
            f"input must be real floating point ({', '.join(arrays.FLOATS)}), "
            f"got {_show(logits)}; convert it to one of these first"
        )
    shape = _known_shape("input", logits)
    return shape, options.class_axis(shape, axis)


def _show(array: Any) -> str:
    return f"{arrays.dtype_name(array)} {tuple(array.shape)}"


def _known_shape(name: str, array: Any) -> tuple[int, ...]:
    shape = tuple(array.shape)
    for size in shape:
        if size is None or (isinstance(size, float) and math.isnan(size)):
            raise ValueError(
                f"{name} must have a known shape, got {shape}; "
                "call compute_chunk_sizes() on a dask array first"
            )
    return shape


def _check_devices(backend: str, operands: Mapping[str, Any]) -> None:
    first = arrays.device(operands["input"], backend)
    for name, array in operands.items():
        if array is not None and arrays.device(array, backend) != first:
            raise TypeError(
                f"all arrays must lie on one device, but input is on {first} and {name} on "
                f"{arrays.device(array, backend)}; move {name} first"
            )


def _target_kind(
    shape: tuple[int, ...],
    row_shape: tuple[int, ...],
    logits: Any,
    target: Any,
    probabilities: bool,
) -> str:
    """Decide by shape, as torch does, what the target holds, and check that its dtype agrees."""
    target_shape = _known_shape("target", target)
    name = arrays.dtype_name(target)
    is_integer = name in arrays.INTEGERS
    if target_shape == shape and probabilities and not (is_integer and shape == (1,)):
        if name not in arrays.FLOATS:
            raise TypeError(
                f"a target of input's shape {shape} holds class probabilities and must be real "
                f"floating point, got {_show(target)}; for class indices drop the class axis"
            )
        return "probability"
    # torch takes a target of shape (1,) for logits of shape (C,).
    if target_shape != row_shape and not (len(shape) == 1 and target_shape == (1,)):
        either = ", or probabilities of input's shape" if probabilities else ""
        raise ValueError(
            f"target must hold class indices of shape {row_shape}{either}, got {_show(target)} "
            f"for input {_show(logits)}; remove or add axes so that one of them fits"
        )
    if not is_integer:
        either = f", or pass float probabilities of shape {shape}" if probabilities else ""
        raise TypeError(
            f"target of shape {target_shape} for input of shape {shape} holds class indices and "
            f"must be an integer dtype, got {name}; cast it to int64{either}"
        )
    return "index"


def _check_weight(weight: Any, classes: int) -> None:
    if tuple(weight.shape) != (classes,):
        raise ValueError(
            f"weight must be 1-D with one entry for each of the {classes} classes, "
            f"got shape {tuple(weight.shape)}; pass shape ({classes},)"
        )
    name = arrays.dtype_name(weight)
    if name not in arrays.FLOATS and name not in arrays.INTEGERS:
        raise TypeError(
            f"weight must be real numbers, got {name}; convert it to a floating-point dtype"
        )


def _check_grad_output(grad_output: Any, problem: Problem) -> None:
    expected = problem.row_shape if problem.reduction == "none" else ()
    if tuple(grad_output.shape) != expected:
        raise ValueError(
            f"grad_output must have the loss's shape {expected} for reduction "
            f"{problem.reduction!r}, got shape {tuple(grad_output.shape)}; pass the gradient "
            "with respect to the loss"
        )
    name = arrays.dtype_name(grad_output)
    if name not in arrays.FLOATS and name not in arrays.INTEGERS:
        raise TypeError(
            f"grad_output must be real numbers, got {name}; convert it to input's dtype"
        )


def _checks_labels(kind: str, target: Any, backend: str, validate: bool | None) -> bool:
    if validate is not None and not isinstance(validate, bool):
        raise TypeError(f"validate must be True, False or None, got {validate!r}; None is usual")
    if validate is False or kind != "index":
        return False
    if not arrays.has_values(target, backend):
        if validate:
            raise ValueError(
                "validate=True needs target's values, but this target is traced or lazy and has "
                "none yet; leave validate at None (a bad label then gives nan)"
            )
        return False
    # On an accelerator a look at the labels would stall the host.
    return bool(validate) or arrays.device_kind(target, backend) in ("cpu", "unknown")


def _promote(xp: Any, *operands: Any) -> Any:
    """Promote the floating dtypes among the operands; float16 with bfloat16 gives float32."""
    found = {arrays.dtype_name(array): array.dtype for array in operands if array is not None}
    for name in ("float64", "float32"):
        if name in found:
            return found[name]
    if "float16" in found and "bfloat16" in found:
        return xp.float32
    return found.get("float16", found.get("bfloat16"))
