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
from polyce.formula import labels, rowgradient, rowstate, rowstats, stats, targets, transform
from polyce.formula.rowstate import RowState
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
    cotangent: Any,
) -> tuple[Any, ...]:
    """Run the call on a block of whole rows, by the path that `select` chooses for its arrays.

    The result is the losses, or their sum if the call reduces them; the gradient, None without a
    cotangent; and the stats that are `needed`.
    """
    summed, dtype, axis = problem.options.reduction != "none", problem.logits_dtype, problem.axis
    problem, logits = with_dtypes(of_chunk(problem, logits, logits.shape), logits, target)
    problem = problem._replace(result_dtype=problem.row_dtype)
    names = stats.needed(problem)
    problem = problem.with_options(stats=names or None)
    xp, grad = problem.xp, None
    operands = Operands(logits, target, weight, sample_weight, None, _by_row(problem, cotangent))
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
    return losses, grad, {name: expand(getattr(found, name), axis) for name in names}


def _by_row(problem: Problem, cotangent: Any) -> Any:
    """Return the cotangent as a call takes it: a number, or an array of the row shape."""
    if cotangent is None or isinstance(cotangent, float):
        return cotangent
    rows = problem.xp.squeeze(cotangent, axis=problem.axis) if cotangent.ndim else cotangent
    return problem.xp.broadcast_to(rows, problem.row_shape)


def itself(block: Any, axis: Any = None, keepdims: Any = None) -> Any:
    """Return a block as it is; also serves as the first step of a reduction."""
    return block


def take(what: int | str, results: Any, *after: Any) -> Any:
    """Take one of a block's results, once those in `after` are there; by its name, a stat."""
    return results[-1][what] if isinstance(what, str) else results[what]


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


def part(
    problem: Problem, logits: Any, target: Any, weight: Any, sample_weight: Any, start: Any
) -> Part:
    """Read a block with some of the classes; `start` is the first of them."""
    start = int(start[0])
    problem, plan, logits, at_label, coefficients = _open(
        problem, logits, target, weight, sample_weight, start
    )
    xp, library, axis = problem.xp, problem.library, problem.axis
    with library.quiet():
        if targets.pivot_leads(problem):
            pivot = library.argmax(logits, axis)
            pivot_logit = library.pick(logits, pivot, logits, axis)
            at_pivot = library.pick(coefficients, pivot, logits, axis)
            at_pivot = library.cast(at_pivot, problem.row_dtype)
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
        state, _ = rowstate.from_logits(
            problem, logits, excluded, pivot_logit, at_pivot, coefficients
        )
    if state.rest_first is not None:
        state = state._replace(rest_first=state.rest_first + start)
    return Part(state, pivot, plan._replace(class_weight=None, probabilities=None), label_logit)


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


def part_rank(
    problem: Problem,
    logits: Any,
    target: Any,
    weight: Any,
    sample_weight: Any,
    start: Any,
    whole: Whole,
) -> Any:
    """Count the classes of a block whose logit is larger than the label's."""
    problem, _, logits, _, _ = _open(problem, logits, target, weight, sample_weight, int(start[0]))
    with problem.library.quiet():
        return rowstats.count_larger(problem, logits, whole.label_logit)


def part_brier(
    problem: Problem,
    logits: Any,
    target: Any,
    weight: Any,
    sample_weight: Any,
    start: Any,
    whole: Whole,
) -> Any:
    """Compute what a block with some of the classes adds to the Brier score of probabilities."""
    start = int(start[0])
    problem, plan, logits, _, _ = _open(problem, logits, target, weight, sample_weight, start)
    with problem.library.quiet():
        excluded = _excluded(problem, plan, logits, whole.pivot - start)
        rest = _exponentials(problem, logits, excluded, whole.state)
        probabilities = plan.probabilities
        others = rowstats.distance_of_rest(problem, whole.state, rest, excluded, probabilities)
        here, at_pivot = _pick(problem, probabilities, whole.pivot - start)
        at_pivot = rowstats.distance_at_pivot(problem, whole.state, at_pivot)
        return others + problem.xp.where(here, at_pivot, 0.0)


def part_gradient(
    problem: Problem,
    logits: Any,
    target: Any,
    weight: Any,
    sample_weight: Any,
    start: Any,
    cotangent: Any,
    whole: Whole,
) -> Any:
    """Compute the gradient of a block with some of the classes; `start` is the first of them."""
    start, dtype = int(start[0]), problem.logits_dtype
    problem, plan, logits, _, coefficients = _open(
        problem, logits, target, weight, sample_weight, start
    )
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
            scale,
            plan.counted,
            logits,
            targets.lse_penalty(problem, plan),
            leads=targets.pivot_leads(problem),
        )
        return library.cast(grad, dtype)


def _open(
    problem: Problem, logits: Any, target: Any, weight: Any, sample_weight: Any, start: int
) -> tuple[Problem, Plan, Any, Any, Any]:
    """Return a part's problem, plan, logits in the arithmetic dtype, and coefficients."""
    axis = problem.axis
    shape = list(logits.shape)
    shape[axis] = problem.classes
    problem, logits = with_dtypes(of_chunk(problem, logits, shape), logits, target)
    xp = problem.xp
    with problem.library.quiet():
        plan = targets.plan(problem, Operands(logits, target, weight, sample_weight, None, None))
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
        elif isinstance(coefficients, float):
            coefficients = xp.asarray(coefficients, dtype=problem.arithmetic_dtype)
    return problem, plan, logits, at_label, coefficients


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


def with_dtypes(problem: Problem, logits: Any, target: Any) -> tuple[Problem, Any]:
    """Put the chunks' own dtypes into the problem; widen logits narrower than declared."""
    narrow = logits.dtype.itemsize < problem.logits_dtype.itemsize
    if narrow or dtypes.holds_integers(logits):
        logits = problem.library.cast(logits, problem.logits_dtype)
    floats = {dtypes.dtype_name(logits)}
    if problem.kind == "index":
        problem = with_labels(problem, target)
    else:
        problem = problem._replace(target_dtype=dtypes.dtype_name(target))
        floats.add(problem.target_dtype)
        if problem.target_dtype not in dtypes.FLOATS:
            raise _not_as_said("target", "floats", target)
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
