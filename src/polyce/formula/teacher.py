"""The softmax of a teacher's logits, by their own maximum, from parts of each row or the whole."""

from __future__ import annotations

import math
from typing import Any

from polyce.call.problem import Problem
from polyce.formula import transform

LARGEST = 800.0
"""exp(-800) is 0 in every dtype."""


def state(problem: Problem, teacher: Any) -> tuple[Any, Any]:
    """Return the largest of a teacher's logits t, and the sum of exp(scale (t - largest))."""
    top = problem.library.class_max(teacher, problem.axis)
    top = problem.library.cast(top, problem.arithmetic_dtype)
    exponentials = _exponentials(problem, teacher, top)
    return top, problem.library.class_sum(exponentials, problem.axis, problem.row_dtype)


def merge(problem: Problem, one: Any, other: Any) -> tuple[Any, Any]:
    """Merge what `state` has returned for two parts of each row's classes."""
    xp = problem.xp
    top = xp.maximum(one[0], other[0])

    def carried(own: Any, total: Any) -> Any:
        # A part of nothing but -inf adds nothing to the other.
        nothing = (own == -math.inf) & (top > -math.inf)
        return xp.where(nothing, 0.0, total * _exponentials(problem, own, top))

    return top, carried(*one) + carried(*other)


def softmax(problem: Problem, teacher: Any, whole: tuple[Any, Any]) -> Any:
    """Return the softmax of a teacher's logits, from the state of the whole row."""
    top, total = whole
    found = _exponentials(problem, teacher, top)
    total = problem.library.cast(total, problem.arithmetic_dtype)
    return problem.library.overwrite(problem.xp.divide, found, total)


def _exponentials(problem: Problem, teacher: Any, top: Any) -> Any:
    """Compute exp(scale (t - top)); what rounding takes from the exponent is multiplied back.

    Half a unit in the last place of an exponent of 80 is 64 units of the result.
    """
    xp, library, scale = problem.xp, problem.library, problem.teacher_scale
    # Numbers of each row, also the constants: XLA would store an array of each that is used twice.
    nothing = top - top
    most = nothing + LARGEST / scale
    logits = library.cast(teacher, problem.arithmetic_dtype)
    # What is beyond has no exponential, and is finite so. A share of a large `top` keeps it there.
    # Without a softmax the difference is nan somewhere.
    logits = xp.maximum(logits, top - (xp.abs(top) * 2.0**-16 + most))
    gap = logits - top
    error = transform.difference_rounding(logits, top, gap)
    if scale != 1.0:
        parts = transform.Factor.of(scale, problem.arithmetic_dtype)
        factor = transform.Factor(*(nothing + part for part in parts))
        lost = transform.product_rounding(xp.maximum(gap, -most), factor)
        # Of large logits it may be infinite where there is no exponential.
        error = xp.minimum(xp.maximum(error * factor.number, nothing - 1.0), nothing + 1.0) + lost
        gap = library.overwrite(xp.multiply, gap, factor.number)
    found = library.overwrite(xp.exp, gap)
    # Not found + found·error, of which XLA would store what is found.
    found = library.overwrite(xp.multiply, found, 1.0 + error)
    if library.is_exact:  # where exp(-800) is no 0
        found = xp.where((teacher == -math.inf) & (top > -math.inf), 0.0, found)
    return found
