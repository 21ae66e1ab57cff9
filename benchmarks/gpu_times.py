"""Times of the GPU script: kernels against the bandwidth of a copy and against peers, and the host.

No time decides anything.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from typing import Any

import gpu_cases
import gpu_contenders
import gpu_values
import torch
from gpu_checks import NOT_HERE, RIGHT, NotHereError, attempt, require
from gpu_contenders import Contender
from gpu_device import Timed, summary
from gpu_machine import Machine
from gpu_timing import PASSES, Case, Size, at_most_a_note, time_what
from measure import Row


def copy_bandwidth(machine: Machine, size: Size) -> Row:
    """Time a copy within the device's memory, of 1 to 4 GB, or a quarter of what is free."""
    count = min(4 * 10**9, machine.free_bytes() // 4)
    source = torch.ones(count, dtype=torch.int8, device=machine.device)
    target = torch.empty_like(source)
    timed = Timed(lambda: None, lambda _: target.copy_(source))
    machine.seconds(timed)
    times = summary([machine.seconds(timed) for _ in range(size.copies)])
    return times | {"bytes": 2 * count, "gb_per_s": 2 * count / times["median_s"] / 1e9}


def check(machine: Machine, size: Size, copy: float | None) -> list[Row]:
    """Time all cases."""
    rows = []
    for dims in size.shapes:
        for dtype in size.dtypes:
            for layout in ("plain", "channels last") if len(dims) > 2 else ("plain",):
                rows += time_case(machine, size, Case(dims, dtype, layout), copy)
    return rows + host(machine, size)


def time_case(machine: Machine, size: Size, case: Case, copy: float | None) -> list[Row]:
    """Time the contenders of one case in turn, once their losses have been compared."""
    facts = case._asdict()
    try:
        logits, labels = problem(machine, case)
    except NotHereError as reason:
        return [{"check": "times", "status": NOT_HERE, "reason": str(reason)} | facts]
    facts["dims"] = tuple(logits.shape)
    want = exact_mean(logits, labels)
    rows: list[Row] = []
    losses: dict[str, Any] = {}
    taking_part: dict[str, Contender] = gpu_contenders.for_torch(machine)
    for name, contender in taking_part.items():

        def first(name: str = name, contender: Contender = contender) -> Row:
            if logits.dim() > 2 and not contender.images:
                raise NotHereError("takes two dimensions only")
            losses[name] = contender.make()
            return gpu_contenders.agrees(machine, name, losses[name], logits, labels, want)

        row = at_most_a_note(name, attempt("agrees with float64", first)) | facts
        rows.append(row | {"contender": name})
        if row["status"] != RIGHT:
            losses.pop(name, None)
    rows.append(attempt("gradient agrees with float64", lambda: gradient(logits, labels)) | facts)
    for what in PASSES:
        calls = {
            name: gpu_contenders.timed(taking_part[name], loss, what, logits, labels)
            for name, loss in losses.items()
            if what in taking_part[name].whats
        }
        rows += [row | facts for row in time_what(machine, size, what, calls, logits.nbytes, copy)]
    return rows


def problem(machine: Machine, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw logits and labels, fewer rows where there is no memory for as many."""
    item = getattr(torch, case.dtype).itemsize
    # As many as torch's own loss makes of them, beside what the contenders keep.
    one = 10 * item * math.prod(case.dims[1:])
    room = int(0.8 * machine.free_bytes())
    rows = min(case.dims[0], room // one)
    if rows == 0:
        raise NotHereError(f"a row needs {one / 1e9:.1f} GB, there are {room / 1e9:.1f}")
    dims = (rows, *case.dims[1:])
    drawn = gpu_cases.Case(dims, case.dtype, layout=case.layout)
    generator = torch.Generator(machine.device).manual_seed(0)
    logits = gpu_values.arranged(machine, dims, drawn).normal_(generator=generator)
    kept = (rows, *dims[2:])
    return logits, torch.randint(dims[1], kept, device=machine.device, generator=generator)


def exact_mean(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Give the mean loss in float64, by torch, a few rows at a time."""
    step = max(1, 2**24 // math.prod(logits.shape[1:]))
    total = 0.0
    for start in range(0, len(logits), step):
        part = slice(start, start + step)
        total += float(
            torch.nn.functional.cross_entropy(logits[part].double(), labels[part], reduction="sum")
        )
    return total / labels.numel()


def gradient(logits: torch.Tensor, labels: torch.Tensor) -> Row:
    """Compare the first and the last rows of our gradient with float64's, by torch."""
    leaf = logits.detach().requires_grad_()
    loss = gpu_contenders.ours(leaf, labels)
    (grad,) = torch.autograd.grad(loss, leaf)
    rows = max(1, 2**22 // math.prod(logits.shape[1:]))
    worst = 0.0
    for part in (slice(0, rows), slice(-rows, None)):
        wide = logits[part].double().requires_grad_()
        total = torch.nn.functional.cross_entropy(wide, labels[part], reduction="sum")
        (want,) = torch.autograd.grad(total / labels.numel(), wide)
        error = (grad[part].double() - want).abs() / want.abs().clamp_min(1e-4 / labels.numel())
        worst = max(worst, float(error.max()))
    leaf.requires_grad_(False)
    allowed = 1.01 * 2.0**-8 if logits.dtype == torch.bfloat16 else 2e-5
    require(worst <= allowed, f"the gradient is off by {worst:.3g}, {allowed:.3g} is allowed")
    return {"relative_error": worst}


def host(machine: Machine, size: Size) -> list[Row]:
    """Time what the host does for a call: one row of ten classes, and nobody waits."""
    rows = []
    logits, labels = problem(machine, Case((1, 10), "float32"))
    for name, contender in gpu_contenders.for_torch(machine).items():
        if contender.spoils:
            continue
        for what in ("forward", "forward and backward"):
            call = functools.partial(_host, machine, contender, what, (logits, labels), size.calls)
            row = at_most_a_note(name, attempt("host", call))
            rows.append(row | {"what": what, "contender": name})
    return rows


def _host(
    machine: Machine, contender: Contender, what: str, problem: tuple[Any, Any], calls: int
) -> Row:
    timed = gpu_contenders.timed(contender, contender.make(), what, *problem)
    state = timed.prepare()
    taken = []
    for _ in range(7):
        machine.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            timed.call(state)
        taken.append((time.perf_counter() - start) / calls)
    machine.synchronize()
    # The first ones compile.
    return {"median_s": statistics.median(taken[2:])}
