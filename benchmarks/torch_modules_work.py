"""What the processes of the benchmark of torch modules do: time a case, measure memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import cpu_peers
import cpu_work
import measure
import shapes
from cpu_peers import Call
from shapes import Problem

Loss = Callable[[Any, Any], Any]
IN_PLACE = "polyce in place"


def torch_loss() -> Loss:
    """Give a function around torch's module."""
    import torch

    criterion = torch.nn.CrossEntropyLoss()

    def loss(logits: Any, labels: Any) -> Any:
        return criterion(logits, labels)

    return loss


def polyce_loss(**options: Any) -> Loss:
    """Give a function around polyce's module: of its own, for compiled code is kept by function."""
    import polyce.torch

    criterion = polyce.torch.CrossEntropyLoss(**options)

    def loss(logits: Any, labels: Any) -> Any:
        return criterion(logits, labels)

    return loss


def in_place() -> Loss:
    """Give a function around polyce's module whose backward pass writes over the logits."""
    return polyce_loss(inplace_backward=True)


def compiled(make: Callable[[], Loss]) -> Callable[[], Loss]:
    """Compile the function, all of it."""

    def make_compiled() -> Loss:
        import torch

        return torch.compile(make(), fullgraph=True)

    return make_compiled


FORWARD: dict[str, Callable[[], Loss]] = {
    "torch": torch_loss,
    "polyce": polyce_loss,
    "torch compiled": compiled(torch_loss),
    "polyce compiled": compiled(polyce_loss),
}
GRADIENT = {
    "torch": torch_loss,
    "polyce": polyce_loss,
    IN_PLACE: in_place,
    "torch compiled": compiled(torch_loss),
    "polyce compiled": compiled(polyce_loss),
}
WHATS = {"forward": FORWARD, "gradient": GRADIENT}


def prepared(what: str, name: str, problem: Problem) -> Call:
    """Give a call without arguments of one contender, on torch tensors in the problem's memory."""
    wrap = cpu_peers.on_torch if what == "forward" else cpu_peers.through_autograd
    return wrap(WHATS[what][name]())(problem)


def time_case(
    shape: str, dtype: str, what: str, eager_only: bool, **timing: Any
) -> dict[str, dict[str, float]]:
    """Time the contenders of one case in turn, after comparing their losses.

    In place the logits of every call but the first are the gradient of the one before. No time
    depends on their values.
    """
    import torch

    # What was compiled for other shapes would count towards torch's limit of recompilations.
    torch.compiler.reset()
    problem = shapes.problem(shapes.SHAPES[shape].dims, dtype)
    calls = {}
    for name in WHATS[what]:
        if eager_only and name.endswith("compiled"):
            continue
        own = problem
        if name == IN_PLACE:
            own = problem._replace(logits=problem.logits.copy())
        calls[name] = prepared(what, name, own)
    losses = {name: measure.loss_of(call()) for name, call in calls.items()}
    for name, loss in losses.items():
        if not math.isclose(loss, losses["polyce"], rel_tol=cpu_work.TOLERANCE[dtype]):
            raise RuntimeError(f"{shape} {dtype} {what}: the losses differ ({name}): {losses}")
    return measure.interleave(calls, **timing)


def grow(dims: list[int], contender: str) -> dict[str, float] | None:
    """Measure by how much this process grows at most during loss and gradient of float32."""
    problem = shapes.problem(tuple(dims), "float32")
    call = prepared("gradient", contender, problem)
    call()  # what is imported and compiled at first is not meant
    time.sleep(0.5)
    cpu_work.forget_peak()
    grown = measure.peak_growth(call)
    return grown and {"bytes": grown["bytes"], "logits": problem.logits.nbytes}
