"""How the loss behaves on a device: the same bits again, no waiting, bad labels, graphs, streams.

Most checks compare bits with a plain call's, whose values `gpu_values` compares with float64.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from typing import Any

import gpu_values
import torch
from gpu_cases import DTYPES, Case, Size
from gpu_checks import NotHereError, attempt, require
from gpu_contenders import ours
from gpu_machine import Machine
from measure import Row

import polyce
import polyce.torch


def check(machine: Machine, size: Size) -> list[Row]:
    """Run all checks; each says what is to hold."""
    classes = size.few_classes[-1]
    dims = (64, classes) if not machine.rehearses else (4, classes)
    checks: dict[str, Callable[[], Row | None]] = {
        "polyce chooses triton by itself": lambda: chooses_triton(machine),
        "mean and sum are those of the rows": lambda: reduces(machine, dims),
        "no rows give what torch gives": lambda: nothing(machine),
        "in place gives the same bits": lambda: in_place(machine, dims),
        "a bad label makes its row nan, and nothing else": lambda: bad_labels(machine, dims),
        "validate=True raises": lambda: validates(machine, dims),
        "no call waits for the device": lambda: waits_for_nothing(machine, dims),
        "a graph replays to the same bits": lambda: graph(machine, dims),
        "another stream gives the same bits": lambda: stream(machine, dims),
        "another device gives the same bits": lambda: second_device(machine, dims),
        "torch.compile gives the same loss": lambda: compiled(machine, dims),
        "deterministic algorithms give the same bits": lambda: deterministic(machine, dims),
    }
    rows = [attempt(name, each) for name, each in checks.items()]
    shapes = {
        "rows": dims,
        "many rows": size.many_rows[-1],
        "a long row": size.long_rows[0],
        "an image": (1, *size.images[0][1:]),
    }
    for name, shape in shapes.items():
        rows.append(
            attempt(
                f"{name}, {size.repeats} times: the same bits",
                functools.partial(repeated, machine, shape, size),
            )
        )
    return rows


def problem(machine: Machine, dims: tuple[int, ...], dtype: str = "float32") -> Any:
    """Draw logits and labels."""
    generator = torch.Generator(machine.device).manual_seed(1)
    logits = torch.empty(dims, dtype=getattr(torch, dtype), device=machine.device)
    logits.normal_(0.0, 3.0, generator=generator)
    rows = (dims[0], *dims[2:])
    labels = torch.randint(dims[1], rows, device=machine.device, generator=generator)
    return logits.requires_grad_(), labels


def loss_and_grad(
    logits: Any, labels: Any, function: Callable[..., Any] = ours, **options: Any
) -> tuple[Any, Any]:
    """Give the loss and the gradient of its sum, through autograd."""
    loss = function(logits, labels, **options)
    (grad,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
    return loss.detach(), grad


def same(got: tuple[Any, ...], want: tuple[Any, ...], what: str) -> None:
    """Require the same bits, nans among them."""
    for name, here, there in zip(("loss", "gradient"), got, want, strict=True):
        equal = here.shape == there.shape and here.dtype == there.dtype
        equal = equal and torch.equal(bits(here), bits(there).to(here.device))
        if not equal:
            off = (here.double().cpu() - there.double().cpu()).abs().max()
            raise AssertionError(f"{what}: the {name} differs, by up to {float(off):.3g}")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Give a tensor's bits as integers."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.itemsize])


def chooses_triton(machine: Machine) -> Row:
    """Ask what runs where nothing is asked for by name."""
    machine.needs_device("path of its own: the emulated kernels run when asked for by name")
    for dtype in DTYPES:
        chosen = polyce.explain(*problem(machine, (4, 10), dtype)).chosen
        require(chosen == "triton", f"{chosen} is chosen for {dtype}")
    return {}


def reduces(machine: Machine, dims: tuple[int, ...]) -> Row:
    """Compare the reduced losses with the rows' own, added in float64."""
    logits, labels = problem(machine, dims)
    weight = torch.rand(dims[1], device=machine.device)
    labels[::3] = -100
    rows = ours(logits, labels, weight, reduction="none").detach().double()
    total = float(weight.double()[labels[labels >= 0]].sum())
    wanted = {"sum": float(rows.sum()), "mean": float(rows.sum()) / total}
    found = {}
    for reduction, want in wanted.items():
        loss = float(ours(logits, labels, weight, reduction=reduction).detach())
        found[f"{reduction}_relative_error"] = abs(loss - want) / want
        require(abs(loss - want) <= 4 * 2.0**-24 * want, f"{reduction} is {loss}, not {want}")
    return found


def nothing(machine: Machine) -> Row:
    """Compare calls without rows, or without a row that counts, with torch on a CPU."""
    for (dims, ignored), reduction in (
        (each, reduction)
        for each in (((0, 10), False), ((0, 3, 2, 2), False), ((3, 10), True))
        for reduction in ("none", "sum", "mean")
    ):
        logits, labels = problem(machine, dims)
        if ignored:
            labels[:] = -100
        there = logits.detach().cpu().requires_grad_()
        options = {"reduction": reduction}
        function = torch.nn.functional.cross_entropy
        wanted = loss_and_grad(there, labels.cpu(), function, **options)
        got = loss_and_grad(logits, labels, **options)
        for here, there in zip(got, wanted, strict=True):
            torch.testing.assert_close(here.cpu(), there, rtol=0, atol=0, equal_nan=True)
    return {}


def in_place(machine: Machine, dims: tuple[int, ...]) -> Row:
    """Let the gradient take the logits' place, on the graph and off it."""
    for dtype in DTYPES:
        logits, labels = problem(machine, dims, dtype)
        want = loss_and_grad(logits, labels)
        leaf = logits.detach().clone().requires_grad_()
        hidden = leaf * 1.0
        loss = polyce.torch.cross_entropy(
            hidden, labels, implementation="triton", inplace_backward=True
        )
        loss.backward()
        same((loss.detach(), leaf.grad), want, f"{dtype}, the gradient")
        same((loss.detach(), hidden.detach()), want, f"{dtype}, the memory of the logits")
        out = logits.detach().clone()
        got = polyce.cross_entropy_with_grad(out, labels, out=out, implementation="triton")
        same(got, want, f"{dtype}, out=")
        require(got[1] is out, "out= is not what is returned")
    return {}


def bad_labels(machine: Machine, dims: tuple[int, ...]) -> Row:
    """Pass labels that are out of range, then a plain call, which shows that the device lives."""
    for dtype in DTYPES:
        logits, labels = problem(machine, dims, dtype)
        loss, grad = loss_and_grad(logits, labels, reduction="none")
        bad = labels.clone()
        bad[0], bad[2] = dims[1], -7
        # On a CPU labels are looked at, unless told not to.
        validate = False if machine.rehearses else None
        got, got_grad = loss_and_grad(logits, bad, reduction="none", validate=validate)
        machine.synchronize()
        for wrong in (0, 2):
            require(bool(got[wrong].isnan()), f"{dtype}: the loss of row {wrong} is no nan")
            require(bool(got_grad[wrong].isnan().all()), f"{dtype}: the gradient is no nan")
        kept = [row for row in range(dims[0]) if row not in (0, 2)]
        same((got[kept], got_grad[kept]), (loss[kept], grad[kept]), f"{dtype}, other rows")
        same(loss_and_grad(logits, labels, reduction="none"), (loss, grad), f"{dtype}, afterwards")
    return {}


def validates(machine: Machine, dims: tuple[int, ...]) -> Row:
    """Ask for labels to be looked at."""
    logits, labels = problem(machine, dims)
    ours(logits, labels, validate=True)
    labels[1] = dims[1]
    try:
        ours(logits, labels, validate=True)
    except IndexError as error:
        return {"message": str(error)}
    raise AssertionError("nothing is raised for a label out of range")


def waits_for_nothing(machine: Machine, dims: tuple[int, ...]) -> Row:
    """Let torch raise where the host waits, in kernels that were compiled before."""
    machine.needs_device("device to wait for")
    logits, labels = problem(machine, dims)
    weight = torch.rand(dims[1], device=machine.device)
    divisor = torch.tensor(3.0, device=machine.device)
    probabilities = torch.softmax(logits.detach(), 1)
    calls: list[tuple[Any, dict[str, Any]]] = [
        (labels, {}),
        (labels.int(), {"reduction": "none"}),
        (labels, {"weight": weight, "label_smoothing": 0.1, "normalizer": 7.0}),
        (labels, {"normalizer": divisor, "z_loss": 0.1}),
        (probabilities, {"weight": weight, "logit_softcap": 5.0}),
    ]
    for warm in (True, False):
        torch.cuda.set_sync_debug_mode("default" if warm else "error")
        try:
            for target, options in calls:
                loss_and_grad(logits, target, **options)
                polyce.cross_entropy_with_grad(
                    logits.detach(), target, implementation="triton", **options
                )
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {"calls": len(calls)}


def graph(machine: Machine, dims: tuple[int, ...]) -> Row:
    """Capture forward and backward in a CUDA graph, and replay it on other logits."""
    machine.needs_device("CUDA graphs")
    logits, labels = problem(machine, dims)
    others, other_labels = logits.detach().flip(0) * 1.25, labels.flip(0)
    want = loss_and_grad(others.clone().requires_grad_(), other_labels)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        loss_and_grad(logits, labels)
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = loss_and_grad(logits, labels)
    with torch.no_grad():
        logits.copy_(others)
        labels.copy_(other_labels)
    captured.replay()
    machine.synchronize()
    same(results, want, "replayed")
    return {}


def stream(machine: Machine, dims: tuple[int, ...]) -> Row:
    """Run on a stream that is not the default one, right behind what makes the logits."""
    machine.needs_device("streams")
    logits, labels = problem(machine, dims)
    want = loss_and_grad(logits, labels)
    machine.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        # Who started on another stream would read what is there before this has run.
        fresh = torch.full_like(logits, float("nan"))
        torch.cuda._sleep(10_000_000)
        fresh.copy_(logits.detach())
        results = loss_and_grad(fresh.requires_grad_(), labels)
    side.synchronize()
    same(results, want, "on another stream")
    return {}


def second_device(machine: Machine, dims: tuple[int, ...]) -> Row:
    """Run on a device that is not the current one."""
    machine.needs_device("devices")
    count = torch.cuda.device_count()
    if count < 2:
        raise NotHereError(f"needs two devices, there is {count}")
    logits, labels = problem(machine, dims)
    want = loss_and_grad(logits, labels)
    current = machine.device.index
    there = torch.device("cuda", (current + 1) % count)
    moved = logits.detach().to(there).requires_grad_()
    results = loss_and_grad(moved, labels.to(there))
    require(results[0].device == results[1].device == there, "the results are elsewhere")
    require(torch.cuda.current_device() == current, "the current device is another one now")
    torch.cuda.synchronize(there)
    same(results, want, "on another device")
    return {}


def compiled(machine: Machine, dims: tuple[int, ...]) -> Row:
    """Compile a small model with the loss, in one graph."""
    torch.manual_seed(0)
    model = torch.nn.Linear(16, dims[1]).to(machine.device)
    inputs = torch.randn(dims[0], 16, device=machine.device)
    labels = torch.randint(dims[1], (dims[0],), device=machine.device)
    # Emulated kernels have nothing for inductor to compile beside them.
    backend = "aot_eager" if machine.rehearses else "inductor"

    def step(inputs: Any, labels: Any) -> Any:
        return ours(model(inputs), labels, label_smoothing=0.1)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=backend)):
        model.zero_grad()
        loss = function(inputs, labels)
        loss.backward()
        results.append((loss.detach(), model.weight.grad.clone()))
    # The model's own product may be another kernel's, which rounds differently.
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    return {"backend": backend}


def deterministic(machine: Machine, dims: tuple[int, ...]) -> Row:
    """Ask torch for deterministic algorithms, which also fills fresh memory with nans."""
    logits, labels = problem(machine, dims)
    want = loss_and_grad(logits, labels)
    torch.use_deterministic_algorithms(True)
    try:
        same(loss_and_grad(logits, labels), want, "with deterministic algorithms")
    finally:
        torch.use_deterministic_algorithms(False)
    return {}


def repeated(machine: Machine, dims: tuple[int, ...], size: Size) -> Row:
    """Run the same call again and again, between other calls."""
    for dtype in size.few_dtypes:
        dims = gpu_values.fitting(machine, Case(dims, dtype, scales=True))
        logits, labels = problem(machine, dims, dtype)
        want = loss_and_grad(logits, labels)
        for turn in range(size.repeats - 1):
            # Memory that was used for something else comes back for the next results.
            torch.full_like(logits, float(turn)).add_(1.0)
            same(loss_and_grad(logits, labels), want, f"{dtype}, run {turn + 2}")
    return {"dims": list(dims)}


def first_call(machine: Machine) -> None:
    """Time the first two calls of this process, and print it."""
    # What torch and the device take to start is not meant.
    logits, labels = problem(machine, (8, 1000))
    (logits.detach() * 2).sum().item()
    machine.synchronize()
    found = {}
    for name in ("first", "second"):
        for what, function in (("forward", ours), ("with gradient", loss_and_grad)):
            with torch.set_grad_enabled(what != "forward"):
                start = time.perf_counter()
                function(logits, labels)
                machine.synchronize()
                found[f"{name} {what}_s"] = time.perf_counter() - start
    print(json.dumps(found))
