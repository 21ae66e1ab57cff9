"""Whole calls on torch's graph, for a path whose kernels plan and reduce themselves.

A backward pass is one run of the path's kernels. A gradient that will be differentiated or is
batched, and the gradients of probabilities and class weights, follow the reference's rules, in
torch operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from polyce.arrays import torch_memory
from polyce.call.problem import Operands, Problem
from polyce.formula import rows, targets, whole
from polyce.formula.stats import Stats
from polyce.formula.targets import Plan
from polyce.graphs import torch_rows, torch_state


class Saved(NamedTuple):
    """What a backward pass needs besides the operands; None for what a path does not keep."""

    rows: Any = None
    """(rows, 4), by some paths more numbers of a row with a teacher or with cotangents of stats"""
    denominator: Any = None
    """() in float64: what the mean was divided by"""


class Kernels(NamedTuple):
    """How a path computes a whole call and its gradient with respect to the logits."""

    name: str
    """The implementation's name."""
    forward: Callable[..., tuple[Any, Stats | None, Saved]]
    """(problem, operands, keep) -> (loss, stats, saved); keep: a backward pass will come"""
    backward: Callable[..., Any]
    """(problem, operands, saved, out) -> gradient, the cotangent being `operands.grad_output`

    It is written to `out`, which may be the logits themselves, or to new memory for None.
    """
    keeps: Callable[[Problem], Saved]
    """(problem) -> in which dtype a forward pass with `keep` saves rows, and whether a denominator

    It looks at the problem alone, since it is also asked while nothing runs.
    """
    takes_grad_stats: bool = False
    """Whether `backward` takes the operands' cotangents of stats; else the reference does."""


def needs_graph(problem: Problem, operands: Operands) -> bool:
    """Tell whether something requires a gradient; refuse arrays that polyce computes none for."""
    logits, _, weight, sample_weight, normalizer, *_ = operands
    if weight is not None or sample_weight is not None or problem.kind == "teacher":
        torch_rows.check(problem, operands)
    return torch.is_grad_enabled() and (
        logits.requires_grad
        or (problem.kind in ("probability", "sparse") and _soft(problem, operands).requires_grad)
        or (weight is not None and weight.requires_grad)
        or (isinstance(normalizer, torch.Tensor) and normalizer.requires_grad)
    )


def _soft(problem: Problem, operands: Operands) -> Any:
    """Return the target, of a sparse one the probabilities, which may have a gradient."""
    return operands.target_probability if problem.kind == "sparse" else operands.target


def cross_entropy(
    kernels: Kernels, problem: Problem, operands: Operands, on_graph: bool | None = None
) -> tuple[Any, Stats | None]:
    """Compute the loss, on torch's graph if something requires a gradient, and the stats.

    `on_graph` is what `needs_graph` has told, for callers that have asked it.
    """
    if on_graph is None:
        on_graph = needs_graph(problem, operands)
    if not on_graph:
        loss, found, _ = kernels.forward(problem, operands, False)
        return loss, found
    logits, _, weight, _, normalizer, *_ = operands
    if isinstance(normalizer, torch.Tensor) and normalizer.requires_grad:
        # torch divides, so that it differentiates by the normalizer.
        summed, operands = without_normalizer(problem, operands)
        total, found = cross_entropy(kernels, summed, operands)
        return (total / normalizer).to(problem.result_dtype), found
    soft = _soft(problem, operands)
    loss, *entries = _Loss.apply(logits, soft, weight, (kernels, problem, operands))
    return loss, Stats(*entries) if entries else None


def without_normalizer(problem: Problem, operands: Operands) -> tuple[Problem, Operands]:
    """Return the call whose loss, divided by the normalizer, is that of this one."""
    summed = problem.with_options(reduction="sum")._replace(
        normalized=False, result_dtype=problem.row_dtype
    )
    return summed, operands._replace(normalizer=None)


class _Loss(torch.autograd.Function):
    # An old-style function, which has the least overhead; each argument costs time.

    @staticmethod
    def forward(
        ctx: Any, logits: Any, target: Any, weight: Any, call: tuple[Kernels, Problem, Operands]
    ) -> tuple[Any, ...]:
        kernels, problem, operands = call
        loss, found, saved = kernels.forward(problem, operands, ctx.needs_input_grad[0])
        number = operands.normalizer
        divisor = number if isinstance(number, torch.Tensor) else None
        classes = (operands.target,) if problem.kind == "sparse" else ()
        ctx.save_for_backward(
            logits, target, weight, operands.sample_weight, divisor, *saved, *classes
        )
        if found is not None:
            problem = problem.with_options(stats=None)
        ctx.call = kernels, problem, number if divisor is None else None
        if problem.inplace_backward:
            ctx.address, ctx.is_written = logits.data_ptr(), False
        if found is None:
            return (loss,)
        torch_state.mark_stats(ctx, found)
        return loss, *found

    @staticmethod
    def backward(
        ctx: Any, cotangent: Any, of_lse: Any = None, of_entropy: Any = None, *_: Any
    ) -> tuple[Any, ...]:
        return gradients(ctx, ctx.saved_tensors, cotangent, of_lse, of_entropy)


def gradients(
    ctx: Any, saved_tensors: Any, cotangent: Any, of_lse: Any = None, of_entropy: Any = None
) -> tuple[Any, ...]:
    """Compute the gradients of a call whose node has kept `call` and saved what `_Loss` saves."""
    (kernels, problem, number), needs = ctx.call, ctx.needs_input_grad
    logits, target, weight, sample_weight, divisor, *saved_rows = saved_tensors
    normalizer = number if divisor is None else divisor
    probability = None
    if problem.kind == "sparse":
        probability, target = target, saved_rows.pop()
    operands = Operands(logits, target, weight, sample_weight, normalizer, cotangent)
    operands = operands._replace(target_probability=probability)
    saved = Saved(*saved_rows)
    # This is only ever traced by torch's compiled autograd.
    traced = torch.compiler.is_dynamo_compiling()
    if needs[1] or needs[2]:
        needs = torch_state.asked_for(ctx)
    if of_lse is None and of_entropy is None:
        if cotangent is None:
            return None, None, None, None
        by_operations = traced or torch_state.needs_operations(cotangent)
    else:
        given = [a for a in (cotangent, of_lse, of_entropy) if a is not None]
        by_operations = traced or any(map(torch_state.needs_operations, given))
        problem, operands = with_stats(problem, operands, of_lse, of_entropy)
        if not kernels.takes_grad_stats:
            kernels, saved = REFERENCE, Saved()
    in_place = problem.inplace_backward and needs[0]
    if in_place:
        _check_written(ctx, by_operations)
    grad = of_target = of_weight = None
    if needs[1] or needs[2]:
        losses = None if by_operations else _losses_by(kernels)
        of_target, of_weight = target_gradients(problem, operands, needs[1:3], losses)
    if in_place:
        grad = _write(ctx, kernels, problem, operands, saved)
    elif by_operations:
        grad = gradient(problem, operands) if needs[0] else None
    elif needs[0]:
        grad = kernels.backward(problem, operands, saved, None)
    return grad, of_target, of_weight, None


def with_stats(
    problem: Problem, operands: Operands, of_lse: Any, of_entropy: Any
) -> tuple[Problem, Operands]:
    """Add the cotangents of stats to a call; the loss then has one too."""
    found = {"lse": of_lse, "entropy": of_entropy}
    names = tuple(name for name, cotangent in found.items() if cotangent is not None)
    cotangent = operands.grad_output
    if cotangent is None:
        shape = problem.row_shape if problem.options.reduction == "none" else ()
        cotangent = operands.logits.new_zeros(shape, dtype=problem.result_dtype)
    operands = operands._replace(grad_output=cotangent, grad_lse=of_lse, grad_entropy=of_entropy)
    return problem._replace(grad_stats=names), operands


def _check_written(ctx: Any, by_operations: bool) -> None:
    """Refuse a backward pass that needs logits which have been or will be overwritten."""
    if by_operations:
        raise RuntimeError(
            "with inplace_backward there is one gradient, without a graph, but create_graph, "
            "is_grads_batched, a transform or a compiler is on; leave inplace_backward out"
        )
    if ctx.is_written:
        raise RuntimeError(
            "with inplace_backward there is one backward pass, but this is the second: the first "
            "has written the gradient over the logits; leave inplace_backward out"
        )


def _write(ctx: Any, kernels: Kernels, problem: Problem, operands: Operands, saved: Saved) -> Any:
    """Write the gradient over the logits, and return it as a tensor in their memory."""
    logits, cotangent = operands.logits, operands.grad_output
    if logits.data_ptr() != ctx.address:
        # Hooks for saved tensors returned a copy, which others may use too.
        return kernels.backward(problem, operands, saved, None)
    if cotangent.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr():
        operands = operands._replace(grad_output=cotangent.clone())
    out = logits.detach()
    if out.is_neg():
        out.copy_(kernels.backward(problem, operands, saved, None))
    else:
        kernels.backward(problem, operands, saved, out)
    # Other operations that saved the logits must notice the change.
    torch.autograd.graph.increment_version(logits)
    ctx.is_written = True
    return out


def _forward(problem: Problem, operands: Operands, keep: bool) -> tuple[Any, Stats | None, Saved]:
    return *whole.cross_entropy(problem, operands), Saved()


def _backward(problem: Problem, operands: Operands, saved: Saved, out: Any) -> Any:
    check_operands(problem, operands)
    plan = targets.plan(problem, operands)
    cotangent = targets.cotangent(problem, plan, operands.grad_output)
    of_stats = rows.stats_cotangents(problem, operands)
    grad = rows.backward(problem, plan, cotangent, operands.logits, of_stats)
    return grad if out is None else out.copy_(grad)


REFERENCE = Kernels(
    "reference", _forward, _backward, lambda problem: Saved(False, False), takes_grad_stats=True
)
"""The rows' formula as kernels: for calls in place, and for calls without logits."""


def check_operands(problem: Problem, operands: Operands) -> None:
    """Refuse saved tensors that came back changed, or whose memory is gone."""
    if torch.compiler.is_compiling():
        return
    logits, target, weight, sample_weight, normalizer, cotangent, of_lse, of_entropy = operands[:8]
    torch_memory.check_storages(normalizer=normalizer, grad_output=cotangent)
    torch_memory.check_storages(grad_lse=of_lse, grad_entropy=of_entropy)
    probability = operands.target_probability
    target_shape = problem.target_shape
    if target.numel() == 1 and not problem.row_shape:
        target_shape = target.shape
    kinds = (
        (problem.shape, problem.logits_dtype),
        (target_shape, getattr(torch, problem.target_dtype)),
        None if weight is None else ((problem.classes,), weight.dtype),
        None if sample_weight is None else (problem.row_shape, sample_weight.dtype),
        None if probability is None else (target_shape, probability.dtype),
    )
    torch_memory.check_returned(kinds, (logits, target, weight, sample_weight, probability))


def _plan(problem: Problem, operands: Operands) -> Plan:
    """Read the target, whose labels the forward pass has checked if it could."""
    check_operands(problem, operands)
    return targets.plan(problem._replace(check_labels=False), operands)


def gradient(problem: Problem, operands: Operands) -> Any:
    """Compute the gradient of the logits in torch operations."""
    plan = _plan(problem, operands)
    cotangent = targets.cotangent(problem, plan, operands.grad_output)
    of_stats = rows.stats_cotangents(problem, operands)
    readable = torch_rows.readable(problem, plan, operands.logits)
    return rows.differentiable_gradient(problem, plan, cotangent, readable, of_stats)


def _losses_by(kernels: Kernels) -> Callable[[Problem, Any, Any], Any]:
    """Return what computes rows' losses for labels, with the class axis, by a path's kernels."""

    def losses(problem: Problem, logits: Any, label: Any) -> Any:
        nothing: dict[str, Any] = dict.fromkeys(Operands._fields)
        operands = Operands(**nothing | {"logits": logits, "target": label.squeeze(problem.axis)})
        return kernels.forward(problem, operands, False)[0].unsqueeze(problem.axis)

    return losses


def target_gradients(
    problem: Problem,
    operands: Operands,
    needs: tuple[bool, bool],
    losses: Callable[[Problem, Any, Any], Any] | None = None,
) -> tuple[Any, Any]:
    """Compute the gradients of target and class weights that are needed, in torch operations.

    `losses` as in `torch_rows.target_gradients`.
    """
    logits, _, weight, *_ = operands
    plan = _plan(problem, operands)
    cotangent = targets.cotangent(problem, plan, operands.grad_output)
    zeros = torch.zeros(problem.row_shape, dtype=problem.row_dtype, device=logits.device)
    by_row = cotangent + zeros.unsqueeze(problem.axis)
    of_target, of_weight = torch_rows.target_gradients(problem, plan, by_row, logits, needs, losses)
    if of_target is not None:
        of_target = of_target.to(_soft(problem, operands).dtype)
    if of_weight is not None:
        of_weight = of_weight.reshape(-1).to(weight.dtype)
    return of_target, of_weight
