"""Rows whose classes lie in several parts: what each part is read for, and how the parts join.

A part holds the classes from `start` on: the logits, and with them probabilities and a teacher's
logits, are its own, while labels, the classes of a sparse target and class weights are those of
whole rows. So is the problem, but for its library and dtypes. Each part is read for a `Part`, the
`Part`s join to a `Whole`, and from that each part's gradient follows without another look at the
others.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from polyce.call.problem import Operands, Problem
from polyce.formula import rowgradient, rowstate, rowstats, targets, transform
from polyce.formula import teacher as teacher_softmax
from polyce.formula.rowgradient import NO_STATS, StatsCotangents
from polyce.formula.rowstate import RowState
from polyce.formula.stats import RowStats
from polyce.formula.targets import Plan


class TeacherState(NamedTuple):
    """What some classes of a teacher's rows add to the sum of its softmax."""

    top: Any
    """The largest logit."""
    total: Any
    """The sum of exp(scale (t_c - top)), in the row dtype; nan without a softmax."""


class Part(NamedTuple):
    """What a part of the classes reports of its rows."""

    state: RowState
    pivot: Any
    """The class that the state keeps apart if it lies in this part."""
    plan: Plan
    """Without the arrays over the classes; the same in every part of a row."""
    label_logit: Any
    """0 where the label lies in another part; None if no stat needs it."""


class Whole(NamedTuple):
    """The parts of each row joined."""

    losses: Any
    state: RowState
    pivot: Any
    label_logit: Any
    stats: RowStats | None
    """Those that follow from the state."""


def read_teacher(problem: Problem, teacher: Any) -> TeacherState:
    """Read a part of a teacher's classes; there may be none."""
    if not teacher.shape[problem.axis]:
        top = _of_no_class(problem, teacher, problem.arithmetic_dtype) - math.inf
        return TeacherState(top, _of_no_class(problem, teacher, problem.row_dtype))
    return TeacherState(*teacher_softmax.state(problem, teacher))


def join_teacher(problem: Problem, parts: list[TeacherState]) -> TeacherState:
    """Join the parts of each of a teacher's rows."""
    top, total = parts[0]
    for other in parts[1:]:
        top, total = teacher_softmax.merge(problem, (top, total), other)
    return TeacherState(top, total)


def read(
    problem: Problem, operands: Operands, start: int, teacher: TeacherState | None = None
) -> Part:
    """Read a part of the classes; a teacher comes with what its whole rows have joined to.

    There may be no class in a part.
    """
    if not operands.logits.shape[problem.axis]:
        return _read_nothing(problem, operands, start)
    part = _open(problem, operands, start, teacher)
    plan, logits, coefficients = part.plan, part.logits, part.coefficients
    entries = targets.entries(problem, plan)
    xp, library, axis = problem.xp, problem.library, problem.axis
    if targets.pivot_leads(problem):
        pivot = library.argmax(logits, axis)
        pivot_logit = library.pick(logits, pivot, logits, axis)
        at_pivot = targets.share_at(problem, coefficients, pivot, logits)
        if entries is not None:
            at_pivot = at_pivot + rowstate.coefficient_at(problem, entries, pivot)
        pivot = pivot + start
    else:
        pivot = plan.label
        here, pivot_logit = pick(problem, logits, plan.label - start)
        at_label = 1.0 if part.at_label is None else part.at_label
        # Not the number itself, which would have the library's own dtype.
        at_label = at_label + xp.zeros_like(library.cast(pivot_logit, problem.row_dtype))
        at_pivot = xp.where(here, at_label, 0.0)
    label_logit = None
    if rowstats.needs_label_logit(problem):
        _, label_logit = pick(problem, logits, plan.label - start)
        label_logit = library.cast(label_logit, problem.row_dtype)
    excluded = _excluded(problem, plan, logits, pivot - start)
    if isinstance(coefficients, float):
        coefficients = xp.asarray(coefficients, dtype=problem.arithmetic_dtype)
    state, _ = rowstate.from_logits(problem, logits, excluded, pivot_logit, at_pivot, coefficients)
    if entries is not None:
        chosen = library.pick(logits, entries.classes, logits, axis)
        state = rowstate.with_entries(problem, state, entries, pivot - start, chosen)
    if state.rest_first is not None:
        state = state._replace(rest_first=state.rest_first + start)
    return Part(state, pivot, of_rows(plan), label_logit)


def of_rows(plan: Plan) -> Plan:
    """Leave out of a plan what is of every class or entry."""
    return plan._replace(
        class_weight=None, probabilities=None, entries=None, kept=None, teacher=None
    )


def _read_nothing(problem: Problem, operands: Operands, start: int) -> Part:
    """Return what a part without classes reports, to which `join` adds nothing."""
    library, leads = problem.library, targets.pivot_leads(problem)
    plan = of_rows(targets.plan(problem, operands))
    zero = _of_no_class(problem, operands.logits, problem.row_dtype)
    first = library.cast(zero, library.label_dtype(zero)) + start
    has_coefficients = leads or problem.options.label_smoothing
    state = RowState(
        rest_max=zero - math.inf,
        rest_sum=zero,
        # Any other class is likelier.
        pivot_logit=zero - math.inf if leads else zero,
        pivot_coefficient=zero,
        rest_coefficient=zero if has_coefficients else None,
        rest_excess=zero if has_coefficients else None,
        rest_entropy=zero if problem.asks("entropy") else None,
        rest_first=first if problem.asks("prediction", "correct") else None,
        rest_squares=zero if rowstate.needs_squares(problem) else None,
    )
    label_logit = zero if rowstats.needs_label_logit(problem) else None
    return Part(state, first if leads else plan.label, plan, label_logit)


def _of_no_class(problem: Problem, logits: Any, dtype: Any) -> Any:
    """Return 0 for each row of logits without classes."""
    xp = problem.xp
    return xp.sum(problem.library.cast(logits, dtype), axis=problem.axis, keepdims=True)


def join(problem: Problem, parts: list[Part]) -> Whole:
    """Join the parts of each row, in the order of the classes, and compute the losses."""
    state, pivot, plan, label_logit = parts[0]
    xp = problem.xp
    for other in parts[1:]:
        joining = other.state
        if targets.pivot_leads(problem):
            passed = joining.pivot_logit > state.pivot_logit
            state = rowstate.demote(problem, state, pivot, passed)
            joining = rowstate.demote(problem, joining, other.pivot, ~passed)
            pivot = xp.where(passed, other.pivot, pivot)
        state = rowstate.merge(problem, state, joining)
        if label_logit is not None:
            label_logit = label_logit + other.label_logit
    losses = rowstate.loss(problem, state, targets.lse_penalty(problem, plan))
    found = None
    if problem.options.stats is not None:
        found = rowstats.of_state(problem, plan, state, pivot, label_logit)
    losses = targets.weigh_rows(plan, xp, losses)
    return Whole(losses, state, pivot, label_logit, found)


def gradient(
    problem: Problem,
    operands: Operands,
    start: int,
    whole: Whole,
    cotangent: Any,
    of_stats: StatsCotangents = NO_STATS,
    teacher: TeacherState | None = None,
) -> Any:
    """Compute a part's gradient, in the arithmetic dtype, for the cotangents of its rows."""
    if not operands.logits.shape[problem.axis]:
        return problem.library.cast(operands.logits, problem.arithmetic_dtype)
    part = _open(problem, operands, start, teacher)
    plan, xp = part.plan, problem.xp
    excluded = _excluded(problem, plan, part.logits, whole.pivot - start)
    scale = targets.weigh_rows(plan, xp, cotangent + xp.zeros_like(whole.state.rest_max))
    return rowgradient.gradient(
        problem,
        whole.state,
        _exponentials(problem, part.logits, excluded, whole.state),
        excluded,
        part.coefficients,
        targets.entries(problem, plan),
        scale,
        plan.counted,
        part.logits,
        targets.lse_penalty(problem, plan),
        of_stats,
        leads=targets.pivot_leads(problem),
    )


def rank(problem: Problem, operands: Operands, label_logit: Any) -> Any:
    """Count the classes of a part whose logit is larger than the label's."""
    logits = problem.library.cast(operands.logits, problem.arithmetic_dtype)
    return rowstats.count_larger(problem, logits, label_logit)


def brier(problem: Problem, operands: Operands, start: int, whole: Whole) -> Any:
    """Compute what a part of the classes adds to the Brier score of probabilities."""
    if not operands.logits.shape[problem.axis]:
        return _of_no_class(problem, operands.logits, problem.row_dtype)
    part = _open(problem, operands, start, None)
    excluded = _excluded(problem, part.plan, part.logits, whole.pivot - start)
    rest = _exponentials(problem, part.logits, excluded, whole.state)
    probabilities = part.plan.probabilities
    others = rowstats.distance_of_rest(problem, whole.state, rest, excluded, probabilities)
    here, at_pivot = pick(problem, probabilities, whole.pivot - start)
    at_pivot = rowstats.distance_at_pivot(problem, whole.state, at_pivot)
    return others + problem.xp.where(here, at_pivot, 0.0)


class _Open(NamedTuple):
    """A part's own operands, as the formula reads them."""

    plan: Plan
    logits: Any
    """In the arithmetic dtype."""
    at_label: Any
    coefficients: Any


def _open(problem: Problem, operands: Operands, start: int, teacher: TeacherState | None) -> _Open:
    axis, library = problem.axis, problem.library
    plan = targets.plan(problem, operands)
    logits = library.cast(operands.logits, problem.arithmetic_dtype)
    if teacher is not None:
        softmax = teacher_softmax.softmax(problem, operands.target, teacher)
        plan = plan._replace(probabilities=softmax, teacher=None)
    if plan.entries is not None:
        local = plan.entries - start
        here = (local >= 0) & (local < logits.shape[axis])
        local, own = (problem.xp.where(here, a, 0) for a in (local, plan.probabilities))
        plan = plan._replace(entries=local, probabilities=own)
    if plan.class_weight is not None:
        classes = slice(start, start + logits.shape[axis])
        own = plan.class_weight[(slice(None),) * axis + (classes,)]
        plan = plan._replace(class_weight=own)
    at_label, coefficients = targets.coefficients(problem, plan)
    if plan.label is not None and targets.pivot_leads(problem):
        is_label = library.one_hot(plan.label - start, logits, axis)
        first = logits[(slice(None),) * axis + (slice(1),)]
        coefficients = targets.all_coefficients(problem, plan, is_label, first)
    return _Open(plan, logits, at_label, coefficients)


def pick(problem: Problem, values: Any, local: Any) -> tuple[Any, Any]:
    """Take each row's value at a class, counted from the part's first; 0 if it is in another."""
    xp, axis = problem.xp, problem.axis
    here = (local >= 0) & (local < values.shape[axis])
    picked = problem.library.pick(values, xp.where(here, local, 0), values, axis)
    return here, xp.where(here, picked, 0.0)


def _excluded(problem: Problem, plan: Plan, logits: Any, local: Any) -> Any:
    """Mark the pivot, if it lies in this part, and every class of rows that do not count."""
    excluded = problem.library.one_hot(local, logits, problem.axis)
    return excluded if plan.counted is None else excluded | ~plan.counted


def _exponentials(problem: Problem, logits: Any, excluded: Any, state: RowState) -> Any:
    """Compute exp(x_c - m') of a part, 0 where excluded."""
    xp, library = problem.xp, problem.library
    rest = library.replace(excluded, -math.inf, logits, owned=False)
    top = library.cast(state.rest_max, problem.arithmetic_dtype)
    top = xp.where(top == -math.inf, 0.0, top)
    return library.overwrite(xp.exp, transform.difference(problem, rest, top, owned=True))
