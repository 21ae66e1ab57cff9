"""Whole calls by an implementation that knows rows: plan, rows, reduction and stats; no graph."""

from __future__ import annotations

from typing import Any

from polyce import arrays, outputs, stats, targets
from polyce.problem import Operands, Problem
from polyce.registry import Implementation
from polyce.stats import Stats


def cross_entropy(
    implementation: Implementation, problem: Problem, operands: Operands
) -> tuple[Any, Stats | None]:
    """Give the loss and the stats."""
    with arrays.computing(problem.backend, operands.named()):
        plan = implementation.plan(problem, operands)
        rows, _, found = implementation.forward(problem, plan, operands.logits)
        loss = targets.reduce(problem, plan, rows)
        return loss, None if found is None else stats.finish(problem, plan, found)


def cross_entropy_with_grad(
    implementation: Implementation, problem: Problem, operands: Operands, out: Any
) -> tuple[Any, Any, Stats | None]:
    """Give the loss, the gradient, in `out` where that is given, and the stats."""
    with arrays.computing(problem.backend, operands.named()):
        plan = implementation.plan(problem, operands)
        cotangent = targets.cotangent(problem, plan, operands.grad_output)
        rows, grad, found = implementation.forward_backward(
            problem, plan, cotangent, operands.logits
        )
        loss = targets.reduce(problem, plan, rows)
        facts = None if found is None else stats.finish(problem, plan, found)
        return loss, grad if out is None else outputs.write(problem, grad, out), facts
