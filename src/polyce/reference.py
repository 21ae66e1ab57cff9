"""The implementation: loss and gradient of every row, on any library of the array API standard.

What has one entry for each row keeps the class axis, of length 1, so that it meets the logits.
Every other implementation takes and gives what these functions take and give.
"""

from __future__ import annotations

from typing import Any

from polyce import arrays, rowstate, targets
from polyce.problem import Problem
from polyce.rowstate import RowState
from polyce.stats import RowStats
from polyce.targets import Plan


def forward(
    problem: Problem, plan: Plan, logits: Any
) -> tuple[Any, RowState | None, RowStats | None]:
    """Give the rows' losses, in the row dtype, the state for `backward`, and the rows' stats."""
    if problem.is_empty:
        return _empty_rows(problem, plan, logits), None, None
    state, _, _, _ = _read(problem, plan, logits)
    return _losses(problem, plan, state), state, None


def backward(
    problem: Problem, plan: Plan, cotangent: Any, logits: Any, state: RowState | None
) -> Any:
    """Give the gradient with respect to the logits, for a cotangent of the rows' losses."""
    if state is None:
        return problem.xp.zeros_like(logits)
    state, excluded, rest_exp, coefficients = _read(problem, plan, logits)
    return _gradient(problem, plan, cotangent, state, excluded, rest_exp, coefficients)


def forward_backward(
    problem: Problem, plan: Plan, cotangent: Any, logits: Any
) -> tuple[Any, Any, RowStats | None]:
    """Give the rows' losses, the gradient and the rows' stats in one pass over the logits."""
    if problem.is_empty:
        return _empty_rows(problem, plan, logits), problem.xp.zeros_like(logits), None
    state, excluded, rest_exp, coefficients = _read(problem, plan, logits)
    rows = _losses(problem, plan, state)
    grad = _gradient(problem, plan, cotangent, state, excluded, rest_exp, coefficients)
    return rows, grad, None


def nll(problem: Problem, plan: Plan, log_probabilities: Any) -> Any:
    """Give the rows' losses -w_y x_y for log-probabilities x, in the row dtype."""
    if problem.is_empty:
        return _empty_rows(problem, plan, log_probabilities)
    xp = problem.xp
    picked = arrays.pick(
        xp, problem.backend, log_probabilities, plan.label, log_probabilities, problem.axis
    )
    rows = -arrays.cast(xp, picked, problem.row_dtype)
    if plan.label_weight is not None:
        # Selected rather than multiplied: a weight of 0 takes no part, not even times infinity.
        rows = xp.where(plan.label_weight == 0.0, 0.0, plan.label_weight * rows)
    return targets.mask_rows(plan, xp, rows)


def log_softmax(problem: Problem, logits: Any) -> Any:
    """Give log(softmax(logits)) along the class axis, accurate at the largest logit too."""
    if problem.is_empty:
        return logits
    xp, backend, axis = problem.xp, problem.backend, problem.axis
    logits = arrays.cast(xp, logits, problem.arithmetic_dtype)
    pivot = xp.argmax(logits, axis=axis, keepdims=True)
    mask = arrays.one_hot(xp, backend, pivot, logits, axis)
    top = arrays.pick(xp, backend, logits, pivot, logits, axis)
    state, _ = rowstate.from_logits(problem, logits, mask, top, None, None)
    # What the likeliest class lacks to a log-probability of 0 is its loss.
    losses = rowstate.loss(problem, state)
    losses = arrays.cast(xp, losses, problem.arithmetic_dtype)
    log_probabilities = xp.where(mask, -losses, (logits - top) - losses)
    return arrays.cast(xp, log_probabilities, problem.logits_dtype)


def log_softmax_backward(problem: Problem, cotangent: Any, log_probabilities: Any) -> Any:
    """Give the gradient of `log_softmax` with respect to the logits, from its result."""
    xp = problem.xp
    wide = arrays.cast(xp, cotangent, problem.arithmetic_dtype)
    softmax = xp.exp(arrays.cast(xp, log_probabilities, problem.arithmetic_dtype))
    grad = wide - softmax * xp.sum(wide, axis=problem.axis, keepdims=True)
    return arrays.cast(xp, grad, problem.logits_dtype)


def _read(problem: Problem, plan: Plan, logits: Any) -> tuple[RowState, Any, Any, Any]:
    xp, backend, axis = problem.xp, problem.backend, problem.axis
    logits = arrays.cast(xp, logits, problem.arithmetic_dtype)
    at_pivot, coefficients = targets.coefficients(problem, plan)
    pivot = plan.label
    if pivot is None:
        pivot = xp.argmax(logits, axis=axis, keepdims=True)
    excluded = arrays.one_hot(xp, backend, pivot, logits, axis)
    pivot_logit = arrays.pick(xp, backend, logits, pivot, logits, axis)
    if plan.label is None:
        at_pivot = arrays.pick(xp, backend, coefficients, pivot, logits, axis)
        at_pivot = arrays.cast(xp, at_pivot, problem.row_dtype)
    if plan.counted is not None:
        # An ignored row is not read: it may hold infinities and nans.
        excluded = excluded | ~plan.counted
    state, rest_exp = rowstate.from_logits(
        problem, logits, excluded, pivot_logit, at_pivot, coefficients
    )
    return state, excluded, rest_exp, coefficients


def _losses(problem: Problem, plan: Plan, state: RowState) -> Any:
    return targets.mask_rows(plan, problem.xp, rowstate.loss(problem, state))


def _gradient(
    problem: Problem,
    plan: Plan,
    cotangent: Any,
    state: RowState,
    excluded: Any,
    rest_exp: Any,
    coefficients: Any,
) -> Any:
    xp = problem.xp
    scale = targets.mask_rows(plan, xp, cotangent + xp.zeros_like(state.rest_max))
    grad = rowstate.gradient(problem, state, rest_exp, excluded, coefficients, scale, plan.counted)
    return arrays.cast(xp, grad, problem.logits_dtype)


def _empty_rows(problem: Problem, plan: Plan, logits: Any) -> Any:
    """Sum over nothing: of no rows, none; of no classes, 0, for a label can only be ignored."""
    nothing = arrays.cast(problem.xp, logits, problem.row_dtype)
    rows = problem.xp.sum(nothing, axis=problem.axis, keepdims=True)
    return targets.mask_rows(plan, problem.xp, rows)
