"""Log-probabilities and the entropy of rows whose classes lie in several processes.

The log-probability of class j is (x_j - x_k) - h for the likeliest class k, and -h for k itself.
Its gradient is that of a cross-entropy with a sparse target: the chosen classes, with minus the
cotangents as their probabilities.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from polyce.arrays import find
from polyce.call import checks
from polyce.call.index import describe_index, has_many, of_entries
from polyce.call.options import Options
from polyce.call.problem import Operands, Problem
from polyce.formula import labels, parts, rowstate, targets, transform
from polyce.formula.parts import Part, Whole
from polyce.formula.rowgradient import NO_STATS
from polyce.formula.rowstate import RowState
from polyce.graphs import torch_state
from polyce.implementations.contract import OfParts
from polyce.implementations.registry import select_of_shard
from polyce.sharded import exchange, functional, states
from polyce.sharded.call import (
    ShardCall,
    check_group,
    check_once,
    check_untransformed,
    describe,
    of_shape,
    place,
)


def entropy(
    input: Any,
    options: Options,
    *,
    group: Any,
    class_start: int | None,
    num_classes: int | None,
    implementation: str | None,
) -> Any:
    """Compute the entropy of each row, as a stat beside a loss that is not used."""
    whole, axis = whole_shape(input, options, group, class_start, num_classes)
    # Without classes no label is in range.
    label = 0 if whole[axis] else options.ignore_index
    rows = (*whole[:axis], *whole[axis + 1 :])
    options = options._replace(reduction="none", stats="entropy")
    call = describe(
        *(input, torch.full(rows, label, device=input.device), None, None, None, options),
        *(group, class_start, num_classes),
    )
    return functional.run(call, implementation)[1].entropy.to(call.problem.result_dtype)


def log_prob(
    input: Any,
    index: Any,
    options: Options,
    *,
    group: Any,
    class_start: int | None,
    num_classes: int | None,
    implementation: str | None,
) -> Any:
    """Compute the log-probabilities of one class or several of each row."""
    whole, axis = whole_shape(input, options, group, class_start, num_classes)
    problem, _, own = describe_index(of_shape(input, whole), index, options)
    if not has_many(problem, own):
        options = options._replace(reduction="none")
        call = describe(
            *(input, index, None, None, None, options), *(group, class_start, num_classes)
        )
        call = replace(call, problem=call.problem._replace(label_name="index"))
        loss, _ = functional.run(call, implementation)
        return 0.0 - loss
    check_untransformed()
    if not own.shape[axis]:
        # Of no class nothing is asked, nor does anything flow back, whatever the rows hold.
        return input.narrow(axis, 0, 0)
    width = input.shape[axis]
    start, _ = place(group, width, class_start, num_classes)
    call = ShardCall(problem, Operands(input, own, None, None, None, None), group, start, width)
    with problem.library.computing({"input": input, "index": own}):
        return _of_many(call, implementation)


def whole_shape(
    input: Any, options: Options, group: Any, class_start: int | None, num_classes: int | None
) -> tuple[tuple[int, ...], int]:
    """Check a shard of logits; return the shape of those of all classes, and the class axis."""
    check_group(group)
    find.of(input=input)
    shape, axis = checks.logits_shape(input, options.axis)
    _, classes = place(group, shape[axis], class_start, num_classes)
    return (*shape[:axis], classes, *shape[axis + 1 :]), axis


class _Chosen(NamedTuple):
    """The classes that an index holds, K along the class axis."""

    classes: Any
    """Always in range."""
    kept: Any
    """False where nothing is asked; None if nowhere."""
    invalid: Any
    """None if the index was checked."""


def _of_many(call: ShardCall, implementation: str | None) -> Any:
    problem, operands = call.problem, call.operands
    index, axis = operands.target, problem.axis
    sparse = problem._replace(kind="sparse", entries=index.shape[axis], check_labels=False)
    call = replace(call, problem=sparse)
    try:
        read = labels.read(of_entries(problem, index), index, operands.logits)
    except IndexError:
        exchange.gather_with_ranges(call, _nothing(call))
        raise
    chosen = _Chosen(*(a if a is None else a.squeeze(index.ndim) for a in read))
    result_dtype = problem.library.result_dtype(problem.logits_dtype, operands.logits)
    if problem.is_empty:
        exchange.gather_with_ranges(call, states.nothing(call))
        on_graph = operands.logits.sum(axis, keepdim=True)
        values = torch.full_like(chosen.classes, math.nan, dtype=result_dtype) + on_graph
        return values if chosen.kept is None else values.where(chosen.kept, 0.0)
    of_parts = select_of_shard(sparse, implementation)
    if not torch_state.needs_gradient(operands.logits):
        values, _ = _forward(call, chosen, of_parts)
    else:
        values = _LogProb.apply(operands.logits, call, chosen, of_parts)
    return values.to(result_dtype)


_SENT = ("rest_max", "rest_sum", "pivot_logit", "pivot")
"""What is sent of each row, beside the logits of the chosen classes."""


def _nothing(call: ShardCall) -> Any:
    """Return what is sent of no classes."""
    shape, device = list(call.problem.shape), call.operands.logits.device
    shape[call.problem.axis] = 1
    zeros = torch.zeros(shape, dtype=call.problem.arithmetic_dtype, device=device)
    chosen = zeros.expand(call.operands.target.shape)
    lowest = zeros - math.inf
    return states.pack(call.problem, [lowest, zeros, lowest, zeros, chosen])


def _with_probabilities(call: ShardCall, probability: Any) -> Operands:
    """Return the operands of a cross-entropy whose sparse target is the chosen classes."""
    return call.operands._replace(target_probability=probability)


def joined(call: ShardCall, classes: Any, of_parts: OfParts) -> tuple[Whole, Any]:
    """Join the rows by their likeliest class; return that and the logits of some classes.

    These are K along the class axis, in the row dtype.
    """
    problem, operands = call.problem, call.operands
    words = _nothing(call)
    if call.is_read:
        zeros = torch.zeros_like(classes, dtype=problem.arithmetic_dtype)
        part = of_parts.read(problem, _with_probabilities(call, zeros), call.start, None)
        _, logits = parts.pick(problem, operands.logits, classes - call.start)
        sent = [*(part.state._asdict()[name] for name in _SENT[:3]), part.pivot, logits]
        words = states.pack(problem, sent)
    gathered = exchange.gather_with_ranges(call, words)
    split = len(_SENT) * math.prod(problem.row_shape)
    plan = targets.plan_rows(problem, operands)
    found = [_part(plan, states.unpack(problem, line, _SENT)) for line in gathered.words[:, :split]]
    whole = parts.join(problem, found)
    if gathered.is_torn is not None:
        spoilt = torch.where(gathered.is_torn, math.nan, whole.state.rest_sum)
        whole = whole._replace(state=whole.state._replace(rest_sum=spoilt))
    logits = gathered.words[:, split:].contiguous().view(problem.arithmetic_dtype)
    return whole, logits.view(len(found), *classes.shape).sum(0).to(problem.row_dtype)


def log_probabilities(problem: Problem, whole: Whole, is_pivot: Any, logits: Any) -> Any:
    """Compute the log-probabilities of classes, in the dtype of their logits."""
    at_pivot = whole.state._replace(pivot_coefficient=None, rest_coefficient=None)
    surprise = rowstate.loss(problem, at_pivot).to(logits.dtype)
    gaps = transform.difference(problem, logits, whole.state.pivot_logit.to(logits.dtype))
    return torch.where(is_pivot, -surprise, gaps - surprise)


def _forward(call: ShardCall, chosen: _Chosen, of_parts: OfParts) -> tuple[Any, Whole]:
    """Compute the values, in the row dtype, and the joined state."""
    whole, logits = joined(call, chosen.classes, of_parts)
    values = log_probabilities(call.problem, whole, chosen.classes == whole.pivot, logits)
    if chosen.invalid is not None:
        values = values.masked_fill(chosen.invalid, math.nan)
    return values if chosen.kept is None else values.where(chosen.kept, 0.0), whole


def _part(plan: Any, values: dict[str, Any]) -> Part:
    zeros = torch.zeros_like(values["rest_max"])
    pivot = values.pop("pivot")
    state = RowState(**values, pivot_coefficient=zeros, rest_coefficient=zeros, rest_excess=zeros)
    return Part(state, pivot, plan, None)


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Any, call: ShardCall, chosen: _Chosen, of_parts: OfParts) -> Any:
        values, whole = _forward(call, chosen, of_parts)
        state = whole.state
        ctx.save_for_backward(
            *(logits, call.operands.target, chosen.classes, chosen.kept, whole.pivot),
            *(state.rest_max, state.rest_sum, state.pivot_logit),
        )
        ctx.call = call.without_arrays(), of_parts
        return values

    @staticmethod
    def backward(ctx: Any, cotangent: Any) -> tuple[Any, ...]:
        check_once(cotangent)
        logits, index, classes, kept, pivot, *of_state = ctx.saved_tensors
        rest_max, rest_sum, pivot_logit = of_state
        call, of_parts = ctx.call
        call = replace(call, operands=Operands(logits.detach(), index, None, None, None, None))
        problem, axis = call.problem, call.problem.axis
        if not call.width:
            return torch.zeros_like(logits), None, None, None
        if kept is not None:
            cotangent = cotangent.where(kept, 0.0)
        of_pivot = torch.where(classes == pivot, cotangent, 0.0).sum(axis, keepdim=True)
        of_rest = torch.where(classes == pivot, 0.0, cotangent).sum(axis, keepdim=True)
        state = RowState(
            *(rest_max, rest_sum, pivot_logit, -of_pivot, -of_rest, torch.zeros_like(of_rest))
        )
        operands = _with_probabilities(call, -cotangent)
        whole = Whole(None, state, pivot, None, None)
        grad = of_parts.gradient(problem, operands, call.start, whole, 1.0, NO_STATS, None)
        if kept is not None:
            grad = grad.where(kept.any(axis, keepdim=True), 0.0)
        return grad.to(problem.logits_dtype), None, None, None
