"""Values of the rows of a linear head other than a loss: log-probabilities."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from polyce.arrays import find
from polyce.call.index import check_index_of_head
from polyce.call.options import Options
from polyce.linear.call import HeadCall, describe
from polyce.linear.functional import run


def linear_log_prob(
    input: Any,
    linear_weight: Any,
    index: Any,
    *,
    linear_bias: Any = None,
    ignore_index: int = -100,
    logit_scale: float | None = None,
    logit_softcap: float | None = None,
    chunk_size: int | None = None,
    validate: bool | None = None,
    implementation: str | None = None,
) -> Any:
    """Compute the log-probability of one class of each row of a linear head, in nats.

    It is `log_prob` of ``input @ linear_weight.T + linear_bias`` with the classes on the last axis,
    which is minus the loss of `linear_cross_entropy` without reduction. Only the logits of some
    rows exist at a time.

    Parameters
    ----------
    input, linear_weight, linear_bias
        As for `linear_cross_entropy`.
    index : array
        One class for each row, in 0 to C - 1, of any integer dtype and of input's shape without the
        last axis.
    ignore_index : int, default -100
        Where `index` is this number the result is 0 and passes no gradient back.
    logit_scale, logit_softcap
        As for `cross_entropy`.
    chunk_size
        As for `linear_cross_entropy`.
    validate
        As for `log_prob`.
    implementation
        As for `linear_cross_entropy`.

    Returns
    -------
    array
        Of index's shape and input's dtype. On torch and jax it has gradients with respect to
        `input`, `linear_weight` and `linear_bias`, for which the logits are computed again.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `linear_cross_entropy` does; an IndexError for a class that is out of range.

    See Also
    --------
    log_prob : The same for logits, and for several classes of each row.
    linear_cross_entropy : With ``return_stats="entropy"``, losses and entropy from one pass.

    Examples
    --------
    >>> import numpy as np
    >>> import polyce
    >>> hidden = np.array([[1.0, 2.0], [0.5, -1.0]])
    >>> head = np.array([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> print(polyce.linear_log_prob(hidden, head, np.array([2, 0])).round(4))
    [-0.5514 -0.3064]
    >>> print(polyce.log_prob(hidden @ head.T, np.array([2, 0])).round(4))
    [-0.5514 -0.3064]
    """
    options = Options(
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        validate=validate,
    )
    given: dict[str, Any] = {
        "linear_bias": linear_bias,
        "options": options,
        "chunk_size": chunk_size,
        "implementation": implementation,
    }
    if find.is_dtensor(input) or find.is_dtensor(linear_weight):
        from polyce.linear import torch_mesh
        from polyce.sharded import layout

        check_index_of_head(layout.whole(input), layout.whole(index), validate)
        for name in ("weight", "sample_weight", "normalizer"):
            given[name] = None
        given["options"] = options._replace(reduction="none")
        losses, _ = torch_mesh.loss(run, input, linear_weight, index, **given, label_name="index")
        return 0.0 - losses
    call = describe_log_prob(input, linear_weight, index, **given)
    losses, _ = run(call)
    with call.whole.library.quiet():
        return call.whole.library.cast(0.0 - losses, losses.dtype)


def describe_log_prob(
    input: Any,
    linear_weight: Any,
    index: Any,
    *,
    linear_bias: Any,
    options: Options,
    chunk_size: int | None,
    implementation: str | None,
) -> HeadCall:
    """Check the arguments of `linear_log_prob`; return the call for the losses of the rows."""
    check_index_of_head(input, index, options.validate)
    call = describe(
        input,
        linear_weight,
        index,
        linear_bias=linear_bias,
        weight=None,
        sample_weight=None,
        normalizer=None,
        options=options._replace(reduction="none"),
        chunk_size=chunk_size,
        implementation=implementation,
    )
    return replace(call, whole=call.whole._replace(label_name="index"))
