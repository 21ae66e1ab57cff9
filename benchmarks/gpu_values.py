"""The cases of `gpu_cases` on torch tensors, compared with float64 on a CPU."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import gpu_exact
import numpy as np
import torch
from gpu_cases import IGNORED, REACH, Case, Size, beyond_32_bits, cases
from gpu_checks import NotHereError, attempt, require
from gpu_machine import Machine
from measure import Row

import polyce
import polyce.torch
from polyce.testing import get_backend


def check(machine: Machine, size: Size) -> list[Row]:
    """Compare all cases, then the functions that hardware computes in its own way."""
    every = itertools.chain(cases(size), beyond_32_bits())
    rows = [
        attempt(case.name, functools.partial(compared, machine, case, size), dtype=case.dtype)
        for case in every
    ]
    for name in ("float32", "float64"):
        for what, measured in gpu_exact.FUNCTIONS.items():
            run = functools.partial(of_rows, machine, name)
            few = machine.rehearses
            rows.append(attempt(what, functools.partial(measured, run, name, few), dtype=name))
    return rows


def compared(machine: Machine, case: Case, size: Size) -> Row:
    """Run a case and compare the rows that are to be checked."""
    dims = fitting(machine, case)
    generator = torch.Generator(machine.device).manual_seed(0)
    logits = arranged(machine, dims, case)
    logits.normal_(0.0, 3.0, generator=generator)
    rows = logits.movedim(1, -1)
    shape = rows.shape[:-1]
    classes = dims[1]
    checked = size.checked // (4 if case.dtype == "float64" else 1)
    where = some_rows(math.prod(shape), max(2, checked // classes), machine.device)
    places = torch.unravel_index(where, shape)
    options, arguments = asked_for(machine, case, classes, generator)
    if "probabilities" in case.options:
        target = torch.softmax(torch.empty_like(logits).normal_(generator=generator), 1)
        checked_target = target.movedim(1, -1)[places]
    else:
        kind = getattr(torch, case.target)
        target = torch.randint(
            classes, shape, dtype=kind, device=machine.device, generator=generator
        )
        if "ignore" in case.options:
            target[tuple(index[::5] for index in places)] = options.ignore_index
        checked_target = target[places]
        make_confident(rows, places, checked_target, options.ignore_index)
    # What reaches the oracle is what the call got.
    wide = np.longdouble if case.dtype == "float64" else np.float64
    seen = rows[places].double().cpu().numpy().astype(wide)
    g = half_to_three_halves(machine, shape, case, generator)
    answer = gpu_exact.exact(
        seen,
        checked_target.double().cpu().numpy().astype(wide)
        if "probabilities" in case.options
        else checked_target.long().cpu().numpy(),
        g[places].double().cpu().numpy(),
        options,
    )
    losses, grad = call(case, logits, target, g, arguments)
    machine.synchronize()
    require(losses.shape == shape and grad.shape == dims, f"shapes {losses.shape}, {grad.shape}")
    require(bool(torch.isfinite(losses).all()), "losses are not finite")
    require(bool(torch.isfinite(grad).all()), "gradients are not finite")
    to_numpy = get_backend("torch").to_numpy
    found = gpu_exact.judged(
        answer, to_numpy(losses[places]), to_numpy(grad.movedim(1, -1)[places]), case.dtype
    )
    if {"probabilities", "smoothing"} & set(case.options):
        # Two parts of an entry may cancel, and then its units are too small to count errors in.
        del found["label_ulp"], found["entry_ulp"]
    return found | {"rows": math.prod(shape), "rows_checked": len(where)}


def call(
    case: Case,
    logits: torch.Tensor,
    target: torch.Tensor,
    g: torch.Tensor,
    arguments: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the row losses and the gradient, through autograd."""
    logits.requires_grad_()
    arguments = arguments | {"reduction": "none", "implementation": "triton"}
    in_place = "in place" in case.options
    if in_place:
        losses = polyce.torch.cross_entropy(logits, target, inplace_backward=True, **arguments)
    else:
        losses = polyce.cross_entropy(logits, target, **arguments)
    (grad,) = torch.autograd.grad(losses, logits, g)
    if in_place:
        require(grad.data_ptr() == logits.data_ptr(), "the gradient is not in the logits' memory")
    return losses.detach(), grad


def asked_for(
    machine: Machine, case: Case, classes: int, generator: torch.Generator
) -> tuple[gpu_exact.Options, dict[str, Any]]:
    """Give the options, for the oracle and as arguments."""
    options = gpu_exact.Options(
        smoothing=0.1 if "smoothing" in case.options else 0.0, ignore_index=IGNORED
    )
    arguments: dict[str, Any] = {"label_smoothing": options.smoothing}
    if "weight" in case.options:
        weight = half_to_three_halves(machine, (classes,), case, generator)
        arguments["weight"] = weight
        options = options._replace(weight=weight.double().cpu().numpy())
    return options, arguments


def half_to_three_halves(
    machine: Machine, shape: tuple[int, ...], case: Case, generator: torch.Generator
) -> torch.Tensor:
    """Draw numbers around 1, in the logits' dtype, which is the losses' then."""
    drawn = torch.rand(shape, device=machine.device, generator=generator) + 0.5
    return drawn.to(getattr(torch, case.dtype))


def fitting(machine: Machine, case: Case) -> tuple[int, ...]:
    """Give the dims, with fewer rows where memory is short and the case allows that."""
    item = getattr(torch, case.dtype).itemsize
    # Logits and gradient, what isfinite makes of them, probabilities and what they are made of.
    copies = 7 if "probabilities" in case.options else 4
    one = math.prod(case.dims[1:]) * item * copies
    if case.layout == "rows far apart":
        one = (REACH + 64) * item
    room = int(0.8 * machine.free_bytes()) - 2**18
    if one * case.dims[0] <= room:
        return case.dims
    if case.scales and room >= one:
        return (room // one, *case.dims[1:])
    raise NotHereError(f"needs {one * case.dims[0] / 1e9:.1f} GB, there are {room / 1e9:.1f}")


def arranged(machine: Machine, dims: tuple[int, ...], case: Case) -> torch.Tensor:
    """Make room for logits in a layout; what lies between them is nan."""

    def room(*shape: int) -> torch.Tensor:
        kind = getattr(torch, case.dtype)
        return torch.full(shape, float("nan"), dtype=kind, device=machine.device)

    first, classes = dims[:2]
    if case.layout == "channels last":
        return room(first, *dims[2:], classes).movedim(-1, 1)
    if case.layout == "misaligned":
        return room(math.prod(dims) + 1)[1:].view(dims)
    if case.layout == "row-strided":
        return room(first, classes + 3)[:, :classes]
    if case.layout == "column-major":
        return room(classes, first).T
    if case.layout == "every second":
        return room(first, 2 * classes)[:, ::2]
    if case.layout == "rows far apart":
        return torch.as_strided(room(first, REACH + 64), dims, (REACH + 64, 1))
    return room(*dims)


def some_rows(count: int, most: int, device: torch.device) -> torch.Tensor:
    """Choose the rows to check: all, or the first, the last and some between."""
    if count <= most:
        return torch.arange(count, device=device)
    return torch.linspace(0, count - 1, most, dtype=torch.float64, device=device).long()


def make_confident(
    rows: torch.Tensor, places: tuple[torch.Tensor, ...], labels: torch.Tensor, ignored: int
) -> None:
    """Put the label of every fourth row ahead of all other classes together, by about 8."""
    for_label = labels[::4].long()
    for_label = torch.where(for_label == ignored, 0, for_label)
    # The largest of C normal numbers is about sqrt(2 log C).
    ahead = 3.0 * math.sqrt(2.0 * math.log(rows.shape[-1] + 1)) + 8.0
    rows[(*(index[::4] for index in places), for_label)] = ahead


def of_rows(
    machine: Machine, name: str, logits: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give what a call gets of logits, the losses, and the gradient for cotangents of 1."""
    x = torch.tensor(logits, dtype=getattr(torch, name), device=machine.device)
    t = torch.tensor(labels, device=machine.device)
    g = torch.ones(len(logits), dtype=x.dtype, device=machine.device)
    seen = x.cpu().numpy()
    losses, grad = call(Case(logits.shape, name), x, t, g, {})
    return seen, losses.cpu().numpy(), grad.cpu().numpy()
