"""The native path under torch: tensors' memory, and the loss on torch's graph.

A backward pass reads the logits once and writes the gradient once. What will be differentiated
again, or is batched, and the gradients of probabilities and of class weights follow the reference's
rules, which are operations of torch.
"""

from __future__ import annotations

from typing import Any

import torch

from polyce import autograd_torch, reference, targets
from polyce.implementations import native
from polyce.problem import Operands, Problem
from polyce.stats import Stats


def _handle(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Give address and strides, and the tensor, which must live as long as they are used."""
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    return tensor.data_ptr(), tensor.stride(), tensor


def _dense(tensor: torch.Tensor, dtype: Any) -> torch.Tensor:
    if dtype is not None and tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    return tensor.contiguous()


def _written(tensor: torch.Tensor) -> None:
    """Let autograd see that a tensor which it may have saved is another one now."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def cross_entropy(problem: Problem, operands: Operands) -> tuple[Any, Stats | None]:
    """Give the loss, on torch's graph if something waits for a gradient, and the stats."""
    logits, target, weight, sample_weight, normalizer, _ = operands
    if weight is not None or sample_weight is not None:
        autograd_torch.check(operands)
    if not torch.is_grad_enabled():
        return native.run(problem, operands)
    if isinstance(normalizer, torch.Tensor) and normalizer.requires_grad:
        # torch divides, and so differentiates by the normalizer.
        summed = problem._replace(reduction="sum", normalized=False, result_dtype=problem.row_dtype)
        total, found = cross_entropy(summed, operands._replace(normalizer=None))
        return (total / normalizer).to(problem.result_dtype), found
    if (
        logits.requires_grad
        or (problem.kind == "probability" and target.requires_grad)
        or (weight is not None and weight.requires_grad)
    ):
        loss, *facts = _Loss.apply(logits, target, weight, problem, operands)
        return loss, Stats(*facts) if facts else None
    return native.run(problem, operands)


class _Loss(torch.autograd.Function):
    # An old-style function, the kind that starts soonest.

    @staticmethod
    def forward(
        ctx: Any, logits: Any, target: Any, weight: Any, problem: Problem, operands: Operands
    ) -> tuple[Any, ...]:
        saved = None
        if native.kernel(problem).saves_rows and ctx.needs_input_grad[0]:
            rows = logits.numel() // problem.classes if problem.classes else 0
            saved = torch.empty((rows, 4), dtype=torch.float64)
        loss, found = native.run(problem, operands, saved=saved)
        ctx.problem = problem if found is None else problem._replace(stats=None)
        ctx.normalizer = operands.normalizer
        normalizer = ctx.normalizer if isinstance(ctx.normalizer, torch.Tensor) else None
        ctx.save_for_backward(logits, target, weight, operands.sample_weight, normalizer, saved)
        if found is None:
            return (loss,)
        ctx.mark_non_differentiable(*(array for array in found if array is not None))
        return loss, *found

    @staticmethod
    def backward(ctx: Any, cotangent: Any, *_: Any) -> tuple[Any, ...]:
        problem, needs = ctx.problem, ctx.needs_input_grad
        logits, target, weight, sample_weight, normalizer, saved = ctx.saved_tensors
        normalizer = ctx.normalizer if normalizer is None else normalizer
        operands = Operands(logits, target, weight, sample_weight, normalizer, cotangent)
        if autograd_torch.wants_operations(cotangent) or needs[1] or needs[2]:
            return *_by_reference(problem, operands, needs), None, None
        grad = torch.empty_like(logits)
        native.run(problem, operands, grad, fresh=True, saved=saved, backward=True)
        return grad, None, None, None, None


def _by_reference(problem: Problem, operands: Operands, needs: tuple[bool, ...]) -> tuple[Any, ...]:
    """Give the gradients of logits, target and class weights as operations of torch."""
    logits, target, weight, *_ = operands
    plan = targets.plan(problem, operands)
    cotangent = targets.cotangent(problem, plan, operands.grad_output)
    grad = of_target = of_weight = None
    if needs[0]:
        readable = autograd_torch.readable(problem, plan, logits)
        grad = reference.backward(problem, plan, cotangent, readable, None)
    if needs[1] or needs[2]:
        rows = cotangent + torch.zeros(problem.row_shape, dtype=problem.row_dtype).unsqueeze(
            problem.axis
        )
        of_target, of_weight = autograd_torch.target_gradients(
            problem, plan, rows, logits, (needs[1], needs[2])
        )
        of_target = of_target if of_target is None else of_target.to(target.dtype)
        of_weight = of_weight if of_weight is None else of_weight.reshape(-1).to(weight.dtype)
    return grad, of_target, of_weight


MEMORY = native.Memory(
    empty=torch.empty,
    empty_like=torch.empty_like,
    handle=_handle,
    dense=_dense,
    scalar=lambda tensor: tensor,
    written=_written,
    on_graph=cross_entropy,
)
