"""torch's autograd of log_softmax: its rule, for plain eager calls and under transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from polyce.arrays import torch_memory
from polyce.call.problem import Problem
from polyce.formula import rows, transform
from polyce.graphs import torch_state
from polyce.graphs.torch_transforms import batched, batched_problem, primal


def log_softmax(problem: Problem, logits: Any, compute: Callable[..., Any]) -> Any:
    """Return compute(problem, logits), which is log(softmax(logits)), with its gradient."""
    if problem.is_empty or torch_state.is_traced_without_rules():
        return rows.log_softmax(problem, logits)
    if torch_state.is_transformed():
        wide, logits = widened(problem, logits)
        result = _TransformedLogSoftmax.apply(logits, wide)
        return problem.library.cast(result, problem.logits_dtype)
    if not torch_state.needs_gradient(logits):
        return compute(problem, logits)
    return _LogSoftmax.apply(logits, problem, compute)


def widened(problem: Problem, logits: Any) -> tuple[Problem, Any]:
    """Widen the logits before a rule, so that its result is rounded once; drop the stats."""
    logits = problem.library.cast(logits, problem.arithmetic_dtype)
    return problem.with_options(stats=None)._replace(logits_dtype=logits.dtype), logits


class _LogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Any, problem: Problem, compute: Callable[..., Any]) -> Any:
        result = compute(problem, logits)
        ctx.problem = problem
        tensors = result, logits if transform.is_capped(problem) else None
        ctx.save_for_backward(*tensors)
        ctx.kinds = torch_memory.kinds(tensors)
        return result

    @staticmethod
    def backward(ctx: Any, cotangent: Any) -> tuple[Any, None, None]:
        result, logits = ctx.saved_tensors
        torch_memory.check_returned(ctx.kinds, (result, logits))
        grad = rows.log_softmax_backward(ctx.problem, cotangent, logits, result)
        return grad, None, None


class _TransformedLogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(logits: Any, problem: Problem) -> Any:
        return rows.log_softmax(problem, logits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        logits, ctx.problem = inputs
        tensors = (output, logits if transform.is_capped(ctx.problem) else None)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def vmap(info: Any, in_dims: Any, logits: Any, problem: Problem) -> Any:
        (logits,) = batched(info.batch_size, (logits,), in_dims[:1])
        return _TransformedLogSoftmax.apply(logits, batched_problem(info.batch_size, problem)), 0

    @staticmethod
    def backward(ctx: Any, cotangent: Any) -> tuple[Any, None]:
        result, logits = ctx.saved_tensors
        return rows.log_softmax_backward(ctx.problem, cotangent, logits, result), None

    @staticmethod
    def jvp(ctx: Any, tangent: Any, problem: None) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            result, logits = map(primal, ctx.saved_tensors)
            softmax = torch.exp(result)
            tangent = tangent * transform.slope(ctx.problem, logits)
            return tangent - torch.sum(softmax * tangent, ctx.problem.axis, keepdim=True)
