"""DTensors: a mesh's placements say which rows and classes are here, and what the results are.

Rows that are sharded need a collective for a sum or a mean only, classes that are sharded that of
`exchange`. Both may be so at once, on several axes of a mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from polyce.call import checks
from polyce.call import problem as calls
from polyce.call.options import Options
from polyce.call.problem import Operands, Problem
from polyce.call.target import SparseTarget, TeacherLogits
from polyce.formula import targets
from polyce.formula.stats import Stats
from polyce.graphs import torch_calls, torch_rows
from polyce.implementations.registry import select
from polyce.sharded import functional, log_probabilities, values
from polyce.sharded.call import ShardCall, describe
from polyce.sharded.layout import Layout, layout_of


def cross_entropy(
    input: Any,
    target: Any,
    weight: Any,
    sample_weight: Any,
    normalizer: Any,
    options: Options,
    implementation: str | None,
) -> tuple[Any, Stats | None]:
    """Compute the loss of logits on a mesh, and the stats, as DTensors."""
    layout = layout_of(input, options.axis)
    options = options._replace(axis=layout.axis)
    call = _described(
        layout,
        (input.to_local(), *arguments(layout, target, weight, sample_weight, normalizer)),
        options,
    )

    def run(problem: Problem, operands: Operands) -> tuple[Any, Any]:
        if call.group is not None:
            own = replace(call, problem=problem, operands=operands)
            return functional.run(own, implementation)
        return select(problem, implementation).cross_entropy(problem, operands)

    return reduced(layout, call.problem, call.operands, run)


def cross_entropy_with_grad(
    input: Any,
    target: Any,
    weight: Any,
    sample_weight: Any,
    normalizer: Any,
    options: Options,
    implementation: str | None,
    grad_output: Any,
    grad_stats: Any,
) -> tuple[Any, Any, Stats | None]:
    """Compute the loss, its gradient and the stats of logits on a mesh, none of them on a graph."""
    layout = layout_of(input, options.axis)
    leaf = input.detach().requires_grad_()
    others = (target, weight, sample_weight, normalizer)
    target, weight, sample_weight, normalizer = map(detached, others)

    def run() -> tuple[Any, Stats | None]:
        arrays = leaf, target, weight, sample_weight, normalizer
        return cross_entropy(*arrays, options, implementation)

    loss, (grad,), stats = with_gradients(layout, [leaf], run, options, grad_output, grad_stats)
    return loss, grad, stats


def with_gradients(
    layout: Layout,
    leaves: Sequence[Any],
    run: Callable[[], tuple[Any, Stats | None]],
    options: Options,
    grad_output: Any,
    grad_stats: Any,
) -> tuple[Any, Sequence[Any], Stats | None]:
    """Compute the loss, its gradients by the leaves and the stats, none of them on a graph.

    `run` computes loss and stats from the leaves.
    """
    number, cotangent = checks.number_or_array("grad_output", grad_output)
    checks.grad_output(number, cotangent, layout.row_shape, options.reduction)
    numbers, arrays = checks.grad_stats(grad_stats, options.checked().stats)
    for name, given in (numbers | arrays).items():
        checks.stats_cotangent(name, given, layout.row_shape)
    with torch.enable_grad():
        loss, stats = run()
    if cotangent is None:
        cotangent = torch.full_like(loss, 1.0 if number is None else number)
    outputs = [loss]
    cotangents = [_cotangent(layout, "grad_output", cotangent, loss)]
    for name, given in (numbers | arrays).items():
        stat = getattr(stats, name)
        wanted = torch.full((), given) if isinstance(given, float) else given
        outputs.append(stat)
        cotangents.append(_cotangent(layout, checks.stats_name(name), wanted, stat))
    grads = torch.autograd.grad(outputs, leaves, cotangents) if leaves else ()
    return loss.detach(), grads, detached(stats)


def detached(given: Any) -> Any:
    """Cut an argument, or several in a named tuple, from any graph."""
    if isinstance(given, tuple):
        return torch_rows.detach(given)
    return given.detach() if isinstance(given, torch.Tensor) else given


def _cotangent(layout: Layout, name: str, given: Any, output: Any) -> Any:
    """Return the cotangent of a result, placed as that is and of its dtype."""
    local = layout.local(name, given.detach(), output.placements).to(output.dtype)
    return DTensor.from_local(
        local, layout.mesh, output.placements, run_check=False, shape=output.shape,
        stride=output.stride(),
    )  # fmt: skip


def arguments(
    layout: Layout, target: Any, weight: Any, sample_weight: Any, normalizer: Any
) -> tuple[Any, ...]:
    """Return this process's parts of what a loss takes beside logits."""
    return _target(layout, target), *_weights(layout, weight, sample_weight, normalizer)


def _weights(
    layout: Layout, weight: Any, sample_weight: Any, normalizer: Any
) -> tuple[Any, Any, Any]:
    return (
        layout.local("weight", weight, layout.everywhere),
        layout.local("sample_weight", sample_weight, layout.of_rows),
        layout.local("normalizer", normalizer, layout.everywhere),
    )


def _target(layout: Layout, target: Any) -> Any:
    if isinstance(target, SparseTarget):
        given = target._asdict().items()
        return SparseTarget(*(layout.local(f"target.{n}", a, layout.of_entries) for n, a in given))
    if isinstance(target, TeacherLogits):
        logits = layout.local("target.logits", target.logits, layout.placements)
        return target._replace(logits=logits)
    is_soft = isinstance(target, torch.Tensor) and target.is_floating_point()
    return layout.local("target", target, layout.placements if is_soft else layout.of_rows)


def _described(
    layout: Layout, arrays: tuple[Any, ...], options: Options, *, probabilities: bool = True
) -> ShardCall:
    """Describe the call on this process's rows; the group is None where all classes are here."""
    logits, target, weight, sample_weight, normalizer = arrays
    given = (logits, target, weight, sample_weight, normalizer, options)
    where = layout.shard
    if where is not None:
        return describe(*given, **where, probabilities=probabilities)
    problem, operands = calls.describe(*given, probabilities=probabilities)
    return ShardCall(problem, operands, None, 0, problem.classes)


def reduced(
    layout: Layout,
    problem: Problem,
    operands: Operands,
    run: Callable[[Problem, Operands], tuple[Any, Any]],
) -> tuple[Any, Stats | None]:
    """Compute the loss of all rows and the stats, as DTensors; `run` does so for the rows here."""
    if problem.options.reduction == "none":
        loss, stats = run(problem, operands)
        loss = layout.rows(loss)
    else:
        if layout.row_groups:
            loss, stats = _of_all_rows(layout, problem, operands, run)
        else:
            loss, stats = run(problem, operands)
        loss = layout.number(loss)
    return loss, None if stats is None else Stats(*map(layout.rows, stats))


def _of_all_rows(
    layout: Layout, problem: Problem, operands: Operands, run: Callable[..., tuple[Any, Any]]
) -> tuple[Any, Any]:
    """Compute the sum or the mean over all rows, and the stats of this process's rows."""
    normalizer = operands.normalizer
    summed, operands = torch_calls.without_normalizer(problem, operands)
    try:
        total, stats = run(summed, operands)
    except IndexError:
        # The others wait for this process's numbers.
        nothing = torch.zeros((), dtype=problem.row_dtype, device=operands.logits.device)
        _Total.apply(nothing, nothing, True, layout.row_groups)
        raise
    denominator = 0.0
    if problem.options.reduction == "mean" and normalizer is None:
        denominator = targets.plan_rows(problem, operands).denominator
    total, denominator, bad = _Total.apply(total, denominator, False, layout.row_groups)
    if problem.check_labels and bool(bad):
        raise IndexError(
            f"{problem.label_name} must lie in 0 to {problem.classes - 1}, got one out of range in "
            "the rows of another process; its error says where"
        )
    if problem.options.reduction == "mean":
        total = total / (denominator if normalizer is None else normalizer)
    return total.to(problem.result_dtype), stats


class _Total(torch.autograd.Function):
    """The sums over all rows: of the losses, of what a mean divides by, and of bad labels.

    Every process has the same sum, and each row's cotangent is that of the sum: no collective.
    """

    @staticmethod
    def forward(ctx: Any, total: Any, denominator: Any, bad: bool, groups: list[Any]) -> Any:
        ops = torch.ops._c10d_functional
        numbers = torch.zeros(3, dtype=total.dtype, device=total.device)
        numbers[0], numbers[1], numbers[2] = total, denominator, float(bad)
        for group in groups:
            numbers = ops.wait_tensor(ops.all_reduce(numbers, "sum", group.group_name))
        ctx.mark_non_differentiable(denominator := numbers[1], bad_labels := numbers[2])
        return numbers[0], denominator, bad_labels

    @staticmethod
    def backward(ctx: Any, cotangent: Any, *_: Any) -> tuple[Any, ...]:
        return cotangent, None, None, None


def nll_loss(
    whole_rows: Callable[..., Any],
    input: Any,
    target: Any,
    weight: Any,
    sample_weight: Any,
    normalizer: Any,
    options: Options,
) -> Any:
    """Compute the loss of log-probabilities on a mesh.

    `whole_rows` computes it of a problem and operands whose classes are all here.
    """
    layout = layout_of(input, options.axis)
    arrays = (
        input.to_local(),
        layout.local("target", target, layout.of_rows),
        *_weights(layout, weight, sample_weight, normalizer),
    )
    call = _described(layout, arrays, options._replace(axis=layout.axis), probabilities=False)

    def run(problem: Problem, operands: Operands) -> tuple[Any, None]:
        if call.group is None:
            return whole_rows(problem, operands), None
        own = replace(call, problem=problem, operands=operands)
        return log_probabilities.nll_loss(own), None

    return reduced(layout, call.problem, call.operands, run)[0]


def log_softmax(whole_rows: Callable[..., Any], input: Any, options: dict[str, Any]) -> Any:
    """Compute the log-probabilities of all classes on a mesh; `whole_rows` as for `log_prob`."""
    layout = layout_of(input, options["axis"])
    where, options = layout.shard, options | {"axis": layout.axis}
    if where is None:
        found = whole_rows(input.to_local(), **options)
    else:
        found = log_probabilities.log_softmax(input.to_local(), Options(**options), **where)
    return layout.logits(found)


def log_prob(
    whole_rows: Callable[..., Any], input: Any, index: Any, options: dict[str, Any], path: Any
) -> Any:
    """Compute log-probabilities on a mesh; `whole_rows` is the function for rows that are whole."""
    layout = layout_of(input, options["axis"])
    is_many = isinstance(index, torch.Tensor) and index.ndim == input.ndim
    placements = layout.of_entries if is_many else layout.of_rows
    arrays = input.to_local(), layout.local("index", index, placements)
    where, options = layout.shard, options | {"axis": layout.axis}
    if where is None:
        found = whole_rows(*arrays, **options, implementation=path)
    else:
        found = values.log_prob(*arrays, Options(**options), **where, implementation=path)
    return layout.entries(found) if is_many else layout.rows(found)


def entropy(whole_rows: Callable[..., Any], input: Any, options: dict[str, Any], path: Any) -> Any:
    """Compute the entropy of each row on a mesh; `whole_rows` as for `log_prob`."""
    layout = layout_of(input, options["axis"])
    where, options = layout.shard, options | {"axis": layout.axis}
    if where is None:
        found = whole_rows(input.to_local(), **options, implementation=path)
    else:
        own = Options(**options)
        found = values.entropy(input.to_local(), own, **where, implementation=path)
    return layout.rows(found)
