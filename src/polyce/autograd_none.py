"""Libraries without derivatives: nothing to attach a gradient to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from polyce import reference
from polyce.problem import Operands, Problem
from polyce.registry import Implementation
from polyce.stats import RowStats
from polyce.targets import Plan


def check(operands: Operands) -> None:
    """Refuse arrays that wait for a gradient which polyce does not give: there are none."""


def detach(operands: Operands) -> Operands:
    """Cut the operands from any derivative: they have none."""
    return operands


def row_losses(
    implementation: Implementation, problem: Problem, plan: Plan, logits: Any
) -> tuple[Any, RowStats | None]:
    """Give the rows' losses and stats."""
    rows, _, stats = implementation.forward(problem, plan, logits)
    return rows, stats


def nll(problem: Problem, plan: Plan, log_probabilities: Any) -> Any:
    """Give the rows' losses for log-probabilities."""
    return reference.nll(problem, plan, log_probabilities)


def log_softmax(problem: Problem, logits: Any, compute: Callable[..., Any]) -> Any:
    """Give log(softmax(logits)) as `compute` does."""
    return compute(problem, logits)
