"""The conformance grid of `polyce.testing`, on the device, for each path of a library there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpu_checks import attempt
from gpu_device import Device
from measure import Row

from polyce.testing import GROUPS, Case, cases, check_implementation
from polyce.testing.selection import representative


def check(machine: Device) -> list[Row]:
    """Run each group of the grid through each path; a rehearsal takes a few cases of it."""
    library = machine.backend()
    rows = []
    for path in machine.paths:
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


def few(group: str) -> Callable[[Case], str]:
    """Leave out all but a few cases of a group."""
    # The exact answers of long rows take seconds.
    short = (case for case in cases([group], ["float32"]) if case.logits.size <= 200)
    chosen = {case.name for case in representative(short, 4)}
    return lambda case: "" if case.name in chosen else "a rehearsal takes a few of each group"
