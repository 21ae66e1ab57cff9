"""The losses as objects that keep their options, for the arrays of any library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polyce.call.options import current_reduction, refuse_dim, shown
from polyce.functional import cross_entropy, nll_loss


class CrossEntropyLoss:
    """Softmax cross-entropy with its options kept: call it with logits and a target.

    The constructor, the attributes and the call are those of ``torch.nn.CrossEntropyLoss``, and as
    there, the options are checked at each call. Pass arrays that change from batch to batch to the
    call: ``loss(input, target, sample_weight=..., normalizer=...)``.

    Parameters
    ----------
    weight, size_average, ignore_index, reduce, reduction, label_smoothing
        As for `cross_entropy`. The deprecated pair is folded into `reduction` here.
    axis, z_loss, logit_scale, logit_softcap, return_stats, validate, implementation, dim
        As for `cross_entropy`.

    Attributes
    ----------
    weight : array or None
        Weight of each class.
    ignore_index : int
        Class index of the rows to leave out.
    reduction : str
        One of 'mean', 'sum' and 'none'.
    label_smoothing : float
        Share of the target that is spread evenly over all classes.
    axis, z_loss, logit_scale, logit_softcap, return_stats, validate, implementation
        As given.

    Examples
    --------
    >>> import numpy as np
    >>> import polyce
    >>> loss = polyce.CrossEntropyLoss(label_smoothing=0.1)
    >>> print(round(loss(np.array([[2.0, 0.0]]), np.array([0])), 6))
    0.226928
    """

    def __init__(
        self,
        weight: Any = None,
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
    ) -> None:
        if dim is not None:
            raise refuse_dim()
        self.weight = weight
        self.ignore_index = ignore_index
        if size_average is not None or reduce is not None:
            reduction = current_reduction(size_average, reduce, reduction)
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.axis = axis
        self.z_loss = z_loss
        self.logit_scale = logit_scale
        self.logit_softcap = logit_softcap
        self.return_stats = return_stats
        self.validate = validate
        self.implementation = implementation

    def __call__(
        self, input: Any, target: Any, *, sample_weight: Any = None, normalizer: Any = None
    ) -> Any:
        """Compute the loss of logits against a target, as `cross_entropy` does."""
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=current_reduction(None, None, self.reduction),
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
        )

    def __repr__(self) -> str:
        """Show the options that are not at their default."""
        return f"CrossEntropyLoss({shown(self, CrossEntropyLoss)})"


class NLLLoss:
    """Negative log-likelihood with its options kept: call it with log-probabilities and labels.

    The constructor, the attributes and the call are those of ``torch.nn.NLLLoss``.

    Parameters
    ----------
    weight, size_average, ignore_index, reduce, reduction
        As for `nll_loss`. The deprecated pair is folded into `reduction` here.
    axis, validate, dim
        As for `nll_loss`.

    Attributes
    ----------
    weight : array or None
        Weight of each class.
    ignore_index : int
        Class index of the rows to leave out.
    reduction : str
        One of 'mean', 'sum' and 'none'.
    axis, validate
        As given.

    Examples
    --------
    >>> import numpy as np
    >>> import polyce
    >>> loss = polyce.NLLLoss()
    >>> print(round(loss(np.log(np.array([[0.5, 0.5]])), np.array([0])), 6))
    0.693147
    """

    def __init__(
        self,
        weight: Any = None,
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
        self.weight = weight
        self.ignore_index = ignore_index
        if size_average is not None or reduce is not None:
            reduction = current_reduction(size_average, reduce, reduction)
        self.reduction = reduction
        self.axis = axis
        self.validate = validate

    def __call__(
        self, input: Any, target: Any, *, sample_weight: Any = None, normalizer: Any = None
    ) -> Any:
        """Compute the loss of log-probabilities against labels, as `nll_loss` does."""
        return nll_loss(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=current_reduction(None, None, self.reduction),
            axis=self.axis,
            sample_weight=sample_weight,
            normalizer=normalizer,
            validate=self.validate,
        )

    def __repr__(self) -> str:
        """Show the options that are not at their default."""
        return f"NLLLoss({shown(self, NLLLoss)})"
