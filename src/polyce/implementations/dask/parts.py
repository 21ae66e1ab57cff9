"""What dask's tasks run where the classes of a row lie in several blocks.

Each block is read for its part of the rows' states, which merge; what needs whole rows, such as the
gradient, looks at a block again. As in `blocks`, every function is at module level and silences
NumPy's warnings itself.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from polyce.call.problem import Operands, Problem
from polyce.formula import rowgradient, rowstate, rowstats, targets, transform
from polyce.formula import teacher as teacher_softmax
from polyce.formula.rowstate import RowState
from polyce.formula.targets import Plan
from polyce.implementations.dask.blocks import of_chunk, with_dtypes


class Part(NamedTuple):
    """What a block with some of the classes reports of its rows."""

    state: RowState
    pivot: Any
    """The class that the state keeps apart if it lies in this part."""
    plan: Plan
    """Without the arrays over the classes; the same in every part of a row."""
    label_logit: Any
    """0 where the label lies in another part; None if no stat needs it."""


class Whole(NamedTuple):
    """The parts of each row merged."""

    losses: Any
    state: RowState
    pivot: Any
    label_logit: Any
    stats: dict[str, Any]
    """Those that follow from the state."""


class TeacherState(NamedTuple):
    """What some classes of a teacher's rows add to the sum of its softmax."""

    top: Any
    """The largest logit."""
    total: Any
    """The sum of exp(scale (t_c - top)), in the row dtype; nan without a softmax."""


def teacher_part(problem: Problem, teacher: Any) -> TeacherState:
    """Read a block with some of a teacher's classes."""
    problem = of_chunk(problem, teacher, teacher.shape)
    with problem.library.quiet():
        return TeacherState(*teacher_softmax.state(problem, teacher))


def join_teacher(problem: Problem, parts: list[TeacherState]) -> TeacherState:
    """Merge the parts of each of a teacher's rows."""
    top, total = parts[0]
    problem = of_chunk(problem, top, top.shape)
    with problem.library.quiet():
        for other in parts[1:]:
            top, total = teacher_softmax.merge(problem, (top, total), other)
    return TeacherState(top, total)


def part(problem: Problem, *inputs: Any) -> Part:
    """Read a block with some of the classes; `inputs` are those of `_open`, here and below."""
    problem, plan, logits, at_label, coefficients, start = _open(problem, *inputs)
    entries = targets.entries(problem, plan)
    xp, library, axis = problem.xp, problem.library, problem.axis
    with library.quiet():
        if targets.pivot_leads(problem):
            pivot = library.argmax(logits, axis)
            pivot_logit = library.pick(logits, pivot, logits, axis)
            at_pivot = targets.share_at(problem, coefficients, pivot, logits)
            if entries is not None:
                at_pivot = at_pivot + rowstate.coefficient_at(problem, entries, pivot)
            pivot = pivot + start
        else:
            pivot = plan.label
            here, pivot_logit = _pick(problem, logits, plan.label - start)
            at_pivot = xp.where(here, 1.0 if at_label is None else at_label, 0.0)
        label_logit = None
        if rowstats.needs_label_logit(problem):
            _, label_logit = _pick(problem, logits, plan.label - start)
            label_logit = library.cast(label_logit, problem.row_dtype)
        excluded = _excluded(problem, plan, logits, pivot - start)
        if isinstance(coefficients, float):
            coefficients = xp.asarray(coefficients, dtype=problem.arithmetic_dtype)
        state, _ = rowstate.from_logits(
            problem, logits, excluded, pivot_logit, at_pivot, coefficients
        )
        if entries is not None:
            chosen = library.pick(logits, entries.classes, logits, axis)
            state = rowstate.with_entries(problem, state, entries, pivot - start, chosen)
    if state.rest_first is not None:
        state = state._replace(rest_first=state.rest_first + start)
    nothing = dict.fromkeys(("class_weight", "probabilities", "entries", "kept", "teacher"))
    return Part(state, pivot, plan._replace(**nothing), label_logit)


def _pick(problem: Problem, values: Any, local: Any) -> tuple[Any, Any]:
    """Take each row's value at a class, counted from the part's first; 0 if it is in another."""
    xp, axis = problem.xp, problem.axis
    here = (local >= 0) & (local < values.shape[axis])
    picked = problem.library.pick(values, xp.where(here, local, 0), values, axis)
    return here, xp.where(here, picked, 0.0)


def join(problem: Problem, parts: list[Part]) -> Whole:
    """Merge the parts of each row, in the order of the classes, and compute the losses."""
    state, pivot, plan, label_logit = parts[0]
    problem = of_chunk(problem, state.rest_max, state.rest_max.shape)
    xp = problem.xp
    with problem.library.quiet():
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
        found = {}
        if problem.options.stats is not None:
            found = rowstats.of_state(problem, plan, state, pivot, label_logit)._asdict()
        losses = targets.weigh_rows(plan, xp, losses)
    return Whole(losses, state, pivot, label_logit, found)


def part_rank(problem: Problem, *inputs_and_whole: Any) -> Any:
    """Count the classes of a block whose logit is larger than the label's."""
    *inputs, whole = inputs_and_whole
    problem, _, logits, *_ = _open(problem, *inputs)
    with problem.library.quiet():
        return rowstats.count_larger(problem, logits, whole.label_logit)


def part_brier(problem: Problem, *inputs_and_whole: Any) -> Any:
    """Compute what a block with some of the classes adds to the Brier score of probabilities."""
    *inputs, whole = inputs_and_whole
    problem, plan, logits, _, _, start = _open(problem, *inputs)
    with problem.library.quiet():
        excluded = _excluded(problem, plan, logits, whole.pivot - start)
        rest = _exponentials(problem, logits, excluded, whole.state)
        probabilities = plan.probabilities
        others = rowstats.distance_of_rest(problem, whole.state, rest, excluded, probabilities)
        here, at_pivot = _pick(problem, probabilities, whole.pivot - start)
        at_pivot = rowstats.distance_at_pivot(problem, whole.state, at_pivot)
        return others + problem.xp.where(here, at_pivot, 0.0)


def part_gradient(problem: Problem, *inputs_and_more: Any) -> Any:
    """Compute the gradient of a block with some of the classes, for the cotangent of its rows."""
    *inputs, cotangent, whole = inputs_and_more
    dtype = problem.logits_dtype
    problem, plan, logits, _, coefficients, start = _open(problem, *inputs)
    xp, library, state = problem.xp, problem.library, whole.state
    with library.quiet():
        excluded = _excluded(problem, plan, logits, whole.pivot - start)
        scale = targets.weigh_rows(plan, xp, cotangent + xp.zeros_like(state.rest_max))
        grad = rowgradient.gradient(
            problem,
            state,
            _exponentials(problem, logits, excluded, state),
            excluded,
            coefficients,
            targets.entries(problem, plan),
            scale,
            plan.counted,
            logits,
            targets.lse_penalty(problem, plan),
            leads=targets.pivot_leads(problem),
        )
        return library.cast(grad, dtype)


def _open(
    problem: Problem,
    logits: Any,
    target: Any,
    weight: Any,
    sample_weight: Any,
    probability: Any,
    teacher: TeacherState | None,
    first_class: Any,
) -> tuple[Problem, Plan, Any, Any, Any, int]:
    """Return a part's problem, plan, logits in the arithmetic dtype, coefficients, first class."""
    axis, start = problem.axis, int(first_class[0])
    shape = list(logits.shape)
    shape[axis] = problem.classes
    problem, logits = with_dtypes(of_chunk(problem, logits, shape), logits, target, probability)
    operands = Operands(logits, target, weight, sample_weight, None, None)
    with problem.library.quiet():
        plan = targets.plan(problem, operands._replace(target_probability=probability))
        if teacher is not None:
            softmax = teacher_softmax.softmax(problem, target, teacher)
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
        logits = problem.library.cast(logits, problem.arithmetic_dtype)
        at_label, coefficients = targets.coefficients(problem, plan)
        if plan.label is not None and targets.pivot_leads(problem):
            is_label = problem.library.one_hot(plan.label - start, logits, axis)
            first = logits[(slice(None),) * axis + (slice(1),)]
            coefficients = targets.all_coefficients(problem, plan, is_label, first)
    return problem, plan, logits, at_label, coefficients, start


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
