"""Statistics of each row, computed in the same pass over the logits as its loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from polyce.call.problem import Problem
from polyce.formula import targets
from polyce.formula.targets import Plan


class Stats(NamedTuple):
    """Statistics of each row, from the same pass over the logits as its loss.

    Arrays of the rows' shape (input's shape without the class axis); None for what was not asked
    for. Rows that do not count, ignored ones and those with a sample weight of 0, hold nan, -1 and
    False. So do rows that have no softmax (a nan, +inf or nothing but -inf among their logits),
    though they count. On torch and jax, lse and entropy have gradients with respect to the logits;
    rows that do not count pass nothing back.

    Parameters
    ----------
    lse : array or None
        log Σ exp(x_c) of the logits after logit_scale and logit_softcap, in nats. In float32, or in
        float64 where the loss is computed in it.
    entropy : array or None
        -Σ p_c log p_c of the softmax p, in nats, in the same dtype.
    prediction : array or None
        The class with the largest logit, the first of them where several have it.
    correct : array or None
        Whether that is the label or, for probabilities, their first largest class; for a sparse
        target without a probability above 0, False.
    valid : array
        Whether the row counts. Always given.

    Examples
    --------
    >>> import numpy as np
    >>> import polyce
    >>> logits, labels = np.array([[0.0, 3.0], [2.0, 1.0], [1.0, 0.0]]), np.array([1, 1, -100])
    >>> _, stats = polyce.cross_entropy(logits, labels, return_stats=("prediction", "correct"))
    >>> print(stats.prediction, stats.correct, stats.valid)
    [ 1  0 -1] [ True False False] [ True  True False]
    """

    lse: Any
    entropy: Any
    prediction: Any
    correct: Any
    valid: Any


class RowStats(NamedTuple):
    """The stats that the rows' formula computes; None for what the problem does not ask for.

    The arrays keep the class axis, of length 1.
    """

    lse: Any
    """In the row dtype; nan where there is no softmax."""
    entropy: Any
    """In the row dtype."""
    prediction: Any
    """The first class with the largest logit; anything where there is no softmax."""


def unfilled(problem: Problem, empty: Callable[[tuple[int, ...], Any], Any]) -> Stats | None:
    """Allocate the stats asked for, by empty(shape, dtype), for a kernel to fill."""
    if problem.options.stats is None:
        return None
    xp, arithmetic = problem.xp, problem.arithmetic_dtype

    def entry(name: str, dtype: Any) -> Any:
        wanted = name == "valid" or problem.asks(name)
        return empty(problem.row_shape, dtype) if wanted else None

    return Stats(
        lse=entry("lse", arithmetic),
        entropy=entry("entropy", arithmetic),
        prediction=entry("prediction", xp.int64),
        correct=entry("correct", xp.bool),
        valid=entry("valid", xp.bool),
    )


def finish(problem: Problem, plan: Plan, found: RowStats) -> Stats:
    """Return the stats that the caller asked for, in the row shape."""
    xp, asked = problem.xp, problem.options.stats or ()
    valid = plan.counted
    if valid is None:
        valid = xp.zeros_like(found.lse) == 0.0

    def narrow(values: Any) -> Any:
        return problem.library.cast(xp.where(valid, values, math.nan), problem.arithmetic_dtype)

    defined = valid & (found.lse == found.lse)
    prediction = correct = None
    if "prediction" in asked:
        prediction = xp.where(defined, found.prediction, -1)
    if "correct" in asked:
        correct = defined
        if not problem.is_empty:
            correct = correct & (found.prediction == targets.label_of(problem, plan))
        if plan.invalid is not None:
            correct = correct & ~plan.invalid
    arrays_of_rows = (
        narrow(found.lse) if "lse" in asked else None,
        narrow(found.entropy) if "entropy" in asked else None,
        prediction,
        correct,
        valid,
    )
    return Stats(*(a if a is None else xp.squeeze(a, axis=problem.axis) for a in arrays_of_rows))
