"""The losses as modules, which keep their options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from polyce import functional
from polyce.call.options import refuse_dim, shown
from polyce.call.target import SparseTarget, TeacherLogits
from polyce.torch.functional import check_tensor, cross_entropy

LEAF = "torch.nn"
"""The `__module__` by which torch.fx knows modules that it should not trace into."""


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """Softmax cross-entropy as a module, in place of ``torch.nn.CrossEntropyLoss``.

    It is a subclass of torch's, and ``state_dict`` has the same entries, so that a checkpoint of
    either loads into the other. As in torch, options are checked in the call.

    Parameters
    ----------
    weight, size_average, ignore_index, reduce, reduction, label_smoothing
        As for ``torch.nn.CrossEntropyLoss``; see `polyce.cross_entropy`.
    axis, z_loss, logit_scale, logit_softcap, return_stats, validate, implementation, dim
        As for `polyce.cross_entropy`.
    inplace_backward
        As for `cross_entropy`, which says when the logits may be read.
    group, class_start, num_classes
        As for `cross_entropy`: this process's shard of the classes.

    Attributes
    ----------
    weight : torch.Tensor or None
        Weight of each class, a buffer: it moves and is cast with the module.
    ignore_index, reduction, label_smoothing, axis, z_loss, logit_scale, logit_softcap
        As given; they may be assigned.
    return_stats, validate, implementation, inplace_backward, group, class_start, num_classes
        As given; they may be assigned.

    See Also
    --------
    polyce.CrossEntropyLoss : The same for the arrays of any library; not a module.

    Examples
    --------
    >>> import torch
    >>> import polyce.torch
    >>> criterion = polyce.torch.CrossEntropyLoss(label_smoothing=0.1)
    >>> isinstance(criterion, torch.nn.CrossEntropyLoss)
    True
    >>> logits = torch.tensor([[2.0, 0.0]], requires_grad=True)
    >>> criterion(logits, torch.tensor([0])).backward()
    >>> logits.grad
    tensor([[-0.0692,  0.0692]])
    """

    __constants__ = [  # noqa: RUF012 - as torch's own
        *torch.nn.CrossEntropyLoss.__constants__,
        *("axis", "z_loss", "logit_scale", "logit_softcap", "return_stats"),
        *("validate", "implementation", "inplace_backward"),
        *("group", "class_start", "num_classes"),
    ]

    def __init__(
        self,
        weight: torch.Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        axis: int | None = None,
        z_loss: float = 0.0,
        logit_scale: float | None = None,
        logit_softcap: float | None = None,
        return_stats: bool | str | Sequence[str] = False,
        validate: bool | None = None,
        implementation: str | None = None,
        dim: None = None,
        inplace_backward: bool = False,
        group: Any = None,
        class_start: int | None = None,
        num_classes: int | None = None,
    ) -> None:
        if dim is not None:
            raise refuse_dim()
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        if type(self) is CrossEntropyLoss:
            self.__module__ = LEAF
        self.axis = axis
        self.z_loss = z_loss
        self.logit_scale = logit_scale
        self.logit_softcap = logit_softcap
        self.return_stats = return_stats
        self.validate = validate
        self.implementation = implementation
        self.inplace_backward = inplace_backward
        self.group = group
        self.class_start = class_start
        self.num_classes = num_classes

    def forward(
        self,
        input: torch.Tensor,
        target: torch.Tensor | SparseTarget | TeacherLogits,
        *,
        sample_weight: torch.Tensor | None = None,
        normalizer: float | torch.Tensor | None = None,
    ) -> Any:
        """Compute the loss of logits against a target, as `cross_entropy` does."""
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            axis=self.axis,
            sample_weight=sample_weight,
            normalizer=normalizer,
            z_loss=self.z_loss,
            logit_scale=self.logit_scale,
            logit_softcap=self.logit_softcap,
            return_stats=self.return_stats,
            validate=self.validate,
            implementation=self.implementation,
            inplace_backward=self.inplace_backward,
            group=self.group,
            class_start=self.class_start,
            num_classes=self.num_classes,
        )

    def extra_repr(self) -> str:
        """Show the options that are not at their default."""
        return shown(self, CrossEntropyLoss)


class NLLLoss(torch.nn.NLLLoss):
    """Negative log-likelihood as a module, in place of ``torch.nn.NLLLoss``.

    It is a subclass of torch's. There is no ``inplace_backward``: the backward pass of the
    log_softmax before it needs the log-probabilities that would be overwritten.

    Parameters
    ----------
    weight, size_average, ignore_index, reduce, reduction
        As for ``torch.nn.NLLLoss``; see `polyce.nll_loss`.
    axis, validate, dim
        As for `polyce.nll_loss`.

    Attributes
    ----------
    weight : torch.Tensor or None
        Weight of each class, a buffer: it moves and is cast with the module.
    ignore_index, reduction, axis, validate
        As given; they may be assigned.

    See Also
    --------
    polyce.NLLLoss : The same for the arrays of any library; not a module.

    Examples
    --------
    >>> import torch
    >>> import polyce.torch
    >>> criterion = polyce.torch.NLLLoss(reduction="sum")
    >>> criterion(torch.log(torch.tensor([[0.5, 0.5]])), torch.tensor([0]))
    tensor(0.6931)
    """

    __constants__ = [*torch.nn.NLLLoss.__constants__, "axis", "validate"]  # noqa: RUF012

    def __init__(
        self,
        weight: torch.Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        *,
        axis: int | None = None,
        validate: bool | None = None,
        dim: None = None,
    ) -> None:
        if dim is not None:
            raise refuse_dim()
        super().__init__(weight, size_average, ignore_index, reduce, reduction)
        if type(self) is NLLLoss:
            self.__module__ = LEAF
        self.axis = axis
        self.validate = validate

    def forward(
        self,
        input: torch.Tensor,
        target: torch.Tensor,
        *,
        sample_weight: torch.Tensor | None = None,
        normalizer: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the loss of log-probabilities against labels, as `polyce.nll_loss` does."""
        check_tensor(input)
        return functional.nll_loss(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            axis=self.axis,
            sample_weight=sample_weight,
            normalizer=normalizer,
            validate=self.validate,
        )

    def extra_repr(self) -> str:
        """Show the options that are not at their default."""
        return shown(self, NLLLoss)
