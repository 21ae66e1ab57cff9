"""Targets that are more than one array: some classes of each row, or a teacher."""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

from polyce.arrays import dtypes
from polyce.arrays.library import Library
from polyce.call import checks
from polyce.call.options import LARGEST, SMALLEST


class SparseTarget(NamedTuple):
    """Probabilities of K classes of each row, for the `target` of a loss; all others have 0.

    It means the same as an array of probabilities, but no such array is made: the mean divides by
    the number of rows, and `weight`, `label_smoothing` and `z_loss` work in the same way. Nothing
    checks that the probabilities of a row sum to 1. If they are the K largest ones of a teacher,
    either divide them by their sum, or leave the rest to no class.

    Parameters
    ----------
    index : array
        Classes in 0 to C - 1, of any integer dtype and of input's shape with K in the place of C.
        If a class is named twice, its probabilities add up. Entries that equal ignore_index are
        left out, whatever their probability. A row with only such entries has the loss of a row
        without a target, which is 0 without label_smoothing and z_loss, but still counts in the
        mean.
    probability : array
        The probability of each class, of any floating dtype and of index's shape.

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

    The softmax of ``scale`` times the logits is computed within the loss; the compiled path makes
    no array of it. The loss is the cross-entropy of student and teacher; the divergence is the loss
    minus the teacher's entropy, ``entropy(logits, logit_scale=scale)``. Teachers have no gradient;
    to ask for one is an error. A row whose teacher has no softmax (nan, +inf or nothing but -inf)
    is nan.

    Parameters
    ----------
    logits : array
        Of input's shape, of any floating dtype.
    scale : float, default 1.0
        A number from 1e-15 to 1e15 that multiplies the teacher's logits: 1/T for a temperature T.

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


class TeacherHead(NamedTuple):
    """The linear head of a teacher, for the `target` of `linear_cross_entropy`.

    It means the same as `TeacherLogits` of ``input @ linear_weight.T + linear_bias``. These logits
    are computed for some rows at a time, beside those of the student, and never held whole. Rows
    and classes are the student's; the teacher may have any number of features, and a dtype of its
    own. Teachers have no gradient; to ask for one is an error.

    Parameters
    ----------
    input : array, shape (F,) or (..., F)
        Hidden states of the teacher, one for each row of the student, of any floating dtype.
    linear_weight : array, shape (C, F)
        Weight of the teacher's head, of the dtype of its hidden states.
    linear_bias : array, shape (C,), optional
        Bias of the teacher's head, of the same dtype.
    scale : float, default 1.0
        A number from 1e-15 to 1e15 that multiplies the logits: 1/T for a temperature T.

    Examples
    --------
    >>> import numpy as np
    >>> import polyce
    >>> hidden, head = np.array([[1.0, 2.0]]), np.array([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> states, weight = np.array([[1.0]]), np.array([[3.0], [1.0], [-2.0]])
    >>> target = polyce.TeacherHead(states, weight, scale=0.5)
    >>> print(round(polyce.linear_cross_entropy(hidden, head, target), 6))
    1.494833
    >>> target = polyce.TeacherLogits(states @ weight.T, scale=0.5)
    >>> print(round(polyce.cross_entropy(hidden @ head.T, target), 6))
    1.494833
    """

    input: Any
    linear_weight: Any
    linear_bias: Any = None
    scale: float = 1.0


Teacher = (TeacherLogits, TeacherHead)


def arrays(target: Any) -> dict[str, Any]:
    """Return a target's arrays by the caller's names for them; an absent bias is None."""
    if isinstance(target, (SparseTarget, TeacherLogits, TeacherHead)):
        given = target._asdict()
        return {f"target.{name}": given[name] for name in given if name != "scale"}
    return {"target": target}


def check_given(input: Any, target: Any, *, is_head: bool) -> None:
    """Refuse None in the place of an array."""
    given = {"input": input, **arrays(target)}
    given.pop("target.linear_bias", None)
    for missing in [name for name, array in given.items() if array is None]:
        what = "the hidden states" if is_head else "the logits"
        raise TypeError(f"{missing} must be an array, got None; pass {what} and their target")


def more_operands(target: Any) -> tuple[str, ...]:
    """Return the names of the operands that a target's arrays after the first become."""
    if isinstance(target, SparseTarget):
        return ("target_probability",)
    return ("teacher_weight", "teacher_bias") if isinstance(target, TeacherHead) else ()


def float_dtype(library: Library, target: Any, arrays: tuple[Any, ...]) -> Any:
    """Return the dtype of a target's last array, or that of a teacher's head as it multiplies."""
    if isinstance(target, TeacherHead):
        return checks.product_dtype(library, *arrays, of="target.")
    return arrays[-1].dtype


def teacher_scale(target: Any) -> float:
    """Return what multiplies a teacher's logits, 1 without a teacher."""
    if not isinstance(target, Teacher):
        return 1.0
    scale = target.scale
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        name = type(target).__name__
        whose = "its logits" if name == "TeacherLogits" else "its input and linear_bias"
        raise TypeError(
            f"target.scale must be a real number, got {type(scale).__qualname__}; make the "
            f"{name} inside of a function that is traced, and multiply {whose} by a scale "
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

    With `probabilities` being False it must be class indices.
    """
    row_shape = shape[:axis] + shape[axis + 1 :]
    if not isinstance(target, (SparseTarget, *Teacher)):
        return checks.target_kind(shape, row_shape, logits, arrays[0], probabilities, not is_head)
    if not probabilities:
        other = "cross_entropy with the logits"
        if isinstance(target, TeacherHead):
            other = "linear_cross_entropy with the hidden states"
        raise TypeError(
            f"the target of nll_loss holds class indices, got a {type(target).__name__}; call "
            f"{other}"
        )
    if isinstance(target, TeacherHead):
        _check_teacher_head(arrays, shape, is_head=is_head)
        return "teacher"
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


def _check_teacher_head(arrays: tuple[Any, ...], shape: tuple[int, ...], *, is_head: bool) -> None:
    if not is_head:
        raise TypeError(
            "the target of a loss of logits must hold the teacher's logits, got a TeacherHead; "
            "call linear_cross_entropy, or pass TeacherLogits of the product"
        )
    found = checks.product_shape(*arrays, of="target.")
    if found != shape:
        raise ValueError(
            f"the target must be a teacher of the same rows and classes, whose logits have shape "
            f"{shape}, got target.input {checks.show(arrays[0])} and target.linear_weight "
            f"{checks.show(arrays[1])}; pass a hidden state for each row, and a weight for each "
            "class"
        )
