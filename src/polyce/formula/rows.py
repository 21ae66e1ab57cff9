"""Loss and gradient of every row, in operations of the array API standard.

Arrays with one entry for each row keep the class axis, of length 1, to broadcast against the
logits.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from polyce.arrays.library import expand
from polyce.call.problem import Operands, Problem
from polyce.formula import rowgradient, rowstate, rowstats, targets, transform
from polyce.formula.entries import Entries, coefficient_at, with_entries
from polyce.formula.rowgradient import NO_STATS, StatsCotangents
from polyce.formula.rowstate import RowState
from polyce.formula.stats import RowStats
from polyce.formula.targets import Plan


def forward(problem: Problem, plan: Plan, logits: Any) -> tuple[Any, RowStats | None]:
    """Compute the rows' losses, in the row dtype, and the rows' stats."""
    if problem.is_empty:
        losses = _empty_rows(problem, plan, logits)
        return losses, _empty_stats(problem, losses)
    read = _read(problem, plan, logits, targets.pivot_leads(problem))
    return _losses(problem, plan, read.state), _row_stats(problem, plan, read)


def backward(
    problem: Problem,
    plan: Plan,
    cotangent: Any,
    logits: Any,
    of_stats: StatsCotangents = NO_STATS,
) -> Any:
    """Compute the gradient with respect to the logits, for cotangents of the rows' values.

    `cotangent` is that of the losses, None for 0 if there is one of the stats.
    """
    if problem.is_empty:
        return logits * 0.0  # on the graph of a library that will differentiate it
    problem = _asking_for(problem, of_stats)
    leads = targets.pivot_leads(problem)
    read = _read(problem, plan, logits, leads, of_loss=cotangent is not None)
    return _gradient(problem, plan, cotangent, read, of_stats)


def differentiable_gradient(
    problem: Problem,
    plan: Plan,
    cotangent: Any,
    logits: Any,
    of_stats: StatsCotangents = NO_STATS,
) -> Any:
    """Compute what `backward` does, in operations whose derivatives keep their digits too.

    With the largest class as the pivot no derivative is a difference of nearly equal numbers: that
    of p_c by x_c is p_c (1 - p_c), where p_c is at most 1/2 for all classes but the pivot, and for
    the pivot 1 - p_c is the sum of the others over the whole.
    """
    if problem.is_empty:
        return logits * 0.0
    problem = _asking_for(problem, of_stats)
    read = _read(problem, plan, logits, leads=True, of_loss=cotangent is not None)
    return _gradient(problem, plan, cotangent, read, of_stats)


def _asking_for(problem: Problem, of_stats: StatsCotangents) -> Problem:
    """Ask for the entropy's part of the state if its gradient needs that."""
    return problem.with_options(stats=None if of_stats.entropy is None else ("entropy",))


def forward_backward(
    problem: Problem,
    plan: Plan,
    cotangent: Any,
    logits: Any,
    of_stats: StatsCotangents = NO_STATS,
) -> tuple[Any, Any, RowStats | None]:
    """Compute the rows' losses, the gradient and the rows' stats in one pass over the logits."""
    if problem.is_empty:
        losses = _empty_rows(problem, plan, logits)
        return losses, problem.xp.zeros_like(logits), _empty_stats(problem, losses)
    read = _read(problem, plan, logits, targets.pivot_leads(problem))
    losses, stats = _losses(problem, plan, read.state), _row_stats(problem, plan, read)
    return losses, _gradient(problem, plan, cotangent, read, of_stats), stats


def stats_cotangents(problem: Problem, operands: Operands) -> StatsCotangents:
    """Return the operands' cotangents of the stats, shaped like the row state."""

    def by_row(cotangent: Any) -> Any:
        if cotangent is None:
            return None
        wide = problem.library.cast(cotangent, problem.row_dtype)
        return problem.library.align(expand(wide, problem.axis), operands.logits)

    return StatsCotangents(by_row(operands.grad_lse), by_row(operands.grad_entropy))


def nll(problem: Problem, plan: Plan, log_probabilities: Any) -> Any:
    """Compute the rows' losses -w_y x_y for log-probabilities x, in the row dtype."""
    if problem.is_empty:
        return _empty_rows(problem, plan, log_probabilities)
    xp = problem.xp
    picked = problem.library.pick(log_probabilities, plan.label, log_probabilities, problem.axis)
    rows = -problem.library.cast(picked, problem.row_dtype)
    if plan.label_weight is not None:
        # Selected, not multiplied: a weight of 0 has no effect, not even times infinity.
        rows = xp.where(plan.label_weight == 0.0, 0.0, plan.label_weight * rows)
    return targets.weigh_rows(plan, xp, rows)


def log_softmax(problem: Problem, logits: Any) -> Any:
    """Compute log(softmax(logits)) along the class axis, accurate at the largest logit too."""
    if problem.is_empty:
        return logits
    xp, library, axis = problem.xp, problem.library, problem.axis
    logits = library.cast(logits, problem.arithmetic_dtype)
    pivot = library.argmax(logits, axis)
    mask = library.one_hot(pivot, logits, axis)
    top = library.pick(logits, pivot, logits, axis)
    state, _ = _state(problem, logits, mask, top, None, None)
    # The log-probability of the likeliest class is minus its loss.
    losses = rowstate.loss(problem, state)
    losses = library.cast(losses, problem.arithmetic_dtype)
    gaps = transform.difference(problem, logits, top)
    log_probabilities = xp.where(mask, -losses, gaps - losses)
    return library.cast(log_probabilities, problem.logits_dtype)


def log_softmax_backward(
    problem: Problem, cotangent: Any, logits: Any, log_probabilities: Any, total: Any = None
) -> Any:
    """Compute the gradient of `log_softmax` with respect to the logits, from its result.

    The logits themselves are only needed for a softcap. `total` is the sum of the cotangents over
    whole rows, where these are part of them.
    """
    xp = problem.xp
    wide = problem.library.cast(cotangent, problem.arithmetic_dtype)
    softmax = xp.exp(problem.library.cast(log_probabilities, problem.arithmetic_dtype))
    if total is None:
        total = xp.sum(wide, axis=problem.axis, keepdims=True)
    grad = wide - softmax * total
    if transform.is_capped(problem):
        logits = problem.library.cast(logits, problem.arithmetic_dtype)
    grad = grad * transform.slope(problem, logits)
    return problem.library.cast(grad, problem.logits_dtype)


class _Read(NamedTuple):
    """What one pass over the logits provides for the losses, the gradient and the stats."""

    logits: Any
    """In the arithmetic dtype."""
    pivot: Any
    leads: bool
    """Whether the pivot is the class of the largest logit."""
    excluded: Any
    state: RowState
    rest_exp: Any
    coefficients: Any
    entries: Entries | None


def _read(problem: Problem, plan: Plan, logits: Any, leads: bool, *, of_loss: bool = True) -> _Read:
    """Read the logits; the pivot is the class of the largest one if it `leads`, else the label.

    The target's coefficients are only read for the loss.
    """
    library, axis = problem.library, problem.axis
    given_dtype = logits.dtype
    logits = library.cast(logits, problem.arithmetic_dtype)
    pivot = library.argmax(logits, axis) if leads else plan.label
    excluded = library.one_hot(pivot, logits, axis)
    pivot_logit = library.pick(logits, pivot, logits, axis)
    entries = targets.entries(problem, plan) if of_loss else None
    if not of_loss:
        at_pivot = coefficients = None
    elif entries is not None:
        _, coefficients = targets.coefficients(problem, plan)
        at_pivot = coefficient_at(problem, entries, pivot)
        at_pivot = at_pivot + targets.share_at(problem, coefficients, pivot, logits)
    elif plan.teacher is not None and library.fuses(logits):
        from polyce.formula import xla

        at_pivot, coefficients = xla.of_teacher(problem, plan, pivot, logits)
        at_pivot = library.cast(at_pivot, problem.row_dtype)
    elif leads:
        is_label = None
        if plan.label is not None:
            is_label = library.one_hot(plan.label, logits, axis)
        coefficients = targets.all_coefficients(problem, plan, is_label, pivot_logit)
        at_pivot = library.pick(coefficients, pivot, logits, axis)
        at_pivot = library.cast(at_pivot, problem.row_dtype)
    else:
        at_pivot, coefficients = targets.coefficients(problem, plan)
    if plan.counted is not None:
        # An ignored row is not read: it may hold infinities and nans.
        excluded = excluded | ~plan.counted
    state, rest_exp = _state(
        problem, logits, excluded, pivot_logit, at_pivot, coefficients, given_dtype
    )
    if callable(coefficients):
        coefficients = coefficients(state.rest_sum)
    if entries is not None:
        chosen = library.pick(logits, entries.classes, logits, axis)
        state = with_entries(problem, state, entries, pivot, chosen)
    return _Read(logits, pivot, leads, excluded, state, rest_exp, coefficients, entries)


def _state(
    problem: Problem,
    logits: Any,
    excluded: Any,
    pivot_logit: Any,
    at_pivot: Any,
    coefficients: Any,
    given_dtype: Any = None,
) -> tuple[RowState, Any]:
    """Read whole rows, in the form for XLA where it fuses; the logits came in `given_dtype`."""
    row = (logits, excluded, pivot_logit, at_pivot, coefficients)
    if problem.library.fuses(logits):
        from polyce.formula import xla

        return xla.from_logits(problem, *row, given_dtype)
    return rowstate.from_logits(problem, *row)


def _losses(problem: Problem, plan: Plan, state: RowState) -> Any:
    rows = rowstate.loss(problem, state, targets.lse_penalty(problem, plan))
    return targets.weigh_rows(plan, problem.xp, rows)


def _gradient(
    problem: Problem, plan: Plan, cotangent: Any, read: _Read, of_stats: StatsCotangents
) -> Any:
    xp, zeros = problem.xp, problem.xp.zeros_like(read.state.rest_max)
    scale = None if cotangent is None else targets.weigh_rows(plan, xp, cotangent + zeros)
    if of_stats.are_given:
        of_stats = StatsCotangents(
            *(a if a is None else targets.select_rows(plan, xp, a + zeros) for a in of_stats)
        )
    grad = rowgradient.gradient(
        problem,
        read.state,
        read.rest_exp,
        read.excluded,
        read.coefficients,
        read.entries,
        scale,
        plan.counted,
        read.logits,
        targets.lse_penalty(problem, plan),
        of_stats,
        leads=read.leads,
    )
    return problem.library.cast(grad, problem.logits_dtype)


def _row_stats(problem: Problem, plan: Plan, read: _Read) -> RowStats | None:
    """Compute the stats that the problem asks for, before the gradient takes rest_exp's memory."""
    if problem.options.stats is None:
        return None
    library, state, label_logit = problem.library, read.state, read.state.pivot_logit
    if read.leads and rowstats.needs_label_logit(problem):
        label_logit = library.pick(read.logits, plan.label, read.logits, problem.axis)
        label_logit = library.cast(label_logit, problem.row_dtype)
    stats = rowstats.of_state(problem, plan, state, read.pivot, label_logit)
    if problem.asks("rank"):
        stats = stats._replace(rank=rowstats.count_larger(problem, read.logits, label_logit))
    if problem.asks("brier") and plan.label is None:
        others = rowstats.distance_of_rest(
            problem, state, read.rest_exp, read.excluded, plan.probabilities
        )
        at_pivot = library.pick(plan.probabilities, read.pivot, read.logits, problem.axis)
        stats = stats._replace(brier=others + rowstats.distance_at_pivot(problem, state, at_pivot))
    return stats


def _empty_rows(problem: Problem, plan: Plan, logits: Any) -> Any:
    """Return the losses without logits: 0 for each row, as every label must be ignored."""
    nothing = problem.library.cast(logits, problem.row_dtype)
    rows = problem.xp.sum(nothing, axis=problem.axis, keepdims=True)
    return targets.weigh_rows(plan, problem.xp, rows)


def _empty_stats(problem: Problem, rows: Any) -> RowStats | None:
    """Return the stats without logits: a row without classes has no softmax and no prediction."""
    if problem.options.stats is None:
        return None
    xp = problem.xp
    undefined = xp.full_like(rows, math.nan)
    labels = problem.library.label_dtype(rows)
    nothing = problem.library.cast(xp.zeros_like(rows), labels)
    return RowStats(
        lse=undefined,
        entropy=undefined,
        prediction=nothing,
        top_probability=undefined,
        brier=undefined,
        rank=nothing,
    )
