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
from polyce.call.options import STATS_WITH_GRADIENT
from polyce.call.problem import Operands, Problem
from polyce.formula import rows, stats, targets
from polyce.formula.entries import Entries
from polyce.formula.rowgradient import StatsCotangents
from polyce.formula.stats import RowStats
from polyce.formula.targets import Plan
from polyce.graphs import torch_entries, torch_state
from polyce.graphs.contract import ArraysT, Rules
from polyce.graphs.torch_log_softmax import log_softmax, widened
from polyce.graphs.torch_transforms import batched, batched_problem, primal


def detach(given: ArraysT) -> ArraysT:
    """Cut the operands from any graph."""
    return type(given)(*(a.detach() if isinstance(a, torch.Tensor) else a for a in given))


def check(problem: Problem, operands: Operands) -> None:
    """Refuse tensors that require a gradient which polyce does not compute."""
    # Under transforms requires_grad does not show everything, so the rules below check again.
    needs = torch_state.needs_gradient
    _refuse(
        weight=problem.kind == "index" and needs(operands.weight),
        sample_weight=needs(operands.sample_weight),
        teacher=problem.kind == "teacher" and needs(operands.target),
    )


def _refuse(*, weight: bool, sample_weight: bool, teacher: bool) -> None:
    if teacher:
        raise TypeError(
            "a teacher's logits have no gradient, but target.logits requires grad; pass "
            "target.logits.detach(), or its softmax as probabilities to differentiate by it"
        )
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
    """Compute the rows' losses and stats, with their gradients on torch's graph."""
    if torch_state.is_traced_without_rules():
        losses, found = rows.forward(problem, plan, readable(problem, plan, logits))
        return losses, None if found is None else _without_gradients(found)
    if torch_state.is_transformed():
        return _transformed_row_losses(problem, plan, logits)
    if not any(map(torch_state.needs_gradient, (logits, plan.probabilities, plan.class_weight))):
        return rows.forward(problem, plan, logits)
    # A teacher has no gradient, but keeps the place of the probabilities: see `asked_for`.
    soft = plan.teacher if plan.probabilities is None else plan.probabilities
    losses, *found = _RowLosses.apply(logits, soft, plan.class_weight, problem, plan)
    return losses, RowStats(*found) if found else None


def _without_gradients(found: RowStats) -> RowStats:
    """Cut the stats that have no gradient from torch's own graph."""
    cut = {}
    for name, array in zip(found._fields, found, strict=True):
        stays = array is None or name in STATS_WITH_GRADIENT
        cut[name] = array if stays else array.detach()
    return RowStats(**cut)


def nll(problem: Problem, plan: Plan, log_probabilities: Any) -> Any:
    """Compute the rows' losses for log-probabilities; a bad label's gradient is nan."""
    if torch_state.is_transformed() or torch.compiler.is_compiling():
        plan, log_probabilities = targets.spoil_rows(problem, plan, log_probabilities)
    elif torch_state.needs_gradient(log_probabilities) and not problem.is_empty:
        return _Nll.apply(log_probabilities, problem, plan)
    return rows.nll(problem, plan, log_probabilities)


class _RowLosses(torch.autograd.Function):
    # Each argument costs time: only the plan and those of its tensors that have gradients.

    @staticmethod
    def forward(
        ctx: Any,
        logits: Any,
        soft: Any,
        class_weight: Any,
        problem: Problem,
        plan: Plan,
    ) -> tuple[Any, ...]:
        losses, found = rows.forward(problem, plan, logits)
        ctx.problem = problem if found is None else problem.with_options(stats=None)
        ctx.kinds = torch_memory.kinds(_keep(ctx, logits, plan))
        if found is None:
            return (losses,)
        torch_state.mark_stats(ctx, found)
        return losses, *found

    @staticmethod
    def backward(
        ctx: Any, cotangent: Any, of_lse: Any = None, of_entropy: Any = None, *_: Any
    ) -> tuple[Any, ...]:
        problem, of_stats = ctx.problem, StatsCotangents(of_lse, of_entropy)
        given = [array for array in (cotangent, *of_stats) if array is not None]
        torch_memory.check_returned(ctx.kinds, ctx.saved_tensors)
        for array in given:
            torch_memory.check_storages(grad_output=array)
        logits, plan = _kept(ctx)
        needs = ctx.needs_input_grad
        if needs[1] or needs[2]:
            needs = torch_state.asked_for(ctx)
        grad = None
        if needs[0] and any(map(torch_state.needs_operations, given)):
            logits = readable(problem, plan, logits)
            grad = rows.differentiable_gradient(problem, plan, cotangent, logits, of_stats)
        elif needs[0] and given:
            grad = rows.backward(problem, plan, cotangent, logits, of_stats)
        of_probabilities = of_weight = None
        if (needs[1] or needs[2]) and cotangent is not None:
            losses = None if torch_state.needs_operations(cotangent) else _losses
            found = target_gradients(problem, plan, cotangent, logits, needs[1:3], losses)
            of_probabilities, of_weight = found
        return grad, of_probabilities, of_weight, None, None


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
    problem: Problem,
    plan: Plan,
    cotangent: Any,
    logits: Any,
    needs: tuple[bool, bool],
    losses: Callable[[Problem, Any, Any], Any] | None = None,
) -> tuple[Any, Any]:
    """Compute the gradients of the probabilities and of the class weights, as far as needed.

    With `losses`, which computes the rows' losses from (problem, logits, labels), those of a sparse
    target's probabilities take no array of all classes, and have no graph.
    """
    if losses is not None and plan.entries is not None and not needs[1] and not problem.is_empty:
        return torch_entries.gradient(problem, plan, cotangent, logits, losses), None
    scale = targets.weigh_rows(plan, problem.xp, cotangent)
    scale = problem.library.cast(scale, problem.arithmetic_dtype)
    gradient = scale * _gaps(problem, plan, logits)
    return targets.coefficients_backward(problem, plan, gradient, needs=needs)


def _losses(problem: Problem, logits: Any, label: Any) -> Any:
    return rows.forward(problem, torch_entries.label_plan(label), logits)[0]


def _gaps(problem: Problem, plan: Plan, logits: Any) -> Any:
    """Compute lse - x_c, the derivative of a row's loss with respect to its coefficients."""
    problem, logits = widened(problem, readable(problem, plan, logits))
    return -log_softmax(problem, logits, rows.log_softmax)


def readable(problem: Problem, plan: Plan, logits: Any) -> Any:
    """Replace the rows that do not count, which may hold infinities and nans, by 0.

    The losses and the gradient select them away, but the derivative of that would be 0 times nan.
    """
    return logits if plan.counted is None else problem.xp.where(plan.counted, logits, 0.0)


def _transformed_row_losses(
    problem: Problem, plan: Plan, logits: Any
) -> tuple[Any, RowStats | None]:
    wide, logits = widened(problem, readable(problem, plan, logits))
    wide = wide.with_options(stats=problem.options.stats)
    # The rows do not depend on the mean's denominator.
    plan = plan._replace(denominator=None)
    losses, *found = _TransformedRowLosses.apply(logits, wide, *plan)
    if not found:
        return losses, None
    nothing: dict[str, Any] = dict.fromkeys(RowStats._fields)
    return losses, RowStats(**nothing | dict(zip(stats.needed(wide), found, strict=True)))


class _TransformedRowLosses(torch.autograd.Function):
    @staticmethod
    def forward(logits: Any, problem: Problem, *plan: Any) -> tuple[Any, ...]:
        losses, found = rows.forward(problem, Plan(*plan), logits)
        return losses, *(getattr(found, name) for name in stats.needed(problem))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        logits, ctx.problem, *plan = inputs
        ctx.save_for_forward(*_keep(ctx, logits, tuple(plan)))
        named = zip(stats.needed(ctx.problem), output[1:], strict=True)
        ctx.mark_non_differentiable(*(a for name, a in named if name not in STATS_WITH_GRADIENT))
        ctx.set_materialize_grads(False)

    @staticmethod
    def vmap(info: Any, in_dims: Any, logits: Any, problem: Problem, *plan: Any) -> Any:
        values = batched(info.batch_size, (logits, *plan), (in_dims[0], *in_dims[2:]))
        problem = batched_problem(info.batch_size, problem)
        found = _TransformedRowLosses.apply(values[0], problem, *values[1:])
        return found, (0,) * len(found)

    @staticmethod
    def backward(ctx: Any, cotangent: Any, *of_stats: Any) -> tuple[Any, ...]:
        logits, plan = _kept(ctx)
        given = dict(zip(stats.needed(ctx.problem), of_stats, strict=True))
        stats_cotangents = StatsCotangents(given.get("lse"), given.get("entropy"))
        problem, needs = ctx.problem, Plan(*ctx.needs_input_grad[2:])
        _refuse(
            weight=plan.label is not None and needs.class_weight,
            sample_weight=needs.sample_weight,
            teacher=needs.teacher,
        )
        grad, grads = None, Plan(*(None,) * len(plan))
        if ctx.needs_input_grad[0] and (cotangent is not None or stats_cotangents.are_given):
            grad = rows.differentiable_gradient(problem, plan, cotangent, logits, stats_cotangents)
        wanted = (needs.probabilities, needs.class_weight)
        if any(wanted) and cotangent is not None:
            found = target_gradients(problem, plan, cotangent, logits, wanted)
            grads = grads._replace(probabilities=found[0], class_weight=found[1])
        return grad, None, *grads

    @staticmethod
    def jvp(ctx: Any, tangent: Any, problem: None, *tangents: Any) -> tuple[Any, ...]:
        logits, plan = _kept(ctx)
        moved = Plan(*tangents)
        _refuse(
            weight=plan.label is not None and moved.class_weight is not None,
            sample_weight=moved.sample_weight is not None,
            teacher=moved.teacher is not None,
        )
        with forward_ad._set_fwd_grad_enabled(True):
            logits, plan = primal(logits), Plan(*map(primal, plan))
            losses = _losses_tangent(ctx.problem, plan, logits, tangent, moved)
            names = stats.needed(ctx.problem)
            return losses, *(_stat_tangent(ctx.problem, plan, logits, tangent, n) for n in names)


def _stat_tangent(problem: Problem, plan: Plan, logits: Any, tangent: Any, name: str) -> Any:
    if tangent is None or name not in StatsCotangents._fields:
        return None
    of_stats = StatsCotangents(**{name: 1.0})
    product = tangent * rows.differentiable_gradient(problem, plan, None, logits, of_stats)
    return problem.library.class_sum(product, problem.axis, problem.row_dtype)


def _losses_tangent(problem: Problem, plan: Plan, logits: Any, tangent: Any, moved: Plan) -> Any:
    xp, library, axis = problem.xp, problem.library, problem.axis
    terms = []
    if tangent is not None:
        product = tangent * rows.differentiable_gradient(problem, plan, 1.0, logits)
        terms.append(library.class_sum(product, axis, problem.row_dtype))
    changes = _coefficients_tangents(problem, plan, moved)
    gaps = _gaps(problem, plan, logits) if changes else None
    for change in changes:
        if isinstance(change, Entries):
            moved_by, own = change.coefficients, library.pick(gaps, change.classes, gaps, axis)
        else:
            moved_by, own = change, gaps
        # A class that stays at coefficient 0 has no effect, not even at a logit of -inf.
        own = xp.where((moved_by == 0.0) & (own == math.inf), 0.0, own)
        product = library.class_sum(moved_by * own, axis, problem.row_dtype)
        terms.append(targets.weigh_rows(plan, xp, product))
    return sum(terms)


def _coefficients_tangents(problem: Problem, plan: Plan, moved: Plan) -> list[Any]:
    """Compute the tangents of r, which is linear in the class weights and in the probabilities.

    Each is an array over the classes, or the entries of a sparse target.
    """
    found: list[Any] = []
    if moved.probabilities is not None:
        share = moved.probabilities * (1.0 - problem.options.label_smoothing)
        unsmoothed = problem.with_options(label_smoothing=0.0)
        given = plan._replace(probabilities=share)
        found += [targets.coefficients(unsmoothed, given)[1], targets.entries(unsmoothed, given)]
    if moved.class_weight is not None:
        given = plan._replace(class_weight=moved.class_weight)
        found += [targets.coefficients(problem, given)[1], targets.entries(problem, given)]
    return [one for one in found if one is not None]


RULES = Rules(check, detach, row_losses, nll, log_softmax)
