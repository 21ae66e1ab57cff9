"""What kernels know of rows whose classes lie in several parts, as they write it and read it.

It lies in one array, of each number those of all rows: the fields of `RowState` in their order, the
pivot, and the logit of a label that is not the pivot. Of a teacher's rows these are the fields of
`TeacherState`. All are in the row dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from polyce.arrays.library import expand
from polyce.call.problem import Operands, Problem
from polyce.formula import rowstate, rowstats, targets
from polyce.formula.parts import Part, TeacherState, Whole, of_rows
from polyce.formula.rowstate import RowState
from polyce.formula.targets import Plan

_PIVOT = len(RowState._fields)
_LABEL_LOGIT = _PIVOT + 1
_NUMBERS = _LABEL_LOGIT + 1

Empty = Callable[..., Any]
"""(shape, dtype) -> array"""


def empty(problem: Problem, make: Empty) -> Any:
    """Allocate what a kernel writes of each row of a part."""
    return make((_NUMBERS, *problem.row_shape), problem.row_dtype)


def empty_teacher(problem: Problem, make: Empty) -> Any:
    """Allocate what a kernel writes of each row of a part of a teacher's classes."""
    return make((len(TeacherState._fields), *problem.row_shape), problem.row_dtype)


def plan(problem: Problem, operands: Operands) -> Plan:
    """Read what the target means but for what kernels read themselves: all of every class."""
    read = targets.plan if problem.names_classes else targets.plan_rows
    return of_rows(read(problem, operands))


def as_part(problem: Problem, plan: Plan, rows: Any) -> Part:
    """Return what has been written of a part of the classes."""
    library, leads = problem.library, targets.pivot_leads(problem)

    def column(number: int) -> Any:
        return expand(rows[number, ...], problem.axis)

    def classes(number: int) -> Any:
        found = column(number)
        return library.cast(found, library.label_dtype(found))

    has_coefficients = leads or bool(problem.options.label_smoothing)
    asked = {
        "rest_coefficient": has_coefficients,
        "rest_excess": has_coefficients,
        "rest_entropy": problem.asks("entropy"),
        "rest_first": problem.asks("prediction", "correct"),
        "rest_squares": rowstate.needs_squares(problem),
    }
    state = RowState(
        *(
            column(number) if asked.get(name, True) else None
            for number, name in enumerate(RowState._fields)
        )
    )
    if state.rest_first is not None:
        state = state._replace(rest_first=classes(RowState._fields.index("rest_first")))
    label_logit = None
    if rowstats.needs_label_logit(problem):
        label_logit = column(_LABEL_LOGIT) if leads else state.pivot_logit
    return Part(state, classes(_PIVOT) if leads else plan.label, plan, label_logit)


def of_whole(problem: Problem, whole: Whole, make: Empty) -> Any:
    """Return what the parts of rows have joined to, as a kernel reads it."""
    rows = empty(problem, make)
    for number, known in enumerate((*whole.state, whole.pivot)):
        rows[number, ...] = 0.0 if known is None else by_row(problem, known, whole.state)
    return rows


def as_teacher(problem: Problem, rows: Any) -> TeacherState:
    """Return what has been written of a part of a teacher's classes."""
    top, total = (expand(rows[number, ...], problem.axis) for number in range(len(rows)))
    return TeacherState(problem.library.cast(top, problem.arithmetic_dtype), total)


def of_teacher(problem: Problem, teacher: TeacherState, make: Empty) -> Any:
    """Return what the parts of a teacher's rows have joined to, as a kernel reads it."""
    rows = empty_teacher(problem, make)
    for number, known in enumerate(teacher):
        rows[number, ...] = problem.xp.squeeze(known, axis=problem.axis)
    return rows


def by_row(problem: Problem, values: Any, state: RowState) -> Any:
    """Return what the rows share or have each, of the rows' shape; None and numbers as given."""
    if values is None:
        return None
    if not getattr(values, "ndim", 0):
        return values
    rows = problem.xp.broadcast_to(values, state.rest_max.shape)
    return problem.xp.squeeze(rows, axis=problem.axis)
