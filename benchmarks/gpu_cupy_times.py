"""Times on CuPy arrays: kernels against the bandwidth of a copy and against peers, and the host.

No time decides anything.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import cupy
import gpu_cases
import gpu_cupy_arrays as arrays
import measure
import numpy as np
from gpu_checks import NOT_HERE, RIGHT, NotHereError, attempt, require
from gpu_cupy_behaviour import alone, with_grad
from gpu_cupy_machine import Machine
from gpu_device import Timed, summary
from gpu_timing import Case, Size, at_most_a_note, time_what
from measure import Row

import polyce
from polyce.testing.dtypes import dtype

# Logits and labels to the mean loss, and to loss and gradient.
Function = Callable[[Any, Any], Any]
WHATS = ("forward", "loss and gradient", "loss and gradient in place")


class Contender(NamedTuple):
    """A way to compute the loss."""

    make: Callable[[], dict[str, Function]]
    """Gives a function for each of WHATS that it has."""
    spoils: bool = False
    """Whether a call writes over its logits, which are brought back before the next one."""


def contenders() -> dict[str, Contender]:
    """Give polyce's and its peers."""
    reference = {
        "forward": functools.partial(polyce.cross_entropy, implementation="reference"),
        "loss and gradient": functools.partial(
            polyce.cross_entropy_with_grad, implementation="reference"
        ),
    }
    return {
        "polyce": Contender(lambda: {"forward": alone, "loss and gradient": with_grad}),
        "polyce in place": Contender(
            lambda: {"loss and gradient in place": lambda x, t: with_grad(x, t, out=x)},
            spoils=True,
        ),
        "reference": Contender(lambda: reference),
        "cupyx log_softmax": Contender(cupyx_log_softmax),
        "torch eager": Contender(torch_eager),
    }


def cupyx_log_softmax() -> dict[str, Function]:
    """Give what a user of CuPy writes by hand."""
    if not measure.installed("cupyx"):
        raise NotHereError("the emulated CuPy has no cupyx")
    from cupyx.scipy.special import log_softmax

    def picked(logits: Any, labels: Any) -> tuple[Any, Any, Any]:
        logs = log_softmax(logits, axis=1)
        where = cupy.expand_dims(labels, 1)
        return logs, where, -cupy.take_along_axis(logs, where, axis=1).mean()

    def both(logits: Any, labels: Any) -> tuple[Any, Any]:
        logs, where, loss = picked(logits, labels)
        grad = cupy.exp(logs)
        classes = cupy.arange(logits.shape[1]).reshape(1, -1, *(1,) * (logits.ndim - 2))
        grad -= classes == where
        grad /= labels.size
        return loss, grad

    return {"forward": lambda x, t: picked(x, t)[-1], "loss and gradient": both}


def torch_eager() -> dict[str, Function]:
    """Give torch's own loss, its tensors over CuPy's memory."""
    if not measure.installed("torch"):
        raise NotHereError("torch is not installed")
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

    return {"forward": forward, "loss and gradient": both}


def copy_bandwidth(machine: Machine, size: Size) -> Row:
    """Time a copy within the device's memory, of 1 to 4 GB, or a quarter of what is free."""
    count = min(4 * 10**9, machine.free_bytes() // 4)
    source = cupy.ones(count, np.int8)
    target = cupy.empty_like(source)
    timed = Timed(lambda: None, lambda _: cupy.copyto(target, source))
    machine.seconds(timed)
    times = summary([machine.seconds(timed) for _ in range(size.copies)])
    return times | {"bytes": 2 * count, "gb_per_s": 2 * count / times["median_s"] / 1e9}


def check(machine: Machine, size: Size, copy: float | None) -> list[Row]:
    """Time all cases."""
    rows = []
    for dims in size.shapes:
        for name in (*size.dtypes, "float16") if len(dims) == 2 else size.dtypes:
            for layout in ("plain", "channels last") if len(dims) > 2 else ("plain",):
                rows += time_case(machine, size, Case(dims, name, layout), copy)
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
    functions: dict[str, dict[str, Function]] = {}
    taking_part = contenders()
    for name, contender in taking_part.items():

        def first(name: str = name, contender: Contender = contender) -> Row:
            functions[name] = contender.make()
            found = {}
            for what, function in functions[name].items():
                found |= agrees(name, function, logits, labels, want, what)
            return found

        row = at_most_a_note(name, attempt("agrees with float64", first)) | facts
        rows.append(row | {"contender": name})
        if row["status"] != RIGHT:
            functions.pop(name, None)
    rows.append(attempt("gradient agrees with float64", lambda: gradient(logits, labels)) | facts)
    for what in WHATS:
        calls = {
            name: timed(function[what], logits, labels, taking_part[name].spoils)
            for name, function in functions.items()
            if what in function
        }
        rows += [row | facts for row in time_what(machine, size, what, calls, logits.nbytes, copy)]
    return rows


def timed(function: Function, logits: Any, labels: Any, spoils: bool) -> Timed:
    """Make something to time: what goes before, and the call itself."""
    place = logits.copy() if spoils else logits

    def bring_back() -> Any:
        if spoils:
            cupy.copyto(place, logits)
        return place

    return Timed(bring_back, lambda place: function(place, labels))


def agrees(name: str, function: Function, logits: Any, labels: Any, want: float, what: str) -> Row:
    """Compare a contender's loss with float64's."""
    got = function(logits.copy(), labels)
    loss = float(got[0] if isinstance(got, tuple) else got)
    ours = name.startswith("polyce")
    # 16-bit losses are rounded, others' on the way too.
    allowed = {2: 5e-3 if ours else 2e-2, 4: 1e-4, 8: 1e-9}[logits.itemsize]
    if abs(loss - want) <= allowed * abs(want):
        return {f"loss of {what}": loss}
    wrong = f"{name}, {what}, gives the loss {loss}, where float64 gives {want}"
    return {f"loss of {what}": loss} | ({"wrong": wrong} if ours else {"note": wrong})


def problem(machine: Machine, case: Case) -> tuple[Any, Any]:
    """Draw logits and labels, fewer rows where there is no memory for as many."""
    # As many as the chain of log_softmax makes of them, beside what the contenders keep.
    one = 10 * dtype(case.dtype).itemsize * math.prod(case.dims[1:])
    rows = min(case.dims[0], int(0.8 * machine.free_bytes()) // one)
    if rows == 0:
        raise NotHereError(f"a row needs {one / 1e9:.1f} GB, there is less")
    dims = (rows, *case.dims[1:])
    drawn = gpu_cases.Case(dims, case.dtype, layout=case.layout)
    logits = arrays.fill(arrays.arranged(dims, drawn), 1.0)
    return logits, arrays.labels((rows, *dims[2:]), dims[1])


def wide_rows(logits: Any, labels: Any, part: slice) -> tuple[Any, Any]:
    """Give the losses of some rows in float64, and what their logits' exponentials amount to."""
    wide = logits[part].astype(np.float64)
    top = wide.max(axis=1, keepdims=True)
    parts = cupy.exp(wide - top)
    total = parts.sum(axis=1, keepdims=True)
    at = cupy.take_along_axis(wide, cupy.expand_dims(labels[part], 1), axis=1)
    return cupy.log(total) + top - at, parts / total


def exact_mean(logits: Any, labels: Any) -> float:
    """Give the mean loss in float64, a few rows at a time."""
    step = max(1, 2**24 // math.prod(logits.shape[1:]))
    parts = (slice(start, start + step) for start in range(0, len(logits), step))
    return sum(float(wide_rows(logits, labels, part)[0].sum()) for part in parts) / labels.size


def gradient(logits: Any, labels: Any) -> Row:
    """Compare the first and the last rows of our gradient with float64's."""
    _, grad = with_grad(logits, labels)
    rows = max(1, 2**22 // math.prod(logits.shape[1:]))
    classes = cupy.arange(logits.shape[1]).reshape(1, -1, *(1,) * (logits.ndim - 2))
    worst = 0.0
    for part in (slice(0, rows), slice(-rows, None)):
        at = (classes == cupy.expand_dims(labels[part], 1)).astype(np.float64)
        want = (wide_rows(logits, labels, part)[1] - at) / labels.size
        error = cupy.abs(grad[part].astype(np.float64) - want)
        error /= cupy.maximum(cupy.abs(want), 1e-4 / labels.size)
        worst = max(worst, float(error.max()))
    # A float16 this small is subnormal.
    half = 1.01 if grad.dtype == np.float16 else 2e-5
    allowed = 1.01 * 2.0**-8 if grad.dtype.name == "bfloat16" else half
    require(worst <= allowed, f"the gradient is off by {worst:.3g}, {allowed:.3g} is allowed")
    return {"relative_error": worst}


def host(machine: Machine, size: Size) -> list[Row]:
    """Time what the host does for a call: one row of ten classes, and nobody waits."""
    rows = []
    given = problem(machine, Case((1, 10), "float32"))
    for name, contender in contenders().items():
        for what in WHATS[:2]:
            if contender.spoils:
                continue
            call = functools.partial(_host, machine, contender, what, given, size.calls)
            row = at_most_a_note(name, attempt("host", call))
            rows.append(row | {"what": what, "contender": name})
    return rows


def _host(
    machine: Machine, contender: Contender, what: str, given: tuple[Any, Any], calls: int
) -> Row:
    function = contender.make()[what]
    taken = []
    for _ in range(7):
        machine.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function(*given)
        taken.append((time.perf_counter() - start) / calls)
    machine.synchronize()
    # The first ones compile.
    return {"median_s": statistics.median(taken[2:])}
