"""The functions: the loss of a linear head, and its gradients, for the arrays of any library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from polyce.arrays import find
from polyce.call.options import Options
from polyce.formula.stats import Stats
from polyce.graphs import rules as derivatives
from polyce.linear import compute, unfused
from polyce.linear.call import HeadCall, check_wrt, describe


def linear_cross_entropy(
    input: Any,
    linear_weight: Any,
    target: Any,
    *,
    linear_bias: Any = None,
    weight: Any = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    sample_weight: Any = None,
    normalizer: Any = None,
    z_loss: float = 0.0,
    logit_scale: float | None = None,
    logit_softcap: float | None = None,
    return_stats: bool | str | Sequence[str] = False,
    chunk_size: int | None = None,
    validate: bool | None = None,
    implementation: str | None = None,
) -> Any:
    """Compute the softmax cross-entropy of a linear head, in nats, without holding its logits.

    It is `cross_entropy` of ``input @ linear_weight.T + linear_bias`` with the classes on the last
    axis. In a language model these logits are the largest array of a training step. Here they are
    computed for some rows at a time and never held whole. `explain` says how many rows.

    Parameters
    ----------
    input : array, shape (F,) or (..., F)
        Hidden states, in float16, bfloat16, float32 or float64.
    linear_weight : array, shape (C, F)
        Weight of the head, of input's dtype, in the layout of torch's linear layers.
    target : array, SparseTarget, TeacherLogits or TeacherHead
        Class indices in 0 to C - 1, of any integer dtype and of input's shape without the last
        axis; or class probabilities, of any floating dtype and with the classes last; or
        probabilities of K classes of each row, with K last; or the logits of a teacher, with the
        classes last; or the head that computes a teacher's logits.
    linear_bias : array, shape (C,), optional
        Bias of the head, of input's dtype.
    weight, reduction, ignore_index, label_smoothing, sample_weight, normalizer, z_loss
        As for `cross_entropy`. Rows that are ignored have no effect, whatever `input` holds there.
    logit_scale, logit_softcap, return_stats, validate
        As for `cross_entropy`.
    chunk_size : int, optional
        How many rows of logits to compute at a time. The default keeps the products fast within 48
        MiB of logits on a CPU, a teacher's included, and is at least 2048 on an accelerator.
    implementation : str, optional
        Name of the implementation that computes the loss of each chunk's logits; see `explain`.

    Returns
    -------
    array
        As `cross_entropy` returns it: without reduction the losses, of input's shape without the
        last axis; else a scalar. The dtype is input's; for probabilities the floating dtypes of
        `input`, `target` and `weight` promote. With `return_stats`, the pair of this and a `Stats`.

    Raises
    ------
    TypeError
        If an argument is of a wrong kind or dtype, if hidden states and head differ in dtype, or if
        the arrays are of several libraries or lie on several devices.
    ValueError
        If a shape or an option does not fit.
    IndexError
        If a class index is out of range.

    See Also
    --------
    linear_cross_entropy_with_grad : The gradients too, without automatic differentiation.
    linear_log_prob : The log-probability of one class of each row.
    cross_entropy : The loss of logits.
    SparseTarget, TeacherLogits, TeacherHead : Targets that are more than one array.

    Notes
    -----
    On torch's graph, and under jax's transformations, the loss and the stats lse and entropy have
    gradients with respect to `input`, `linear_weight` and `linear_bias`. Those of the loss are
    computed together with it, while a chunk's logits exist. The logits are computed a second time
    for reduction 'none'; on torch if a gradient flows into a stat; and on jax if lse or entropy is
    asked for. The other stats cost nothing in the backward pass.

    Products are computed in input's dtype or, under torch's autocast, in its dtype. 16-bit products
    are computed in float32, except in torch on an accelerator, and in bfloat16 on a CPU. Sums over
    chunks are at least float32.

    Examples
    --------
    >>> import numpy as np
    >>> import polyce
    >>> hidden = np.array([[1.0, 2.0], [0.5, -1.0]])
    >>> head = np.array([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> labels = np.array([2, 0])
    >>> print(round(polyce.linear_cross_entropy(hidden, head, labels), 6))
    0.4289
    >>> print(round(polyce.cross_entropy(hidden @ head.T, labels), 6))
    0.4289
    >>> _, stats = polyce.linear_cross_entropy(hidden, head, labels, return_stats="correct")
    >>> print(stats.correct)
    [ True  True]
    """
    options = Options(
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        stats=return_stats,
        validate=validate,
    )
    given = {
        "linear_bias": linear_bias,
        "weight": weight,
        "sample_weight": sample_weight,
        "normalizer": normalizer,
        "options": options,
        "chunk_size": chunk_size,
        "implementation": implementation,
    }
    if find.is_dtensor(input) or find.is_dtensor(linear_weight):
        from polyce.linear import torch_mesh

        loss, stats = torch_mesh.loss(run, input, linear_weight, target, **given)
    else:
        loss, stats = run(describe(input, linear_weight, target, **given))
    return loss if stats is None else (loss, stats)


def run(call: HeadCall) -> tuple[Any, Stats | None]:
    """Compute the loss of a call, and the stats."""
    check(call)
    return rules(call).loss(call)


def linear_cross_entropy_with_grad(
    input: Any,
    linear_weight: Any,
    target: Any,
    *,
    linear_bias: Any = None,
    weight: Any = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    sample_weight: Any = None,
    normalizer: Any = None,
    z_loss: float = 0.0,
    logit_scale: float | None = None,
    logit_softcap: float | None = None,
    return_stats: bool | str | Sequence[str] = False,
    chunk_size: int | None = None,
    validate: bool | None = None,
    implementation: str | None = None,
    wrt: str | Sequence[str] = ("input", "linear_weight", "linear_bias"),
    grad_output: Any = None,
    grad_stats: Mapping[str, Any] | None = None,
) -> tuple[Any, ...]:
    """Compute the softmax cross-entropy of a linear head and its gradients, without its logits.

    The gradients need no automatic differentiation, so every library has them. With G the gradient
    with respect to the logits, as `cross_entropy_with_grad` returns it, they are ``G @
    linear_weight``, ``G.T @ input`` and the sum of G over the rows. G includes the gradients of the
    stats lse and entropy, times `grad_stats`.

    Parameters
    ----------
    input, linear_weight, target, linear_bias
        As for `linear_cross_entropy`.
    weight, reduction, ignore_index, label_smoothing, sample_weight, normalizer, z_loss
        As for `cross_entropy`.
    logit_scale, logit_softcap, return_stats, validate
        As for `cross_entropy`.
    chunk_size, implementation
        As for `linear_cross_entropy`.
    wrt : str or tuple of str
        What to differentiate with respect to: one or several of 'input', 'linear_weight' and
        'linear_bias'. The other gradients are not computed.
    grad_output : array or float, optional
        The gradient with respect to the loss, as for `cross_entropy_with_grad`; 1 by default.
    grad_stats : mapping, optional
        The gradients with respect to stats, as for `cross_entropy_with_grad`; 0 by default.

    Returns
    -------
    loss : array
        As `linear_cross_entropy` returns it.
    gradients : tuple of three arrays or None
        Of `input`, `linear_weight` and `linear_bias`, each of its shape and dtype; None for what is
        not in `wrt`, and for an absent bias. No result is part of a torch or jax graph.
    stats : Stats
        Only with `return_stats`.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `linear_cross_entropy` does.

    Examples
    --------
    >>> import numpy as np
    >>> import polyce
    >>> hidden, head = np.array([[1.0, 2.0]]), np.zeros((2, 2))
    >>> loss, (d_hidden, d_head, d_bias) = polyce.linear_cross_entropy_with_grad(
    ...     hidden, head, np.array([0]), wrt="linear_weight"
    ... )
    >>> print(round(loss, 6), d_hidden, d_bias)
    0.693147 None None
    >>> print(d_head)
    [[-0.5 -1. ]
     [ 0.5  1. ]]
    >>> loss, (d_hidden, d_head, _), stats = polyce.linear_cross_entropy_with_grad(
    ...     hidden,
    ...     head,
    ...     np.array([0]),
    ...     grad_output=0.0,
    ...     return_stats="lse",
    ...     grad_stats={"lse": np.array([1.0])},
    ... )
    >>> print(d_head)
    [[0.5 1. ]
     [0.5 1. ]]
    """
    wanted = check_wrt(wrt)
    options = Options(
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        stats=return_stats,
        validate=validate,
    )
    given = {
        "linear_bias": linear_bias,
        "weight": weight,
        "sample_weight": sample_weight,
        "normalizer": normalizer,
        "options": options,
        "chunk_size": chunk_size,
        "implementation": implementation,
        "grad_output": grad_output,
        "grad_stats": grad_stats,
    }
    if find.is_dtensor(input) or find.is_dtensor(linear_weight):
        from polyce.linear import torch_mesh

        result, gradients, stats = torch_mesh.loss_and_gradients(
            run, input, linear_weight, target, wanted, **given
        )
    else:
        call = describe(input, linear_weight, target, **given)
        if call.head.bias is None:
            wanted = wanted._replace(linear_bias=False)
        call = call.detached(derivatives.of(call.whole.backend).detach)
        result, gradients, stats = rules(call).loss_and_gradients(call, wanted)
    found = (result, tuple(gradients))
    return found if stats is None else (*found, stats)


def check(call: HeadCall, *, on_graph: bool = True) -> None:
    """Refuse torch tensors that require a gradient which is not computed here."""
    if on_graph and call.whole.backend == "torch":
        from polyce.linear import torch_rule

        torch_rule.check(call)


def _torch(call: HeadCall) -> ModuleType:
    from polyce.linear import torch_rule

    return torch_rule if torch_rule.is_needed(call) else compute


def _jax(call: HeadCall) -> ModuleType:
    from polyce.linear import jax_rule

    return jax_rule


def _dask(call: HeadCall) -> ModuleType:
    from polyce.linear import dask_rule

    return dask_rule


_RULES = {"torch": _torch, "jax": _jax, "dask": _dask}


def rules(call: HeadCall) -> ModuleType:
    """Return the module that computes a call; all have the same two functions."""
    if unfused.is_wanted(call.whole):
        return unfused
    own = _RULES.get(call.whole.backend)
    return compute if own is None else own(call)
