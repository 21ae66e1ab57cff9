"""The losses of a linear head for torch only: of a head over processes too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from polyce.call.index import check_index_of_head
from polyce.call.options import Options
from polyce.call.target import SparseTarget, TeacherHead, TeacherLogits
from polyce.linear import functional, torch_sharded, values
from polyce.torch.functional import check_tensor, check_whole


def linear_cross_entropy(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor | SparseTarget | TeacherLogits | TeacherHead,
    *,
    linear_bias: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    sample_weight: torch.Tensor | None = None,
    normalizer: float | torch.Tensor | None = None,
    z_loss: float = 0.0,
    logit_scale: float | None = None,
    logit_softcap: float | None = None,
    return_stats: bool | str | Sequence[str] = False,
    chunk_size: int | None = None,
    validate: bool | None = None,
    implementation: str | None = None,
    group: Any = None,
    class_start: int | None = None,
    num_classes: int | None = None,
    reduce_input_grad: bool = True,
) -> Any:
    """Compute the softmax cross-entropy of a linear head, in nats, also of one over processes.

    Without `group` this is `polyce.linear_cross_entropy`.

    Parameters
    ----------
    input, linear_weight, target, linear_bias
        As for `polyce.linear_cross_entropy`. With `group`, weight and bias are those of this
        process's classes; so are probabilities and the logits of a teacher. `input` is whole.
    weight, reduction, ignore_index, label_smoothing, sample_weight, normalizer, z_loss
        As for `polyce.linear_cross_entropy`.
    logit_scale, logit_softcap, return_stats, chunk_size, validate, implementation
        As for `polyce.linear_cross_entropy`.
    group, class_start, num_classes
        As for `cross_entropy`: this process's shard of the classes.
    reduce_input_grad : bool, default True
        Whether the gradient of `input` is summed over the processes, in one all-reduce. Without,
        it is what this process's classes add to it, for a caller who sums it elsewhere.

    Returns
    -------
    torch.Tensor
        The loss, as `polyce.linear_cross_entropy` returns it; with `return_stats`, the pair of it
        and a `polyce.Stats`. With `group` they are the same in every process.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `polyce.linear_cross_entropy` and `cross_entropy` do. With `group` there is no
        `TeacherHead`.

    Notes
    -----
    With `group` a backward pass computes the logits a second time, some rows at a time as the
    forward pass does; the states of all rows take one all-gather, however many chunks there are.
    For the stat 'rank', and 'brier' of probabilities, the forward pass computes them twice too.

    Examples
    --------
    >>> import torch
    >>> import polyce.torch
    >>> hidden, head = torch.zeros(2, 3), torch.zeros(4, 3)
    >>> polyce.torch.linear_cross_entropy(hidden, head, torch.tensor([0, 3]))
    tensor(1.3863)
    """
    check_tensor(input)
    if group is None:
        check_whole(class_start, num_classes)
        return functional.linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            sample_weight=sample_weight,
            normalizer=normalizer,
            z_loss=z_loss,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            return_stats=return_stats,
            chunk_size=chunk_size,
            validate=validate,
            implementation=implementation,
        )
    head = torch_sharded.describe(
        input,
        linear_weight,
        target,
        linear_bias=linear_bias,
        weight=weight,
        sample_weight=sample_weight,
        normalizer=normalizer,
        options=Options(
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            stats=return_stats,
            validate=validate,
        ),
        chunk_size=chunk_size,
        implementation=implementation,
        group=group,
        class_start=class_start,
        num_classes=num_classes,
        reduce_input_grad=reduce_input_grad,
    )
    loss, stats = torch_sharded.run(head)
    return loss if stats is None else (loss, stats)


def linear_log_prob(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    index: torch.Tensor,
    *,
    linear_bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float | None = None,
    logit_softcap: float | None = None,
    chunk_size: int | None = None,
    validate: bool | None = None,
    implementation: str | None = None,
    group: Any = None,
    class_start: int | None = None,
    num_classes: int | None = None,
    reduce_input_grad: bool = True,
) -> torch.Tensor:
    """Compute the log-probability of one class of each row of a head, also of one over processes.

    Without `group` this is `polyce.linear_log_prob`.

    Parameters
    ----------
    input, linear_weight, index, linear_bias, ignore_index, logit_scale, logit_softcap
        As for `polyce.linear_log_prob`; `index` holds classes of all processes.
    chunk_size, validate, implementation
        As for `polyce.linear_log_prob`.
    group, class_start, num_classes, reduce_input_grad
        As for `linear_cross_entropy`: this process's shard of the classes.

    Returns
    -------
    torch.Tensor
        As `polyce.linear_log_prob` returns it; with `group` the same in every process.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `polyce.linear_log_prob` and `cross_entropy` do.

    Examples
    --------
    >>> import torch
    >>> import polyce.torch
    >>> hidden, head = torch.zeros(2, 3), torch.zeros(4, 3)
    >>> polyce.torch.linear_log_prob(hidden, head, torch.tensor([0, 3]))
    tensor([-1.3863, -1.3863])
    """
    check_tensor(input)
    if group is None:
        check_whole(class_start, num_classes)
        return values.linear_log_prob(
            input,
            linear_weight,
            index,
            linear_bias=linear_bias,
            ignore_index=ignore_index,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            chunk_size=chunk_size,
            validate=validate,
            implementation=implementation,
        )
    check_index_of_head(input, index, validate)
    head = torch_sharded.describe(
        input,
        linear_weight,
        index,
        linear_bias=linear_bias,
        weight=None,
        sample_weight=None,
        normalizer=None,
        options=Options(
            ignore_index=ignore_index,
            reduction="none",
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            validate=validate,
        ),
        chunk_size=chunk_size,
        implementation=implementation,
        group=group,
        class_start=class_start,
        num_classes=num_classes,
        reduce_input_grad=reduce_input_grad,
        label_name="index",
    )
    return 0.0 - torch_sharded.run(head)[0]
