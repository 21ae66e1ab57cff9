"""Rows whose classes lie in several parts, by the kernels: what `formula.parts` does, in one pass.

What is known of the rows lies in an array as `part_rows` says.
"""

from __future__ import annotations

from typing import Any

from polyce.arrays import dtypes
from polyce.call.problem import Operands, Problem
from polyce.formula import parts, rowstate
from polyce.formula.parts import Part, TeacherState, Whole
from polyce.formula.rowgradient import NO_STATS, StatsCotangents
from polyce.implementations import part_rows
from polyce.implementations.native.run import ArrayAccess, kernel, readable


def read_teacher(own: ArrayAccess, problem: Problem, teacher: Any) -> TeacherState:
    """Read a part of a teacher's classes."""
    if not teacher.shape[problem.axis]:
        return parts.read_teacher(problem, teacher)
    teacher = own.in_order(teacher)
    name = dtypes.name_of(teacher.dtype)
    problem = problem._replace(logits_dtype=teacher.dtype, target_dtype=name)
    rows = part_rows.empty_teacher(problem, own.empty)
    # It stands in the logits' place too, which are not read.
    operands = Operands(teacher, teacher, None, None, None, None)
    _run(own, problem, operands, 0, None, rows)
    return part_rows.as_teacher(problem, rows)


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
    plan = part_rows.plan(problem, operands)
    operands = operands._replace(grad_output=None, grad_lse=None, grad_entropy=None)
    rows = part_rows.empty(problem, own.empty)
    _run(own, problem, operands, start, teacher, rows)
    return part_rows.as_part(problem, plan, rows)


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
    rows = part_rows.of_whole(problem, whole, own.empty)
    passed = (cotangent, of_stats.lse, of_stats.entropy)
    of_losses, of_lse, of_entropy = (part_rows.by_row(problem, a, whole.state) for a in passed)
    operands = operands._replace(grad_output=of_losses, grad_lse=of_lse, grad_entropy=of_entropy)
    _run(own, problem, operands, start, teacher, rows, grad)
    return grad


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
    given = readable(own, problem.with_options(reduction="none"), operands)
    del given["normalizer"]
    kernel(problem, width=operands.logits.shape[problem.axis]).run_part(
        **given,
        start=start,
        teacher=None if teacher is None else part_rows.of_teacher(problem, teacher, own.empty),
        rows=rows,
        entropy=problem.asks("entropy"),
        first=problem.asks("prediction", "correct"),
        squares=rowstate.needs_squares(problem),
        grad=grad,
    )
