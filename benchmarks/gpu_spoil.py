"""Make the kernels' results wrong on purpose, to see that the GPU script finds it."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from polyce.implementations import triton_torch

_INFINITY = torch.tensor(float("inf"))


def spoil(what: str) -> None:
    """Spoil the loss or the gradient by a fiftieth, or the last bit of every second loss."""
    forward, backward = triton_torch.forward, triton_torch.backward
    turns = itertools.count()

    def spoilt_forward(*arguments: Any, **options: Any) -> Any:
        loss, *others = forward(*arguments, **options)
        if what == "loss":
            loss = loss * 1.02
        elif what == "bits" and loss.dtype == torch.float32 and next(turns) % 2:
            loss = torch.nextafter(loss, _INFINITY.to(loss.device))
        return (loss, *others)

    def spoilt_backward(*arguments: Any, **options: Any) -> Any:
        grad = backward(*arguments, **options)
        return grad.mul_(1.02) if what == "gradient" else grad

    triton_torch.forward, triton_torch.backward = spoilt_forward, spoilt_backward
    triton_torch.KERNELS = triton_torch.KERNELS._replace(
        forward=spoilt_forward, backward=spoilt_backward
    )
