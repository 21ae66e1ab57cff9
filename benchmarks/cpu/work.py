"""The work of the CPU benchmark's processes: time a case, measure errors, measure memory."""

from __future__ import annotations

from typing import Any

from .. import measure, shapes
from ..workers import TOLERANCE
from . import peers


def taking_part(table: dict[str, peers.Contender], dtype: str) -> dict[str, Any]:
    """Return the contenders whose library is installed and takes the dtype."""
    libraries = measure.installed("numpy", "torch", "jax", "scipy")
    if dtype == "bfloat16" and "scipy" in libraries:
        libraries.remove("scipy")
    return {name: each for name, each in table.items() if each.library in libraries}


def time_case(
    shape: str, dtype: str, what: str, threads: int, huge_pages: bool, first: bool, **timing: Any
) -> dict[str, dict[str, float]]:
    """Compare the losses of one case, then time its contenders and their bounds in turn.

    With `huge_pages` only torch's contenders take part, since the others do not depend on it. After
    the first visit slow contenders are left out.
    """
    problem = shapes.problem(shapes.SHAPES[shape].dims, dtype)
    calls = {
        name: contender.make(problem)
        for name, contender in taking_part(peers.WHATS[what], dtype).items()
        if (contender.library == "torch" if huge_pages else first or not contender.slow)
    }
    if not calls:  # torch is not installed
        return {}
    losses = {name: measure.loss_of(call()) for name, call in calls.items()}
    expected = losses["polyce torch" if huge_pages else "polyce NumPy"]
    measure.check_losses(f"{shape} {dtype} {what}", losses, expected, TOLERANCE[dtype])
    return measure.interleave(calls | peers.roofs(what, problem, threads), **timing)


def grow(shape: str, what: str, contender: str) -> dict[str, float] | None:
    """Measure by how much this process grows at most during a call on float32."""
    problem = shapes.problem(shapes.SHAPES[shape].dims, "float32")
    call = peers.WHATS[what][contender].make(problem)
    call()  # not measured: what the first call imports and compiles
    grown = measure.settled_growth(call)
    return grown and {"bytes": grown["bytes"], "logits": problem.logits.nbytes}
