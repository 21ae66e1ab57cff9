"""torch's autograd: the analytic gradient of the rows' losses, never torch's own of the formula.

Plain eager calls use an old-style `autograd.Function`, which has the least overhead. Under a
torch.func transform, or in forward mode, a new-style one runs the reference, whose operations torch
can batch and differentiate again. Under torch.compile the old-style one is part of an operator of
`torch_compiled`; torch.export, which keeps no rule, traces the operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from polyce.arrays import torch_memory
from polyce.call.problem import Operands, Problem
from polyce.formula import rows, targets, transform
from polyce.formula.stats import RowStats
from polyce.formula.targets import Plan
from polyce.graphs import torch_state
from polyce.graphs.contract import ArraysT, Rules


def detach(given: ArraysT) -> ArraysT:
    """Cut the operands from any graph."""
    return type(given)(*(a.detach() if isinstance(a, torch.Tensor) else a for a in given))


def check(operands: Operands) -> None:
    """Refuse tensors that require a gradient which polyce does not compute."""
    # Under transforms requires_grad does not show everything, so the rules below check again.
    weight = torch_state.needs_gradient(operands.weight) and not operands.target.is_floating_point()
    _refuse(weight, torch_state.needs_gradient(operands.sample_weight))


def _refuse(weight: bool, sample_weight: bool) -> None:
    if weight:
        raise TypeError(
            "weight has a gradient only where target holds class probabilities, but weight "
            "requires grad and target holds class indices; pass weight.detach()"
        )
    if sample_weight:
        raise TypeError(
            "sample_weight has no gradient, but it requires grad; multiply the losses of "
            "reduction='none' by it"
        )


def row_losses(problem: Problem, plan: Plan, logits: Any) -> tuple[Any, RowStats | None]:
    """Compute the rows' losses and stats, the losses with their gradient on torch's graph."""
    if torch_state.is_traced_without_rules():
        losses, stats = rows.forward(problem, plan, readable(problem, plan, logits))
        return losses, _detached(stats)
    if torch_state.is_transformed():
        return _transformed_row_losses(problem, plan, logits)
    if not any(map(torch_state.needs_gradient, (logits, plan.probabilities, plan.class_weight))):
        return rows.forward(problem, plan, logits)
    losses, *found = _RowLosses.apply(logits, plan.probabilities, plan.class_weight, problem, plan)
    return losses, RowStats(*found) if found else None


def log_softmax(problem: Problem, logits: Any, compute: Callable[..., Any]) -> Any:
    """Return compute(problem, logits), which is log(softmax(logits)), with its gradient."""
    if problem.is_empty or torch_state.is_traced_without_rules():
        return rows.log_softmax(problem, logits)
    if torch_state.is_transformed():
        wide, logits = _widened(problem, logits)
        result = _TransformedLogSoftmax.apply(logits, wide)
        return problem.library.cast(result, problem.logits_dtype)
    if not torch_state.needs_gradient(logits):
        return compute(problem, logits)
    return _LogSoftmax.apply(logits, problem, compute)


def nll(problem: Problem, plan: Plan, log_probabilities: Any) -> Any:
    """Compute the rows' losses for log-probabilities; a bad label's gradient is nan."""
    if torch_state.is_transformed() or torch.compiler.is_compiling():
        plan, log_probabilities = targets.spoil_rows(problem, plan, log_probabilities)
    elif torch_state.needs_gradient(log_probabilities) and not problem.is_empty:
        return _Nll.apply(log_probabilities, problem, plan)
    return rows.nll(problem, plan, log_probabilities)


def _detached(stats: RowStats | None) -> RowStats | None:
    return stats and RowStats(*(a if a is None else a.detach() for a in stats))


class _RowLosses(torch.autograd.Function):
    # Each argument costs time: only the plan and those of its tensors that have gradients.

    @staticmethod
    def forward(
        ctx: Any,
        logits: Any,
        probabilities: Any,
        class_weight: Any,
        problem: Problem,
        plan: Plan,
    ) -> tuple[Any, ...]:
        losses, stats = rows.forward(problem, plan, logits)
        ctx.problem = problem if stats is None else problem.with_options(stats=None)
        ctx.kinds = torch_memory.kinds(_keep(ctx, logits, plan))
        found = stats or ()
        ctx.mark_non_differentiable(*(array for array in found if array is not None))
        return losses, *found

    @staticmethod
    def backward(ctx: Any, cotangent: Any, *_: Any) -> tuple[Any, ...]:
        problem = ctx.problem
        torch_memory.check_returned(ctx.kinds, ctx.saved_tensors)
        torch_memory.check_storages(grad_output=cotangent)
        logits, plan = _kept(ctx)
        needs = ctx.needs_input_grad
        if needs[1] or needs[2]:
            needs = torch_state.asked_for(ctx)
        grad = None
        if needs[0] and torch_state.needs_operations(cotangent):
            logits = readable(problem, plan, logits)
            grad = rows.differentiable_gradient(problem, plan, cotangent, logits)
        elif needs[0]:
            grad = rows.backward(problem, plan, cotangent, logits)
        of_probabilities = of_weight = None
        if needs[1] or needs[2]:
            found = target_gradients(problem, plan, cotangent, logits, (needs[1], needs[2]))
            of_probabilities, of_weight = found
        return grad, of_probabilities, of_weight, None, None


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


class _Nll(torch.autograd.Function):
    # torch could derive this, but what autograd returns has to be checked.

    @staticmethod
    def forward(ctx: Any, log_probabilities: Any, problem: Problem, plan: Plan) -> Any:
        ctx.problem, ctx.dtype = problem, log_probabilities.dtype
        kept = plan._replace(class_weight=None, denominator=None)
        ctx.kinds = torch_memory.kinds(_keep(ctx, None, kept))
        return rows.nll(problem, plan, log_probabilities)

    @staticmethod
    def backward(ctx: Any, cotangent: Any) -> tuple[Any, None, None]:
        problem = ctx.problem
        torch_memory.check_returned(ctx.kinds, ctx.saved_tensors)
        _, plan = _kept(ctx)
        scale = cotangent if plan.label_weight is None else cotangent * plan.label_weight
        scale = targets.weigh_rows(plan, problem.xp, scale)
        at_label = problem.library.cast(-scale, ctx.dtype)
        grad = at_label.new_zeros(problem.shape).scatter(problem.axis, plan.label, at_label)
        if plan.invalid is not None:
            grad = torch.where(plan.invalid, math.nan, grad)
        return grad, None, None


def _keep(ctx: Any, logits: Any, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Save tensors by torch's own means, so that its hooks and its check for changes apply."""
    tensors = (logits, *(v if isinstance(v, torch.Tensor) else None for v in values))
    ctx.save_for_backward(*tensors)
    ctx.numbers = tuple(None if isinstance(v, torch.Tensor) else v for v in values)
    return tensors


def _kept(ctx: Any) -> tuple[Any, Plan]:
    logits, *tensors = ctx.saved_tensors
    values = (
        number if tensor is None else tensor
        for tensor, number in zip(tensors, ctx.numbers, strict=True)
    )
    return logits, Plan(*values)


def target_gradients(
    problem: Problem, plan: Plan, cotangent: Any, logits: Any, needs: tuple[bool, bool]
) -> tuple[Any, Any]:
    """Compute the gradients of the probabilities and of the class weights, as far as needed."""
    scale = targets.weigh_rows(plan, problem.xp, cotangent)
    scale = problem.library.cast(scale, problem.arithmetic_dtype)
    gradient = scale * _gaps(problem, plan, logits)
    return targets.coefficients_backward(problem, plan, gradient, needs=needs)


def _gaps(problem: Problem, plan: Plan, logits: Any) -> Any:
    """Compute lse - x_c, the derivative of a row's loss with respect to its coefficients."""
    problem, logits = _widened(problem, readable(problem, plan, logits))
    return -log_softmax(problem, logits, rows.log_softmax)


def readable(problem: Problem, plan: Plan, logits: Any) -> Any:
    """Replace the rows that do not count, which may hold infinities and nans, by 0.

    The losses and the gradient select them away, but the derivative of that would be 0 times nan.
    """
    return logits if plan.counted is None else problem.xp.where(plan.counted, logits, 0.0)


def _widened(problem: Problem, logits: Any) -> tuple[Problem, Any]:
    """Widen the logits before a rule, so that its result is rounded once; drop the stats."""
    logits = problem.library.cast(logits, problem.arithmetic_dtype)
    return problem.with_options(stats=None)._replace(logits_dtype=logits.dtype), logits


def _transformed_row_losses(
    problem: Problem, plan: Plan, logits: Any
) -> tuple[Any, RowStats | None]:
    stats = None
    if problem.options.stats is not None:
        _, stats = rows.forward(problem, plan, logits)
    wide, logits = _widened(problem, readable(problem, plan, logits))
    # The rows do not depend on the mean's denominator.
    plan = plan._replace(denominator=None)
    return _TransformedRowLosses.apply(logits, wide, *plan), _detached(stats)


class _TransformedRowLosses(torch.autograd.Function):
    @staticmethod
    def forward(logits: Any, problem: Problem, *plan: Any) -> Any:
        losses, _ = rows.forward(problem, Plan(*plan), logits)
        return losses

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        logits, ctx.problem, *plan = inputs
        ctx.save_for_forward(*_keep(ctx, logits, tuple(plan)))
        ctx.set_materialize_grads(False)

    @staticmethod
    def vmap(info: Any, in_dims: Any, logits: Any, problem: Problem, *plan: Any) -> Any:
        values = _batched(info.batch_size, (logits, *plan), (in_dims[0], *in_dims[2:]))
        problem = _batched_problem(info.batch_size, problem)
        return _TransformedRowLosses.apply(values[0], problem, *values[1:]), 0

    @staticmethod
    def backward(ctx: Any, cotangent: Any) -> tuple[Any, ...]:
        logits, plan = _kept(ctx)
        problem, needs = ctx.problem, Plan(*ctx.needs_input_grad[2:])
        _refuse(plan.label is not None and needs.class_weight, needs.sample_weight)
        grad, grads = None, Plan(*(None,) * len(plan))
        if ctx.needs_input_grad[0]:
            grad = rows.differentiable_gradient(problem, plan, cotangent, logits)
        wanted = (needs.probabilities, needs.class_weight)
        if any(wanted):
            found = target_gradients(problem, plan, cotangent, logits, wanted)
            grads = grads._replace(probabilities=found[0], class_weight=found[1])
        return grad, None, *grads

    @staticmethod
    def jvp(ctx: Any, tangent: Any, problem: None, *tangents: Any) -> Any:
        logits, plan = _kept(ctx)
        moved = Plan(*tangents)
        _refuse(
            plan.label is not None and moved.class_weight is not None,
            moved.sample_weight is not None,
        )
        with forward_ad._set_fwd_grad_enabled(True):
            logits, plan = _primal(logits), Plan(*map(_primal, plan))
            return _rows_tangent(ctx.problem, plan, logits, tangent, moved)


def _rows_tangent(problem: Problem, plan: Plan, logits: Any, tangent: Any, moved: Plan) -> Any:
    xp, library, axis = problem.xp, problem.library, problem.axis
    terms = []
    if tangent is not None:
        product = tangent * rows.differentiable_gradient(problem, plan, 1.0, logits)
        terms.append(library.class_sum(product, axis, problem.row_dtype))
    coefficients = _coefficients_tangent(problem, plan, moved)
    if coefficients is not None:
        gaps = _gaps(problem, plan, logits)
        # A class that stays at coefficient 0 has no effect, not even at a logit of -inf.
        gaps = xp.where((coefficients == 0.0) & (gaps == math.inf), 0.0, gaps)
        product = library.class_sum(coefficients * gaps, axis, problem.row_dtype)
        terms.append(targets.weigh_rows(plan, xp, product))
    return sum(terms)


def _coefficients_tangent(problem: Problem, plan: Plan, moved: Plan) -> Any:
    """Compute the tangent of r, which is linear in the class weights and in the probabilities."""
    terms = []
    if moved.probabilities is not None:
        share = moved.probabilities * (1.0 - problem.options.label_smoothing)
        unsmoothed = problem.with_options(label_smoothing=0.0)
        terms.append(targets.coefficients(unsmoothed, plan._replace(probabilities=share))[1])
    if moved.class_weight is not None:
        weighted = plan._replace(class_weight=moved.class_weight)
        terms.append(targets.coefficients(problem, weighted)[1])
    return sum(terms) if terms else None


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
        (logits,) = _batched(info.batch_size, (logits,), in_dims[:1])
        return _TransformedLogSoftmax.apply(logits, _batched_problem(info.batch_size, problem)), 0

    @staticmethod
    def backward(ctx: Any, cotangent: Any) -> tuple[Any, None]:
        result, logits = ctx.saved_tensors
        return rows.log_softmax_backward(ctx.problem, cotangent, logits, result), None

    @staticmethod
    def jvp(ctx: Any, tangent: Any, problem: None) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            result, logits = map(_primal, ctx.saved_tensors)
            softmax = torch.exp(result)
            tangent = tangent * transform.slope(ctx.problem, logits)
            return tangent - torch.sum(softmax * tangent, ctx.problem.axis, keepdim=True)


def _batched(size: int, values: tuple[Any, ...], dims: tuple[Any, ...]) -> list[Any]:
    """Move vmap's axis to the front, where it is one more axis of rows."""
    found = []
    for value, dim in zip(values, dims, strict=True):
        if not isinstance(value, torch.Tensor):
            found.append(value)
        elif dim is None:
            found.append(value.expand(size, *value.shape))
        else:
            found.append(value.movedim(dim, 0))
    return found


def _batched_problem(size: int, problem: Problem) -> Problem:
    return problem._replace(
        shape=(size, *problem.shape), axis=problem.axis + 1, row_shape=(size, *problem.row_shape)
    )


def _primal(value: Any) -> Any:
    """Remove the tangent of this level, so that a rule's result is differentiated once.

    torch switches forward mode off around a rule, which loses a tangent within a tangent
    (https://github.com/pytorch/pytorch/issues/197867); a rule that switches it on must do this.
    """
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return forward_ad.unpack_dual(value).primal
    return value


RULES = Rules(check, detach, row_losses, nll, log_softmax)
