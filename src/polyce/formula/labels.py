"""Class indices: which rows count, which labels are out of range, and the error about those."""

from __future__ import annotations

from typing import Any

import numpy as np

from polyce.arrays import dtypes, numpy
from polyce.arrays.library import expand
from polyce.call.problem import Problem


def read(problem: Problem, target: Any, logits: Any) -> tuple[Any, Any, Any]:
    """Return each row's label, always in range, which rows count, and which have a bad label.

    None means that all rows count, or that no label is bad. Where labels are checked, a bad one
    raises IndexError. The results keep the class axis, of length 1. Of a sparse target they are
    about its K classes of each row, and have K entries along the class axis.
    """
    if problem.check_labels:
        target = problem.library.to_look_at(target)
    on_host = problem.library is not numpy.LIBRARY and isinstance(target, np.ndarray)
    library = numpy.LIBRARY if on_host else problem.library
    xp = library.xp
    if problem.kind != "sparse":
        if tuple(target.shape) != problem.row_shape:
            target = xp.reshape(target, problem.row_shape)
        target = expand(target, problem.axis)
    lowest, highest = dtypes.INTEGERS[problem.target_dtype]
    ignore_index = ignored_label(problem)
    if problem.target_dtype in library.stored_only:
        target = library.cast(target, xp.int64)
        lowest = -(2**63)
        ignore_index = ignored_as_signed(problem)

    ignored = None
    if ignore_index is not None:
        ignored = target == library.integer(ignore_index, target)
    invalid = _out_of_range(target, lowest, highest, problem.classes)
    if problem.check_labels:
        odd = _either(ignored, invalid)
        if odd is None or not library.is_any(odd):
            # In most calls every row counts; knowing it makes what follows cheaper.
            ignored = invalid = None
    if ignored is not None and invalid is not None:
        invalid = invalid & ~ignored
    if problem.check_labels and invalid is not None:
        if library.is_any(invalid):
            first = int(xp.argmax(xp.astype(xp.reshape(invalid, (-1,)), xp.uint8)))
            raise bad_label(problem, int(xp.reshape(target, (-1,))[first]), first)
        invalid = None

    unusable = _either(ignored, invalid)
    if unusable is not None:
        target = xp.where(unusable, 0, target)
    label = library.cast(target, problem.library.label_dtype(target))
    counted = None if ignored is None else ~ignored

    def beside_logits(array: Any) -> Any:
        if array is None:
            return None
        return problem.library.align(problem.xp.asarray(array) if on_host else array, logits)

    return beside_logits(label), beside_logits(counted), beside_logits(invalid)


def ignored_label(problem: Problem) -> int | None:
    """Return the label that marks ignored rows; None if the target's dtype cannot hold it.

    Not by a cast to that dtype, which could turn it into another label.
    """
    lowest, highest = dtypes.INTEGERS[problem.target_dtype]
    ignored = problem.options.ignore_index
    return ignored if lowest <= ignored <= highest else None


def ignored_as_signed(problem: Problem) -> int | None:
    """Return that label as it is when labels are read as int64.

    uint64 labels from 2^63 on become negative, as no other label is, and so does this one.
    """
    ignored = ignored_label(problem)
    return ignored - 2**64 if ignored is not None and ignored >= 2**63 else ignored


def _out_of_range(target: Any, lowest: int, highest: int, classes: int) -> Any:
    """Mark labels outside 0, ..., C - 1; return None if the dtype holds no such value."""
    below = target < 0 if lowest < 0 else None
    above = target >= classes if classes <= highest else None
    return _either(below, above)


def _either(one: Any, other: Any) -> Any:
    """Combine two masks; None marks nothing."""
    if one is None or other is None:
        return other if one is None else one
    return one | other


def bad_label(problem: Problem, value: int, place: int) -> IndexError:
    """Return the error about a label that is out of range, its place counted in C order."""
    position = tuple(int(i) for i in np.unravel_index(place, problem.target_shape))
    if problem.target_dtype == "uint64":
        value %= 2**64
    where = f" at position {position}" if position else ""
    if problem.classes == 0:
        return IndexError(
            f"without classes every label must be ignored, got {value}{where}; "
            "pass logits with at least one class"
        )
    out = "entries" if problem.kind == "sparse" else "rows"
    if problem.classes == 1 and problem.label_name == "labels":
        return IndexError(
            f"with one column of logits every label is 0, got {value}{where}; for a binary loss "
            "pass two columns, one for each class, such as 0 and the logit of class 1"
        )
    return IndexError(
        f"{problem.label_name} must lie in 0 to {problem.classes - 1} ({problem.classes} classes), "
        f"got {value}{where}; give {out} to leave out the "
        f"{problem.label_name.removesuffix('s')} ignore_index"
    )
