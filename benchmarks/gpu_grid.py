"""The conformance grid of `polyce.testing`, on the device, for each path that torch has there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from gpu_machine import Machine, attempt
from measure import Row

from polyce.testing import GROUPS, Backend, Case, cases, check_implementation, get_backend
from polyce.testing.selection import representative

PATHS = ("triton", "reference")


def check(machine: Machine) -> list[Row]:
    """Run each group of the grid through each path; a rehearsal takes a few cases of it."""
    library = on(machine)
    rows = []
    for path in PATHS:
        for group in GROUPS:

            def run(path: str = path, group: str = group) -> Row:
                part: dict[str, Any] = {"groups": [group]}
                if machine.rehearses:
                    part |= {"dtypes": ["float32"], "leave_out": few(group)}
                report = check_implementation(path, library, **part)
                left_out = {why: len(names) for why, names in report.left_out.items()}
                return {"ran": sum(report.ran.values()), "left_out": left_out}

            rows.append(attempt(f"{path}, {group}", run, path=path, group=group))
    return rows


def on(machine: Machine) -> Backend:
    """Give the torch backend with its arrays on the device, strides as they were."""
    backend = get_backend("torch")

    def asarray(array: Any) -> Any:
        tensor = backend.asarray(array)
        if tensor.numel() == 0:
            return tensor.to(machine.device)
        # `to` alone would close the gaps between strided elements.
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        memory = torch.as_strided(tensor, (extent,), (1,)).to(machine.device)
        return torch.as_strided(memory, tensor.shape, tensor.stride())

    return dataclasses.replace(backend, asarray=asarray)


def few(group: str) -> Callable[[Case], str]:
    """Leave out all but a few cases of a group."""
    # The exact answers of long rows take seconds.
    short = (case for case in cases([group], ["float32"]) if case.logits.size <= 200)
    chosen = {case.name for case in representative(short, 4)}
    return lambda case: "" if case.name in chosen else "a rehearsal takes a few of each group"
