"""Targets that are more than one array: some classes of each row, or the logits of a teacher."""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

from polyce.arrays import dtypes
from polyce.call import checks
from polyce.call.options import LARGEST, SMALLEST


class SparseTarget(NamedTuple):
    """Probabilities of K classes of each row, for the `target` of a loss; all others have 0.

    What an array of probabilities means this means too, without such an array being made: the mean
    divides by the number of rows, and `weight`, `label_smoothing` and `z_loss` act alike. Nothing
    checks that the probabilities of a row sum to 1: where they are the K largest of a teacher's,
    either divide them by their sum, or leave the rest to no class.

    Parameters
    ----------
    index : array
        Classes, in 0 to C - 1, of any integer dtype: input's shape with K in the place of C. Where
        a class is named twice its probabilities add up. Entries that equal ignore_index take no
        part, whatever their probability; a row of nothing else has the loss of a row without a
        target, which is 0 without label_smoothing and z_loss, and counts in the mean all the same.
    probability : array
        The probability of each, of any floating dtype and of index's shape.

    Examples
    --------
    >>> import numpy as np
    >>> import polyce
    >>> logits = np.array([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]])
    >>> target = polyce.SparseTarget(np.array([[0, 1], [2, 1]]), np.array([[0.9, 0.1], [0.5, 0.5]]))
    >>> print(polyce.cross_entropy(logits, target, reduction="none").round(6))
    [0.369846 1.402008]
    """

    index: Any
    probability: Any


class TeacherLogits(NamedTuple):
    """The logits of a teacher, for the `target` of a loss: the target is their softmax.

    It is computed within the loss, from ``scale`` times the logits; the compiled path makes no
    array of it. The loss is the cross-entropy of student and teacher; the divergence is that less
    the teacher's entropy, ``entropy(logits, logit_scale=scale)``. Teachers have no gradient: an
    error if one is asked for. A row whose teacher has no softmax (nan, +inf or nothing but -inf) is
    nan.

    Parameters
    ----------
    logits : array
        Of input's shape, of any floating dtype.
    scale : float, default 1.0
        A number from 1e-15 to 1e15 that multiplies them: 1/T for a temperature T.

    Examples
    --------
    >>> import numpy as np
    >>> import polyce
    >>> student, teacher = np.array([[2.0, 0.0, -1.0]]), np.array([[3.0, 1.0, -2.0]])
    >>> target = polyce.TeacherLogits(teacher, scale=0.5)
    >>> print(round(polyce.cross_entropy(student, target), 6))
    0.847114
    """

    logits: Any
    scale: float = 1.0


def arrays(target: Any) -> dict[str, Any]:
    """Return a target's arrays by the caller's names for them."""
    if isinstance(target, SparseTarget):
        return {"target.index": target.index, "target.probability": target.probability}
    if isinstance(target, TeacherLogits):
        return {"target.logits": target.logits}
    return {"target": target}


def teacher_scale(target: Any) -> float:
    """Return what multiplies a teacher's logits, 1 without a teacher."""
    if not isinstance(target, TeacherLogits):
        return 1.0
    scale = target.scale
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(
            f"target.scale must be a real number, got {type(scale).__qualname__}; make the "
            "TeacherLogits inside of a function that is traced, and multiply its logits by a scale "
            "that is an array before the call"
        )
    if not SMALLEST <= scale <= LARGEST:
        raise ValueError(
            f"target.scale must lie between 1e-15 and 1e15, got {scale}; 1 leaves the teacher's "
            "logits as they are"
        )
    return float(scale)


def kind_of(
    target: Any,
    arrays: tuple[Any, ...],
    shape: tuple[int, ...],
    axis: int,
    logits: Any,
    *,
    probabilities: bool,
    is_head: bool,
) -> str:
    """Decide what a target holds, and check the shapes and dtypes of its arrays.

    With `probabilities` being False it must be class indices; a head takes those and an array of
    probabilities.
    """
    row_shape = shape[:axis] + shape[axis + 1 :]
    if not isinstance(target, (SparseTarget, TeacherLogits)):
        return checks.target_kind(shape, row_shape, logits, arrays[0], probabilities, not is_head)
    if is_head or not probabilities:
        taken = "class indices or an array of probabilities" if probabilities else "class indices"
        of = "a linear head" if is_head else "nll_loss"
        raise TypeError(
            f"the target of {of} holds {taken}, got a {type(target).__name__}; pass the logits to "
            "cross_entropy instead"
        )
    if isinstance(target, SparseTarget):
        _check_sparse(arrays[0], arrays[1], shape, axis)
        return "sparse"
    _check_teacher(arrays[0], shape)
    return "teacher"


def _check_sparse(index: Any, probability: Any, shape: tuple[int, ...], axis: int) -> None:
    if not dtypes.holds_integers(index):
        raise TypeError(
            f"target.index must hold classes in an integer dtype, got {checks.show(index)}; cast "
            "it to int64"
        )
    given = tuple(index.shape)
    if len(given) != len(shape) or given[:axis] + given[axis + 1 :] != (
        shape[:axis] + shape[axis + 1 :]
    ):
        some = ", ".join("K" if i == axis else str(size) for i, size in enumerate(shape))
        raise ValueError(
            f"target.index must have input's shape with K in the place of the {shape[axis]} "
            f"classes, ({some}{',' * (len(shape) == 1)}), got {checks.show(index)}; reshape it"
        )
    if dtypes.dtype_name(probability) not in dtypes.FLOATS:
        raise TypeError(
            "target.probability must be real floating point "
            f"({', '.join(dtypes.FLOATS)}), got {checks.show(probability)}; convert it first"
        )
    if tuple(probability.shape) != given:
        raise ValueError(
            f"target.probability must have the shape of target.index, {given}, got "
            f"{tuple(probability.shape)}; pass one probability for each class"
        )


def _check_teacher(teacher: Any, shape: tuple[int, ...]) -> None:
    if dtypes.dtype_name(teacher) not in dtypes.FLOATS:
        raise TypeError(
            f"target.logits must be real floating point ({', '.join(dtypes.FLOATS)}), got "
            f"{checks.show(teacher)}; convert it first"
        )
    if tuple(teacher.shape) != shape:
        raise ValueError(
            f"target.logits must have input's shape {shape}, got {tuple(teacher.shape)}; pass the "
            "teacher's logits for the same rows and classes"
        )
