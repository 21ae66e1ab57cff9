"""What dask's tasks run on one block of the logits, with arrays of the chunk's own library.

Every function is at module level and takes no module as an argument, so that dask can send it to
another process. Each silences NumPy's warnings itself, since dask's threads do not inherit the
caller's settings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from polyce.arrays import dtypes, find
from polyce.arrays.library import expand
from polyce.call.problem import Operands, Problem
from polyce.formula import labels, stats, targets
from polyce.formula.stats import RowStats
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
    grad_lse: Any,
    grad_entropy: Any,
) -> tuple[Any, ...]:
    """Run the call on a block of whole rows, by the path that `select` chooses for its arrays.

    The result is the losses, or their sum if the call reduces them; the gradient, None without a
    cotangent; and the stats that are `needed`.
    """
    summed, dtype, axis = problem.options.reduction != "none", problem.logits_dtype, problem.axis
    problem = of_chunk(problem, logits, logits.shape)
    problem, logits = with_dtypes(problem, logits, target, probability)
    problem = problem._replace(result_dtype=problem.row_dtype)
    names = stats.needed(problem)
    problem = problem.with_options(stats=names or None)
    xp, grad = problem.xp, None
    operands = Operands(logits, target, weight, sample_weight, None, _by_row(problem, cotangent))
    operands = operands._replace(
        target_probability=probability, grad_lse=grad_lse, grad_entropy=grad_entropy
    )
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
    of_rows = {name: expand(getattr(found, name), axis) for name in names}
    return losses, grad, RowStats(**dict.fromkeys(RowStats._fields) | of_rows)


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
    return getattr(results[-1], what) if isinstance(what, str) else results[what]


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
