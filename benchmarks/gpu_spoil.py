"""Make the kernels' results wrong on purpose, to see that the GPU script finds it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any


def spoil(library: str, what: str) -> None:
    """Spoil the loss or the gradient by a fiftieth, or the last bit of every second loss."""
    if library == "cupy":
        spoil_cupy(what)
    else:
        spoil_torch(what)


def spoilt_loss(what: str, next_after: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Give what is done to each loss."""
    turns = itertools.count()

    def of(loss: Any) -> Any:
        if what == "loss":
            return loss * 1.02
        if what == "bits" and str(loss.dtype).endswith("float32") and next(turns) % 2:
            return next_after(loss)
        return loss

    return of


def spoil_torch(what: str) -> None:
    """Spoil what Triton's kernels give."""
    import torch

    from polyce.implementations import triton_torch

    infinity = torch.tensor(float("inf"))
    forward, backward = triton_torch.forward, triton_torch.backward
    spoilt = spoilt_loss(what, lambda loss: torch.nextafter(loss, infinity.to(loss.device)))

    def spoilt_forward(*arguments: Any, **options: Any) -> Any:
        loss, *others = forward(*arguments, **options)
        return (spoilt(loss), *others)

    def spoilt_backward(*arguments: Any, **options: Any) -> Any:
        grad = backward(*arguments, **options)
        return grad.mul_(1.02) if what == "gradient" else grad

    triton_torch.forward, triton_torch.backward = spoilt_forward, spoilt_backward
    triton_torch.KERNELS = triton_torch.KERNELS._replace(
        forward=spoilt_forward, backward=spoilt_backward
    )


def spoil_cupy(what: str) -> None:
    """Spoil what the whole calls of CuPy's path give."""
    import cupy

    from polyce import registry

    row = registry.find("cupy")

    # CuPy's own nextafter takes the smallest steps for zero.
    def next_after(loss: Any) -> Any:
        return (loss.view(cupy.int32) + 1).view(loss.dtype)

    # Each has turns of its own.
    alone, beside = spoilt_loss(what, next_after), spoilt_loss(what, next_after)
    plain, with_grad = row.cross_entropy, row.cross_entropy_with_grad
    assert plain is not None  # noqa: S101
    assert with_grad is not None  # noqa: S101

    def spoilt_plain(*arguments: Any) -> Any:
        loss, stats = plain(*arguments)
        return alone(loss), stats

    def spoilt_with_grad(*arguments: Any) -> Any:
        loss, grad, stats = with_grad(*arguments)
        if what == "gradient":
            grad *= 1.02
        return beside(loss), grad, stats

    changed = dataclasses.replace(
        row, cross_entropy=spoilt_plain, cross_entropy_with_grad=spoilt_with_grad
    )
    registry.TABLE = tuple(changed if each is row else each for each in registry.TABLE)
