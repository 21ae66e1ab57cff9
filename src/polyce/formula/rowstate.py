"""The row formula: a softmax row's state, its loss, its gradient, and how parts of it merge.

Written as R·lse - Σ r_c x_c, the loss of a confident row cancels to 0 in float32 from a gap of 17
on, and so does its gradient. Here one class k of each row, the pivot, is kept apart (the label, or
the class of the largest logit: `targets.pivot_leads` says which) and every sum runs over the
*other* classes, so that only non-negative terms are added (if the coefficients are non-negative)
and nothing cancels:

    m' = max x_c    d' = Σ exp(x_c - m')    q' = Σ r_c (m' - x_c)    R' = Σ r_c        (c ≠ k)
    δ = m' - x_k
    δ ≤ 0:  a = exp(δ);   E = d' a;         f = a / (1 + E)
    δ > 0:  b = exp(-δ);  E = d' - 1 + b;   f = 1 / (1 + E)
    h = log1p(E)       lse = max(m', x_k) + h       p_k = (exp(-δ) or 1) / (1 + E)
    loss = q' + R' max(-δ, 0) + r_k max(δ, 0) + (R' + r_k) h + λ lse²
    dloss/dx_c = (R' + r_k + 2λ lse) exp(x_c - m') f - r_c
    dloss/dx_k = R' - (R' + r_k) d' f + 2λ lse p_k  =  (R' + r_k) p_k - r_k + 2λ lse p_k

The entropy is the sum of p_c (lse - x_c), no term of which is negative; S is what the others add:

    H = S + p_k (lse - x_k)    dH/dx_c = p_c (lse - x_c - H)    dlse/dx_c = p_c
    dH/dx_k = p_k ((lse - x_k) (1 - p_k) - S)                   1 - p_k = d' f

The largest probability is 1 / (1 + E). The Brier score Σ (p_c - [c = y])² of a label y is

    (d' f)² + Q f²                                   if y is the pivot
    (1 - p_y)² + p_k² + (Q f² - p_y²)                if the pivot is a class at least as likely

with Q = Σ exp(x_c - m')² (c ≠ k). All terms of the first are positive; what the difference in the
second loses is little beside (1 - p_y)², which is 1/4 at least.

The x are the logits after the `transform`. The state holds logits before it, and every difference
of two x is taken by `transform.difference`.

Kernels that cannot call these functions are tested against them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from polyce.call.problem import Problem
from polyce.formula import transform


class RowState(NamedTuple):
    """All that the loss of each row needs from a part of its classes.

    Every entry is an array of the logits' shape with 1 for the class axis. `merge` joins parts over
    disjoint classes.
    """

    rest_max: Any
    """The logit of m', the largest besides the pivot's; -inf if there is no other class."""
    rest_sum: Any
    """d', the sum of exp(x_c - m') over the classes besides the pivot."""
    pivot_logit: Any
    """The logit of x_k, or 0 where the pivot lies in another part."""
    pivot_coefficient: Any
    """r_k, or 0 where the pivot lies in another part; None for 1 in a whole row."""
    rest_coefficient: Any
    """R', the sum of the coefficients besides the pivot's; None where they are all 0."""
    rest_excess: Any
    """q', the sum of r_c (m' - x_c) besides the pivot's; None where the r_c are all 0."""
    rest_entropy: Any = None
    """The sum of exp(x_c - m') (m' - x_c) besides the pivot's; None if not asked for."""
    rest_first: Any = None
    """The first class besides the pivot with the logit of m'; None if not asked for."""
    rest_squares: Any = None
    """Q, the sum of exp(x_c - m')² besides the pivot's; None if not asked for."""


def from_logits(
    problem: Problem,
    logits: Any,
    excluded: Any,
    pivot_logit: Any,
    pivot_coefficient: Any,
    coefficients: Any,
) -> tuple[RowState, Any]:
    """Read a part of each row once; return its state and exp(x_c - m'), unset where excluded.

    `logits` are in the arithmetic dtype. `excluded` marks the pivot, if it lies in this part, and
    whatever else must not be read. `coefficients` are the r_c: an array that broadcasts against the
    logits, or, for a whole row only, one positive number for all classes; None for 0.
    """
    xp, library, axis, row_dtype = problem.xp, problem.library, problem.axis, problem.row_dtype
    rest = library.replace(excluded, -math.inf, logits, owned=False)
    rest_first = rest_entropy = rest_squares = None
    if problem.asks("prediction", "correct"):
        rest_first = library.argmax(rest, axis)
    rest_max = library.class_max(rest, axis)
    offset = xp.where(rest_max == -math.inf, 0.0, rest_max)
    rest = transform.difference(problem, rest, offset, owned=True)

    rest_coefficient = rest_excess = None
    if isinstance(coefficients, float):
        share = coefficients
        # Scaled before the sum, which could overflow.
        gaps = xp.where(excluded, 0.0, rest * -share)
        rest_excess = library.class_sum(gaps, axis=axis, dtype=row_dtype)
        del gaps
        rest_coefficient = xp.full_like(rest_excess, share * (logits.shape[axis] - 1))
    elif coefficients is not None:
        others = xp.where(excluded, 0.0, coefficients)
        rest_coefficient = library.class_sum(others, axis=axis, dtype=row_dtype)
        # A class of coefficient 0 has no effect, not even as 0 times infinity. A finite factor is
        # multiplied even so: the derivative by the coefficient needs it.
        skipped = (others == 0.0) & (rest == -math.inf)
        others = others * xp.where(skipped, 0.0, -rest)
        rest_excess = library.class_sum(others, axis=axis, dtype=row_dtype)

    if problem.asks("entropy"):
        gaps, rest = rest, xp.exp(rest)
        gaps = library.replace(rest == 0.0, 0.0, gaps, owned=True)
        gaps = library.overwrite(xp.multiply, gaps, rest)
        rest_entropy = -library.class_sum(gaps, axis=axis, dtype=row_dtype)
        del gaps
    else:
        rest = library.overwrite(xp.exp, rest)
    if needs_squares(problem):
        rest_squares = library.class_sum(rest * rest, axis=axis, dtype=row_dtype)
    state = RowState(
        rest_max=library.cast(rest_max, row_dtype),
        rest_sum=library.class_sum(rest, axis=axis, dtype=row_dtype),
        pivot_logit=library.cast(pivot_logit, row_dtype),
        pivot_coefficient=pivot_coefficient,
        rest_coefficient=rest_coefficient,
        rest_excess=rest_excess,
        rest_entropy=rest_entropy,
        rest_first=rest_first,
        rest_squares=rest_squares,
    )
    return state, rest


def needs_squares(problem: Problem) -> bool:
    """Tell whether the state has the sum that a label's Brier score is made of."""
    return problem.kind == "index" and problem.asks("brier")


def merge(problem: Problem, one: RowState, other: RowState) -> RowState:
    """Merge the states of two parts of each row, over disjoint classes; either may be empty."""
    xp = problem.xp
    top = xp.maximum(one.rest_max, other.rest_max)
    reference = xp.where(top == -math.inf, 0.0, top)

    def carried(part: RowState) -> tuple[Any, Any, Any, Any]:
        decay = xp.exp(transform.difference(problem, part.rest_max, reference))
        rest_sum = xp.where(part.rest_sum == 0.0, 0.0, part.rest_sum * decay)
        own = xp.where(part.rest_max == -math.inf, 0.0, part.rest_max)
        risen = transform.difference(problem, reference, own)
        excess = entropy = squares = None
        if part.rest_coefficient is not None:
            moved = part.rest_excess + part.rest_coefficient * risen
            excess = xp.where(part.rest_coefficient == 0.0, part.rest_excess, moved)
        if part.rest_entropy is not None:
            moved = (part.rest_entropy + part.rest_sum * risen) * decay
            entropy = xp.where(rest_sum == 0.0, 0.0, moved)
        if part.rest_squares is not None:
            squares = xp.where(rest_sum == 0.0, 0.0, part.rest_squares * decay * decay)
        return rest_sum, excess, entropy, squares

    one_sum, one_excess, one_entropy, one_squares = carried(one)
    other_sum, other_excess, other_entropy, other_squares = carried(other)
    first = None
    if one.rest_first is not None:
        is_one = (one.rest_max > other.rest_max) | (
            (one.rest_max == other.rest_max) & (one.rest_first < other.rest_first)
        )
        first = xp.where(is_one, one.rest_first, other.rest_first)

    def add(a: Any, b: Any) -> Any:
        if a is None:
            return b
        return a if b is None else a + b

    return RowState(
        rest_max=top,
        rest_sum=one_sum + other_sum,
        pivot_logit=one.pivot_logit + other.pivot_logit,
        pivot_coefficient=one.pivot_coefficient + other.pivot_coefficient,
        rest_coefficient=add(one.rest_coefficient, other.rest_coefficient),
        rest_excess=add(one_excess, other_excess),
        rest_entropy=add(one_entropy, other_entropy),
        rest_first=first,
        rest_squares=add(one_squares, other_squares),
    )


def demote(problem: Problem, state: RowState, pivot: Any, rows: Any) -> RowState:
    """Move the pivot, of class `pivot`, among the other classes in the marked rows."""
    xp = problem.xp
    coefficient = xp.where(rows, state.pivot_coefficient, 0.0)
    logit = xp.where(rows, state.pivot_logit, -math.inf)
    nothing = logit == -math.inf
    nowhere = xp.zeros_like(logit)
    one = xp.where(nothing, nowhere, 1.0)
    alone = RowState(
        rest_max=logit,
        rest_sum=one,
        pivot_logit=nowhere,
        pivot_coefficient=nowhere,
        rest_coefficient=coefficient,
        rest_excess=xp.where(nothing & (coefficient != 0.0), coefficient * math.inf, 0.0),
        rest_entropy=None if state.rest_entropy is None else nowhere,
        rest_first=None if state.rest_first is None else pivot,
        rest_squares=None if state.rest_squares is None else one,
    )
    kept = state._replace(
        pivot_logit=xp.where(rows, 0.0, state.pivot_logit),
        pivot_coefficient=xp.where(rows, 0.0, state.pivot_coefficient),
    )
    return merge(problem, kept, alone)


class Scalars(NamedTuple):
    """The few numbers of a row from which its loss and its gradient follow."""

    below: Any
    """True where the pivot is at least as large as every other class: δ ≤ 0."""
    behind: Any
    """max(δ, 0), how far the pivot is below the largest of the others."""
    opposite: Any
    """-δ, how far the pivot is above them."""
    decay: Any
    """exp(-|δ|): a or b above."""
    excess: Any
    """E, the sum of all exponentials relative to the largest, minus 1."""


def scalars(problem: Problem, state: RowState) -> Scalars:
    """Compute the few numbers of each row from the state of the whole row."""
    xp = problem.xp
    delta = transform.difference(problem, state.rest_max, state.pivot_logit)
    below = delta <= 0.0
    # Not abs and maximum: at a tie their derivatives would be wrong, and so would the second
    # derivative.
    opposite = -delta
    decay = xp.exp(xp.where(below, delta, opposite))
    if problem.row_dtype == problem.arithmetic_dtype:
        # The row dtype is no wider than the logits, so δ has been rounded.
        error = transform.difference_error(problem, state.rest_max, state.pivot_logit)
        decay = decay + decay * xp.where(below, error, -error)
    # The difference is 0, or nan where the pivot is at +inf: such a row has no softmax.
    nothing = state.pivot_logit - state.pivot_logit
    excess = xp.where(below, state.rest_sum * decay + nothing, (state.rest_sum - 1.0) + decay)
    behind = xp.where(below, 0.0, delta)
    return Scalars(below, behind, opposite, decay, excess)


def lse(problem: Problem, state: RowState) -> Any:
    """Compute log Σ exp(x_c) of each row from the state of the whole row; nan without a softmax."""
    return lse_from(problem, state, scalars(problem, state))


def lse_from(problem: Problem, state: RowState, s: Scalars) -> Any:
    """Compute what `lse` does from the scalars."""
    largest = problem.xp.where(s.below, state.pivot_logit, state.rest_max)
    return transform.value(problem, largest) + problem.xp.log1p(s.excess)


class Surprise(NamedTuple):
    """What the entropy of a row is made of."""

    at_top: Any
    """lse - m'"""
    at_pivot: Any
    """lse - x_k; h where p_k is 0."""
    others: Any
    """S, the sum of p_c (lse - x_c) over the classes besides the pivot."""


def surprise(problem: Problem, state: RowState, s: Scalars) -> Surprise:
    """Compute what the entropy of each row is made of."""
    xp = problem.xp
    h = xp.log1p(s.excess)
    factor = factor_of_rest(xp, s)
    ahead = xp.where(s.below & (state.rest_sum != 0.0), s.opposite, 0.0)
    behind = xp.where(pivot_probability(xp, s) == 0.0, 0.0, s.behind)
    share = state.rest_sum * factor
    # The lead may overflow where the others have no probability left.
    others = factor * state.rest_entropy + xp.where(share == 0.0, 0.0, share * (ahead + h))
    return Surprise(ahead + h, behind + h, others)


def entropy(problem: Problem, state: RowState) -> Any:
    """Compute -Σ p_c log p_c of each row: the p_c times lse - x_c, none of which is negative."""
    s = scalars(problem, state)
    found = surprise(problem, state, s)
    return found.others + pivot_probability(problem.xp, s) * found.at_pivot


def prediction(problem: Problem, state: RowState, pivot: Any) -> Any:
    """Return the first class with the largest logit of each row; `pivot` is the pivot's class."""
    first = state.rest_first
    leads = (state.pivot_logit > state.rest_max) | (
        (state.pivot_logit == state.rest_max) & (pivot < first)
    )
    return problem.xp.where(leads, pivot, first)


def top_probability(problem: Problem, state: RowState) -> Any:
    """Compute the largest probability of each row."""
    return 1.0 / (1.0 + scalars(problem, state).excess)


def brier(problem: Problem, state: RowState, apart: Any, label_logit: Any) -> Any:
    """Compute Σ (p_c - [c = y])² of each row for a label y.

    `apart` marks the rows whose pivot is another class than the label, at least as likely; None if
    the label is always the pivot.
    """
    xp = problem.xp
    s = scalars(problem, state)
    factor = factor_of_rest(xp, s)
    away = state.rest_sum * factor
    squares = state.rest_squares * factor * factor
    at_label = away * away + squares
    if apart is None:
        return at_label
    reference = xp.where(state.rest_max == -math.inf, 0.0, state.rest_max)
    label = xp.exp(transform.difference(problem, label_logit, reference)) * factor
    near = pivot_probability(xp, s)
    beside = (1.0 - label) * (1.0 - label) + near * near + (squares - label * label)
    return xp.where(apart, beside, at_label)


def factor_of_rest(xp: Any, s: Scalars) -> Any:
    """Compute f, which turns exp(x_c - m') into a probability."""
    return xp.where(s.below, s.decay, 1.0) / (1.0 + s.excess)


def pivot_probability(xp: Any, s: Scalars) -> Any:
    """Compute p_k."""
    return xp.where(s.below, 1.0, s.decay) / (1.0 + s.excess)


def loss(problem: Problem, state: RowState, lse_penalty: Any = None) -> Any:
    """Compute each row's loss, from the state of the whole row, with lse_penalty · lse² added."""
    xp = problem.xp
    s = scalars(problem, state)
    h = xp.log1p(s.excess)
    at_pivot = state.pivot_coefficient
    if at_pivot is None:
        rows = s.behind + h
    elif isinstance(at_pivot, float):
        rows = at_pivot * (s.behind + h)
    else:
        rows = at_pivot * (xp.where(at_pivot == 0.0, 0.0, s.behind) + h)
    others = state.rest_coefficient
    if others is not None:
        ahead = xp.where(s.below & (others != 0.0), s.opposite, 0.0)
        # It is nan where an infinite coefficient meets a gap of 0: the other terms suffice then.
        excess = xp.where(state.rest_excess == state.rest_excess, state.rest_excess, 0.0)
        rows = rows + (excess + others * (ahead + h))
    if lse_penalty is not None:
        log_sum = lse_from(problem, state, s)
        rows = rows + lse_penalty * log_sum * log_sum
    return rows
