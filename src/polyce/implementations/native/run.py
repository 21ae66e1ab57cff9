"""One run of the kernels on the arrays of a call."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from polyce.arrays import dtypes
from polyce.call.problem import Operands, Problem
from polyce.formula import labels, stats, transform
from polyce.formula.stats import Stats
from polyce.implementations.native.core import core

_MOST_KERNELS = 1024
# From this many classes on the forward pass saves what spares the backward pass one reading of the
# logits. The core has the same rule; this copy is for code that runs without it.
SAVED_FROM = 65


def saved_shape(problem: Problem) -> tuple[int, int]:
    """Return the shape of what the core saves of the rows, in float64."""
    return math.prod(problem.row_shape), 6 if problem.kind == "teacher" else 4


class ArrayAccess(NamedTuple):
    """How the kernels reach the memory of a library's arrays."""

    empty: Callable[..., Any]
    """(shape, dtype) -> array"""
    empty_like: Callable[[Any], Any]
    """An array laid out like another, without gaps or overlaps."""
    in_order: Callable[[Any], Any]
    """An array with its bytes in this processor's order."""
    dense: Callable[..., Any]
    """(name, array, dtype or None) -> the array, C-contiguous, in that dtype or its own"""
    scalar: Callable[[Any], Any]
    """A 0-d array as the library's own sum returns it."""
    written: Callable[[Any], object] = id
    """Called once the kernels have written to a caller's array, for a library that tracks this."""
    on_graph: Callable[..., tuple[Any, Stats | None] | None] | None = None
    """(problem, operands) -> (loss, stats), or None if nothing requires a gradient"""


def _in_order(array: Any) -> Any:
    """Return an array with its bytes in this processor's order, as the kernels read them."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _dense(name: str, array: Any, dtype: Any) -> Any:
    # Most arrays pass here; NumPy's own function takes three times as long to find that out.
    if array.flags.carray and array.dtype.isnative and (dtype is None or array.dtype == dtype):
        return array
    array = np.asarray(_in_order(array), dtype, order="C")
    return array if array.flags.aligned else array.copy()


NUMPY = ArrayAccess(
    empty=np.empty,
    empty_like=np.empty_like,
    in_order=_in_order,
    dense=_dense,
    scalar=operator.itemgetter(()),
)


def run(
    own: ArrayAccess,
    problem: Problem,
    operands: Operands,
    grad: Any = None,
    *,
    fresh: bool = False,
    saved: Any = None,
) -> tuple[Any, Stats | None]:
    """Compute the loss and the stats; write `grad`, and `saved` for a backward pass, if given.

    `fresh` says that the memory of `grad` is dense and has never been written.
    """
    empty, options = own.empty, problem.options
    by_rows = options.reduction == "none"
    losses = empty(problem.row_shape if by_rows else (), dtype=problem.result_dtype)
    found = None
    if options.stats is not None:
        found = stats.unfilled(problem, lambda shape, dtype: empty(shape, dtype=dtype))
    given = readable(own, problem, operands)
    bad_label = kernel(problem).run(
        **given, losses=losses, stats=found, saved=saved, grad=grad, fresh=fresh, backward=False
    )
    if bad_label is not None:
        raise _bad_label(problem, given["target"], bad_label)
    return losses if by_rows else own.scalar(losses), found


def run_backward(
    own: ArrayAccess, problem: Problem, operands: Operands, saved: Any, grad: Any, *, fresh: bool
) -> None:
    """Write the gradient, from what a forward pass has `saved` of the rows, if it has."""
    given = readable(own, problem, operands)
    if saved is not None:
        saved = own.dense("what was saved of the rows", saved, None)
    bad_label = kernel(problem).run(
        **given, losses=None, stats=None, saved=saved, grad=grad, fresh=fresh, backward=True
    )
    if bad_label is not None:
        raise _bad_label(problem, given["target"], bad_label)


def readable(own: ArrayAccess, problem: Problem, operands: Operands) -> dict[str, Any]:
    """Return the operands as the kernels read them, and whether each row has a cotangent."""
    logits, target, weight, sample_weight, normalizer, cotangent, of_lse, of_entropy, *_ = operands
    probability = operands.target_probability
    if problem.kind == "index":
        target = own.dense("target", target, None)
        if not problem.row_shape and target.ndim:
            target = target.reshape(())  # one label for one row may have an axis
    elif problem.kind == "sparse":
        # The entries of a row lie together.
        target, probability = (
            problem.xp.moveaxis(array, problem.axis, -1) for array in (target, probability)
        )
        target = own.dense("target.index", target, None)
        probability = own.dense("target.probability", probability, problem.arithmetic_dtype)
    else:
        target = own.in_order(target)
    if weight is not None:
        weight = own.dense("weight", weight, problem.arithmetic_dtype)
    if sample_weight is not None:
        sample_weight = own.dense("sample_weight", sample_weight, problem.row_dtype)
    if normalizer is None:
        normalizer = 0.0
    by_row = False
    if cotangent is None:
        cotangent = 1.0
    elif type(cotangent) is not float and problem.options.reduction == "none" and cotangent.ndim:
        by_row = True
        cotangent = own.dense("grad_output", cotangent, problem.row_dtype)
    if of_lse is not None:
        of_lse = own.dense("grad_lse", of_lse, problem.row_dtype)
    if of_entropy is not None:
        of_entropy = own.dense("grad_entropy", of_entropy, problem.row_dtype)
    return {
        # The path takes no logits whose bytes are in another order.
        "logits": logits,
        "target": target,
        "target_probability": probability,
        "weight": weight,
        "sample_weight": sample_weight,
        "normalizer": normalizer,
        "cotangent": cotangent,
        "by_row": by_row,
        "grad_lse": of_lse,
        "grad_entropy": of_entropy,
    }


def _bad_label(problem: Problem, target: Any, place: int) -> IndexError:
    value = int(target.reshape((-1,))[place])
    if problem.kind == "sparse":
        # In the target as it was given, the entries are on the class axis.
        at = list(np.unravel_index(place, tuple(target.shape)))
        at.insert(problem.axis, at.pop())
        place = int(np.ravel_multi_index(at, problem.target_shape))
    return labels.bad_label(problem, value, place)


_kernels: dict[tuple[Problem, int | None], Any] = {}


def kernel(problem: Problem, width: int | None = None) -> Any:
    """Return what the kernels prepare from a problem before they see an array.

    With a `width` they see so many of the problem's classes, and results of each row alone.
    """
    key = problem, width
    found = _kernels.get(key)
    if found is None:
        if len(_kernels) >= _MOST_KERNELS:
            _kernels.clear()
        found = _kernels[key] = _kernel(problem) if width is None else _of_part(problem, width)
    return found


def _of_part(problem: Problem, width: int) -> Any:
    """Prepare what sees a part of the classes; the labels have been checked."""
    shape = (*problem.shape[: problem.axis], width, *problem.shape[problem.axis + 1 :])
    own = problem.with_options(reduction="none")._replace(shape=shape, check_labels=False)
    return _kernel(own, problem.classes)


def _kernel(problem: Problem, all_classes: int | None = None) -> Any:
    return core().Call(
        shape=problem.shape,
        axis=problem.axis,
        logits_dtype=problem.logits_dtype_name,
        target_dtype=problem.target_dtype,
        kind=problem.kind,
        entries=problem.entries,
        teacher_scale=problem.teacher_scale,
        wide=dtypes.name_of(problem.arithmetic_dtype) == "float64",
        result_dtype=dtypes.name_of(problem.result_dtype),
        reduction=problem.options.reduction,
        ignored=labels.ignored_as_signed(problem) if problem.names_classes else None,
        check_labels=problem.check_labels,
        smoothing=problem.options.label_smoothing,
        z_loss=problem.options.z_loss,
        scale=transform.scale_of(problem),
        cap=problem.options.logit_softcap or 0.0,
        normalized=problem.normalized,
        all_classes=all_classes,
    )
