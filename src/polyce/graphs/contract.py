"""What derivative rules are: the functions that every library's rules consist of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from polyce.call.problem import Operands, Problem
from polyce.formula import rows
from polyce.formula.stats import RowStats

ArraysT = TypeVar("ArraysT", bound=tuple[Any, ...])


def _check(problem: Problem, operands: Operands) -> None:
    pass


def _detach(given: ArraysT) -> ArraysT:
    return given


def _log_softmax(problem: Problem, logits: Any, compute: Callable[..., Any]) -> Any:
    return compute(problem, logits)


class Rules(NamedTuple):
    """How a library differentiates; the defaults are for one that does not."""

    check: Callable[[Problem, Operands], None] = _check
    """Refuses arrays that require a gradient which polyce does not compute."""
    detach: Callable[..., Any] = _detach
    """Cuts a named tuple of arrays from any derivative."""
    row_losses: Callable[..., tuple[Any, RowStats | None]] = rows.forward
    """(problem, plan, logits) -> (losses, stats), the losses with their derivatives"""
    nll: Callable[..., Any] = rows.nll
    """(problem, plan, log_probabilities) -> losses"""
    log_softmax: Callable[..., Any] = _log_softmax
    """(problem, logits, compute) -> compute(problem, logits) with its derivative"""
