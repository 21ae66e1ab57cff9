"""The work of the torch benchmark's processes: time a case, measure memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import measure, shapes
from ..cpu.peers import Call, on_torch, through_autograd
from ..shapes import Problem
from ..workers import TOLERANCE

Loss = Callable[[Any, Any], Any]
IN_PLACE = "polyce in place"


def torch_loss() -> Loss:
    """Return a function around torch's module."""
    import torch

    criterion = torch.nn.CrossEntropyLoss()

    def loss(logits: Any, labels: Any) -> Any:
        return criterion(logits, labels)

    return loss


def polyce_loss(**options: Any) -> Loss:
    """Return a new function around polyce's module: torch keeps compiled code by function."""
    import polyce.torch

    criterion = polyce.torch.CrossEntropyLoss(**options)

    def loss(logits: Any, labels: Any) -> Any:
        return criterion(logits, labels)

    return loss


def in_place() -> Loss:
    """Return a function around polyce's module whose backward pass writes over the logits."""
    return polyce_loss(inplace_backward=True)


def compiled(make: Callable[[], Loss]) -> Callable[[], Loss]:
    """Compile the whole function."""

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
GRADIENT = FORWARD | {IN_PLACE: in_place}
WHATS = {"forward": FORWARD, "gradient": GRADIENT}


def prepared(what: str, name: str, problem: Problem) -> Call:
    """Return a contender's call without arguments, on torch tensors in the problem's memory."""
    wrap = on_torch if what == "forward" else through_autograd
    return wrap(WHATS[what][name]())(problem)


def time_case(
    shape: str, dtype: str, what: str, eager_only: bool, **timing: Any
) -> dict[str, dict[str, float]]:
    """Time the contenders of one case in turn, after comparing their losses.

    In place, the logits of every call but the first are the last call's gradient. No time depends
    on their values.
    """
    import torch

    # Graphs compiled for other shapes would count towards torch's limit of recompilations.
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
    measure.check_losses(f"{shape} {dtype} {what}", losses, losses["polyce"], TOLERANCE[dtype])
    return measure.interleave(calls, **timing)


def grow(dims: list[int], contender: str) -> dict[str, float] | None:
    """Measure by how much this process grows at most during loss and gradient of float32."""
    problem = shapes.problem(tuple(dims), "float32")
    call = prepared("gradient", contender, problem)
    call()  # not measured: what the first call imports and compiles
    grown = measure.settled_growth(call)
    return grown and {"bytes": grown["bytes"], "logits": problem.logits.nbytes}
