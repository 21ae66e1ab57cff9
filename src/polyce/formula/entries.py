"""Coefficients at some classes of each row, as those of a sparse target, beside every class's own.

They are added to a state that was read without them: nothing of the logits' shape is made of them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from polyce.arrays.library import columns
from polyce.call.problem import Problem
from polyce.formula import transform
from polyce.formula.rowstate import RowState


class Entries(NamedTuple):
    """Coefficients at some classes of each row, beside those that every class has.

    The arrays have the logits' shape with any number of entries along the class axis. Those of one
    class add up.
    """

    classes: Any
    coefficients: Any
    """In the arithmetic dtype."""


def together(problem: Problem, classes: Any, values: Any) -> Any:
    """Add up the values of each entry's class: at every entry, those of all entries equal to it."""
    found = problem.xp.zeros_like(values)
    pairs = zip(columns(classes, problem.axis), columns(values, problem.axis), strict=True)
    for own, value in pairs:
        found = found + problem.xp.where(classes == own, value, 0.0)
    return found


def coefficient_at(problem: Problem, entries: Entries, pivot: Any) -> Any:
    """Compute what the entries add to r_k of each row, for a pivot of class `pivot`."""
    at_pivot = problem.xp.where(entries.classes == pivot, entries.coefficients, 0.0)
    return problem.library.class_sum(at_pivot, axis=problem.axis, dtype=problem.row_dtype)


def with_entries(
    problem: Problem, state: RowState, entries: Entries, pivot: Any, logits: Any
) -> RowState:
    """Add to the state of a part of each row what entries at the other classes of it add.

    `logits` are those at the entries' classes, in the arithmetic dtype.
    """
    xp, library, axis, row_dtype = problem.xp, problem.library, problem.axis, problem.row_dtype
    others = xp.where(entries.classes == pivot, 0.0, entries.coefficients)
    top = library.cast(state.rest_max, problem.arithmetic_dtype)
    top = xp.where(top == -math.inf, 0.0, top)
    gaps = transform.difference(problem, logits, top)
    # As in `rowstate.from_logits`. What entries of one class add to infinity has one sign: their
    # sum's.
    by_class = xp.where(xp.isinf(gaps), together(problem, entries.classes, others), others)
    skipped = (by_class == 0.0) & xp.isinf(gaps)
    terms = by_class * xp.where(skipped, 0.0, -gaps)
    excess = library.class_sum(terms, axis=axis, dtype=row_dtype)
    coefficient = library.class_sum(others, axis=axis, dtype=row_dtype)
    if state.rest_coefficient is not None:
        excess, coefficient = excess + state.rest_excess, coefficient + state.rest_coefficient
    return state._replace(rest_coefficient=coefficient, rest_excess=excess)
