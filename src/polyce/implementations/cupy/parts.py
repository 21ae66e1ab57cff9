"""Rows whose classes lie in several parts, by the kernels: what `formula.parts` does, in one pass.

What is known of the rows lies in an array as `part_rows` says.
"""

from __future__ import annotations

from typing import Any

import cupy

from polyce.arrays import dtypes
from polyce.call.problem import Operands, Problem
from polyce.formula import parts
from polyce.formula.parts import Part, TeacherState, Whole
from polyce.formula.rowgradient import NO_STATS, StatsCotangents
from polyce.implementations import part_rows
from polyce.implementations.cupy import launch
from polyce.implementations.cupy.plan import PartKey


def read_teacher(problem: Problem, teacher: Any) -> TeacherState:
    """Read a part of a teacher's classes."""
    if not teacher.size:
        return parts.read_teacher(problem, teacher)
    name = dtypes.name_of(teacher.dtype)
    problem = problem._replace(logits_dtype=teacher.dtype, target_dtype=name)
    rows = part_rows.empty_teacher(problem, cupy.empty)
    # It stands in the logits' place too.
    operands = Operands(teacher, teacher, None, None, None, None)
    _launch_state(problem, operands, 0, None, rows)
    return part_rows.as_teacher(problem, rows)


def read(
    problem: Problem, operands: Operands, start: int, teacher: TeacherState | None = None
) -> Part:
    """Read a part of the classes; a teacher comes with what its whole rows have joined to."""
    if not operands.logits.size:
        return parts.read(problem, operands, start, teacher)
    plan = part_rows.plan(problem, operands)
    rows = part_rows.empty(problem, cupy.empty)
    _launch_state(problem, operands, start, teacher, rows)
    return part_rows.as_part(problem, plan, rows)


def gradient(
    problem: Problem,
    operands: Operands,
    start: int,
    whole: Whole,
    cotangent: Any,
    of_stats: StatsCotangents = NO_STATS,
    teacher: TeacherState | None = None,
) -> Any:
    """Compute a part's gradient, in the logits' dtype, for the cotangents of its rows."""
    logits = operands.logits
    grad = cupy.empty_like(logits)
    if not logits.size:
        return grad
    with problem.library.computing(operands.named()):
        rows = part_rows.of_whole(problem, whole, cupy.empty)
        passed = (cotangent, of_stats.lse, of_stats.entropy)
        of_losses, *others = (part_rows.by_row(problem, each, whole.state) for each in passed)
        of_lse, of_entropy = (
            None if each is None else cupy.ascontiguousarray(each) for each in others
        )
        operands = operands._replace(
            grad_output=of_losses, grad_lse=of_lse, grad_entropy=of_entropy
        )
        call = _described(problem, operands, start, of_stats.are_given, grad)
        known = (*_of_teacher(problem, teacher), rows, *call.cotangent)
        arguments = (
            call.logits,
            *call.targets,
            *known,
            call.grad,
            *call.entries[:2],
            *call.of_stats,
        )
        call.launch("gradient_of_part", (call.plan.blocks,), *arguments)
        if call.grad is not grad:
            grad[...] = call.grad
    return grad


def _launch_state(
    problem: Problem, operands: Operands, start: int, teacher: TeacherState | None, rows: Any
) -> None:
    """Fill `rows`."""
    operands = operands._replace(grad_output=None, grad_lse=None, grad_entropy=None)
    with problem.library.computing(operands.named()):
        call = _described(problem, operands, start)
        known = (*_of_teacher(problem, teacher), rows)
        arguments = (call.logits, *call.targets, *known, *call.entries[:2])
        call.launch("state_of_part", (call.plan.blocks,), *arguments)


def _described(
    problem: Problem, operands: Operands, start: int, valued: bool = False, grad: Any = None
) -> launch.KernelCall:
    """Lay out a part's call; each row's cotangent is that of its own loss."""
    width = operands.logits.shape[problem.axis]
    if start < 0 or start + width > problem.classes:
        raise ValueError(
            f"a part's classes must be some of all, got {width} from {start} on of "
            f"{problem.classes}; cut the logits where the classes end"
        )
    operands = operands._replace(normalizer=None)
    part = PartKey(start, width, valued)
    return launch.described(problem.with_options(reduction="none"), operands, grad, part)


def _of_teacher(problem: Problem, teacher: TeacherState | None) -> tuple[Any]:
    return (launch.NULL if teacher is None else part_rows.of_teacher(problem, teacher, cupy.empty),)
