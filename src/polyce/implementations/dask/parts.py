"""What dask's tasks run where the classes of a row lie in several blocks, by `formula.parts`.

As in `blocks`, every function is at module level and silences NumPy's warnings itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from polyce.call.problem import Operands, Problem
from polyce.formula import parts, rows
from polyce.formula.parts import Part, TeacherState, Whole
from polyce.implementations.contract import OfParts
from polyce.implementations.dask.blocks import of_chunk, with_dtypes

Select = Callable[[Problem], OfParts]


def read_teacher(select: Select, problem: Problem, teacher: Any) -> TeacherState:
    """Read a block with some of a teacher's classes, as `read` does."""
    problem = of_chunk(problem, teacher, _whole_shape(problem, teacher))
    with problem.library.quiet():
        return select(problem).read_teacher(problem, teacher)


def join_teacher(problem: Problem, found: list[TeacherState]) -> TeacherState:
    """Join the blocks of each of a teacher's rows."""
    problem = of_chunk(problem, found[0].top, found[0].top.shape)
    with problem.library.quiet():
        return parts.join_teacher(problem, found)


def read(select: Select, problem: Problem, *inputs: Any) -> Part:
    """Read a block with some of the classes, by the path that `select` chooses for its arrays.

    `inputs` are those of `_open`, here and below.
    """
    problem, operands, teacher, start = _open(problem, *inputs)
    with problem.library.quiet():
        return select(problem).read(problem, operands, start, teacher)


def join(problem: Problem, found: list[Part]) -> Whole:
    """Join the blocks of each row, in the order of the classes, and compute the losses."""
    top = found[0].state.rest_max
    problem = of_chunk(problem, top, top.shape)
    with problem.library.quiet():
        return parts.join(problem, found)


def rank(problem: Problem, *inputs_and_whole: Any) -> Any:
    """Count the classes of a block whose logit is larger than the label's."""
    *inputs, whole = inputs_and_whole
    problem, operands, _, _ = _open(problem, *inputs)
    with problem.library.quiet():
        return parts.rank(problem, operands, whole.label_logit)


def brier(problem: Problem, *inputs_and_whole: Any) -> Any:
    """Compute what a block with some of the classes adds to the Brier score of probabilities."""
    *inputs, whole = inputs_and_whole
    problem, operands, _, start = _open(problem, *inputs)
    with problem.library.quiet():
        return parts.brier(problem, operands, start, whole)


def gradient(select: Select, problem: Problem, *inputs_and_more: Any) -> Any:
    """Compute the gradient of a block with some of the classes, for the cotangent of its rows."""
    *inputs, cotangent, grad_lse, grad_entropy, whole = inputs_and_more
    dtype = problem.logits_dtype
    problem, operands, teacher, start = _open(problem, *inputs)
    operands = operands._replace(grad_lse=grad_lse, grad_entropy=grad_entropy)
    with problem.library.quiet():
        of_stats = rows.stats_cotangents(problem, operands)
        of_parts = select(problem)
        grad = of_parts.gradient(problem, operands, start, whole, cotangent, of_stats, teacher)
        return problem.library.cast(grad, dtype)


def _open(
    problem: Problem,
    logits: Any,
    target: Any,
    weight: Any,
    sample_weight: Any,
    probability: Any,
    teacher: TeacherState | None,
    first_class: Any,
) -> tuple[Problem, Operands, TeacherState | None, int]:
    """Return a block's problem, its operands, what its teacher's rows have joined to, its start."""
    problem = of_chunk(problem, logits, _whole_shape(problem, logits))
    problem, logits = with_dtypes(problem, logits, target, probability)
    operands = Operands(logits, target, weight, sample_weight, None, None)
    operands = operands._replace(target_probability=probability)
    return problem, operands, teacher, int(first_class[0])


def _whole_shape(problem: Problem, part: Any) -> tuple[int, ...]:
    shape = list(part.shape)
    shape[problem.axis] = problem.classes
    return tuple(shape)
