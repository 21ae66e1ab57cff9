"""Whole calls by the rows' formula: target, rows, reduction and stats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from polyce.call import outputs
from polyce.call.problem import Operands, Problem
from polyce.formula import rows, stats, targets
from polyce.formula.stats import Stats


def cross_entropy(
    problem: Problem, operands: Operands, row_losses: Callable[..., Any] = rows.forward
) -> tuple[Any, Stats | None]:
    """Compute the loss and the stats; `row_losses` may put the rows' losses on a graph."""
    with problem.library.computing(operands.named()):
        plan = targets.plan(problem, operands)
        losses, found = row_losses(problem, plan, operands.logits)
        loss = targets.reduce(problem, plan, losses)
        return loss, None if found is None else stats.finish(problem, plan, found)


def cross_entropy_with_grad(
    problem: Problem, operands: Operands, out: Any
) -> tuple[Any, Any, Stats | None]:
    """Compute the loss, the gradient, in `out` if that is given, and the stats; no graph."""
    with problem.library.computing(operands.named()):
        plan = targets.plan(problem, operands)
        cotangent = targets.cotangent(problem, plan, operands.grad_output)
        of_stats = rows.stats_cotangents(problem, operands)
        losses, grad, found = rows.forward_backward(
            problem, plan, cotangent, operands.logits, of_stats
        )
        loss = targets.reduce(problem, plan, losses)
        if out is not None:
            grad = outputs.write(problem, grad, out)
        return loss, grad, None if found is None else stats.finish(problem, plan, found)
