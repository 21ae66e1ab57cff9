"""What the processes of the CPU benchmark do: time a case, measure memory."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from .. import measure, shapes
from ..measure import Row
from ..workers import TOLERANCE
from . import peers

# A case that is above one of these was disturbed: quartiles so far apart, a median so far above the
# best, and so many processors busy with something else.
SPREAD, EXCESS, OTHERS = 0.10, 0.25, 0.10
# Not judged: jax's threads are never quiet, and the reference fills memory over and over.
UNJUDGED = ("jax jit", "polyce jax", "polyce reference")


class Case(NamedTuple):
    """What is timed together."""

    shape: str
    dtype: str
    threads: int
    huge_pages: bool
    """Whether torch has them."""
    what: str

    def __str__(self) -> str:
        pages = ", huge pages" if self.huge_pages else ""
        return f"{self.shape} {self.dtype} {self.what}, threads: {self.threads}{pages}"


def taking_part(what: str, costly: bool, huge_pages: bool = False) -> dict[str, peers.Contender]:
    """Return the contenders whose library is there."""
    libraries = measure.installed("numpy", "torch", "jax")
    return {
        name: each
        for name, each in peers.WHATS[what].items()
        if each.library in libraries
        and (costly or not each.costly)
        and (not huge_pages or name in peers.ON_HUGE_PAGES)
    }


def time_case(case: Case, costly: bool, large: bool, **timing: Any) -> list[Row]:
    """Time the contenders of one case in turn, with what bounds them, after comparing their losses.

    With huge pages only those in torch take part, since the others do not depend on it.
    """
    shape, dtype, threads, huge_pages, what = case
    given = shapes.SHAPES[shape]
    problem = shapes.problem(given.dims, dtype, given.channels_last)
    contenders = taking_part(what, costly, huge_pages)
    if any("compiled" in name for name in contenders):
        import torch

        # What was compiled for other shapes would count towards torch's limit of recompilations.
        torch.compiler.reset()
    calls = {name: contender.make(problem) for name, contender in contenders.items()}
    losses = {name: measure.loss_of(call()) for name, call in calls.items()}
    if losses:
        expected = losses["polyce torch" if huge_pages else "polyce NumPy"]
        measure.check_losses(str(case), losses, expected, TOLERANCE[dtype])
    if huge_pages:
        calls = {peers.ON_HUGE_PAGES[name]: call for name, call in calls.items()}
    else:
        calls |= peers.bounds(what, problem, large)
    start, busy = time.perf_counter(), measure.busy_with_others()
    times = measure.interleave(calls, **timing)
    passed, busy_then = time.perf_counter() - start, measure.busy_with_others()
    others = None if busy is None or busy_then is None else (busy_then - busy) / passed
    facts: Row = {"shape": shape, "dtype": dtype, "threads": threads, "what": what}
    facts |= {"others": others, "unrest": unrest(times, others)}
    return [facts | {"contender": name} | row for name, row in times.items()]


def unrest(times: dict[str, dict[str, float]], others: float | None) -> float:
    """Tell how disturbed a case was: above 1 it is measured again."""
    signs = [(others or 0.0) / OTHERS]
    for name, row in times.items():
        if name not in UNJUDGED:
            signs += [row["spread"] / SPREAD, (row["median_s"] / row["best_s"] - 1) / EXCESS]
    return max(signs)


def grow(dims: list[int], what: str, contender: str) -> dict[str, float] | None:
    """Measure by how much this process grows at most during a call on float32."""
    problem = shapes.problem(tuple(dims), "float32")
    call = peers.WHATS[what][contender].make(problem)
    call()  # not measured: what the first call imports and compiles
    grown = measure.settled_growth(call)
    return grown and {"bytes": grown["bytes"], "logits": problem.logits.nbytes}
