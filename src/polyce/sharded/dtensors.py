"""DTensors: a mesh's placements say which rows and classes are here, and what the results are.

Rows that are sharded need a collective for a sum or a mean only, classes that are sharded that of
`exchange`. Both may be so at once, on several axes of a mesh.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from polyce.call import problem as calls
from polyce.call.options import Options, class_axis
from polyce.call.target import SparseTarget, TeacherLogits
from polyce.formula import targets
from polyce.formula.stats import Stats
from polyce.graphs import torch_calls
from polyce.implementations.registry import select
from polyce.sharded import functional, values
from polyce.sharded.call import ShardCall, describe


class Layout(NamedTuple):
    """How rows and classes lie on a mesh."""

    mesh: Any
    placements: tuple[Any, ...]
    """Those of the logits."""
    shape: tuple[int, ...]
    """That of all logits."""
    axis: int

    @property
    def of_rows(self) -> tuple[Any, ...]:
        """Return the placements of what has one number for each row, in the rows' shape."""
        return tuple(
            Shard(p.dim - (p.dim > self.axis)) if self._shards_rows(p) else Replicate()
            for p in self.placements
        )

    @property
    def of_entries(self) -> tuple[Any, ...]:
        """Return the placements of what has some classes of each row in the place of all."""
        return tuple(p if self._shards_rows(p) else Replicate() for p in self.placements)

    @property
    def everywhere(self) -> tuple[Any, ...]:
        """Return the placements of what every process has whole."""
        return tuple(Replicate() for _ in self.placements)

    @property
    def row_groups(self) -> list[Any]:
        """Return the groups over which a sum of the rows goes."""
        return [
            self.mesh.get_group(i)
            for i, p in enumerate(self.placements)
            if self._shards_rows(p) and self.mesh.size(i) > 1
        ]

    @property
    def shard(self) -> dict[str, Any] | None:
        """Return the arguments that say which classes are here; None if all are."""
        for i, placement in enumerate(self.placements):
            if placement.is_shard(self.axis):
                classes = self.shape[self.axis]
                width = -(-classes // self.mesh.size(i))
                start = min(width * self.mesh.get_local_rank(i), classes)
                return {
                    "group": self.mesh.get_group(i),
                    "class_start": start,
                    "num_classes": classes,
                }
        return None

    def _shards_rows(self, placement: Any) -> bool:
        return placement.is_shard() and not placement.is_shard(self.axis)

    def local(self, name: str, tensor: Any, placements: tuple[Any, ...]) -> Any:
        """Return this process's part of an argument that is to have these placements.

        A tensor that is no DTensor is whole, and the same in every process.
        """
        if not isinstance(tensor, torch.Tensor):
            return tensor
        if not isinstance(tensor, DTensor):
            whole = DTensor.from_local(tensor, self.mesh, self.everywhere, run_check=False)
            return self._cut(name, whole, placements)
        if tensor.device_mesh != self.mesh:
            raise ValueError(
                f"all DTensors must lie on one mesh, but input is on {self.mesh} and {name} on "
                f"{tensor.device_mesh}; redistribute {name}"
            )
        _check_placements(name, tensor)
        return self._cut(name, tensor, placements)

    def _cut(self, name: str, tensor: Any, placements: tuple[Any, ...]) -> Any:
        for own, wanted in zip(tensor.placements, placements, strict=True):
            # What is whole is cut along its rows without a collective.
            cuts_rows = own == Replicate() and (
                placements != self.placements or self._shards_rows(wanted)
            )
            if own != wanted and not cuts_rows:
                raise ValueError(
                    f"{name} must be placed as input is, {placements}, got {tensor.placements}; "
                    f"redistribute {name}"
                )
        return tensor.redistribute(self.mesh, placements).to_local()

    def rows(self, local: Any) -> Any:
        """Return the DTensor of all rows, of what this process has computed of its own."""
        if local is None:
            return None
        shape = torch.Size((*self.shape[: self.axis], *self.shape[self.axis + 1 :]))
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        return self._result(local, self.of_rows, shape, tuple(strides))

    def entries(self, local: Any) -> Any:
        """Do what `rows` does for several numbers of each row, on the class axis."""
        shape = list(self.shape)
        shape[self.axis] = local.shape[self.axis]
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        return self._result(local, self.of_entries, torch.Size(shape), tuple(strides))

    def number(self, value: Any) -> Any:
        """Return the DTensor of a number that every process has."""
        return self._result(value, self.everywhere, value.shape, ())

    def _result(self, local: Any, placements: Any, shape: Any, stride: Any) -> Any:
        return DTensor.from_local(
            local, self.mesh, placements, run_check=False, shape=shape, stride=stride
        )


def layout_of(input: Any, axis: int | None) -> Layout:
    """Check how the logits lie, and describe it."""
    shape = tuple(input.shape)
    axis = class_axis(shape, axis)
    _check_placements("input", input)
    placements = tuple(input.placements)
    if sum(placement.is_shard(axis) for placement in placements) > 1:
        raise ValueError(
            "the classes of input must be sharded over one axis of a mesh, got placements "
            f"{input.placements}; redistribute it"
        )
    return Layout(input.device_mesh, placements, shape, axis)


def _check_placements(name: str, tensor: Any) -> None:
    for placement in tensor.placements:
        # Not what FSDP cuts parameters into, which is a Shard by its base in some versions.
        if type(placement) is not Shard and not placement.is_replicate():
            raise ValueError(
                f"{name} must be sharded or replicated on each axis of its mesh, got placements "
                f"{tensor.placements}; redistribute it"
            )


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
    arrays = (
        input.to_local(),
        _target(layout, target),
        layout.local("weight", weight, layout.everywhere),
        layout.local("sample_weight", sample_weight, layout.of_rows),
        layout.local("normalizer", normalizer, layout.everywhere),
    )
    call = _described(layout, arrays, options)
    if call.problem.options.reduction == "none":
        loss, stats = _of_rows_here(call, implementation)
        loss = layout.rows(loss)
    else:
        loss, stats = _of_all_rows(layout, call, implementation)
        loss = layout.number(loss)
    return loss, None if stats is None else Stats(*map(layout.rows, stats))


def _target(layout: Layout, target: Any) -> Any:
    if isinstance(target, SparseTarget):
        given = target._asdict().items()
        return SparseTarget(*(layout.local(f"target.{n}", a, layout.of_entries) for n, a in given))
    if isinstance(target, TeacherLogits):
        logits = layout.local("target.logits", target.logits, layout.placements)
        return target._replace(logits=logits)
    is_soft = isinstance(target, torch.Tensor) and target.is_floating_point()
    return layout.local("target", target, layout.placements if is_soft else layout.of_rows)


def _described(layout: Layout, arrays: tuple[Any, ...], options: Options) -> ShardCall:
    """Describe the call on this process's rows; the group is None where all classes are here."""
    logits, target, weight, sample_weight, normalizer = arrays
    given = (logits, target, weight, sample_weight, normalizer, options)
    where = layout.shard
    if where is not None:
        return describe(*given, **where)
    problem, operands = calls.describe(*given)
    return ShardCall(problem, operands, None, 0, problem.classes)


def _of_rows_here(call: ShardCall, implementation: str | None) -> tuple[Any, Any]:
    """Compute loss and stats of this process's rows."""
    if call.group is not None:
        return functional.run(call, implementation)
    return select(call.problem, implementation).cross_entropy(call.problem, call.operands)


def _of_all_rows(layout: Layout, call: ShardCall, implementation: str | None) -> tuple[Any, Any]:
    """Compute the sum or the mean over all rows, and the stats of this process's rows."""
    if not layout.row_groups:
        return _of_rows_here(call, implementation)
    problem, normalizer = call.problem, call.operands.normalizer
    summed, operands = torch_calls.without_normalizer(problem, call.operands)
    try:
        total, stats = _of_rows_here(
            replace(call, problem=summed, operands=operands), implementation
        )
    except IndexError:
        # The others wait for this process's numbers.
        nothing = torch.zeros((), device=operands.logits.device)
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
        numbers = torch.zeros(3, dtype=torch.float64, device=total.device)
        numbers[0], numbers[1], numbers[2] = total, denominator, float(bad)
        for group in groups:
            numbers = ops.wait_tensor(ops.all_reduce(numbers, "sum", group.group_name))
        ctx.mark_non_differentiable(denominator := numbers[1], bad_labels := numbers[2])
        return numbers[0].to(total.dtype), denominator, bad_labels

    @staticmethod
    def backward(ctx: Any, cotangent: Any, *_: Any) -> tuple[Any, ...]:
        return cotangent, None, None, None


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
