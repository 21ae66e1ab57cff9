"""The cupy path's calls: memory for what the kernels write, and their launches.

Everything runs on the current stream of the logits' device. Nothing waits for it, except the check
of the labels that validate=True asks for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cupy
import numpy as np

from polyce.arrays import dtypes
from polyce.call.options import BESIDE_TARGET, USUAL_STATS
from polyce.call.problem import Operands, Problem
from polyce.formula import labels, stats, whole
from polyce.formula.stats import Stats
from polyce.implementations.cupy import plan as cupy_plan
from polyce.implementations.cupy.plan import LaunchKey, LaunchPlan, Layout, PartKey

# A null pointer, in the one form that CuPy 13 also takes.
NULL = 0
# Bytes of two sums, and at most of the state of a part of a row.
_SUMS, _STATE = 16, 168
_MOST_KNOWN = 1024
# The stats that the kernels fill, in the order of their arguments.
_WRITTEN = (*USUAL_STATS, "valid", *BESIDE_TARGET)

_plans: dict[tuple[Problem, LaunchKey], LaunchPlan] = {}
_kernels: dict[tuple[str, ...], Any] = {}


def cross_entropy(problem: Problem, operands: Operands) -> tuple[Any, Stats | None]:
    """Compute the loss and the stats."""
    if problem.is_empty:
        return whole.cross_entropy(problem, operands)
    with problem.library.computing(operands.named()):
        return _forward(described(problem, operands))


def cross_entropy_with_grad(
    problem: Problem, operands: Operands, out: Any
) -> tuple[Any, Any, Stats | None]:
    """Compute the loss, the gradient, in `out` if that is given, and the stats."""
    if problem.is_empty:
        return whole.cross_entropy_with_grad(problem, operands, out)
    with problem.library.computing(operands.named()):
        grad = cupy.empty_like(operands.logits) if out is None else out
        call = described(problem, operands, grad)
        loss, found = _forward_backward(call)
        if call.grad is not grad:
            grad[...] = call.grad
        return loss, grad, found


class KernelCall(NamedTuple):
    """One call: how it is launched, and its arrays as the kernels take them."""

    problem: Problem
    plan: LaunchPlan
    logits: Any
    targets: tuple[Any, Any, Any]
    """Target, class weights and sample weights."""
    entries: tuple[Any, int, Any]
    """The probabilities of a sparse target, how many a row has, and memory for their logits."""
    divisor: tuple[Any, float]
    """What a mean divides by: an array and 1, or no array and a number."""
    cotangent: tuple[Any, float]
    of_stats: tuple[Any, Any]
    """The cotangents of lse and entropy, in float64."""
    grad: Any

    def launch(self, name: str, grid: tuple[int, ...], *arguments: Any) -> None:
        """Launch a kernel."""
        kernel = _kernel(name, self.plan.options[name])
        kernel(grid, (self.plan.block,), (self.plan.call, *arguments))


def described(
    problem: Problem, operands: Operands, grad: Any = None, part: PartKey | None = None
) -> KernelCall:
    """Lay out a call; copy the arrays whose layout the kernels cannot read."""
    logits, target, weight, sample, normalizer, cotangent, *more = operands
    of_lse, of_entropy, chances, *_ = more
    if problem.check_labels and part is None:
        labels.read(problem, target, logits)
    dense = problem.kind in ("probability", "teacher")
    entries = (NULL, 0, NULL)
    if problem.kind == "sparse":
        target = _in_order(cupy.moveaxis(target, problem.axis, -1))
        real = problem.arithmetic_dtype
        chances = _in_order(cupy.moveaxis(chances, problem.axis, -1), real)
        # The gradient may be written over the logits.
        over = grad is not None and part is None
        logits_kept = cupy.empty(target.shape, real) if over else NULL
        entries = (chances, problem.entries, logits_kept)
    elif not dense:
        target = _in_order(target)
    if weight is not None:
        weight = _in_order(weight, problem.arithmetic_dtype)
    by_row = problem.options.reduction == "none" and bool(getattr(cotangent, "ndim", 0))
    sample, normalizer, cotangent = map(_readable, (sample, normalizer, cotangent))
    rest = (_kind(sample), _kind(normalizer), _kind(cotangent), by_row, part)
    plan = _plan(problem, logits, target if dense else None, grad, rest)
    if any(plan.copies):
        if plan.copies[0]:
            logits = cupy.ascontiguousarray(logits)
        if plan.copies[1]:
            target = cupy.ascontiguousarray(target)
        if plan.copies[2]:
            grad = cupy.empty(logits.shape, problem.logits_dtype)
        plan = _plan(problem, logits, target if dense else None, grad, rest)
    return KernelCall(
        problem=problem,
        plan=plan,
        logits=logits,
        targets=(target, _or_null(weight), _or_null(sample)),
        entries=entries,
        divisor=_array_and_number(normalizer),
        cotangent=_array_and_number(cotangent),
        of_stats=(_of_stats(of_lse), _of_stats(of_entropy)),
        grad=grad,
    )


def _plan(
    problem: Problem, logits: Any, target: Any, grad: Any, rest: tuple[Any, ...]
) -> LaunchPlan:
    key = LaunchKey(
        _layout(logits),
        None if target is None else _layout(target),
        None if grad is None else _layout(grad),
        *rest,
    )
    plan = _plans.get((problem, key))
    if plan is None:
        if len(_plans) >= _MOST_KNOWN:
            _plans.clear()
        plan = _plans[problem, key] = cupy_plan.plan(problem, key)
    return plan


def _forward(call: KernelCall) -> tuple[Any, Stats | None]:
    """Read the rows once, and reduce their losses."""
    plan = call.plan
    reduced = call.problem.options.reduction != "none"
    loss, found, written = _results(call.problem)
    if plan.parts > 1:
        states = _memory(plan.rows * plan.parts * _STATE)
        read = (call.logits, *call.targets)
        arguments = (*read, states, NULL, *written, *call.entries)
        call.launch("forward", (plan.rows, plan.parts), *arguments)
        result = loss if reduced else NULL
        call.launch("join", (1,), *call.targets, states, *call.divisor, result, *written)
        return loss, found
    sums = _memory(plan.blocks * _SUMS) if reduced else NULL
    arguments = (call.logits, *call.targets, NULL, sums, *written, *call.entries)
    call.launch("forward", (plan.blocks,), *arguments)
    if reduced:
        call.launch("reduce", (1,), sums, plan.blocks, *call.divisor, loss)
    return loss, found


def _forward_backward(call: KernelCall) -> tuple[Any, Stats | None]:
    """Write the gradient, and reduce the losses."""
    plan = call.plan
    reduced = call.problem.options.reduction != "none"
    loss, found, written = _results(call.problem)
    result = loss if reduced else NULL
    read = (call.logits, *call.targets)
    scales = (*call.cotangent, *call.divisor)
    if plan.parts > 1:
        states = _memory(plan.rows * plan.parts * _STATE)
        nothing = (*[NULL] * len(written), *call.entries)
        call.launch("forward", (plan.rows, plan.parts), *read, states, NULL, *nothing)
        # The block after the last row writes the loss.
        arguments = (*read, *scales, states, result, call.grad, *written, *call.of_stats)
        call.launch("backward", (plan.rows + 1, plan.parts), *arguments)
        return loss, found
    weights, sums, finished = NULL, NULL, NULL
    if reduced:
        weights = _memory((plan.weighing + plan.blocks + 1) * _SUMS)
        sums = weights + plan.weighing * _SUMS
        finished = sums + plan.blocks * _SUMS
        call.launch("weigh", (plan.weighing,), *call.targets, weights, finished)
    places = (weights, finished, sums, result, call.grad, *written)
    call.launch(
        "forward_backward", (plan.blocks,), *read, *scales, *places, *call.entries, *call.of_stats
    )
    return loss, found


def _results(problem: Problem) -> tuple[Any, Stats | None, list[Any]]:
    """Allocate the loss and the stats; return them, and those that kernels write for each row."""
    by_row = problem.options.reduction == "none"
    loss = cupy.empty(problem.row_shape if by_row else (), problem.result_dtype)
    found = stats.unfilled(problem, cupy.empty)
    entries = [None if found is None else getattr(found, name) for name in _WRITTEN]
    return loss, found, [loss if by_row else NULL, *map(_or_null, entries)]


def _memory(size: int) -> Any:
    """Allocate `size` bytes, which belong to the stream's next kernels."""
    return cupy.empty(size, np.uint8).data


def _readable(value: Any) -> Any:
    """Return an array from which kernels can read one number a row; leave all else as it is."""
    if not hasattr(value, "dtype"):
        return value
    return _in_order(value, None if dtypes.dtype_name(value) in dtypes.FLOATS else np.float64)


def _kind(value: Any) -> str | None:
    if value is None:
        return None
    return dtypes.dtype_name(value) if hasattr(value, "dtype") else "number"


def _array_and_number(value: Any) -> tuple[Any, float]:
    if hasattr(value, "dtype"):
        return value, 1.0
    return NULL, 1.0 if value is None else value


def _of_stats(cotangent: Any) -> Any:
    return NULL if cotangent is None else _in_order(cotangent, np.float64)


def _or_null(array: Any) -> Any:
    return NULL if array is None else array


def _in_order(array: Any, dtype: Any = None) -> Any:
    """Return an array in C order, and refuse a misaligned one."""
    cupy_plan.check_address(array.data.ptr, array.itemsize)
    return cupy.ascontiguousarray(array, dtype)


def _layout(array: Any) -> Layout:
    return Layout(array.strides, array.data.ptr % 16, array.itemsize)


def _kernel(name: str, options: tuple[str, ...]) -> Any:
    found = _kernels.get(options)
    if found is None:
        # A product fused with a sum would differ from what a CPU computes.
        unfused = "-ffp-contract=off" if cupy.cuda.runtime.is_hip else "--fmad=false"
        options_here = (*options, unfused)
        module = cupy.RawModule(code=cupy_plan.source(), options=options_here, backend="nvrtc")
        found = _kernels[options] = module.get_function(name)
    return found
