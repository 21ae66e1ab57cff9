"""Log-probabilities of all classes where these lie in several processes, and the loss made of them.

The first take the state of each row by its likeliest class, as `values` does, and a sum over all
classes for the gradient; the loss takes one number of each row, and nothing for the gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from polyce.arrays import torch_memory
from polyce.call.options import Options
from polyce.call.problem import Operands, describe_logits
from polyce.formula import parts, rows, targets, transform
from polyce.graphs import torch_rows, torch_state
from polyce.implementations.contract import OfParts
from polyce.implementations.registry import select_of_shard
from polyce.sharded import exchange, states, values
from polyce.sharded.call import ShardCall, check_once, check_untransformed, of_shape, place


def log_softmax(
    input: Any,
    options: Options,
    *,
    group: Any,
    class_start: int | None,
    num_classes: int | None,
) -> Any:
    """Compute the logarithm of the softmax of whole rows, at the classes of a shard."""
    whole, axis = values.whole_shape(input, options, group, class_start, num_classes)
    problem, _ = describe_logits(of_shape(input, whole), options)
    check_untransformed()
    start, _ = place(group, input.shape[axis], class_start, num_classes)
    if problem.is_empty:
        return rows.log_softmax(problem, input)
    # Log-probabilities of K classes of each row, with K = 0.
    shape = (*whole[:axis], 0, *whole[axis + 1 :])
    nothing = torch.empty(shape, dtype=torch.int64, device=input.device)
    problem = problem._replace(kind="sparse", target_dtype="int64", entries=0)
    operands = Operands(input, nothing, None, None, None, None)
    call = ShardCall(problem, operands, group, start, input.shape[axis])
    of_parts = select_of_shard(problem)
    with problem.library.computing({"input": input}):
        if torch_state.needs_gradient(input):
            return _LogSoftmax.apply(input, call, of_parts)
        return _of_all_classes(call, of_parts)


def _of_all_classes(call: ShardCall, of_parts: OfParts) -> Any:
    problem, logits = call.problem, call.operands.logits
    whole, _ = values.joined(call, call.operands.target, of_parts)
    wide = problem.library.cast(logits, problem.arithmetic_dtype)
    is_pivot = problem.library.one_hot(whole.pivot - call.start, wide, problem.axis)
    return problem.library.cast(
        values.log_probabilities(problem, whole, is_pivot, wide), problem.logits_dtype
    )


class _LogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Any, call: ShardCall, of_parts: OfParts) -> Any:
        result = _of_all_classes(call, of_parts)
        saved = result, logits if transform.is_capped(call.problem) else None
        ctx.save_for_backward(*saved)
        ctx.kinds = torch_memory.kinds(saved)
        ctx.call = call.without_arrays()
        return result

    @staticmethod
    def backward(ctx: Any, cotangent: Any) -> tuple[Any, None, None]:
        check_once(cotangent)
        saved = ctx.saved_tensors
        torch_memory.check_returned(ctx.kinds, saved)
        result, logits = saved
        problem = ctx.call.problem
        own = cotangent.sum(problem.axis, keepdim=True, dtype=problem.arithmetic_dtype)
        total = exchange.total(ctx.call, own)
        return rows.log_softmax_backward(problem, cotangent, logits, result, total), None, None


def nll_loss(call: ShardCall) -> Any:
    """Compute the loss of a shard's log-probabilities, the same in every process."""
    problem, operands = call.problem, call.operands
    with problem.library.computing(operands.named()):
        try:
            plan = targets.plan(problem, operands)
        except IndexError:
            # The others wait for this process.
            exchange.gather(call, states.pack(problem, [_of_no_class(call, operands.target)]))
            raise
        found = _AtLabel.apply(operands.logits, plan.label, plan.invalid, call.without_arrays())
        # What is left is a loss of rows with one class, which is the label.
        shape = list(problem.shape)
        shape[problem.axis] = 1
        plan = plan._replace(label=torch.zeros_like(plan.label))
        losses = torch_rows.nll(problem._replace(shape=tuple(shape)), plan, found)
        return targets.reduce(problem, plan, losses)


class _AtLabel(torch.autograd.Function):
    """Takes each row's entry at its label, from the process that has it."""

    @staticmethod
    def forward(ctx: Any, shard: Any, label: Any, invalid: Any, call: ShardCall) -> Any:
        problem, local = call.problem, label - call.start
        ctx.save_for_backward(local, invalid)
        ctx.call, ctx.shape, ctx.dtype = call, shard.shape, shard.dtype
        own = parts.pick(problem, shard, local)[1] if call.width else _of_no_class(call, label)
        words = exchange.gather(call, states.pack(problem, [own]))
        each = [states.unpack(problem, line, ("entry",))["entry"] for line in words]
        return sum(each[1:], each[0])

    @staticmethod
    def backward(ctx: Any, cotangent: Any) -> tuple[Any, None, None, None]:
        check_once(cotangent)
        local, invalid = ctx.saved_tensors
        grad = torch.zeros(ctx.shape, dtype=ctx.dtype, device=local.device)
        if ctx.call.width:
            axis = ctx.call.problem.axis
            here = (local >= 0) & (local < ctx.call.width)
            at_label = torch.where(here, cotangent, 0.0).to(ctx.dtype)
            grad = grad.scatter(axis, torch.where(here, local, 0), at_label)
            if invalid is not None:
                grad = torch.where(invalid, math.nan, grad)
        return grad, None, None, None


def _of_no_class(call: ShardCall, like: Any) -> Any:
    """Return 0 for each row."""
    return torch.zeros_like(like, dtype=call.problem.arithmetic_dtype)
