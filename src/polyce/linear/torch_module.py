"""The loss of a linear head as a module, which owns the head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from polyce.call.options import shown
from polyce.call.target import SparseTarget, TeacherHead, TeacherLogits
from polyce.linear.functional import linear_cross_entropy

LEAF = "torch.nn"
"""The `__module__` by which torch.fx knows modules that it should not trace into."""


class LinearCrossEntropyLoss(torch.nn.Module):
    """A linear head and its softmax cross-entropy, in place of ``torch.nn.LinearCrossEntropyLoss``.

    The head is a ``torch.nn.Linear``, under the same name as in torch's module: a checkpoint of
    either loads into the other. Options are checked in the call.

    Parameters
    ----------
    in_features : int
        F, the length of a hidden state.
    num_classes : int
        C.
    bias : bool, default False
        Whether the head has a bias.
    device, dtype
        Of the head's parameters.
    reduction, weight, ignore_index, label_smoothing
        As for `polyce.linear_cross_entropy`.
    z_loss, logit_scale, logit_softcap, return_stats, chunk_size, validate, implementation
        As for `polyce.linear_cross_entropy`.

    Attributes
    ----------
    linear : torch.nn.Linear
        The head. To tie its weight to that of an embedding, assign ``linear.weight``.
    weight : torch.Tensor or None
        Weight of each class, a buffer: it moves and is cast with the module.
    reduction, ignore_index, label_smoothing, z_loss, logit_scale, logit_softcap
        As given; they may be assigned.
    return_stats, chunk_size, validate, implementation
        As given; they may be assigned.

    See Also
    --------
    polyce.linear_cross_entropy : The same for the arrays of any library, with any head.

    Notes
    -----
    There is no ``out_features``: for a head of several outputs call it once for each. Hidden states
    may have any axes before their last. torch's ``options`` choose chunks, as `chunk_size` does.

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
    ) -> None:
        super().__init__()
        if type(self) is LinearCrossEntropyLoss:
            self.__module__ = LEAF
        self.linear = torch.nn.Linear(
            in_features, num_classes, bias=bias, device=device, dtype=dtype
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
        )

    def extra_repr(self) -> str:
        """Show the options that are not at their default."""
        return shown(self, LinearCrossEntropyLoss)
