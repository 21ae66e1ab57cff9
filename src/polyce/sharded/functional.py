"""The functions on a shard of the classes; `polyce.torch` says what they mean."""

from __future__ import annotations

from typing import Any

from polyce.call.options import Options
from polyce.formula import stats, targets
from polyce.formula.stats import Stats
from polyce.implementations.registry import select_of_shard
from polyce.sharded import rows
from polyce.sharded.call import ShardCall, describe


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


def run(call: ShardCall, implementation: str | None) -> tuple[Any, Stats | None]:
    """Compute the loss and the stats of a call."""
    problem, by_row = call.problem, call.by_row
    of_parts = select_of_shard(by_row.problem, implementation)
    with problem.library.computing(call.operands.named()):
        losses, found, plan = rows.compute(by_row, rows.plan_of(call), of_parts)
        loss = targets.reduce(problem, plan, losses)
        return loss, None if found is None else stats.finish(problem, plan, found)
