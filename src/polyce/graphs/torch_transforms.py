"""What rules for torch.func transforms share: vmap's axis, and the levels of forward mode."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from polyce.call.problem import Problem


def batched(size: int, values: tuple[Any, ...], dims: tuple[Any, ...]) -> list[Any]:
    """Move vmap's axis to the front, where it is one more axis of rows."""
    found = []
    for value, dim in zip(values, dims, strict=True):
        if not isinstance(value, torch.Tensor):
            found.append(value)
        elif dim is None:
            found.append(value.expand(size, *value.shape))
        else:
            found.append(value.movedim(dim, 0))
    return found


def batched_problem(size: int, problem: Problem) -> Problem:
    """Return the problem whose rows have vmap's axis in front."""
    return problem._replace(
        shape=(size, *problem.shape), axis=problem.axis + 1, row_shape=(size, *problem.row_shape)
    )


def primal(value: Any) -> Any:
    """Remove the tangent of this level, so that a rule's result is differentiated once.

    torch switches forward mode off around a rule, which loses a tangent within a tangent
    (https://github.com/pytorch/pytorch/issues/197867); a rule that switches it on must do this.
    """
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return forward_ad.unpack_dual(value).primal
    return value
