"""The functions on a shard of the classes; `polyce.torch` says what they mean."""

from __future__ import annotations

from typing import Any

from polyce.call.options import Options
from polyce.call.problem import Operands
from polyce.formula import stats, targets
from polyce.formula.stats import Stats
from polyce.graphs import torch_calls
from polyce.implementations.registry import select_of_shard
from polyce.sharded import exchange, rows, states
from polyce.sharded.call import ShardCall, describe, of_shape


def cross_entropy(
    input: Any,
    target: Any,
    weight: Any,
    sample_weight: Any,
    normalizer: Any,
    options: Options,
    *,
    group: Any,
    class_start: int | None,
    num_classes: int | None,
    implementation: str | None,
) -> tuple[Any, Stats | None]:
    """Compute the loss of a shard of the classes, and the stats, the same in every process."""
    call = describe(
        *(input, target, weight, sample_weight, normalizer, options),
        *(group, class_start, num_classes),
    )
    return run(call, implementation)


def run(call: ShardCall, implementation: str | None) -> tuple[Any, Any]:
    """Compute the loss and the stats of a call."""
    problem, by_row = call.problem, call.by_row
    of_parts = select_of_shard(by_row.problem, implementation)
    with problem.library.computing(call.operands.named()):
        plan = rows.plan_of(call)
        if problem.is_empty:
            exchange.gather_with_ranges(call, states.nothing(call))
            return torch_calls.cross_entropy(torch_calls.REFERENCE, problem, _of_whole_rows(call))
        losses, found, plan = rows.compute(by_row, plan, of_parts)
        loss = targets.reduce(problem, plan, losses)
        return loss, None if found is None else stats.finish(problem, plan, found)


def _of_whole_rows(call: ShardCall) -> Operands:
    """Return the operands of a call without logits in the shapes of whole rows, on the graph."""
    problem, operands = call.problem, call.operands
    target = operands.target
    if problem.kind in ("probability", "teacher"):
        target = of_shape(target, problem.shape)
    logits = operands.logits.sum(problem.axis, keepdim=True).expand(problem.shape)
    return operands._replace(logits=logits, target=target)
