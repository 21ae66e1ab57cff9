"""Values of each row other than a loss: log-probabilities and the entropy of the softmax."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeVar

from polyce.arrays import find
from polyce.arrays.library import expand
from polyce.call.index import describe_index, has_many, of_entries
from polyce.call.options import Options, refuse_dim
from polyce.call.problem import Problem, describe_logits
from polyce.formula import labels, transform
from polyce.functional import cross_entropy
from polyce.graphs import rules
from polyce.implementations.registry import select_log_softmax

ArrayT = TypeVar("ArrayT")


def log_prob(
    input: Any,
    index: Any,
    *,
    axis: int | None = None,
    ignore_index: int = -100,
    logit_scale: float | None = None,
    logit_softcap: float | None = None,
    validate: bool | None = None,
    implementation: str | None = None,
) -> Any:
    r"""Compute the log-probabilities of chosen classes, in nats.

    For class j of a row x it is :math:`x_j - \log \sum_c e^{x_c}`, accurate near 0 too. On torch
    and jax it has its gradient, :math:`[c = j] - p_c` for the softmax p. The function makes no
    array of all log-probabilities.

    Parameters
    ----------
    input : array, shape (C,), (N, C) or (N, C, d1, ..., dK)
        Logits, in float16, bfloat16, float32 or float64. The 16-bit ones are computed in float32.
    index : array
        Classes in 0 to C - 1, of any integer dtype: one for each row, of input's shape without the
        class axis; or K for each row, with K in the place of C on the class axis, as for a gather.
    axis : int, optional
        The class axis of `input`; 1 by default, or 0 if there is only one.
    ignore_index : int, default -100
        Where `index` is this number the result is 0 and passes no gradient back.
    logit_scale, logit_softcap
        As for `cross_entropy`: x is what they make of the logits.
    validate : bool, optional
        As for `cross_entropy`. Where the index is not checked, a class that is out of range gives
        nan.
    implementation : str, optional
        Name of the implementation to run; an error if it cannot. See `explain`.

    Returns
    -------
    array
        Of index's shape and input's dtype.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `cross_entropy` does; an IndexError for a class that is out of range.

    See Also
    --------
    log_softmax : The log-probabilities of all classes.
    entropy : The entropy of each row.

    Examples
    --------
    >>> import numpy as np
    >>> import polyce
    >>> logits = np.array([[0.0, 40.0, 1.0], [2.0, 2.0, 2.0]])
    >>> print(polyce.log_prob(logits, np.array([1, -100])))
    [-1.57965784e-17  0.00000000e+00]
    >>> print(polyce.log_prob(logits, np.array([[0, 1], [2, 0]])))
    [[-4.00000000e+01 -1.57965784e-17]
     [-1.09861229e+00 -1.09861229e+00]]
    """
    given: dict[str, Any] = {
        "axis": axis,
        "ignore_index": ignore_index,
        "logit_scale": logit_scale,
        "logit_softcap": logit_softcap,
        "validate": validate,
    }
    if find.is_dtensor(input):
        from polyce.sharded import dtensors

        return dtensors.log_prob(log_prob, input, index, given, implementation)
    options = Options(**given)
    problem, logits, own = describe_index(input, index, options)
    with problem.library.computing({"input": logits, "index": own}):
        if not has_many(problem, own):
            return _of_one(problem, logits, index, implementation)
        if own.shape[problem.axis] == 0:
            return logits[(*(slice(None),) * problem.axis, slice(0), ...)]
        if problem.library.is_lazy or not hasattr(problem.xp, "take_along_axis"):
            return _one_by_one(problem, logits, index, implementation)
        return _of_many(problem, logits, index, implementation)


def entropy(
    input: Any,
    *,
    axis: int | None = None,
    logit_scale: float | None = None,
    logit_softcap: float | None = None,
    implementation: str | None = None,
) -> Any:
    r"""Compute the entropy of the softmax of each row, in nats.

    For a row x with the softmax p it is :math:`H = -\sum_c p_c \log p_c`. On torch and jax it has
    its gradient, :math:`p_c (\mathrm{lse} - x_c - H)`.

    Parameters
    ----------
    input : array, shape (C,), (N, C) or (N, C, d1, ..., dK)
        Logits, in float16, bfloat16, float32 or float64. The 16-bit ones are computed in float32.
    axis : int, optional
        The class axis of `input`; 1 by default, or 0 if there is only one.
    logit_scale, logit_softcap
        As for `cross_entropy`: x is what they make of the logits.
    implementation : str, optional
        Name of the implementation to run; an error if it cannot. See `explain`.

    Returns
    -------
    array
        Of input's shape without the class axis and input's dtype; nan where a row has no softmax.

    Raises
    ------
    TypeError, ValueError
        As `cross_entropy` does.

    See Also
    --------
    cross_entropy : With ``return_stats="entropy"``, loss and entropy from one pass.

    Examples
    --------
    >>> import numpy as np
    >>> import polyce
    >>> print(polyce.entropy(np.array([[0.0, 0.0], [0.0, 40.0]])))
    [6.93147181e-01 1.74182524e-16]
    """
    given: dict[str, Any] = {
        "axis": axis,
        "logit_scale": logit_scale,
        "logit_softcap": logit_softcap,
    }
    if find.is_dtensor(input):
        from polyce.sharded import dtensors

        return dtensors.entropy(entropy, input, given, implementation)
    problem, logits = describe_logits(input, Options(**given))
    library = problem.library
    with library.computing({"input": logits}):
        anything = any_labels(problem, logits)
    _, stats = cross_entropy(
        logits,
        anything,
        return_stats="entropy",
        implementation=implementation,
        **_options(problem),
    )
    return library.cast(stats.entropy, library.result_dtype(problem.logits_dtype, logits))


def any_labels(problem: Problem, logits: Any) -> Any:
    """Return labels that are in range, for calls whose loss is not used."""
    library, xp = problem.library, problem.xp
    if not problem.classes:
        where = library.device(logits)
        device = {} if where is None else {"device": where}
        return xp.full(problem.row_shape, -100, dtype=library.label_dtype(logits), **device)
    # Made from the logits, so that they lie, are cut and are traced alike.
    first = library.first_class(logits, problem.axis)
    return library.cast(first < first, library.label_dtype(first))


def _options(problem: Problem) -> dict[str, Any]:
    """Return what every loss here is asked for."""
    options = problem.options
    return {
        "reduction": "none",
        "axis": problem.axis,
        "logit_scale": options.logit_scale,
        "logit_softcap": options.logit_softcap,
    }


def _of_one(problem: Problem, logits: Any, index: Any, implementation: str | None) -> Any:
    """Compute the log-probability of one class of each row: minus its loss."""
    if problem.check_labels:
        # For an error that speaks of the index.
        labels.read(problem, index, logits)
    loss = cross_entropy(
        logits,
        index,
        ignore_index=problem.options.ignore_index,
        validate=problem.options.validate,
        implementation=implementation,
        **_options(problem),
    )
    return problem.library.cast(0.0 - loss, loss.dtype)


def _one_by_one(problem: Problem, logits: Any, index: Any, implementation: str | None) -> Any:
    """Compute those of K classes where a gather of several is missing, or computed in chunks."""
    before = (slice(None),) * problem.axis
    found = [
        _of_one(problem, logits, index[(*before, k, ...)], implementation)
        for k in range(index.shape[problem.axis])
    ]
    return problem.xp.stack(found, axis=problem.axis)


class _Parts(NamedTuple):
    """What the log-probabilities of K classes are made of, with the class axis."""

    surprise: Any
    """lse - x_k of the likeliest class k"""
    lse: Any
    chosen: Any
    """The logits of the chosen classes."""
    likeliest: Any
    """The logit of k."""


def _of_many(problem: Problem, logits: Any, index: Any, implementation: str | None) -> Any:
    """Compute those of K classes: (x_j - x_k) - h for the likeliest class k, -h for k itself.

    h is the loss of k, whose derivative keeps its digits at k; at the others that of lse does.
    """
    xp, library, axis = problem.xp, problem.library, problem.axis
    result_dtype = library.result_dtype(problem.logits_dtype, logits)
    wide = library.cast(logits, problem.arithmetic_dtype)
    label, kept, invalid = (
        None if array is None else xp.squeeze(array, axis=index.ndim)
        for array in labels.read(of_entries(problem, index), index, logits)
    )
    if problem.is_empty:
        # Without classes there is no softmax.
        undefined = xp.sum(wide, axis=axis, keepdims=True) + math.nan
        kept = label == 0 if kept is None else kept
        return library.cast(xp.where(kept, undefined, 0.0), result_dtype)
    top = library.argmax(wide, axis)
    target = top
    if kept is not None:
        # A row of which nothing is asked passes nothing back.
        target = xp.where(xp.any(kept, axis=axis, keepdims=True), top, -100)
    autograd = rules.of(problem.backend)
    differentiates = autograd is not rules.NONE
    found = cross_entropy(
        wide,
        xp.squeeze(target, axis=axis),
        return_stats="lse" if differentiates else False,
        implementation=implementation,
        **_options(problem),
    )
    loss, lse = (found[0], found[1].lse) if differentiates else (found, None)

    def by_row(rows: Any) -> Any:
        return library.cast(expand(rows, axis), problem.row_dtype)

    def picked(classes: Any) -> Any:
        return library.cast(library.pick(wide, classes, wide, axis), problem.row_dtype)

    parts = _Parts(by_row(loss), None if lse is None else by_row(lse), picked(label), picked(top))
    fixed = autograd.detach(parts)
    others = _gaps(problem, parts, fixed) - fixed.surprise
    if differentiates:
        others = others - (parts.lse - fixed.lse)
    values = xp.where(label == top, -parts.surprise, others)
    if invalid is not None:
        # Multiplied, so that the derivative is nan too.
        values = values * xp.where(invalid, math.nan, xp.ones_like(values))
    if kept is not None:
        values = xp.where(kept, values, 0.0)
    return library.cast(values, result_dtype)


def _gaps(problem: Problem, parts: _Parts, fixed: _Parts) -> Any:
    """Compute x_j - x_k of the chosen classes, whose derivative is that of x_j."""
    if not transform.is_capped(problem):
        return transform.difference(problem, parts.chosen, fixed.likeliest)
    gaps = transform.difference(problem, fixed.chosen, fixed.likeliest)
    if parts.chosen is fixed.chosen:
        return gaps
    # The value without the derivative of the difference, which loses digits where tanh is flat.
    masked = fixed.chosen == -math.inf
    one, other = (
        transform.value_by_decay(problem, problem.xp.where(masked, 0.0, p.chosen))
        for p in (parts, fixed)
    )
    return gaps + problem.xp.where(masked, 0.0, one - other)


def log_softmax(
    input: ArrayT,
    axis: int | None = None,
    *,
    logit_scale: float | None = None,
    logit_softcap: float | None = None,
    dim: None = None,
) -> ArrayT:
    """Compute the logarithm of the softmax, in nats, along the class axis.

    Entry c of a row x is x_c - log Σ exp(x_c), accurate near 0 too: the log-probability of a
    nearly certain class keeps all its digits.

    Parameters
    ----------
    input : array, shape (C,), (N, C) or (N, C, d1, ..., dK)
        Logits, in float16, bfloat16, float32 or float64.
    axis : int, optional
        The class axis; 1 by default, or 0 if there is only one, as for `cross_entropy`.
    logit_scale, logit_softcap, dim
        As for `cross_entropy`: x is what the first two make of the logits.

    Returns
    -------
    array
        Of input's shape and dtype.

    Raises
    ------
    TypeError, ValueError
        As `cross_entropy` does.

    Examples
    --------
    >>> import numpy as np
    >>> import polyce
    >>> print(polyce.log_softmax(np.array([0.0, 40.0])))
    [-4.00000000e+01 -4.24835426e-18]
    """
    if dim is not None:
        raise refuse_dim()
    given: dict[str, Any] = {
        "axis": axis,
        "logit_scale": logit_scale,
        "logit_softcap": logit_softcap,
    }
    if find.is_dtensor(input):
        from polyce.sharded import dtensors

        return dtensors.log_softmax(log_softmax, input, given)
    problem, logits = describe_logits(input, Options(**given))
    compute = select_log_softmax(problem)
    with problem.library.computing({"input": logits}):
        return rules.of(problem.backend).log_softmax(problem, logits, compute)
