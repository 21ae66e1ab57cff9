"""What dask's tasks run on one block of the logits, with arrays of the chunk's own library.

Every function is at module level and takes no module as an argument, so that dask can send it to
another process. Each silences NumPy's warnings itself, since dask's threads do not inherit the
caller's settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from polyce.arrays import dtypes, find
from polyce.arrays.library import expand
from polyce.call.problem import Operands, Problem
from polyce.formula import labels, rowgradient, rows, rowstate, targets, transform
from polyce.formula import teacher as teacher_softmax
from polyce.formula.rowstate import RowState
from polyce.formula.stats import RowStats
from polyce.formula.targets import Plan
from polyce.implementations.contract import Implementation


def total_weight(problem: Problem, target: Any, weight: Any, sample_weight: Any) -> Any:
    """Compute what a block's rows add to the mean's denominator, from their labels alone."""
    shape = list(target.shape)
    shape.insert(problem.axis, problem.classes)
    problem = of_chunk(problem, target, shape).with_options(reduction="mean")
    problem = with_labels(problem, target)
    operands = Operands(None, target, weight, sample_weight, None, None)
    with problem.library.quiet():
        total = targets.plan(problem, operands).denominator
        total = problem.xp.asarray(total, dtype=problem.row_dtype)
        return problem.xp.reshape(total, (1,) * target.ndim)


def whole_rows(
    select: Callable[[Problem], Implementation],
    problem: Problem,
    logits: Any,
    target: Any,
    weight: Any,
    sample_weight: Any,
    probability: Any,
    cotangent: Any,
) -> tuple[Any, ...]:
    """Run the call on a block of whole rows, by the path that `select` chooses for its arrays.

    The result is the losses, or their sum if the call reduces them; the gradient, None without a
    cotangent; and the entries of the stats.
    """
    summed, dtype, axis = problem.options.reduction != "none", problem.logits_dtype, problem.axis
    problem = of_chunk(problem, logits, logits.shape)
    problem, logits = with_dtypes(problem, logits, target, probability)
    problem = problem._replace(result_dtype=problem.row_dtype)
    problem = problem.with_options(stats=_reported(problem))
    xp, grad = problem.xp, None
    operands = Operands(logits, target, weight, sample_weight, None, _by_row(problem, cotangent))
    operands = operands._replace(target_probability=probability)
    chosen = select(problem)
    with problem.library.quiet():
        if cotangent is None:
            losses, found = chosen.cross_entropy(problem, operands)
        else:
            losses, grad, found = chosen.cross_entropy_with_grad(problem, operands, None)
            grad = problem.library.cast(grad, dtype)
        losses = expand(losses, axis)
        if summed:
            losses = xp.reshape(problem.library.total(losses), (1,) * logits.ndim)
    entries = () if found is None else (found.lse, found.entropy, found.prediction)
    return losses, grad, *(a if a is None else expand(a, axis) for a in entries)


def _reported(problem: Problem) -> tuple[str, ...] | None:
    """Return the stats that a block must report for the call's to be computed."""
    if problem.options.stats is None:
        return None
    predicts = problem.asks("prediction", "correct")
    return ("lse", *["entropy"] * problem.asks("entropy"), *["prediction"] * predicts)


def _by_row(problem: Problem, cotangent: Any) -> Any:
    """Return the cotangent as a call takes it: a number, or an array of the row shape."""
    if cotangent is None or isinstance(cotangent, float):
        return cotangent
    rows = problem.xp.squeeze(cotangent, axis=problem.axis) if cotangent.ndim else cotangent
    return problem.xp.broadcast_to(rows, problem.row_shape)


def itself(block: Any, axis: Any = None, keepdims: Any = None) -> Any:
    """Return a block as it is; also serves as the first step of a reduction."""
    return block


def take(index: int, results: Any, *after: Any) -> Any:
    """Take one of a block's results, once those in `after` are there."""
    return results[index]


class Part(NamedTuple):
    """What a block with some of the classes reports of its rows."""

    state: RowState
    pivot: Any
    """The class that the state keeps apart if it lies in this part."""
    plan: Plan
    """Without the arrays over the classes; the same in every part of a row."""


class Whole(NamedTuple):
    """The parts of each row merged."""

    losses: Any
    lse: Any
    entropy: Any
    prediction: Any
    state: RowState
    pivot: Any


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


def part(
    problem: Problem,
    logits: Any,
    target: Any,
    weight: Any,
    sample_weight: Any,
    probability: Any,
    teacher: TeacherState | None,
    start: Any,
) -> Part:
    """Read a block with some of the classes; `start` is the first of them."""
    start = int(start[0])
    problem, plan, logits, at_label, coefficients = _open(
        problem, logits, target, weight, sample_weight, probability, teacher, start
    )
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
            pivot, local = plan.label, plan.label - start
            here = (local >= 0) & (local < logits.shape[axis])
            local = xp.where(here, local, 0)
            pivot_logit = library.pick(logits, local, logits, axis)
            pivot_logit = xp.where(here, pivot_logit, 0.0)
            at_pivot = xp.where(here, 1.0 if at_label is None else at_label, 0.0)
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
    return Part(state, pivot, plan._replace(**nothing))


def join(problem: Problem, parts: list[Part]) -> Whole:
    """Merge the parts of each row, in the order of the classes, and compute the losses."""
    state, pivot, plan = parts[0]
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
        losses = rowstate.loss(problem, state, targets.lse_penalty(problem, plan))
        stats = rows.row_stats(problem, state, pivot) or RowStats(None, None, None)
        losses = targets.weigh_rows(plan, xp, losses)
    return Whole(losses, stats.lse, stats.entropy, stats.prediction, state, pivot)


def part_gradient(
    problem: Problem,
    logits: Any,
    target: Any,
    weight: Any,
    sample_weight: Any,
    probability: Any,
    teacher: TeacherState | None,
    start: Any,
    cotangent: Any,
    whole: Whole,
) -> Any:
    """Compute the gradient of a block with some of the classes; `start` is the first of them."""
    start, dtype = int(start[0]), problem.logits_dtype
    problem, plan, logits, _, coefficients = _open(
        problem, logits, target, weight, sample_weight, probability, teacher, start
    )
    xp, library, state = problem.xp, problem.library, whole.state
    with library.quiet():
        excluded = _excluded(problem, plan, logits, whole.pivot - start)
        rest = library.replace(excluded, -math.inf, logits, owned=False)
        top = library.cast(state.rest_max, problem.arithmetic_dtype)
        top = xp.where(top == -math.inf, 0.0, top)
        rest = transform.difference(problem, rest, top, owned=True)
        scale = targets.weigh_rows(plan, xp, cotangent + xp.zeros_like(state.rest_max))
        grad = rowgradient.gradient(
            problem,
            state,
            library.overwrite(xp.exp, rest),
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
    start: int,
) -> tuple[Problem, Plan, Any, Any, Any]:
    """Return a part's problem, plan, logits in the arithmetic dtype, and coefficients."""
    axis = problem.axis
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
    return problem, plan, logits, at_label, coefficients


def _excluded(problem: Problem, plan: Plan, logits: Any, local: Any) -> Any:
    """Mark the pivot, if it lies in this part, and every class of rows that do not count."""
    excluded = problem.library.one_hot(local, logits, problem.axis)
    return excluded if plan.counted is None else excluded | ~plan.counted


def of_chunk(problem: Problem, chunk: Any, shape: Any) -> Problem:
    """Return the problem of a call on chunks like this one."""
    library, _ = find.of(input=chunk)
    shape = tuple(shape)
    return problem._replace(
        library=library,
        device=library.device_kind(chunk),
        shape=shape,
        row_shape=shape[: problem.axis] + shape[problem.axis + 1 :],
        options=problem.options._replace(reduction="none"),
        check_labels=False,
        normalized=False,
        is_concrete=library.are_concrete([chunk]),
    )


# dask does not enforce the dtype that an array declares: it computes with what its chunks have. So
# do these functions, but they return the declared dtype.


def with_dtypes(
    problem: Problem, logits: Any, target: Any, probability: Any = None
) -> tuple[Problem, Any]:
    """Put the chunks' own dtypes into the problem; widen logits narrower than declared."""
    narrow = logits.dtype.itemsize < problem.logits_dtype.itemsize
    if narrow or dtypes.holds_integers(logits):
        logits = problem.library.cast(logits, problem.logits_dtype)
    floats = {dtypes.dtype_name(logits)}
    if problem.names_classes:
        problem = with_labels(problem, target)
    else:
        problem = problem._replace(target_dtype=dtypes.dtype_name(target))
    soft = {"index": None, "sparse": probability}.get(problem.kind, target)
    if soft is not None:
        floats.add(dtypes.dtype_name(soft))
        if dtypes.dtype_name(soft) not in dtypes.FLOATS:
            raise _not_as_said("target", "floats", soft)
    if not floats <= set(dtypes.FLOATS):
        raise _not_as_said("input", "real floats", logits)
    if "float64" in floats:
        wide = problem.library.float_dtype("float64")
        problem = problem._replace(arithmetic_dtype=wide)
    return problem._replace(logits_dtype=logits.dtype), logits


def with_labels(problem: Problem, target: Any) -> Problem:
    """Put the labels' own dtype into the problem."""
    if not dtypes.holds_integers(target):
        raise _not_as_said("target", "integers", target)
    found = problem._replace(target_dtype=dtypes.dtype_name(target))
    if labels.ignored_label(found) is not None and labels.ignored_label(problem) is None:
        # Which rows count was decided by the declared dtype.
        raise _not_as_said("target", problem.target_dtype, target)
    return found


def _not_as_said(name: str, wanted: str, chunk: Any) -> TypeError:
    return TypeError(
        f"{name} must hold {wanted} in all of its chunks, as its dtype says, but one is "
        f"{dtypes.dtype_name(chunk)}; give map_blocks, or what made it, the dtype= that is true"
    )
