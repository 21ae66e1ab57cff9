"""The stats of rows: those that follow from the row state, and those that take another look.

What the stats of a label are compared with is its logit, which need not be the pivot's.
"""

from __future__ import annotations

from typing import Any

from polyce.call.problem import Problem
from polyce.formula import rowstate, targets
from polyce.formula.rowstate import RowState
from polyce.formula.stats import RowStats
from polyce.formula.targets import Plan


def of_state(
    problem: Problem, plan: Plan, state: RowState, pivot: Any, label_logit: Any
) -> RowStats:
    """Compute the stats that follow from the state of whole rows with the given pivot class.

    Those are all that do not look at the logits again. `label_logit` is only read for the Brier
    score of labels that need not be the pivot.
    """
    brier = None
    if rowstate.needs_squares(problem):
        apart = pivot != plan.label if targets.pivot_leads(problem) else None
        brier = rowstate.brier(problem, state, apart, label_logit)
    return RowStats(
        lse=rowstate.lse(problem, state),
        entropy=rowstate.entropy(problem, state) if problem.asks("entropy") else None,
        prediction=(
            rowstate.prediction(problem, state, pivot)
            if problem.asks("prediction", "correct")
            else None
        ),
        top_probability=(
            rowstate.top_probability(problem, state) if problem.asks("top_probability") else None
        ),
        brier=brier,
        rank=None,
    )


def looks_again(problem: Problem, name: str) -> bool:
    """Tell whether a stat takes another look at the logits, once the state is known."""
    return name == "rank" or (name == "brier" and problem.kind == "probability")


def needs_label_logit(problem: Problem) -> bool:
    """Tell whether stats are made of the label's logit, wherever the pivot is."""
    return problem.kind == "index" and problem.asks("brier", "rank")


def count_larger(problem: Problem, logits: Any, label_logit: Any) -> Any:
    """Count the classes of each row whose logit is larger than the label's."""
    larger = logits > problem.library.cast(label_logit, logits.dtype)
    counted = problem.library.cast(larger, problem.library.label_dtype(logits))
    return problem.xp.sum(counted, axis=problem.axis, keepdims=True)


def distance_of_rest(
    problem: Problem, state: RowState, rest_exp: Any, excluded: Any, probabilities: Any
) -> Any:
    """Sum (p_c - t_c)² over classes besides the pivot, for probabilities t of these classes.

    `rest_exp` is their exp(x_c - m'); `excluded` classes have no part in it.
    """
    factor = rowstate.factor_of_rest(problem.xp, rowstate.scalars(problem, state))
    gaps = rest_exp * problem.library.cast(factor, problem.arithmetic_dtype) - probabilities
    gaps = problem.xp.where(excluded, 0.0, gaps)
    return problem.library.class_sum(gaps * gaps, problem.axis, problem.row_dtype)


def distance_at_pivot(problem: Problem, state: RowState, probability: Any) -> Any:
    """Compute (p_k - t_k)² of the pivot, for its probability t_k."""
    xp = problem.xp
    s = rowstate.scalars(problem, state)
    near, away = rowstate.pivot_probability(xp, s), state.rest_sum * rowstate.factor_of_rest(xp, s)
    probability = problem.library.cast(probability, problem.row_dtype)
    # What is left of 1 has more digits than a probability near it.
    gap = xp.where(away < 0.5, (1.0 - probability) - away, near - probability)
    return gap * gap
