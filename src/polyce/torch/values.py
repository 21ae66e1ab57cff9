"""Log-probabilities and entropies for torch only: of classes over processes too."""

from __future__ import annotations

from typing import Any

import torch

from polyce import values
from polyce.call.options import Options
from polyce.sharded import values as sharded
from polyce.torch.functional import check_tensor, check_whole


def log_prob(
    input: torch.Tensor,
    index: torch.Tensor,
    *,
    axis: int | None = None,
    ignore_index: int = -100,
    logit_scale: float | None = None,
    logit_softcap: float | None = None,
    validate: bool | None = None,
    implementation: str | None = None,
    group: Any = None,
    class_start: int | None = None,
    num_classes: int | None = None,
) -> torch.Tensor:
    """Compute the log-probabilities of chosen classes, in nats, also of classes over processes.

    Without `group` this is `polyce.log_prob`.

    Parameters
    ----------
    input, index, axis, ignore_index, logit_scale, logit_softcap, validate, implementation
        As for `polyce.log_prob`.
    group, class_start, num_classes
        As for `cross_entropy`: `input` is a shard of the classes, `index` holds classes of all.

    Returns
    -------
    torch.Tensor
        As `polyce.log_prob` returns it; with `group` the same in every process.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `polyce.log_prob` and `cross_entropy` do.

    Examples
    --------
    >>> import torch
    >>> import polyce.torch
    >>> polyce.torch.log_prob(torch.zeros(1, 4), torch.tensor([2]))
    tensor([-1.3863])
    """
    check_tensor(input)
    if group is None:
        check_whole(class_start, num_classes)
        return values.log_prob(
            input,
            index,
            axis=axis,
            ignore_index=ignore_index,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            validate=validate,
            implementation=implementation,
        )
    options = Options(
        axis,
        ignore_index,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        validate=validate,
    )
    return sharded.log_prob(
        input,
        index,
        options,
        group=group,
        class_start=class_start,
        num_classes=num_classes,
        implementation=implementation,
    )


def entropy(
    input: torch.Tensor,
    *,
    axis: int | None = None,
    logit_scale: float | None = None,
    logit_softcap: float | None = None,
    implementation: str | None = None,
    group: Any = None,
    class_start: int | None = None,
    num_classes: int | None = None,
) -> torch.Tensor:
    """Compute the entropy of the softmax of each row, in nats, also of classes over processes.

    Without `group` this is `polyce.entropy`.

    Parameters
    ----------
    input, axis, logit_scale, logit_softcap, implementation
        As for `polyce.entropy`.
    group, class_start, num_classes
        As for `cross_entropy`: `input` is a shard of the classes.

    Returns
    -------
    torch.Tensor
        As `polyce.entropy` returns it; with `group` the same in every process.

    Raises
    ------
    TypeError, ValueError
        As `polyce.entropy` and `cross_entropy` do.

    Examples
    --------
    >>> import torch
    >>> import polyce.torch
    >>> polyce.torch.entropy(torch.zeros(1, 4))
    tensor([1.3863])
    """
    check_tensor(input)
    if group is None:
        check_whole(class_start, num_classes)
        return values.entropy(
            input,
            axis=axis,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            implementation=implementation,
        )
    return sharded.entropy(
        input,
        Options(axis, logit_scale=logit_scale, logit_softcap=logit_softcap),
        group=group,
        class_start=class_start,
        num_classes=num_classes,
        implementation=implementation,
    )
