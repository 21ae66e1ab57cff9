"""The index of log-probabilities: one class of each row, or K of them along the class axis."""

from __future__ import annotations

from typing import Any

from polyce.arrays import dtypes, find
from polyce.arrays.library import Library
from polyce.call import checks
from polyce.call.options import Options
from polyce.call.problem import Problem, describe_logits


def describe_index(input: Any, index: Any, options: Options) -> tuple[Problem, Any, Any]:
    """Check logits and index; return the logits' problem, the logits and the index.

    The problem is that of a function of logits alone, but says whether the index is checked.
    """
    problem, logits = describe_logits(input, options)
    library, own, given = _integers(logits, index)
    if tuple(own.shape) != problem.row_shape and not has_many(problem, own):
        some = [*map(str, problem.shape)]
        some[problem.axis] = "K"
        raise ValueError(
            f"index must have the shape of the rows {problem.row_shape}, or for K classes of each "
            f"row {_shown(some)}, got {given} for input {problem.shape}; reshape it, or pass axis= "
            "if the classes are on another axis"
        )
    problem = problem._replace(
        target_dtype=dtypes.dtype_name(own),
        check_labels=checks.looks_at_labels("index", index, library, problem.options.validate),
        label_name="index",
    )
    return problem, logits, own


def check_index_of_head(input: Any, index: Any, validate: bool | None) -> None:
    """Refuse an index that is not one class of each row of a linear head."""
    if input is None:
        raise TypeError("input must be an array, got None; pass the hidden states")
    library, own, given = _integers(input, index)
    rows = tuple(input.shape[:-1])
    if tuple(own.shape) != rows:
        raise ValueError(
            f"index must have one class of each row, of shape {rows}, got {given} for input "
            f"{tuple(input.shape)}; reshape it, or call linear_log_prob once for each of several "
            "classes"
        )
    checks.looks_at_labels("index", index, library, validate)


def _integers(input: Any, index: Any) -> tuple[Library, Any, str]:
    """Return the library of input and index, the index as its own, and what was given in words."""
    if index is None:
        raise TypeError("index must be an array, got None; pass the classes to choose")
    library, arrays = find.of(input=input, index=index)
    if library.device(arrays[0]) is not None:
        checks.devices(library, dict(zip(("input", "index"), arrays, strict=True)))
    own = arrays[1]
    given = f"{dtypes.dtype_name(own)} {tuple(own.shape)}"
    if not dtypes.holds_integers(own):
        raise TypeError(
            f"index must hold classes in an integer dtype, got {given}; cast it to int64"
        )
    return library, own, given


def _shown(shape: list[str]) -> str:
    return f"({', '.join(shape)}{',' * (len(shape) == 1)})"


def has_many(problem: Problem, index: Any) -> bool:
    """Tell whether an index holds K classes of each row, on the class axis."""
    shape, axis = tuple(index.shape), problem.axis
    return len(shape) == len(problem.shape) and shape[:axis] + shape[axis + 1 :] == (
        problem.row_shape
    )


def of_entries(problem: Problem, index: Any) -> Problem:
    """Return a problem in which each entry of the index is a row."""
    shape = tuple(index.shape)
    return problem._replace(shape=(*shape, problem.classes), axis=len(shape), row_shape=shape)
