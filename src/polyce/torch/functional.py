"""The functions for torch only: what they take beyond those of polyce's own of the same names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from polyce import functional
from polyce.arrays.plain import is_traced
from polyce.call import outputs
from polyce.call.options import Options, current_reduction, refuse_dim
from polyce.call.problem import describe
from polyce.call.target import SparseTarget, TeacherLogits
from polyce.implementations import door
from polyce.implementations.registry import select
from polyce.sharded import functional as sharded


def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor | SparseTarget | TeacherLogits,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    axis: int | None = None,
    sample_weight: torch.Tensor | None = None,
    normalizer: float | torch.Tensor | None = None,
    z_loss: float = 0.0,
    logit_scale: float | None = None,
    logit_softcap: float | None = None,
    return_stats: bool | str | Sequence[str] = False,
    validate: bool | None = None,
    implementation: str | None = None,
    inplace_backward: bool = False,
    group: Any = None,
    class_start: int | None = None,
    num_classes: int | None = None,
    dim: None = None,
) -> Any:
    """Compute the softmax cross-entropy of torch tensors, in nats, in place or over processes.

    Without `inplace_backward` and `group` this is `polyce.cross_entropy`.

    Parameters
    ----------
    input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        As for `polyce.cross_entropy`.
    axis, sample_weight, normalizer, z_loss, logit_scale, logit_softcap, return_stats
        As for `polyce.cross_entropy`.
    validate, implementation, dim
        As for `polyce.cross_entropy`.
    inplace_backward : bool, default False
        Whether the backward pass writes the gradient of `input` over `input`, which saves a tensor
        of its size. The notes say when this is safe.
    group : torch.distributed.ProcessGroup, optional
        The processes that hold the classes of the same rows: `input` is this process's shard of
        them, and every process gets the loss of whole rows, in the same bits. Probabilities and
        the logits of a teacher are sharded as `input` is; everything else, class indices and class
        weights too, is what it is for whole rows, and the same in every process.
    class_start, num_classes : int, optional
        With `group`: the first class of this process's shard, and C. By default all shards have
        the width of this one, in the order of the processes. Shards may be of any width, 0 too.

    Returns
    -------
    torch.Tensor
        The loss, as `polyce.cross_entropy` returns it; with `return_stats`, the pair of it and a
        `polyce.Stats`.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `polyce.cross_entropy` does; a TypeError for arrays that are not torch tensors. With
        `inplace_backward` a ValueError for an `input` that is traced, overlaps itself (as an
        expanded tensor does), shares memory with another argument or with its own ``.grad``. With
        `group` a ValueError, in every process, for shards that overlap, leave a gap or do not fit.

    Notes
    -----
    With `group` there is one collective in a forward pass, an all-gather of a few numbers of each
    row, and none in a backward pass; a teacher takes one more, and so does the stat 'rank', or
    'brier' of probabilities. There is a gradient of `input` alone, and no second derivative.

    With `inplace_backward` the logits keep their values until the backward pass; after it their
    memory holds the gradient, and so does that part of any tensor that they are a view of. Nothing
    is written if no gradient of the logits is asked for, as under ``torch.no_grad``.

    - Code that needs the logits' values, such as an accuracy, must read them before the backward
      pass, or use `return_stats`. A tensor detached from them before holds the gradient afterwards.
    - A second backward pass through this loss raises a RuntimeError, and so does one through
      another operation that saved the logits, unless it came first. ``create_graph=True`` and
      ``is_grads_batched=True`` raise one before anything is written.
    - Logits that are a leaf share their memory with their ``.grad`` from then on. It has to be
      None again before the next call.
    - If ``torch.autograd.graph.saved_tensors_hooks`` return a copy of the logits, the gradient is a
      new tensor and nothing is overwritten.

    Examples
    --------
    >>> import torch
    >>> import polyce.torch
    >>> features = torch.tensor([[1.0, 2.0]], requires_grad=True)
    >>> logits = features * 0.0
    >>> loss = polyce.torch.cross_entropy(logits, torch.tensor([0]), inplace_backward=True)
    >>> loss.backward()
    >>> logits.detach()
    tensor([[-0.5000,  0.5000]])

    A group of one process, which holds all classes; more of them call alike:

    >>> import torch.distributed as dist
    >>> store = dist.HashStore()
    >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    >>> shard, group = torch.zeros(1, 2), dist.group.WORLD
    >>> polyce.torch.cross_entropy(shard, torch.tensor([1]), group=group)
    tensor(0.6931)
    >>> dist.destroy_process_group()
    """
    if dim is not None:
        raise refuse_dim()
    check_tensor(input)
    reduction = current_reduction(size_average, reduce, reduction)
    if group is not None:
        if inplace_backward:
            raise ValueError(
                "inplace_backward is for classes of one process, got it with a group; leave one of "
                "them out"
            )
        loss, stats = sharded.cross_entropy(
            *(input, target, weight, sample_weight, normalizer),
            Options(
                axis,
                ignore_index,
                reduction,
                label_smoothing,
                z_loss,
                logit_scale,
                logit_softcap,
                return_stats,
                validate,
            ),
            group=group,
            class_start=class_start,
            num_classes=num_classes,
            implementation=implementation,
        )
        return loss if stats is None else (loss, stats)
    check_whole(class_start, num_classes)
    if not inplace_backward:
        return functional.cross_entropy(
            input,
            target,
            weight,
            None,
            ignore_index,
            None,
            reduction,
            label_smoothing,
            axis=axis,
            sample_weight=sample_weight,
            normalizer=normalizer,
            z_loss=z_loss,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            return_stats=return_stats,
            validate=validate,
            implementation=implementation,
        )
    given = (
        input, target, weight, None, ignore_index, None, reduction, label_smoothing,
        axis, sample_weight, normalizer, z_loss, logit_scale, logit_softcap,
        return_stats, validate, implementation, None,
    )  # fmt: skip
    if not is_traced() and (answer := door.cross_entropy_in_place(given)) is not None:
        return answer
    asked = Options(
        axis,
        ignore_index,
        reduction,
        label_smoothing,
        z_loss,
        logit_scale,
        logit_softcap,
        return_stats,
        validate,
    )
    problem, operands = describe(input, target, weight, sample_weight, normalizer, asked)
    outputs.check_inplace(problem, operands)
    problem = problem._replace(inplace_backward=True)
    chosen = select(problem, implementation)
    loss, stats = chosen.cross_entropy(problem, operands)
    door.keep(given, problem, chosen)
    return loss if stats is None else (loss, stats)


def check_whole(class_start: int | None, num_classes: int | None) -> None:
    """Refuse a shard's range without a group."""
    if class_start is not None or num_classes is not None:
        raise ValueError(
            "class_start and num_classes say which classes a process of group= holds, got no "
            "group; pass the process group, or leave them out"
        )


def check_tensor(input: Any) -> None:
    """Refuse what is no tensor."""
    if not isinstance(input, torch.Tensor):
        raise TypeError(
            f"polyce.torch takes torch tensors, but input is {type(input).__qualname__}; convert "
            "it with torch.as_tensor, or call the function of that name in polyce"
        )
