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

    Each is an array of the rows' shape (input's shape without the class axis), or None if it was
    not asked for. Rows that do not count, because they are ignored or have a sample weight of 0,
    hold nan, -1 and False. So do rows that have no softmax (a nan, +inf or nothing but -inf among
    their logits), though they count. On torch and jax, lse and entropy have gradients with respect
    to the logits; rows that do not count pass nothing back. The others have none.

    Parameters
    ----------
    lse : array or None
        log Σ exp(x_c) of the logits after logit_scale and logit_softcap, in nats. In float32, or in
        float64 if the loss is computed in float64.
    entropy : array or None
        -Σ p_c log p_c of the softmax p, in nats, in the same dtype.
    prediction : array or None
        The class with the largest logit; if several have it, the first of these.
    correct : array or None
        Whether the prediction is the label or, for probabilities, the first class with the largest
        one; False for a sparse target without a probability above 0.
    top_probability : array or None
        The largest p_c, in the dtype of lse.
    brier : array or None
        Σ (p_c - t_c)², the Brier score, in the dtype of lse. t is 1 for the label and 0 for the
        other classes, or the probabilities as given: smoothing and class weights do not enter. nan
        for a label that is out of range and not checked.
    rank : array or None
        How many classes have a larger logit than the label. In a row that counts, the label is
        among the k most likely classes if this is less than k. Of equal logits none is larger. The
        logits are compared as given, so it does not matter if a softcap makes them equal. -1 for a
        label out of range too. Not for probabilities.
    valid : array
        Whether the row counts. Always given.

    Notes
    -----
    Like the loss, the Brier score of a label keeps its digits however confident the row is: it is a
    sum of positive terms if the label is the likeliest class, and more than 1/4 otherwise. In
    float32, it and the largest probability are exact to 4 units in the last place on the compiled
    path, and to 8 on `reference`; the largest errors measured are 1.6 and 1.1, for leads up to 70
    and an offset of 1e4. For probabilities the Brier score is the sum of the squares of the
    differences. Its error was at most 2.3 · 2^-24 of Σ abs(p_c - t_c) max(p_c, t_c), unless the two
    agree to the last digits; then only the squares of these are left. If the likeliest class has
    more than half of the probability, its p_c - t_c is computed as (1 - t_c) - (1 - p_c), so
    one-hot probabilities give the same digits as labels.

    Examples
    --------
    >>> import numpy as np
    >>> import polyce
    >>> logits, labels = np.array([[0.0, 3.0], [2.0, 1.0], [1.0, 0.0]]), np.array([1, 1, -100])
    >>> _, stats = polyce.cross_entropy(logits, labels, return_stats=("prediction", "correct"))
    >>> print(stats.prediction, stats.correct, stats.valid)
    [ 1  0 -1] [ True False False] [ True  True False]
    >>> _, stats = polyce.cross_entropy(logits, labels, return_stats=("brier", "rank"))
    >>> print(stats.brier.round(3), stats.rank)
    [0.004 1.069   nan] [ 0  1 -1]
    """

    lse: Any
    entropy: Any
    prediction: Any
    correct: Any
    top_probability: Any
    brier: Any
    rank: Any
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
    top_probability: Any
    """In the row dtype."""
    brier: Any
    """In the row dtype; anything for a bad label."""
    rank: Any
    """An integer; anything where there is no softmax, and for a bad label."""


def needed(problem: Problem) -> tuple[str, ...]:
    """Return the names of the rows' stats from which those that are asked for follow."""
    if problem.options.stats is None:
        return ()
    names = {"lse", *problem.options.stats}
    if "correct" in names:
        names.add("prediction")
    return tuple(name for name in RowStats._fields if name in names)


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
        top_probability=entry("top_probability", arithmetic),
        brier=entry("brier", arithmetic),
        rank=entry("rank", xp.int64),
        valid=entry("valid", xp.bool),
    )


def left_out(problem: Problem, dtype: Any) -> float | int | bool:
    """Return what a row that does not count holds in a stat of this dtype."""
    if dtype == problem.xp.bool:
        return False
    return -1 if dtype == problem.xp.int64 else math.nan


def finish(problem: Problem, plan: Plan, found: RowStats) -> Stats:
    """Return the stats that the caller asked for, in the row shape."""
    xp, asked = problem.xp, problem.options.stats or ()
    valid = plan.counted
    if valid is None:
        valid = xp.zeros_like(found.lse) == 0.0

    def narrow(values: Any) -> Any:
        return problem.library.cast(xp.where(valid, values, math.nan), problem.arithmetic_dtype)

    defined = valid & (found.lse == found.lse)
    labelled = defined if plan.invalid is None else defined & ~plan.invalid
    prediction = correct = brier = rank = None
    if "prediction" in asked:
        prediction = xp.where(defined, found.prediction, -1)
    if "correct" in asked:
        correct = labelled
        if not problem.is_empty:
            correct = correct & (found.prediction == targets.label_of(problem, plan))
    if "brier" in asked:
        brier = narrow(xp.where(labelled, found.brier, math.nan))
    if "rank" in asked:
        rank = xp.where(labelled, found.rank, -1)
    arrays_of_rows = (
        narrow(found.lse) if "lse" in asked else None,
        narrow(found.entropy) if "entropy" in asked else None,
        prediction,
        correct,
        narrow(found.top_probability) if "top_probability" in asked else None,
        brier,
        rank,
        valid,
    )
    return Stats(*(a if a is None else xp.squeeze(a, axis=problem.axis) for a in arrays_of_rows))
