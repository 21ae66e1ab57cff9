"""Rows whose classes lie in several parts, by the kernels: what `formula.parts` does, in one pass.

What is known of the rows lies in one array of float64, of each number those of all rows: the fields
of `RowState` in their order, the pivot, and the logit of a label that is not the pivot.
"""

from __future__ import annotations

from typing import Any

from polyce.arrays import dtypes
from polyce.arrays.library import expand
from polyce.call.problem import Operands, Problem
from polyce.formula import parts, rowstate, rowstats, targets
from polyce.formula.parts import Part, TeacherState, Whole
from polyce.formula.rowgradient import NO_STATS, StatsCotangents
from polyce.formula.rowstate import RowState
from polyce.implementations.native.run import ArrayAccess, kernel, readable

_PIVOT = len(RowState._fields)
_LABEL_LOGIT = _PIVOT + 1
_NUMBERS = _LABEL_LOGIT + 1


def read_teacher(own: ArrayAccess, problem: Problem, teacher: Any) -> TeacherState:
    """Read a part of a teacher's classes."""
    if not teacher.shape[problem.axis]:
        return parts.read_teacher(problem, teacher)
    teacher = own.in_order(teacher)
    name = dtypes.name_of(teacher.dtype)
    problem = problem._replace(logits_dtype=teacher.dtype, target_dtype=name)
    rows = own.empty((len(TeacherState._fields), *problem.row_shape), problem.row_dtype)
    # It stands in the logits' place too, which are not read.
    operands = Operands(teacher, teacher, None, None, None, None)
    _run(own, problem, operands, 0, None, rows)
    top, total = (expand(rows[number, ...], problem.axis) for number in range(len(rows)))
    return TeacherState(problem.library.cast(top, problem.arithmetic_dtype), total)


def read(
    own: ArrayAccess,
    problem: Problem,
    operands: Operands,
    start: int,
    teacher: TeacherState | None = None,
) -> Part:
    """Read a part of the classes; a teacher comes with what its whole rows have joined to."""
    if not operands.logits.shape[problem.axis]:
        return parts.read(problem, operands, start, teacher)
    library, leads = problem.library, targets.pivot_leads(problem)
    # Of every class there is nothing in it that the kernels do not read themselves.
    describe = targets.plan if problem.names_classes else targets.plan_rows
    plan = parts.of_rows(describe(problem, operands))
    operands = operands._replace(grad_output=None, grad_lse=None, grad_entropy=None)
    rows = own.empty((_NUMBERS, *problem.row_shape), problem.row_dtype)
    _run(own, problem, operands, start, teacher, rows)

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


def gradient(
    own: ArrayAccess,
    problem: Problem,
    operands: Operands,
    start: int,
    whole: Whole,
    cotangent: Any,
    of_stats: StatsCotangents = NO_STATS,
    teacher: TeacherState | None = None,
) -> Any:
    """Compute a part's gradient, in the logits' dtype, for the cotangents of its rows."""
    grad = own.empty_like(operands.logits)
    if not operands.logits.shape[problem.axis]:
        return grad
    state = whole.state
    rows = own.empty((_NUMBERS, *problem.row_shape), problem.row_dtype)
    for number, known in enumerate((*state, whole.pivot)):
        rows[number, ...] = 0.0 if known is None else _by_row(problem, known, state)
    operands = operands._replace(
        grad_output=_by_row(problem, cotangent, state),
        grad_lse=_by_row(problem, of_stats.lse, state),
        grad_entropy=_by_row(problem, of_stats.entropy, state),
    )
    _run(own, problem, operands, start, teacher, rows, grad)
    return grad


def _by_row(problem: Problem, values: Any, state: RowState) -> Any:
    """Return what the rows share or have each, of the rows' shape."""
    if values is None:
        return None
    if not getattr(values, "ndim", 0):
        return values
    rows = problem.xp.broadcast_to(values, state.rest_max.shape)
    return problem.xp.squeeze(rows, axis=problem.axis)


def _run(
    own: ArrayAccess,
    problem: Problem,
    operands: Operands,
    start: int,
    teacher: TeacherState | None,
    rows: Any,
    grad: Any = None,
) -> None:
    """Fill `rows`, or, from those, the gradient."""
    of_teacher = None
    if teacher is not None:
        of_teacher = own.empty((len(teacher), *problem.row_shape), problem.row_dtype)
        for number, known in enumerate(teacher):
            of_teacher[number, ...] = problem.xp.squeeze(known, axis=problem.axis)
    given = readable(own, problem.with_options(reduction="none"), operands)
    del given["normalizer"]
    kernel(problem, width=operands.logits.shape[problem.axis]).run_part(
        **given,
        start=start,
        teacher=of_teacher,
        rows=rows,
        entropy=problem.asks("entropy"),
        first=problem.asks("prediction", "correct"),
        squares=rowstate.needs_squares(problem),
        grad=grad,
    )
