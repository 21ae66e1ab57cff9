"""The contenders on a GPU: polyce and what one would call instead, with torch or CuPy.

Each computes the mean loss of logits and labels, and is timed in one or several ways.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import polyce
from gpu.device import Device, NotHereError, Timed

from ..measure import installed

# Takes logits and labels; returns the loss, or a tuple that begins with it.
Loss = Callable[[Any, Any], Any]
# Takes logits and labels; returns a call to time.
Way = Callable[[Any, Any], Timed]


class Made(NamedTuple):
    """A contender that can run here."""

    loss: Loss
    ways: dict[str, Way]


class Contender(NamedTuple):
    """A way to compute the loss."""

    make: Callable[[], Made]
    images: bool = True
    """Whether it takes more than two dimensions."""
    spoils: bool = False
    """Whether a call writes over its logits, which are then restored before the next call."""


def contenders(device: Device) -> dict[str, Contender]:
    """Return polyce's contenders and its peers, for the arrays of a device."""
    return for_cupy(device) if device.library == "cupy" else for_torch(device)


def named(device: Device) -> dict[str, str]:
    """Return the option that names the path: a stand-in's is not chosen by itself.

    A device's is, and naming it takes the host longer.
    """
    return {"implementation": device.path} if device.rehearses else {}


def for_torch(device: Device) -> dict[str, Contender]:
    """Return the contenders for torch tensors."""
    import torch

    import polyce.torch

    ours = functools.partial(polyce.cross_entropy, **named(device))
    in_place = functools.partial(polyce.torch.cross_entropy, inplace_backward=True, **named(device))
    whole = ("forward", "backward", "forward and backward")
    written = ("in-place backward",)
    liger = functools.partial(found, "liger_kernel.transformers", "liger-kernel")
    quack = functools.partial(found, "quack.cross_entropy", "quack-kernels")
    return {
        "polyce": Contender(lambda: through_autograd(ours, whole)),
        "polyce in place": Contender(lambda: through_autograd(in_place, written), spoils=True),
        "torch eager": Contender(
            lambda: through_autograd(torch.nn.functional.cross_entropy, whole)
        ),
        "torch compiled": Contender(lambda: through_autograd(compiled(device), whole)),
        # Its forward pass computes the gradient, over the logits.
        "liger": Contender(
            lambda: through_autograd(liger().LigerCrossEntropyLoss(), whole[-1:], True),
            images=False,
            spoils=True,
        ),
        "quack": Contender(lambda: through_autograd(quack().cross_entropy, whole), images=False),
        "quack in place": Contender(
            lambda: through_autograd(
                functools.partial(quack().cross_entropy, inplace_backward=True), written
            ),
            images=False,
            spoils=True,
        ),
    }


def compiled(device: Device) -> Loss:
    """Compile torch's own loss, for one shape only."""
    import torch

    # Graphs compiled for other shapes would count towards torch's limit of recompilations.
    torch.compiler.reset()
    backend = "aot_eager" if device.rehearses else "inductor"
    function: Loss = torch.compile(
        torch.nn.functional.cross_entropy, dynamic=False, backend=backend
    )
    return function


def found(name: str, package: str) -> Any:
    """Import a module of a package that may not be installed."""
    if not installed(name.partition(".")[0]):
        raise NotHereError(f"not installed (pip install {package})")
    return importlib.import_module(name)


def through_autograd(loss: Loss, whats: tuple[str, ...], writes: bool = False) -> Made:
    """Return the calls of a loss on torch's graph; `writes`: its forward pass writes the logits."""
    return Made(loss, {what: graph_way(loss, what, writes) for what in whats})


def graph_way(loss: Loss, what: str, writes: bool) -> Way:
    """Return one of these calls; one that writes over its logits gets a copy."""
    import torch

    spoils = writes or what == "in-place backward"

    def way(logits: Any, labels: Any) -> Timed:
        leaf = logits.detach().clone() if spoils else logits.detach()
        leaf.requires_grad_(what != "forward")

        def bring_back() -> Any:
            if spoils:
                with torch.no_grad():
                    leaf.copy_(logits)
            return leaf

        def gradient(value: Any) -> Any:
            return torch.autograd.grad(value, leaf)

        if what == "forward":
            return Timed(bring_back, lambda leaf: loss(leaf, labels))
        if what == "forward and backward":
            return Timed(bring_back, lambda leaf: gradient(loss(leaf, labels)))
        return Timed(lambda: loss(bring_back(), labels), gradient)

    return way


def for_cupy(device: Device) -> dict[str, Contender]:
    """Return the contenders for CuPy arrays."""
    ours, reference = (
        [
            functools.partial(function, **option)
            for function in (polyce.cross_entropy, polyce.cross_entropy_with_grad)
        ]
        for option in (named(device), {"implementation": "reference"})
    )
    return {
        "polyce": Contender(lambda: of_two(*ours)),
        "polyce in place": Contender(
            lambda: Made(ours[1], {"loss and gradient in place": written_way(ours[1])}),
            spoils=True,
        ),
        "reference": Contender(lambda: of_two(*reference)),
        "cupyx log_softmax": Contender(cupyx_log_softmax),
        "torch eager": Contender(torch_eager),
    }


def of_two(loss: Loss, both: Loss) -> Made:
    """Return the calls of a function for the loss and one for loss and gradient."""
    return Made(loss, {"forward": plain_way(loss), "loss and gradient": plain_way(both)})


def plain_way(function: Loss) -> Way:
    """Return a call on logits that stay as they are."""
    return lambda logits, labels: Timed(lambda: logits, lambda x: function(x, labels))


def written_way(function: Callable[..., Any]) -> Way:
    """Return a call that writes the gradient over its logits."""

    def way(logits: Any, labels: Any) -> Timed:
        place = logits.copy()

        def bring_back() -> Any:
            place[...] = logits
            return place

        return Timed(bring_back, lambda x: function(x, labels, out=x))

    return way


def cupyx_log_softmax() -> Made:
    """Return what a user of CuPy would write by hand."""
    if not installed("cupyx"):
        raise NotHereError("cupyx is not installed")
    import cupy
    from cupyx.scipy.special import log_softmax

    def picked(logits: Any, labels: Any) -> tuple[Any, Any, Any]:
        logs = log_softmax(logits, axis=1)
        where = cupy.expand_dims(labels, 1)
        return -cupy.take_along_axis(logs, where, axis=1).mean(), logs, where

    def both(logits: Any, labels: Any) -> tuple[Any, Any]:
        loss, logs, where = picked(logits, labels)
        grad = cupy.exp(logs)
        classes = cupy.arange(logits.shape[1]).reshape(1, -1, *(1,) * (logits.ndim - 2))
        grad -= classes == where
        grad /= labels.size
        return loss, grad

    return of_two(lambda x, t: picked(x, t)[0], both)


def torch_eager() -> Made:
    """Return torch's own loss, on tensors over CuPy's memory."""
    if not installed("torch"):
        raise NotHereError("torch is not installed")
    import cupy
    import torch

    if not torch.cuda.is_available():
        raise NotHereError(f"torch {torch.__version__} finds no device")
    loss_of = torch.nn.functional.cross_entropy

    def forward(logits: Any, labels: Any) -> Any:
        with torch.no_grad():
            loss = loss_of(torch.from_dlpack(logits), torch.from_dlpack(labels))
        return cupy.from_dlpack(loss)

    def both(logits: Any, labels: Any) -> tuple[Any, Any]:
        leaf = torch.from_dlpack(logits).requires_grad_()
        loss = loss_of(leaf, torch.from_dlpack(labels))
        (grad,) = torch.autograd.grad(loss, leaf)
        return cupy.from_dlpack(loss.detach()), cupy.from_dlpack(grad)

    return of_two(forward, both)
