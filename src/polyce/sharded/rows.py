"""The losses and stats of rows whose classes lie in several processes, on torch's graph.

A forward pass reads the shard, exchanges states and joins them; a backward pass has all it needs in
the joined state, and exchanges nothing.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from polyce.arrays import torch_memory
from polyce.call.options import STATS_WITH_GRADIENT
from polyce.call.problem import Operands, Problem
from polyce.formula import parts, rowstats, targets
from polyce.formula.parts import TeacherState, Whole
from polyce.formula.rowgradient import StatsCotangents
from polyce.formula.rowstate import RowState
from polyce.formula.stats import RowStats
from polyce.formula.targets import Plan
from polyce.graphs import torch_rows, torch_state
from polyce.implementations.contract import OfParts
from polyce.sharded import exchange, states
from polyce.sharded.call import ShardCall, check_once


def plan_of(call: ShardCall) -> Plan:
    """Read what the target means, but for what is sharded; raises IndexError for a bad label."""
    read = targets.plan if call.problem.kind == "sparse" else targets.plan_rows
    try:
        return read(call.problem, call.operands)
    except IndexError:
        # The others wait for this process. If the ranges are wrong, a label may be so for that.
        exchange.gather_with_ranges(call, states.nothing(call))
        raise


def compute(call: ShardCall, plan: Plan, of_parts: OfParts) -> tuple[Any, RowStats | None, Plan]:
    """Compute the rows' losses and stats, and complete the plan by what only all processes know.

    The call has no reduction, but it has rows and classes.
    """
    logits = call.operands.logits
    call = replace(call, operands=torch_rows.detach(call.operands))
    whole, plan, teacher = _forward(call, plan, of_parts)
    found = whole.stats
    if not torch_state.needs_gradient(logits):
        return whole.losses, found, plan
    operands, values = call.operands, with_gradients(whole)
    results = _Rows.apply(
        *(logits, call.without_arrays(), of_parts, tuple(values), *values.values()),
        *(operands.target, operands.weight, operands.sample_weight, operands.target_probability),
        *(*(teacher or (None, None)), whole.pivot, *whole.state),
    )
    return *put(values, results, found), plan


def with_gradients(whole: Whole) -> dict[str, Any]:
    """Return what a joined state has that gradients flow into, by name."""
    values = {"losses": whole.losses}
    if whole.stats is not None:
        values |= {name: getattr(whole.stats, name) for name in STATS_WITH_GRADIENT}
    return {name: array for name, array in values.items() if array is not None}


def put(
    values: dict[str, Any], results: Any, found: RowStats | None
) -> tuple[Any, RowStats | None]:
    """Return losses and stats with those of them that have come back on the graph."""
    on_graph = dict(zip(values, results, strict=True))
    losses = on_graph.pop("losses")
    return losses, None if found is None else found._replace(**on_graph)


def _forward(
    call: ShardCall, plan: Plan, of_parts: OfParts
) -> tuple[Whole, Plan, TeacherState | None]:
    problem, operands = call.problem, call.operands
    teacher = teacher_of(call, of_parts) if problem.kind == "teacher" else None
    if call.is_read:
        part = of_parts.read(problem, operands, call.start, teacher)
        whole, plan = join(call, plan, states.encode(call, part), part.pivot)
    else:
        whole, plan = join(call, plan, states.nothing(call), None)
    names = looking_again(problem) if call.is_read else ()
    own = {name: look_again(call, whole, name) for name in names}
    return with_second_looks(call, whole, own), plan, teacher


def join(call: ShardCall, plan: Plan, words: Any, pivot: Any) -> tuple[Whole, Plan]:
    """Send what this process has read of its shard, and join it with what the others send.

    `pivot` is that of its own part, None if it has none.
    """
    gathered = exchange.gather_with_ranges(call, words)
    if pivot is None:
        pivot = torch.full((), -1, device=words.device)
    found, plan = states.decode(call.problem, plan, gathered.words, call.group.rank(), pivot)
    if gathered.is_torn is not None:
        first = found[0].state
        spoilt = torch.where(gathered.is_torn, math.nan, first.rest_sum)
        found[0] = found[0]._replace(state=first._replace(rest_sum=spoilt))
    return parts.join(call.problem, found), plan


def teacher_of(call: ShardCall, of_parts: OfParts) -> TeacherState:
    """Join the softmax of a teacher's rows, in a collective of its own: the states depend on it."""
    own = of_parts.read_teacher(call.problem, call.operands.target)
    words = exchange.gather(call, states.encode_teacher(call.problem, own))
    return parts.join_teacher(call.problem, states.decode_teacher(call.problem, words))


def looking_again(problem: Problem) -> tuple[str, ...]:
    """Return the names of the stats that look at the logits once the state is known."""
    return tuple(n for n in problem.options.stats or () if rowstats.looks_again(problem, n))


def look_again(call: ShardCall, whole: Whole, name: str) -> Any:
    """Compute what a shard, which has classes, adds to such a stat."""
    if name == "rank":
        return parts.rank(call.problem, call.operands, whole.label_logit)
    return parts.brier(call.problem, call.operands, call.start, whole)


def with_second_looks(call: ShardCall, whole: Whole, own: dict[str, Any]) -> Whole:
    """Add these stats, in one more collective for each, from what this process's shard adds.

    `own` has nothing of a shard that is not read.
    """
    found = whole.stats
    if found is None:
        return whole
    for name in looking_again(call.problem):
        # No all-reduce: every process adds in the same order.
        adds = own.get(name, torch.zeros_like(whole.state.rest_max))
        words = exchange.gather(call, states.pack(call.problem, [adds]))
        each = [states.unpack(call.problem, line, (name,))[name] for line in words]
        found = found._replace(**{name: sum(each[1:], each[0])})
    return whole._replace(stats=found)


class _Rows(torch.autograd.Function):
    """Puts what has been computed on the graph.

    All tensors are arguments of their own, as torch.compile needs them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Any,
        call: ShardCall,
        of_parts: OfParts,
        names: tuple[str, ...],
        *tensors: Any,
    ) -> tuple[Any, ...]:
        count = len(names)
        saved = (logits, *tensors[count:])
        ctx.save_for_backward(*saved)
        ctx.kinds = torch_memory.kinds(saved)
        ctx.call, ctx.of_parts, ctx.names = call, of_parts, names
        ctx.absent = (None,) * (3 + len(tensors))
        ctx.set_materialize_grads(False)
        # A result that is an argument would be taken for one that was changed.
        return tuple(tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        passed = dict(zip(ctx.names, cotangents, strict=True))
        given = [array for array in cotangents if array is not None]
        if not given:
            return None, *ctx.absent
        check_once(*given)
        saved = ctx.saved_tensors
        torch_memory.check_returned(ctx.kinds, saved)
        logits, target, weight, sample_weight, probability, top, total, pivot, *state = saved
        if not ctx.call.width:
            return torch.zeros_like(logits), *ctx.absent
        operands = Operands(logits.detach(), target, weight, sample_weight, None, None)
        operands = operands._replace(target_probability=probability)
        of_losses = passed["losses"]
        grad = ctx.of_parts.gradient(
            *(ctx.call.problem, operands, ctx.call.start),
            Whole(None, RowState(*state), pivot, None, None),
            0.0 if of_losses is None else of_losses,
            StatsCotangents(passed.get("lse"), passed.get("entropy")),
            None if top is None else TeacherState(top, total),
        )
        return grad.to(ctx.call.problem.logits_dtype), *ctx.absent
