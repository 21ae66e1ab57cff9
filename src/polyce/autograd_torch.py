"""torch's autograd: the analytic gradient of the rows' losses, never torch's own of the formula."""

from __future__ import annotations

import math
from typing import Any

import torch

from polyce import reference
from polyce.problem import Operands, Problem
from polyce.registry import Implementation
from polyce.stats import RowStats
from polyce.targets import Plan


def detach(operands: Operands) -> Operands:
    """Cut the operands from any graph."""
    return Operands(*(a.detach() if isinstance(a, torch.Tensor) else a for a in operands))


def check(operands: Operands) -> None:
    """Refuse tensors that wait for a gradient which polyce does not give."""
    if not torch.is_grad_enabled():
        return
    for name in ("target", "weight"):
        array = getattr(operands, name)
        if array is not None and array.requires_grad:
            raise TypeError(
                f"polyce differentiates with respect to input only, but {name} requires grad; "
                f"pass {name}.detach()"
            )


def row_losses(
    implementation: Implementation, problem: Problem, plan: Plan, logits: Any
) -> tuple[Any, RowStats | None]:
    """Give the rows' losses and stats, the losses with their gradient on torch's graph."""
    if not (torch.is_grad_enabled() and logits.requires_grad):
        rows, _, stats = implementation.forward(problem, plan, logits)
        return rows, stats
    rows, *found = _RowLosses.apply(logits, implementation, problem, plan)
    return rows, RowStats(*found) if found else None


def log_softmax(problem: Problem, logits: Any) -> Any:
    """Give log(softmax(logits)), with its gradient on torch's graph."""
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return reference.log_softmax(problem, logits)
    return _LogSoftmax.apply(logits, problem)


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Any, implementation: Implementation, problem: Problem, plan: Plan
    ) -> tuple[Any, ...]:
        rows, state, stats = implementation.forward(problem, plan, logits)
        ctx.implementation, ctx.problem = implementation, problem
        ctx.plan_type, ctx.state_type = type(plan), type(state)
        # Saved as torch wants it, so that its hooks and its check for changed tensors apply.
        values = (*plan, *(state or ()))
        ctx.save_for_backward(logits, *(_tensor_or_none(value) for value in values))
        ctx.numbers = tuple(None if isinstance(v, torch.Tensor) else v for v in values)
        found = stats or ()
        ctx.mark_non_differentiable(*(array for array in found if array is not None))
        return rows, *found

    @staticmethod
    def backward(ctx: Any, cotangent: Any, *_: Any) -> tuple[Any, None, None, None]:
        logits, *tensors = ctx.saved_tensors
        values = [
            number if tensor is None else tensor
            for tensor, number in zip(tensors, ctx.numbers, strict=True)
        ]
        count = len(ctx.plan_type._fields)
        plan = ctx.plan_type(*values[:count])
        state = ctx.state_type(*values[count:]) if values[count:] else None
        grad = ctx.implementation.backward(ctx.problem, plan, cotangent, logits, state)
        return grad, None, None, None


def _tensor_or_none(value: Any) -> Any:
    return value if isinstance(value, torch.Tensor) else None


class _LogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Any, problem: Problem) -> Any:
        result = reference.log_softmax(problem, logits)
        ctx.problem = problem
        ctx.save_for_backward(result, logits if problem.logit_softcap != math.inf else None)
        return result

    @staticmethod
    def backward(ctx: Any, cotangent: Any) -> tuple[Any, None]:
        result, logits = ctx.saved_tensors
        return reference.log_softmax_backward(ctx.problem, cotangent, logits, result), None
