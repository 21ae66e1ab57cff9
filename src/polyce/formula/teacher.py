"""The softmax of a teacher's logits, by their own maximum, from parts of each row or the whole."""

from __future__ import annotations

import math
from typing import Any

from polyce.call.problem import Problem


def state(problem: Problem, teacher: Any) -> tuple[Any, Any]:
    """Return the largest of a teacher's logits t, and the sum of exp(scale (t - largest))."""
    top = problem.library.class_max(teacher, problem.axis)
    top = problem.library.cast(top, problem.arithmetic_dtype)
    exponentials = _exponentials(problem, teacher, top)
    return top, problem.library.class_sum(exponentials, problem.axis, problem.row_dtype)


def merge(problem: Problem, one: Any, other: Any) -> tuple[Any, Any]:
    """Merge what `state` has returned for two parts of each row's classes."""
    xp, scale = problem.xp, problem.teacher_scale
    top = xp.maximum(one[0], other[0])
    # A part of nothing but -inf adds nothing to the other.
    carried = [
        xp.where((own == -math.inf) & (top > -math.inf), 0.0, total * xp.exp((own - top) * scale))
        for own, total in (one, other)
    ]
    return top, carried[0] + carried[1]


def softmax(problem: Problem, teacher: Any, whole: tuple[Any, Any]) -> Any:
    """Return the softmax of a teacher's logits, from the state of the whole row."""
    top, total = whole
    found = _exponentials(problem, teacher, top)
    total = problem.library.cast(total, problem.arithmetic_dtype)
    return problem.library.overwrite(problem.xp.divide, found, total)


def _exponentials(problem: Problem, teacher: Any, top: Any) -> Any:
    library = problem.library
    # Without a softmax this difference is nan somewhere, and the sum with it.
    found = library.cast(teacher, problem.arithmetic_dtype) - top
    if problem.teacher_scale != 1.0:
        found = library.overwrite(problem.xp.multiply, found, problem.teacher_scale)
    return library.overwrite(problem.xp.exp, found)
