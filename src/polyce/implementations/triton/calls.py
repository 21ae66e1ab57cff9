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
from polyce.implementations.triton import arguments, launch
from polyce.implementations.triton.launch import Results


def forward(
    problem: Problem, operands: Operands, keep: bool
) -> tuple[torch.Tensor, Stats | None, Saved]:
    """Compute the loss, the stats, and what a backward pass needs if there will be one."""
    if problem.is_empty:
        return REFERENCE.forward(problem, operands, keep)
    torch_memory.check_storages(**operands.named())
    device = operands.logits.device

    def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    call = arguments.call(problem, operands)
    reduced = problem.options.reduction != "none"
    divided = problem.options.reduction == "mean"
    results = Results(
        loss=empty(() if reduced else problem.row_shape, problem.result_dtype),
        stats=stats.unfilled(problem, empty),
        rows=empty((call.row_count, _saved_of_a_row(problem)), torch.float64) if keep else None,
        sums=empty((call.programs, 2), torch.float64) if reduced else None,
        denominator=empty((), torch.float64) if divided else None,
        normalizer=operands.normalizer,
        of_stats=(operands.grad_lse, operands.grad_entropy),
    )
    launch.run(launch.forward(call, results), operands.logits)
    saved = Saved(results.rows, results.denominator) if keep else Saved()
    return results.loss, results.stats, saved


def backward(
    problem: Problem, operands: Operands, saved: Saved, out: torch.Tensor | None
) -> torch.Tensor:
    """Compute the gradient, in `out` if that is given; it may be the logits."""
    if problem.is_empty:
        return REFERENCE.backward(problem, operands, saved, out)
    torch_calls.check_operands(problem, operands)
    if saved.rows is None or problem.grad_stats:
        # What the cotangents of stats are multiplied by was not saved: the rows are read again.
        _, _, saved = forward(problem, operands, keep=True)
    return _write_gradient(problem, operands, saved, out)


def _write_gradient(
    problem: Problem, operands: Operands, saved: Saved, out: torch.Tensor | None
) -> torch.Tensor:
    logits = operands.logits.detach()
    _check_saved(problem, saved)
    grad = torch.empty_like(logits) if out is None else out
    call, place = arguments.call(problem, operands, grad), grad
    if call.grad_rows is None:
        place = torch.empty(problem.shape, dtype=logits.dtype, device=logits.device)
        call = arguments.call(problem, operands, place)
    cotangent = operands.grad_output
    if not isinstance(cotangent, torch.Tensor):
        number = 1.0 if cotangent is None else cotangent
        cotangent = torch.full((), number, dtype=torch.float64, device=logits.device)
    launches = launch.backward(call, saved.rows, saved.denominator, cotangent, place)
    launch.run(launches, logits)
    return grad if place is grad else grad.copy_(place)


def _saved_of_a_row(problem: Problem) -> int:
    return (9 if problem.grad_stats else 4) + (2 if problem.kind == "teacher" else 0)


def _check_saved(problem: Problem, saved: Saved) -> None:
    """Refuse tensors that no forward pass of this call has saved."""
    size = torch.Size((math.prod(problem.row_shape), _saved_of_a_row(problem)))
    rows = (size, torch.float64)
    denominator = (torch.Size(()), torch.float64) if problem.options.reduction == "mean" else None
    torch_memory.check_returned((rows, denominator), saved)


def cross_entropy_with_grad(
    problem: Problem, operands: Operands, out: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, Stats | None]:
    """Compute the loss, the gradient, in `out` if that is given, and the stats."""
    loss, found, saved = forward(problem, operands, keep=True)
    if problem.is_empty:
        return loss, backward(problem, operands, saved, out), found
    return loss, _write_gradient(problem, operands, saved, out), found


def keeps(problem: Problem) -> Saved:
    """Return what a forward pass saves."""
    if problem.is_empty:
        return Saved(rows=False, denominator=False)
    return Saved(rows=True, denominator=problem.options.reduction == "mean")


KERNELS = Kernels("triton", forward, backward, keeps, takes_grad_stats=True)
