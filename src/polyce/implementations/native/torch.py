"""The native path under torch: tensors' memory, and its kernels for whole calls."""

from __future__ import annotations

from typing import Any

import torch

from polyce.arrays import torch_memory
from polyce.call.problem import Operands, Problem
from polyce.formula.stats import Stats
from polyce.graphs import torch_calls
from polyce.graphs.torch_calls import Kernels, Saved
from polyce.implementations.native.run import (
    SAVED_FROM,
    ArrayAccess,
    run,
    run_backward,
    saved_shape,
)


def _dense(name: str, tensor: torch.Tensor, dtype: Any) -> torch.Tensor:
    is_other = dtype is not None and tensor.dtype != dtype
    if is_other or not tensor.is_contiguous():
        torch_memory.check_storages(**{name: tensor})
        return tensor.to(dtype or tensor.dtype).contiguous()
    return tensor


# torch's default device may be another.
_CPU = torch.device("cpu")


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=_CPU)


def _written(tensor: torch.Tensor) -> None:
    """Tell autograd that a tensor, which it may have saved, has changed."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


_NOTHING = Saved()


def _keeps(problem: Problem) -> Saved:
    return Saved(torch.float64 if problem.classes >= SAVED_FROM else None, denominator=False)


def _forward(
    problem: Problem, operands: Operands, keep: bool
) -> tuple[torch.Tensor, Stats | None, Saved]:
    if not keep or not _keeps(problem).rows:
        loss, found = run(TORCH, problem, operands)
        return loss, found, _NOTHING
    rows = _empty(saved_shape(problem), torch.float64)
    loss, found = run(TORCH, problem, operands, saved=rows)
    return loss, found, Saved(rows)


def _backward(
    problem: Problem, operands: Operands, saved: Saved, out: torch.Tensor | None
) -> torch.Tensor:
    grad = torch.empty_like(operands.logits) if out is None else out
    run_backward(TORCH, problem, operands, saved.rows, grad, fresh=out is None)
    return grad


KERNELS = Kernels("native", _forward, _backward, _keeps, takes_grad_stats=True)


def _on_graph(problem: Problem, operands: Operands) -> tuple[Any, Stats | None] | None:
    if torch_calls.needs_graph(problem, operands):
        return torch_calls.cross_entropy(KERNELS, problem, operands, on_graph=True)
    return None


TORCH = ArrayAccess(
    empty=_empty,
    empty_like=torch.empty_like,
    in_order=lambda tensor: tensor,
    dense=_dense,
    scalar=lambda tensor: tensor,
    written=_written,
    on_graph=_on_graph,
)
