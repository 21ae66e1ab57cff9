"""The triton path's calls: memory for the kernels' results, and calls that launch nothing."""

from __future__ import annotations

import math

import torch

from polyce.arrays import torch_memory
from polyce.call.problem import Operands, Problem
from polyce.formula import stats
from polyce.formula.stats import Stats
from polyce.graphs import torch_calls
from polyce.graphs.torch_calls import REFERENCE, Kernels, Saved
from polyce.implementations.triton import arguments, launch, layout, plans
from polyce.implementations.triton.arguments import Arrays, Place
from polyce.implementations.triton.launch import Results, Sizes
from polyce.implementations.triton.plans import Key


def forward(
    problem: Problem, operands: Operands, keep: bool
) -> tuple[torch.Tensor, Stats | None, Saved]:
    """Compute the loss, the stats, and what a backward pass needs if there will be one."""
    if problem.is_empty:
        return REFERENCE.forward(problem, operands, keep)
    # Looking at labels is no launch.
    key = None if problem.check_labels else plans.key(problem, keep, tensors=operands)
    plan = plans.find(key, operands)
    if plan is not None:
        results = _results(problem, operands, plan.sizes)
        values = launch.of_forward(_as_given(operands), results)
        plans.run(plan.launches, values, operands.logits)
    else:
        torch_memory.check_storages(**operands.named())
        call = arguments.call(problem, operands)
        sizes = launch.sizes(call, keep)
        results = _results(problem, operands, sizes)
        values = launch.of_forward(call.arrays, results)
        launches = launch.run(launch.forward(call, results), values, operands.logits)
        if key is not None and _are_as_given(call.arrays, operands):
            plans.keep(key, operands, launches, sizes)
    saved = Saved(results.rows, results.denominator) if keep else Saved()
    return results.loss, results.stats, saved


def _results(problem: Problem, operands: Operands, sizes: Sizes) -> Results:
    """Allocate what a forward pass writes."""
    device = operands.logits.device

    def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def wide(shape: tuple[int, ...] | None) -> torch.Tensor | None:
        return None if shape is None else empty(shape, torch.float64)

    reduction = problem.options.reduction
    return Results(
        loss=empty(() if reduction != "none" else problem.row_shape, problem.result_dtype),
        stats=stats.unfilled(problem, empty),
        rows=None if sizes.rows is None else empty(sizes.rows, problem.arithmetic_dtype),
        sums=wide(sizes.sums),
        added=wide(sizes.added),
        softmax=wide(sizes.softmax),
        parts=wide(sizes.parts),
        weights=wide(sizes.weights),
        denominator=wide(() if reduction == "mean" else None),
        normalizer=operands.normalizer,
        of_stats=(operands.grad_lse, operands.grad_entropy),
    )


def _as_given(operands: Operands) -> Arrays:
    """Return the arrays that kernels read, of a call that needs no copies of them."""
    logits, target, weight, sample_weight, *_ = operands
    return Arrays(logits, target, weight, sample_weight, operands.target_probability)


def _are_as_given(arrays: Arrays, operands: Operands) -> bool:
    """Tell whether the kernels read the operands' own memory."""
    return all(
        array is None or (array.data_ptr() == given.data_ptr() and array.dtype == given.dtype)
        for array, given in zip(arrays, _as_given(operands), strict=True)
    )


def backward(
    problem: Problem, operands: Operands, saved: Saved, out: torch.Tensor | None
) -> torch.Tensor:
    """Compute the gradient, in `out` if that is given; it may be the logits."""
    if problem.is_empty:
        return REFERENCE.backward(problem, operands, saved, out)
    tensors = (*operands, *saved, out)
    key: Key | None = plans.key(problem, tensors=tensors)
    plan = plans.find(key, tensors)
    if plan is not None:
        grad = torch.empty_like(operands.logits) if out is None else out
        found = _of_entries(problem, grad)
        given = arguments.cotangent(operands.grad_output)
        values = launch.of_backward(_as_given(operands), saved, given, grad, found)
        plans.run(plan.launches, values, operands.logits)
        return grad
    torch_calls.check_operands(problem, operands)
    if saved.rows is None or problem.grad_stats:
        # What the cotangents of stats are multiplied by was not saved: the rows are read again.
        _, _, saved = forward(problem, operands, keep=True)
        key = None
    return write_gradient(problem, operands, saved, out, key)


def write_gradient(
    problem: Problem,
    operands: Operands,
    saved: Saved,
    out: torch.Tensor | None,
    key: Key | None,
    part: Place | None = None,
) -> torch.Tensor:
    """Lay the backward pass out, and keep its launches by the key, if there is one."""
    logits = operands.logits.detach()
    _check_saved(problem, saved)
    grad = torch.empty_like(logits) if out is None else out
    call, place = arguments.call(problem, operands, grad, part, check=False), grad
    if call.grad_rows is None:
        place = torch.empty(problem.shape, dtype=logits.dtype, device=logits.device)
        call = arguments.call(problem, operands, place, part, check=False)
    cotangent = arguments.cotangent(operands.grad_output)
    values = launch.of_backward(call.arrays, saved, cotangent, place, _of_entries(problem, place))
    launches = launch.run(launch.backward(call, cotangent, place), values, logits)
    if key is not None and place is grad and _are_as_given(call.arrays, operands):
        plans.keep(key, (*operands, *saved, out), launches)
    return grad if place is grad else grad.copy_(place)


def _of_entries(problem: Problem, grad: torch.Tensor) -> torch.Tensor | None:
    """Allocate memory for the gradient at the entries of a sparse target."""
    if not problem.entries:
        return None
    count = math.prod(problem.row_shape) * problem.entries
    return torch.empty(count, dtype=grad.dtype, device=grad.device)


def _check_saved(problem: Problem, saved: Saved) -> None:
    """Refuse tensors that no forward pass of this call has saved."""
    size = torch.Size((math.prod(problem.row_shape), launch.saved_of_a_row(problem)))
    rows = (size, problem.arithmetic_dtype)
    denominator = (torch.Size(()), torch.float64) if problem.options.reduction == "mean" else None
    torch_memory.check_returned((rows, denominator), saved)


def cross_entropy_with_grad(
    problem: Problem, operands: Operands, out: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, Stats | None]:
    """Compute the loss, the gradient, in `out` if that is given, and the stats."""
    is_plain = problem.kind == "index" and not (problem.is_empty or problem.grad_stats)
    if is_plain and problem.classes <= layout.WHOLE:
        found = _in_one_pass(problem, operands, out)
        if found is not None:
            return found
    loss, stats_of_rows, saved = forward(problem, operands, keep=True)
    if problem.grad_stats and not problem.is_empty:
        # The forward pass has just saved what their cotangents are multiplied by.
        return loss, write_gradient(problem, operands, saved, out, None), stats_of_rows
    return loss, backward(problem, operands, saved, out), stats_of_rows


def _in_one_pass(
    problem: Problem, operands: Operands, out: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, Stats | None] | None:
    """Compute loss and gradient of labels with each row kept by a program; None if it is longer."""
    tensors = (*operands, out)
    key = None if problem.check_labels else plans.key(problem, "both", tensors=tensors)
    plan = plans.find(key, tensors)
    if plan is not None and not plan.launches:
        # The rows of an earlier call like this one were too long.
        return None
    grad = torch.empty_like(operands.logits) if out is None else out
    cotangent = arguments.cotangent(operands.grad_output)
    if plan is not None:
        results = _results(problem, operands, plan.sizes)
        values = launch.of_both(_as_given(operands), results, cotangent, grad)
        plans.run(plan.launches, values, operands.logits)
        return results.loss, grad, results.stats
    torch_memory.check_storages(**operands.named())
    call = arguments.call(problem, operands, grad)._replace(is_whole=True)
    if not call.fits:
        if key is not None:
            plans.keep(key, tensors, ())
        return None
    sizes = launch.sizes_of_both(call)
    results = _results(problem, operands, sizes)
    values = launch.of_both(call.arrays, results, cotangent, grad)
    launches = launch.run(launch.both(call, results, cotangent, grad), values, operands.logits)
    if key is not None and _are_as_given(call.arrays, operands):
        plans.keep(key, tensors, launches, sizes)
    return results.loss, grad, results.stats


def keeps(problem: Problem) -> Saved:
    """Return what a forward pass saves."""
    if problem.is_empty:
        return Saved(rows=False, denominator=False)
    rows = problem.arithmetic_dtype
    return Saved(rows=rows, denominator=problem.options.reduction == "mean")


KERNELS = Kernels("triton", forward, backward, keeps, takes_grad_stats=True)
