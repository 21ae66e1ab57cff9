"""dask: few tasks for each block of the logits, which run the best path of the chunk's own library.

On dask arrays nearly every operation of the reference becomes a task with a result as large as the
chunk. Here a block of whole rows is one task, which does what a call on the block would do. Where
the classes are cut as well, each block computes the state of its part of each row, the states are
merged, and a second task computes the block's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

from polyce.arrays import find
from polyce.call.problem import Operands, Problem
from polyce.formula import rowstats, stats, targets
from polyce.formula.stats import RowStats, Stats
from polyce.formula.targets import Plan
from polyce.implementations.contract import Implementation, OfParts
from polyce.implementations.dask import blocks, parts

FAN_IN = 16
"""How many blocks' numbers one task adds up."""


def unavailable() -> str | None:
    """Return that dask is missing, or None."""
    return None if find.installed("dask") else "dask is not installed (pip install dask[array])"


class Select(NamedTuple):
    """How the path of a block is chosen from the same table."""

    whole_rows: Callable[[Problem], Implementation]
    of_parts: Callable[[Problem], OfParts]


def path(select: Select) -> Implementation:
    """Return the dask path; `select` chooses the path of each block."""
    return Implementation(
        name="dask",
        cross_entropy=partial(cross_entropy, select),
        cross_entropy_with_grad=partial(cross_entropy_with_grad, select),
        backends=frozenset({"dask"}),
        takes_grad_stats=True,
        unavailable=unavailable,
    )


def cross_entropy(select: Select, problem: Problem, operands: Operands) -> tuple[Any, Stats | None]:
    """Compute the loss and the stats, all of them lazy."""
    with problem.library.quiet():
        pieces, plan = _read(problem, operands)
        losses, _, found = _run(select, problem, pieces, None)
        return _finish(problem, plan, losses, found)


def cross_entropy_with_grad(
    select: Select, problem: Problem, operands: Operands, out: None
) -> tuple[Any, Any, Stats | None]:
    """Compute the loss, the gradient, cut as the logits are, and the stats, all of them lazy."""
    with problem.library.quiet():
        pieces, plan = _read(problem, operands)
        cotangent = targets.cotangent(problem, plan, operands.grad_output)
        losses, grad, found = _run(select, problem, pieces, cotangent)
        loss, stats = _finish(problem, plan, losses, found)
        return loss, _recut(grad, operands.logits.chunks), stats


def _read(problem: Problem, operands: Operands) -> tuple[Operands, Plan]:
    """Cut the operands, leave the target to the blocks, and add up the mean's denominator.

    The plan's other arrays are for the stats; dask computes none that is not used.
    """
    target = operands.target
    pieces = _cut(problem, operands)
    # NumPy labels are checked now: they have values.
    plan = targets.plan(problem, pieces._replace(target=target))
    if problem.kind == "index" and not problem.normalized and hasattr(plan.denominator, "dask"):
        plan = plan._replace(denominator=total_weight(problem, pieces))
    return pieces, plan


def _finish(
    problem: Problem, plan: Plan, losses: Any, found: RowStats | None
) -> tuple[Any, Stats | None]:
    loss = targets.reduce(problem, plan, losses)
    return loss, None if found is None else stats.finish(problem, plan, found)


def _run(
    select: Select,
    problem: Problem,
    pieces: Operands,
    cotangent: Any,
) -> tuple[Any, Any, RowStats | None]:
    """Compute losses, gradient (None without a cotangent) and stats."""
    if pieces.logits.numblocks[problem.axis] == 1:
        return _whole_rows(select, problem, pieces, cotangent)
    return _parts(select.of_parts, problem, pieces, cotangent)


def _cuts(problem: Problem, logits: Any) -> tuple[tuple[int, ...], ...]:
    """Return the logits' chunks without empty ones, which have no largest class."""
    if problem.is_empty:
        return tuple((size,) for size in problem.shape)
    return tuple(tuple(size for size in sizes if size) for sizes in logits.chunks)


def _recut(array: Any, chunks: Any) -> Any:
    """Rechunk an array; dask's own method ignores empty arrays."""
    import dask.array as da

    return array.rechunk(chunks) if array.size else da.zeros_like(array, chunks=chunks)


def _whole_rows(
    select: Select,
    problem: Problem,
    operands: Operands,
    cotangent: Any,
) -> tuple[Any, Any, RowStats | None]:
    axes, axis, logits = _axes(problem), problem.axis, operands.logits
    results = _blockwise(
        partial(blocks.whole_rows, select.whole_rows),
        problem,
        axes,
        *_inputs(problem, operands),
        *scale(problem, cotangent, logits),
        *_of_stats(problem, operands),
        adjust_chunks={axis: 1},
        meta=logits._meta,
    )
    # For a reduction each block returns one number.
    cuts = results.chunks if problem.options.reduction == "none" else (1,) * len(axes)
    losses = take(problem, results, 0, problem.row_dtype, cuts)
    found = _stats(problem, {name: _stat(problem, results, name) for name in stats.needed(problem)})
    grad = None
    if cotangent is not None:
        # A block's result is kept until all of it is taken. If the gradient were not taken last,
        # dask could put it off for the losses, block after block, until memory is full.
        small = [array for array in (losses, *(found or ())) if array is not None]
        grad = take(problem, results, 1, problem.logits_dtype, logits.chunks, small)
    if problem.options.reduction != "none":
        losses = losses.rechunk(dict.fromkeys(axes, FAN_IN))
    return losses, grad, found


def _parts(
    select: Callable[[Problem], OfParts], problem: Problem, operands: Operands, cotangent: Any
) -> tuple[Any, Any, RowStats | None]:
    import dask.array as da

    axes, axis, logits = _axes(problem), problem.axis, operands.logits
    sizes = logits.chunks[axis]
    starts = da.from_array([sum(sizes[:i]) for i in range(len(sizes))], chunks=1)
    inputs = (*_inputs(problem, operands), *_teacher(select, problem, operands), starts, (axis,))
    read = _blockwise(
        partial(parts.read, select),
        problem,
        axes,
        *inputs,
        adjust_chunks={axis: 1},
        meta=logits._meta,
    )
    joined = _join(problem, parts.join, read)
    grad = None
    if cotangent is not None:
        grad = _blockwise(
            partial(parts.gradient, select),
            problem,
            axes,
            *inputs,
            *scale(problem, cotangent, logits),
            *_of_stats(problem, operands),
            *(joined, axes),
            meta=logits._meta,
        )

    def stat(name: str) -> Any:
        if not rowstats.looks_again(problem, name):
            return _stat(problem, joined, name)
        counts = _blockwise(
            parts.rank if name == "rank" else parts.brier,
            problem,
            axes,
            *inputs,
            *(joined, axes),
            adjust_chunks={axis: 1},
            meta=logits._meta.astype(_dtype(problem, name)),
        )
        return counts.sum(axis=axis, keepdims=True)

    losses = take(problem, joined, 0, problem.row_dtype)
    return losses, grad, _stats(problem, {name: stat(name) for name in stats.needed(problem)})


def _teacher(
    select: Callable[[Problem], OfParts], problem: Problem, operands: Operands
) -> tuple[Any, Any]:
    """Pair what the softmax of a teacher's whole rows needs, if there is one, with its axes."""
    if problem.kind != "teacher":
        return None, None
    axes, teacher = _axes(problem), operands.target
    read = _blockwise(
        partial(parts.read_teacher, select),
        problem,
        axes,
        *(teacher, axes),
        adjust_chunks={problem.axis: 1},
        meta=teacher._meta,
    )
    return _join(problem, parts.join_teacher, read), axes


def _join(problem: Problem, function: Callable[..., Any], read: Any) -> Any:
    """Merge the parts of each row.

    Not by blockwise: if nothing else used it, dask would run it within each block of the gradient.
    """
    import dask.array as da
    from dask.base import tokenize
    from dask.highlevelgraph import HighLevelGraph

    axis, shared = problem.axis, problem
    name = f"polyce-{function.__name__.replace('_', '-')}-{tokenize(read.name, shared)}"
    before, after = read.numblocks[:axis], read.numblocks[axis + 1 :]
    graph = {}
    for place in product(*map(range, before), (0,), *map(range, after)):
        every = [
            (read.name, *place[:axis], part, *place[axis + 1 :])
            for part in range(read.numblocks[axis])
        ]
        graph[(name, *place)] = (partial(function, shared), every)
    chunks = (*read.chunks[:axis], (1,), *read.chunks[axis + 1 :])
    layers = HighLevelGraph.from_collections(name, graph, dependencies=[read])
    return da.Array(layers, name, chunks, meta=read._meta)


def _axes(problem: Problem) -> tuple[int, ...]:
    return tuple(range(len(problem.shape)))


def _row_axes(problem: Problem) -> tuple[int, ...]:
    return tuple(i for i in _axes(problem) if i != problem.axis)


def _blockwise(
    function: Any, problem: Problem, out: tuple[int, ...], *pairs: Any, meta: Any, **options: Any
) -> Any:
    """Call a function on the blocks; with a meta dask does not try it on empty arrays first."""
    import dask.array as da

    return da.blockwise(
        # Not every pickler can send a module to another process.
        partial(function, problem),
        out,
        *pairs,
        align_arrays=False,
        token=f"polyce-{getattr(function, 'func', function).__name__.replace('_', '-')}",
        meta=meta,
        **options,
    )


def take(
    problem: Problem,
    results: Any,
    what: int | str,
    dtype: Any,
    cuts: Any = None,
    after: Sequence[Any] = (),
) -> Any:
    """Take one array out of blocks that are tuples, once the arrays in `after` are there."""
    import dask.array as da

    axes = _axes(problem)
    return da.blockwise(
        partial(blocks.take, what),
        axes,
        *(results, axes),
        *(item for array in after for item in (array, axes)),
        adjust_chunks=dict(enumerate(results.chunks if cuts is None else cuts)),
        align_arrays=False,
        token="polyce-take",
        meta=results._meta.astype(dtype),
    )


def _stats(problem: Problem, found: dict[str, Any]) -> RowStats | None:
    if problem.options.stats is None:
        return None
    return RowStats(**{name: found.get(name) for name in RowStats._fields})


def _stat(problem: Problem, results: Any, name: str) -> Any:
    return take(problem, results, name, _dtype(problem, name))


def _dtype(problem: Problem, name: str) -> Any:
    return problem.xp.int64 if name in ("prediction", "rank") else problem.row_dtype


def _cut(problem: Problem, operands: Operands) -> Operands:
    """Cut every operand that has rows as the logits are cut."""
    chunks = _cuts(problem, operands.logits)
    logits = _recut(operands.logits, chunks)
    return cut_beside(problem, operands._replace(logits=logits), chunks)


def cut_beside(problem: Problem, operands: Operands, chunks: Any) -> Operands:
    """Cut every operand that has rows, except the logits, to match logits of these chunks."""
    import dask.array as da

    target, probability = operands.target, operands.target_probability
    before, after = chunks[: problem.axis], chunks[problem.axis + 1 :]
    row_chunks = before + after
    if problem.kind == "index" and tuple(target.shape) != problem.row_shape:
        target = target.reshape(problem.row_shape)
    own = row_chunks if problem.kind == "index" else chunks
    if problem.kind == "sparse" or problem.teacher_dtype is not None:
        # The entries of a sparse target are in one chunk, which every part of their row reads; so
        # are a teacher's hidden states.
        own = (*before, (target.shape[problem.axis],), *after)
    if not isinstance(target, da.Array):
        target = da.from_array(target, chunks=own)
    names = ("sample_weight", "grad_lse", "grad_entropy")
    given = ((name, getattr(operands, name)) for name in names)
    cut = {name: _recut(array, row_chunks) for name, array in given if array is not None}
    if probability is not None:
        cut["target_probability"] = _recut(probability, own)
    return operands._replace(target=_recut(target, own), **cut)


def _inputs(problem: Problem, operands: Operands) -> tuple[Any, ...]:
    """Pair what every block reads with its axes; class weights have none and come whole."""
    axes, row_axes = _axes(problem), _row_axes(problem)
    return (
        *(operands.logits, axes),
        *(operands.target, row_axes if problem.kind == "index" else axes),
        *in_one(operands.weight),
        *paired(operands.sample_weight, row_axes),
        *paired(operands.target_probability, axes),
    )


def paired(array: Any, axes: tuple[int, ...]) -> tuple[Any, Any]:
    """Pair an array, if there is one, with its axes."""
    return (array, None if array is None else axes)


def in_one(array: Any) -> tuple[Any, None]:
    """Pair an array, if there is one, with no axes: every block takes all of it.

    dask itself would name it anew in each call, and compute it again.
    """
    if hasattr(array, "dask"):
        from dask.delayed import delayed

        (block,) = array.rechunk(-1).to_delayed(optimize_graph=False).flat
        # A task of its own, which dask cannot fuse with the blocks that share it.
        array = delayed(blocks.itself, pure=True)(block)
    return array, None


def scale(problem: Problem, cotangent: Any, logits: Any) -> tuple[Any, Any]:
    """Pair the cotangent, a number or an array of one or all rows, with its axes."""
    if not hasattr(cotangent, "dask"):
        return cotangent, None
    if not cotangent.ndim:
        return cotangent, ()
    return problem.library.align(cotangent, logits), _axes(problem)


def _of_stats(problem: Problem, operands: Operands) -> tuple[Any, ...]:
    """Pair the cotangents of lse and entropy, if there are any, with their axes."""
    given = (operands.grad_lse, operands.grad_entropy)
    return tuple(item for array in given for item in paired(array, _row_axes(problem)))


def total_weight(problem: Problem, operands: Operands) -> Any:
    """Add up the mean's denominator from the labels, block by block."""
    row_axes = _row_axes(problem)
    totals = _blockwise(
        blocks.total_weight,
        problem,
        row_axes,
        *(operands.target, row_axes),
        *in_one(operands.weight),
        *paired(operands.sample_weight, row_axes),
        adjust_chunks=dict.fromkeys(row_axes, 1),
        meta=operands.target._meta.astype(problem.row_dtype),
    )
    return problem.library.total(totals)
