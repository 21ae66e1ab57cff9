"""What the processes of the CPU benchmark do: time a case, measure errors, measure memory."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import cpu_peers
import measure
import numpy as np
import shapes
from measure import Row

import polyce

# Every row loss of bfloat16 may be off by half a unit in the last place, 2⁻⁹ of it, and the sum too
# where it is bfloat16 as well.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


def begin(threads: int) -> None:
    """Give this process so many threads, before it imports a library that counts processors."""
    if threads == 1 and hasattr(os, "sched_setaffinity"):
        # Nothing else holds jax to one thread; where this is missing, jax keeps all of them.
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    polyce.set_num_threads(threads)
    if measure.installed("torch"):
        import torch

        torch.set_num_threads(threads)


def taking_part(table: dict[str, cpu_peers.Contender], dtype: str) -> dict[str, Any]:
    """Give the contenders whose library is there, and takes the dtype."""
    libraries = measure.installed("numpy", "torch", "jax", "scipy")
    if dtype == "bfloat16" and "scipy" in libraries:
        libraries.remove("scipy")
    return {name: each for name, each in table.items() if each.library in libraries}


def time_case(
    shape: str, dtype: str, what: str, threads: int, huge_pages: bool, first: bool, **timing: Any
) -> dict[str, dict[str, float]]:
    """Time the contenders of one case in turn, with what bounds them, after comparing their losses.

    With `huge_pages` only those in torch take part, since the others do not depend on it, and in
    visits after the first one those that are not slow.
    """
    problem = shapes.problem(shapes.SHAPES[shape].dims, dtype)
    calls = {
        name: contender.make(problem)
        for name, contender in taking_part(cpu_peers.WHATS[what], dtype).items()
        if (contender.library == "torch" if huge_pages else first or not contender.slow)
    }
    if not calls:  # torch is not installed
        return {}
    losses = {name: measure.loss_of(call()) for name, call in calls.items()}
    expected = losses["polyce torch" if huge_pages else "polyce NumPy"]
    for name, loss in losses.items():
        if not math.isclose(loss, expected, rel_tol=TOLERANCE[dtype]):
            raise RuntimeError(f"{shape} {dtype} {what}: the losses differ ({name}): {losses}")
    return measure.interleave(calls | cpu_peers.roofs(what, problem, threads), **timing)


def errors(shape: str, dtype: str) -> list[Row]:
    """Measure the errors of the row losses in units in the last place."""
    rows = []
    for confident in (False, True):
        problem = shapes.problem(shapes.SHAPES[shape].dims, dtype, confident)
        exact = shapes.exact_losses(*problem)
        for name, contender in taking_part(cpu_peers.ROWS, dtype).items():
            got = contender.make(problem)()
            got = got.float().numpy() if contender.library == "torch" else np.asarray(got)
            off = shapes.ulps(got, exact, dtype)
            rows.append(
                {
                    "shape": shape,
                    "dtype": dtype,
                    "rows": "confident" if confident else "random",
                    "contender": name,
                    "max_ulp": float(off.max()),
                    "mean_ulp": float(off.mean()),
                }
            )
    return rows


def grow(shape: str, what: str, contender: str) -> dict[str, float] | None:
    """Measure by how much this process grows at most during a call on float32."""
    problem = shapes.problem(shapes.SHAPES[shape].dims, "float32")
    call = cpu_peers.WHATS[what][contender].make(problem)
    call()  # what is imported and compiled at first is not meant
    time.sleep(0.5)  # jax frees what it returned a moment later
    forget_peak()
    grown = measure.peak_growth(call)
    return grown and {"bytes": grown["bytes"], "logits": problem.logits.nbytes}


def forget_peak() -> None:
    """Let the system count this process's peak memory from now on, where it does so."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
