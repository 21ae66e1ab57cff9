"""reference: the formula in operations of the array API standard, on any library."""

from __future__ import annotations

from typing import Any

from polyce.call.problem import Operands, Problem
from polyce.formula import parts, rows, whole
from polyce.formula.stats import Stats
from polyce.graphs import rules
from polyce.implementations.contract import Implementation, OfParts


def cross_entropy(problem: Problem, operands: Operands) -> tuple[Any, Stats | None]:
    """Compute the loss, on the library's graph if it has one, and the stats."""
    if problem.inplace_backward:
        from polyce.graphs import torch_calls

        return torch_calls.cross_entropy(torch_calls.REFERENCE, problem, operands)
    own = rules.of(problem.backend)
    own.check(problem, operands)
    return whole.cross_entropy(problem, operands, own.row_losses)


PATH = Implementation(
    name="reference",
    cross_entropy=cross_entropy,
    cross_entropy_with_grad=whole.cross_entropy_with_grad,
    takes_grad_stats=True,
    of_parts=OfParts(parts.read, parts.gradient, parts.read_teacher, is_traceable=True),
    log_softmax=rows.log_softmax,
)
