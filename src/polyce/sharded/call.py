"""One call on a shard of the classes: its problem, which is that of whole rows, and its range."""

from __future__ import annotations

import numbers
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from polyce.arrays import dtypes, find
from polyce.call import checks
from polyce.call import problem as calls
from polyce.call import target as of_target
from polyce.call.options import Options
from polyce.call.problem import Operands, Problem
from polyce.call.target import SparseTarget, TeacherLogits
from polyce.graphs import torch_state


@dataclass(frozen=True)
class ShardCall:
    """One call on this process's shard of the classes."""

    problem: Problem
    """The problem of whole rows."""
    operands: Operands
    """Logits, and with them probabilities or a teacher's logits, are those of the shard."""
    group: Any
    """The processes that hold the classes of the same rows."""
    start: int
    """The shard's first class."""
    width: int
    """How many classes it has."""

    @property
    def is_read(self) -> bool:
        """Tell whether the shard has classes, and all are among those of the whole rows."""
        return self.start >= 0 and 0 < self.width <= self.problem.classes - self.start

    @property
    def by_row(self) -> ShardCall:
        """Return the call without its reduction, whose labels are not checked again."""
        problem = self.problem.with_options(reduction="none")
        problem = problem._replace(
            check_labels=False, normalized=False, result_dtype=problem.row_dtype
        )
        return replace(self, problem=problem, operands=self.operands._replace(normalizer=None))

    def without_arrays(self) -> ShardCall:
        """Return the call without its arrays."""
        return replace(self, operands=Operands(*(None,) * 6))


def describe(
    input: Any,
    target: Any,
    weight: Any,
    sample_weight: Any,
    normalizer: Any,
    options: Options,
    group: Any,
    class_start: int | None,
    num_classes: int | None,
    *,
    probabilities: bool = True,
) -> ShardCall:
    """Check the arguments of a call on a shard, and describe it.

    Without `probabilities`, as for nll_loss, the target is class indices whatever its shape. What
    is wrong with the range itself is not an error yet: the other processes would wait for the one
    that raises it. It travels with the states.
    """
    check_group(group)
    of_target.check_given(input, target, is_head=False)
    find.of(input=input, **of_target.arrays(target))
    shape, axis = checks.logits_shape(input, options.axis, target)
    start, classes = place(group, shape[axis], class_start, num_classes)
    whole = (*shape[:axis], classes, *shape[axis + 1 :])
    stand_in, kept = whole_target(target, shape, whole) if probabilities else (target, None)
    # Whole rows exist nowhere, so the problem is that of tensors of their shape without memory.
    problem, operands = calls.describe(
        *(of_shape(input, whole), stand_in, weight, sample_weight, normalizer, options),
        probabilities=probabilities,
    )
    operands = operands._replace(logits=input)
    if kept is not None:
        operands = operands._replace(target=kept)
    _check_gradients(problem, operands)
    return ShardCall(problem, operands, group, start, shape[axis])


def check_group(group: Any) -> None:
    """Refuse what is no process group, and one that this process is not in."""
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "group must be one that this process is in, got what torch.distributed.new_group gives "
            "to the others; call the loss in the processes of the group only"
        )
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a torch.distributed.ProcessGroup, got {type(group).__qualname__}; pass "
            "what new_group or DeviceMesh.get_group returns, or torch.distributed.group.WORLD"
        )


def place(
    group: Any, width: int, class_start: int | None, num_classes: int | None
) -> tuple[int, int]:
    """Return a shard's first class and the number of all classes."""
    if class_start is None and num_classes is None:
        return group.rank() * width, group.size() * width
    if class_start is None or num_classes is None:
        missing = "class_start" if class_start is None else "num_classes"
        raise ValueError(
            "class_start and num_classes must be given together, or neither for equal shards, "
            f"got no {missing}; pass the shard's first class and the number of all classes"
        )
    for name, value in (("class_start", class_start), ("num_classes", num_classes)):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be an integer, got {value!r}; pass a number of classes")
    if num_classes < 0:
        raise ValueError(
            f"num_classes must be at least 0, got {num_classes}; pass the number of all classes"
        )
    return int(class_start), int(num_classes)


def of_shape(like: Any, shape: tuple[int, ...]) -> Any:
    """Return a tensor of a shape that has next to no memory, and values that nobody reads."""
    return like.detach().new_empty(()).expand(shape)


def whole_target(target: Any, shape: tuple[int, ...], whole: tuple[int, ...]) -> tuple[Any, Any]:
    """Return a target of whole rows, and what its shard is if it is sharded as the logits are."""
    if isinstance(target, TeacherLogits):
        _check_sharded("target.logits", target.logits, shape)
        return target._replace(logits=of_shape(target.logits, whole)), target.logits
    if isinstance(target, SparseTarget) or not isinstance(target, torch.Tensor):
        return target, None
    if dtypes.dtype_name(target) not in dtypes.FLOATS:
        return target, None
    _check_sharded("target", target, shape)
    return of_shape(target, whole), target


def _check_sharded(name: str, given: Any, shape: tuple[int, ...]) -> None:
    if tuple(given.shape) != shape:
        raise ValueError(
            f"{name} must be sharded as input is, of its shape {shape}, got {checks.show(given)}; "
            "pass this process's classes of it, or class indices as whole rows have them"
        )


def _check_gradients(problem: Problem, operands: Operands) -> None:
    """Refuse tensors that require a gradient which is not computed over processes."""
    names = {
        "target": operands.target,
        "target.probability": operands.target_probability,
        "weight": operands.weight,
        "sample_weight": operands.sample_weight,
    }
    for name, tensor in names.items():
        if torch_state.needs_gradient(tensor):
            own = "target.logits" if name == "target" and problem.kind == "teacher" else name
            raise TypeError(
                "a loss of classes over processes has a gradient of input alone, but "
                f"{own} requires grad; pass {own}.detach()"
            )
    check_untransformed()


def check_untransformed() -> None:
    """Refuse transforms of torch.func and forward mode, for which there are no rules."""
    if torch_state.is_transformed():
        raise ValueError(
            "a loss of classes over processes has a backward pass only, but a torch.func transform "
            "or forward mode is on; call it outside of them, or gather the classes"
        )


def check_once(*cotangents: Any) -> None:
    """Refuse a backward pass whose result would be differentiated again, or is batched."""
    if not torch.compiler.is_compiling() and any(map(torch_state.needs_operations, cotangents)):
        raise RuntimeError(
            "a loss of classes over processes has one gradient, without a graph, but "
            "create_graph, is_grads_batched or a transform is on; gather the classes for that"
        )
