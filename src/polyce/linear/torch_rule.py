"""torch's autograd: gradients are computed with the loss, chunk by chunk, and kept for backward.

A mean or a sum has one cotangent, by which the kept gradients are multiplied. With reduction 'none'
each row has its own, so the chunks are computed again, as they are for a second backward pass. A
gradient that will be differentiated is computed in torch operations, on all logits at once. So are
the chunks if a gradient flows into a stat: what was kept does not contain it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from polyce.arrays import torch_memory
from polyce.call.problem import Head, Operands
from polyce.formula.stats import Stats
from polyce.graphs import torch_calls, torch_rows, torch_state
from polyce.linear import compute, unfused
from polyce.linear.call import Gradients, HeadCall, taking_stats, without_gradient


def is_needed(call: HeadCall) -> bool:
    """Tell whether a call goes on torch's graph, or into one that torch compiles."""
    given = (call.operands.logits, *call.head, call.operands.normalizer)
    return call.whole.is_compiling or any(
        isinstance(array, torch.Tensor) and torch_state.needs_gradient(array) for array in given
    )


def loss(call: HeadCall) -> tuple[Any, Stats | None]:
    """Compute the loss and the stats, on torch's graph if something requires a gradient."""
    normalizer = call.operands.normalizer
    if isinstance(normalizer, torch.Tensor) and torch_state.needs_gradient(normalizer):
        # torch divides, so that it differentiates by the normalizer.
        whole, operands = torch_calls.without_normalizer(call.whole, call.operands)
        total, stats = loss(replace(call, whole=whole, operands=operands))
        return (total / normalizer).to(call.whole.result_dtype), stats
    if call.whole.is_compiling:
        from polyce.linear import torch_op

        return torch_op.loss(call)
    arrays = (call.operands.logits, *call.head)
    if not any(map(torch_state.needs_gradient, arrays)):
        return compute.loss(call)
    result, *entries = _Loss.apply(*arrays, call)
    return result, Stats(*entries) if entries else None


def loss_and_gradients(call: HeadCall, wanted: Gradients) -> tuple[Any, Gradients, Stats | None]:
    """Compute the loss, the gradients wanted and the stats of a call that torch compiles."""
    from polyce.linear import torch_op

    return torch_op.loss_and_gradients(call, wanted)


def check(call: HeadCall) -> None:
    """Refuse tensors that require a gradient which is not computed here."""
    kind = call.whole.kind
    for name, tensor in without_gradient(kind, call.operands).items():
        if torch_state.needs_gradient(tensor):
            of_logits = ", or give the logits to cross_entropy"
            is_teacher = kind == "teacher" and name.startswith("target")
            raise TypeError(
                "linear_cross_entropy has gradients of input, linear_weight and linear_bias, but "
                f"{name} requires grad; pass {name}.detach(){'' if is_teacher else of_logits}"
            )


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Any, weight: Any, bias: Any, call: HeadCall) -> tuple[Any, ...]:
        call = call.detached(torch_rows.detach)
        operands = call.operands
        number = operands.normalizer
        divisor = number if isinstance(number, torch.Tensor) else None
        tensors = (
            *(input, weight, bias),
            *(operands.target, operands.weight, operands.sample_weight, divisor),
            *(operands.target_probability, operands.teacher_weight, operands.teacher_bias),
        )
        ctx.save_for_backward(*tensors)
        ctx.kinds = torch_memory.kinds(tensors)
        ctx.number = number if divisor is None else None
        ctx.call = replace(call, whole=call.whole.with_options(stats=None)).without_arrays()
        wanted = Gradients(*ctx.needs_input_grad[:3])
        ctx.waiting = None
        if call.whole.options.reduction == "none":
            result, stats = compute.loss(call)
        else:
            result, sums, factor, stats = compute.loss_and_sums(call, wanted)
            ctx.waiting = sums, factor
        if stats is None:
            return (result,)
        torch_state.mark_stats(ctx, stats, len(wanted))
        return result, *stats

    @staticmethod
    def backward(
        ctx: Any, cotangent: Any, of_lse: Any = None, of_entropy: Any = None, *_: Any
    ) -> tuple[Any, ...]:
        given = [array for array in (cotangent, of_lse, of_entropy) if array is not None]
        if not given:
            return None, None, None, None
        saved = ctx.saved_tensors
        torch_memory.check_returned(ctx.kinds, saved)
        hidden, weight, bias, target, class_weight, sample_weight, divisor, *of_target = saved
        normalizer = ctx.number if divisor is None else divisor
        operands = Operands(hidden, target, class_weight, sample_weight, normalizer, cotangent)
        names = ("target_probability", "teacher_weight", "teacher_bias")
        operands = operands._replace(**dict(zip(names, of_target, strict=True)))
        call = replace(ctx.call, operands=operands, head=Head(weight, bias))
        flows_into_stats = of_lse is not None or of_entropy is not None
        if flows_into_stats:
            whole, operands = torch_calls.with_stats(call.whole, call.operands, of_lse, of_entropy)
            whole = whole.with_options(stats=whole.grad_stats)
            name = taking_stats(call.name)
            call = replace(call, whole=whole, operands=operands, name=name)
        wanted = Gradients(*ctx.needs_input_grad[:3])
        if torch.compiler.is_compiling() or any(map(torch_state.needs_operations, given)):
            return *_differentiable(call, wanted), None
        # Scaled in place below, so it is not kept: a second pass computes its own.
        waiting, ctx.waiting = ctx.waiting, None
        if flows_into_stats:
            waiting = None
        call = call.detached(torch_rows.detach)
        if waiting is None:
            return *compute.loss_and_gradients(call, wanted)[1], None
        # On an accelerator, looking whether it is 1 would wait.
        is_one = cotangent.device.type == "cpu" and float(cotangent) == 1.0
        return *compute.finish(call, *waiting, None if is_one else cotangent), None


def _differentiable(call: HeadCall, wanted: Gradients) -> Gradients:
    grad = torch_calls.gradient(call.whole, unfused.with_logits(call))
    return unfused.gradients(call, wanted, grad)
