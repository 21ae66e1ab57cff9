"""The loss of a linear head as a module, which owns the head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from polyce.call.options import shown
from polyce.call.target import SparseTarget, TeacherHead, TeacherLogits
from polyce.sharded.call import check_group
from polyce.torch.linear import linear_cross_entropy
from polyce.torch.modules import LEAF


class LinearCrossEntropyLoss(torch.nn.Module):
    """A linear head and its softmax cross-entropy, in place of ``torch.nn.LinearCrossEntropyLoss``.

    The head is a ``torch.nn.Linear``, under the same name as in torch's module: a checkpoint of
    either loads into the other. Options are checked in the call.

    Parameters
    ----------
    in_features : int
        F, the length of a hidden state.
    num_classes : int
        C, also where the head has some of the classes only.
    bias : bool, default False
        Whether the head has a bias.
    device, dtype
        Of the head's parameters.
    reduction, weight, ignore_index, label_smoothing
        As for `polyce.linear_cross_entropy`.
    z_loss, logit_scale, logit_softcap, return_stats, chunk_size, validate, implementation
        As for `polyce.linear_cross_entropy`.
    group : torch.distributed.ProcessGroup, optional
        The processes that hold the classes of the same rows: the head has this one's, and calls
        are those of `linear_cross_entropy` with a group.
    class_start, width : int, optional
        With `group`: the first class of this process, and how many it has. By default all have
        equally many, in the order of the processes, and C has to be a multiple of their number.
    reduce_input_grad
        As for `linear_cross_entropy`.

    Attributes
    ----------
    linear : torch.nn.Linear
        The head. To tie its weight to that of an embedding, assign ``linear.weight``. With `group`
        it is that of this process, and so is what ``state_dict`` holds.
    weight : torch.Tensor or None
        Weight of each class, a buffer: it moves and is cast with the module.
    reduction, ignore_index, label_smoothing, z_loss, logit_scale, logit_softcap
        As given; they may be assigned.
    return_stats, chunk_size, validate, implementation, reduce_input_grad
        As given; they may be assigned.
    group, class_start, width
        Which classes the head has, None without a group.

    See Also
    --------
    polyce.linear_cross_entropy : The same for the arrays of any library, with any head.

    Notes
    -----
    There is no ``out_features``: for a head of several outputs call it once for each. Hidden states
    may have any axes before their last. torch's ``options`` choose chunks, as `chunk_size` does.

    A head may also be a DTensor, as ``parallelize_module`` makes it of ``linear``; then there is no
    `group`. With one, seed each process differently before, or all shards begin alike.

    Examples
    --------
    >>> import torch
    >>> import polyce.torch
    >>> criterion = polyce.torch.LinearCrossEntropyLoss(4, 10)
    >>> hidden = torch.zeros(2, 4, requires_grad=True)
    >>> criterion(hidden, torch.tensor([3, 1]))
    tensor(2.3026, grad_fn=<_LossBackward>)
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
        reduction: str = "mean",
        weight: torch.Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        logit_scale: float | None = None,
        logit_softcap: float | None = None,
        return_stats: bool | str | Sequence[str] = False,
        chunk_size: int | None = None,
        validate: bool | None = None,
        implementation: str | None = None,
        group: Any = None,
        class_start: int | None = None,
        width: int | None = None,
        reduce_input_grad: bool = True,
    ) -> None:
        super().__init__()
        if group is not None:
            check_group(group)
            class_start, width = _range(group, num_classes, class_start, width)
        elif class_start is not None or width is not None:
            raise ValueError(
                "class_start and width say which classes a process of group= holds, got no group; "
                "pass the process group, or leave them out"
            )
        if type(self) is LinearCrossEntropyLoss:
            self.__module__ = LEAF
        self.linear = torch.nn.Linear(
            in_features,
            num_classes if width is None else width,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.weight: torch.Tensor | None
        self.register_buffer("weight", weight)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.logit_scale = logit_scale
        self.logit_softcap = logit_softcap
        self.return_stats = return_stats
        self.chunk_size = chunk_size
        self.validate = validate
        self.implementation = implementation
        self.group = group
        self.class_start = class_start
        self.width = width
        self.reduce_input_grad = reduce_input_grad
        self._num_classes = None if group is None else num_classes

    def forward(
        self,
        input: torch.Tensor,
        target: torch.Tensor | SparseTarget | TeacherLogits | TeacherHead,
        *,
        sample_weight: torch.Tensor | None = None,
        normalizer: float | torch.Tensor | None = None,
    ) -> Any:
        """Compute the loss of hidden states against a target, as `linear_cross_entropy` does."""
        return linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            sample_weight=sample_weight,
            normalizer=normalizer,
            z_loss=self.z_loss,
            logit_scale=self.logit_scale,
            logit_softcap=self.logit_softcap,
            return_stats=self.return_stats,
            chunk_size=self.chunk_size,
            validate=self.validate,
            implementation=self.implementation,
            group=self.group,
            class_start=self.class_start,
            num_classes=self._num_classes,
            reduce_input_grad=self.reduce_input_grad,
        )

    def extra_repr(self) -> str:
        """Show the options that are not at their default."""
        return shown(self, LinearCrossEntropyLoss)


def _range(
    group: Any, num_classes: int, class_start: int | None, width: int | None
) -> tuple[int, int]:
    """Return the first class of this process and how many it has."""
    if class_start is not None and width is not None:
        return class_start, width
    if class_start is not None or width is not None:
        missing = "class_start" if class_start is None else "width"
        raise ValueError(
            "class_start and width must be given together, or neither for equal shards, got no "
            f"{missing}; pass the first class of this process and how many it has"
        )
    width, rest = divmod(num_classes, group.size())
    if rest:
        raise ValueError(
            f"num_classes must be a multiple of the {group.size()} processes of the group, got "
            f"{num_classes}; pass class_start= and width= for shards of other widths"
        )
    return group.rank() * width, width
