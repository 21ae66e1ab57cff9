"""The gradient of a row's loss, lse and entropy with respect to its logits, from its state.

`rowstate` has the formulas. A gradient is that of the class axis besides the pivot, in an array of
the logits' shape, into which the pivot's is put last.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from polyce.call.problem import Problem
from polyce.formula import rowstate, transform
from polyce.formula.entries import Entries
from polyce.formula.rowstate import RowState


class StatsCotangents(NamedTuple):
    """The gradients that flow into the stats of each row, shaped like the state; None for 0."""

    lse: Any = None
    entropy: Any = None

    @property
    def are_given(self) -> bool:
        """Tell whether there is one."""
        return self.lse is not None or self.entropy is not None


NO_STATS = StatsCotangents()


def gradient(
    problem: Problem,
    state: RowState,
    rest_exp: Any,
    excluded: Any,
    coefficients: Any,
    entries: Entries | None,
    scale: Any,
    counted: Any,
    logits: Any,
    lse_penalty: Any = None,
    of_stats: StatsCotangents = NO_STATS,
    *,
    leads: bool,
) -> Any:
    """Compute scale times each row's gradient by its logits, in the arithmetic dtype.

    `rest_exp` is exp(x_c - m') as `from_logits` returns it, and the gradient may overwrite it.
    `scale` is shaped like the state, or None for 0 where `of_stats` is given: the gradients of the
    stats times these are added. Where `counted` is False, all classes are `excluded` and the
    gradient is 0. The `logits` are only read for a softcap and for the entropy. `leads` says
    whether the pivot is the class of the largest logit.
    """
    xp, library = problem.xp, problem.library
    s = rowstate.scalars(problem, state)
    if not transform.is_capped(problem) and (slope := transform.scale_of(problem)) != 1.0:
        scale = None if scale is None else scale * slope
        of_stats = StatsCotangents(*(a if a is None else a * slope for a in of_stats))
    grad = at_pivot = None
    if of_stats.are_given:
        grad, at_pivot = _stats_gradient(problem, state, s, rest_exp, excluded, logits, of_stats)
    if scale is not None:
        of_loss, loss_at_pivot = _loss_gradient(
            problem, state, s, rest_exp, coefficients, entries, scale, lse_penalty, leads=leads
        )
        grad = of_loss if grad is None else library.overwrite(xp.add, grad, of_loss)
        at_pivot = loss_at_pivot if at_pivot is None else at_pivot + loss_at_pivot
    if transform.is_capped(problem):
        grad = library.overwrite(xp.multiply, grad, transform.slope(problem, logits))
        at_pivot = at_pivot * transform.slope(problem, state.pivot_logit)
    if counted is not None:
        at_pivot = xp.where(counted, at_pivot, 0.0)
    return library.replace(excluded, _narrow(problem, at_pivot), grad, owned=True)


def _narrow(problem: Problem, rows: Any) -> Any:
    return problem.library.cast(rows, problem.arithmetic_dtype)


def _loss_gradient(
    problem: Problem,
    state: RowState,
    s: rowstate.Scalars,
    rest_exp: Any,
    coefficients: Any,
    entries: Entries | None,
    scale: Any,
    lse_penalty: Any,
    *,
    leads: bool,
) -> tuple[Any, Any]:
    """Compute scale times dloss/dx of every class, over `rest_exp`, and that of the pivot."""
    xp, library = problem.xp, problem.library
    factor = rowstate.factor_of_rest(xp, s)
    total = 1.0 if state.pivot_coefficient is None else state.pivot_coefficient
    if state.rest_coefficient is not None:
        total = total + state.rest_coefficient
    away = total * (state.rest_sum * factor)
    others = 0.0 if state.rest_coefficient is None else state.rest_coefficient
    at_pivot = others - away
    if not isinstance(total, float):
        # R p_k - r_k is the same number, and torch's form where the terms are infinite. The form
        # with the smaller terms keeps its digits: with a label as the pivot always the first.
        near = total * rowstate.pivot_probability(xp, s)
        if leads:
            is_larger = xp.abs(near) + xp.abs(state.pivot_coefficient) > xp.abs(away) + xp.abs(
                others
            )
        else:
            # On a jax mesh this is spread as the rows are.
            is_larger = xp.isfinite(total + xp.zeros_like(near))
        at_pivot = xp.where(is_larger, at_pivot, near - state.pivot_coefficient)
    if lse_penalty is not None:
        pull = 2.0 * lse_penalty * rowstate.lse_from(problem, state, s)
        total = total + pull
        at_pivot = at_pivot + pull * rowstate.pivot_probability(xp, s)
    if coefficients is None and entries is None:
        factor = _narrow(problem, scale * (total * factor))
        return library.overwrite(xp.multiply, rest_exp, factor), scale * at_pivot
    # Scaled last: an infinite scale, from a total weight of 0, would leave inf - inf.
    grad = library.overwrite(xp.multiply, rest_exp, _narrow(problem, total * factor))
    if coefficients is not None:
        grad = library.overwrite(xp.subtract, grad, coefficients)
    if entries is not None:
        grad = library.add_at(grad, entries.classes, -entries.coefficients, problem.axis)
    grad = library.overwrite(xp.multiply, grad, _narrow(problem, scale))
    return grad, scale * at_pivot


def _stats_gradient(
    problem: Problem,
    state: RowState,
    s: rowstate.Scalars,
    rest_exp: Any,
    excluded: Any,
    logits: Any,
    of_stats: StatsCotangents,
) -> tuple[Any, Any]:
    """Compute the gradients of lse and entropy, times their cotangents, as `_loss_gradient`."""
    xp, library = problem.xp, problem.library
    factor, near = rowstate.factor_of_rest(xp, s), rowstate.pivot_probability(xp, s)
    slope = 0.0 if of_stats.lse is None else of_stats.lse
    if of_stats.entropy is None:
        return rest_exp * _narrow(problem, slope * factor), slope * near
    found = rowstate.surprise(problem, state, s)
    slope = slope + of_stats.entropy * (found.at_top - (found.others + near * found.at_pivot))
    # The lead may overflow where the others have no probability left.
    slope = xp.where(factor == 0.0, 0.0, slope * factor)
    at_pivot = of_stats.entropy * (found.at_pivot * (state.rest_sum * factor) - found.others)
    if of_stats.lse is not None:
        at_pivot = at_pivot + of_stats.lse
    top = _narrow(problem, xp.where(state.rest_max == -math.inf, 0.0, state.rest_max))
    # A class without probability has no effect, not even as 0 times infinity.
    skipped = excluded | (rest_exp == 0.0)
    others = library.replace(skipped, top, logits, owned=False)
    gaps = transform.difference(problem, top, others)
    gaps = library.overwrite(xp.multiply, gaps, _narrow(problem, of_stats.entropy * factor))
    gaps = library.overwrite(xp.add, gaps, _narrow(problem, slope))
    return library.overwrite(xp.multiply, gaps, rest_exp), near * at_pivot
