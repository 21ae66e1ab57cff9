"""The contenders of the GPU script: polyce and what one would call in its place.

Each gives the mean loss of logits and labels. A new library (CuPy, for one) has contenders of its
own, in a function beside `for_torch`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import measure
import torch
from gpu_checks import NotHereError
from gpu_device import Timed
from gpu_machine import Machine
from measure import Row

import polyce
import polyce.torch

Loss = Callable[[Any, Any], Any]
ours: Loss = functools.partial(polyce.cross_entropy, implementation="triton")


class Contender(NamedTuple):
    """A way to compute the loss."""

    make: Callable[[], Loss]
    whats: tuple[str, ...] = ("forward", "backward", "forward and backward")
    spoils: bool = False
    """Whether a call writes over its logits, which are brought back before the next one."""
    images: bool = True
    """Whether it takes more than two dimensions."""


def for_torch(machine: Machine) -> dict[str, Contender]:
    """Give polyce's and its peers for torch tensors."""
    in_place: Loss = functools.partial(
        polyce.torch.cross_entropy, implementation="triton", inplace_backward=True
    )
    return {
        "polyce": Contender(lambda: ours),
        "polyce in place": Contender(lambda: in_place, ("in-place backward",), spoils=True),
        "torch eager": Contender(lambda: torch.nn.functional.cross_entropy),
        "torch compiled": Contender(lambda: compiled(machine)),
        # It computes the gradient in its forward pass, where the logits were.
        "liger": Contender(liger, ("forward and backward",), spoils=True, images=False),
        "quack": Contender(quack, images=False),
        "quack in place": Contender(
            lambda: functools.partial(quack(), inplace_backward=True),
            ("in-place backward",),
            spoils=True,
            images=False,
        ),
    }


def compiled(machine: Machine) -> Loss:
    """Compile torch's own loss, for one shape alone."""
    # What was compiled for other shapes would count towards torch's limit of recompilations.
    torch.compiler.reset()
    backend = "aot_eager" if machine.rehearses else "inductor"
    function: Loss = torch.compile(
        torch.nn.functional.cross_entropy, dynamic=False, backend=backend
    )
    return function


def liger() -> Loss:
    """Give Liger's loss."""
    function: Loss = _module("liger_kernel.transformers", "liger-kernel").LigerCrossEntropyLoss()
    return function


def quack() -> Loss:
    """Give quack's loss."""
    function: Loss = _module("quack.cross_entropy", "quack-kernels").cross_entropy
    return function


def _module(name: str, package: str) -> Any:
    if not measure.installed(name.partition(".")[0]):
        raise NotHereError(f"not installed (pip install {package})")
    return importlib.import_module(name)


def timed(contender: Contender, loss: Loss, what: str, logits: Any, labels: Any) -> Timed:
    """Make something to time of a contender: what goes before, and the call itself."""
    pristine = logits.detach().clone() if contender.spoils else None
    leaf = logits.detach().clone() if contender.spoils else logits.detach()
    if what != "forward":
        leaf.requires_grad_()

    def bring_back() -> Any:
        if pristine is not None:
            with torch.no_grad():
                leaf.copy_(pristine)
        return leaf

    def forward() -> Any:
        return loss(bring_back(), labels)

    def gradient(value: Any) -> Any:
        return torch.autograd.grad(value, leaf)

    if what == "forward":
        return Timed(bring_back, lambda leaf: loss(leaf, labels))
    if what == "forward and backward":
        return Timed(bring_back, lambda leaf: gradient(loss(leaf, labels)))
    return Timed(forward, gradient)


def agrees(machine: Machine, name: str, loss: Loss, logits: Any, labels: Any, want: float) -> Row:
    """Compare a contender's loss with ours, which was compared with float64 before."""
    with torch.no_grad():
        got = float(loss(logits.detach().clone(), labels))
    # 16-bit losses are rounded, torch's on the way too.
    allowed = {2: 5e-3 if name.startswith("polyce") else 2e-2, 4: 1e-4, 8: 1e-9}[logits.itemsize]
    if abs(got - want) <= allowed * abs(want):
        return {"loss": got}
    wrong = f"{name} gives the loss {got}, where float64 gives {want}"
    return {"loss": got} | ({"wrong": wrong} if name.startswith("polyce") else {"note": wrong})
