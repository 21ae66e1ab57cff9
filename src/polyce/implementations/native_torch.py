"""The native path under torch: tensors' memory, and its kernels for whole calls."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from polyce import torch_calls
from polyce.implementations import native
from polyce.problem import Operands, Problem
from polyce.stats import Stats
from polyce.torch_calls import Kernels, Saved


def _handle(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Give address and strides, and the tensor, which must live as long as they are used."""
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    return tensor.data_ptr(), tensor.stride(), tensor


def _dense(tensor: torch.Tensor, dtype: Any) -> torch.Tensor:
    if dtype is not None and tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    return tensor.contiguous()


def _written(tensor: torch.Tensor) -> None:
    """Let autograd see that a tensor which it may have saved is another one now."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


_NOTHING = Saved()


def _keeps(problem: Problem) -> Saved:
    return Saved(rows=problem.classes >= native.SAVED_FROM, denominator=False)


def _forward(
    problem: Problem, operands: Operands, keep: bool
) -> tuple[torch.Tensor, Stats | None, Saved]:
    if not keep or problem.classes < native.SAVED_FROM:
        loss, found = native.run(problem, operands)
        return loss, found, _NOTHING
    rows = torch.empty((math.prod(problem.row_shape), 4), dtype=torch.float64)
    loss, found = native.run(problem, operands, saved=rows)
    return loss, found, Saved(rows)


def _backward(
    problem: Problem, operands: Operands, saved: Saved, out: torch.Tensor | None
) -> torch.Tensor:
    grad = torch.empty_like(operands.logits) if out is None else out
    native.run(problem, operands, grad, fresh=out is None, saved=saved.rows, backward=True)
    return grad


KERNELS = Kernels("native", _forward, _backward, _keeps)


MEMORY = native.Memory(
    empty=torch.empty,
    empty_like=torch.empty_like,
    handle=_handle,
    dense=_dense,
    scalar=lambda tensor: tensor,
    written=_written,
    on_graph=functools.partial(torch_calls.cross_entropy, KERNELS),
)
