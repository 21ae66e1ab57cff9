"""Every kind of launch once, compared with float64: what is tried first on a GPU."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from polyce.testing import Case as GridCase
from polyce.testing import cases, check_implementation
from polyce.testing.selection import representative
from triton_checks import PARTS, changed

from .cases import Case, small_set
from .compared import compared
from .device import Device
from .ledger import RIGHT, Row, Step

# The groups of the conformance grid that have kinds of launches of their own: other targets, stats
# and their cotangents, transforms, infinities.
GROUPS = (
    *("options", "sparse", "teacher", "stats", "target-stats", "grad-stats", "transform"),
    *("special", "values"),
)
# Those that are tried again with rows split over programs.
SPLIT = ("options", "sparse", "teacher")
# Cases of a group, and logits of a case at most: exact answers are computed on the host.
EACH, LARGEST = 2, 2000
# A step whose kernels are compiled already takes a fraction of this.
_SECONDS = 2.0


def steps(device: Device) -> Iterator[Step]:
    """Yield all steps."""
    for case in some_of_each():
        run = functools.partial(_compared, device, case)
        yield Step(f"float64: {case.name}", _SECONDS, run)
    for group in GROUPS:
        run = functools.partial(on_grid, device, group)
        yield Step(f"grid: {group}", _SECONDS, run)
    if device.path == "triton":
        for group in SPLIT:
            run = functools.partial(on_grid, device, group, in_parts=True)
            yield Step(f"grid, rows in parts: {group}", _SECONDS, run)


def some_of_each() -> Iterator[Case]:
    """Yield one case or two of each dtype, layout and kind of call."""
    for number, case in enumerate(small_set()):
        # Five layouts by three kinds of call: every kind and dtype meets every layout but one.
        if number % 2 or not case.options:
            yield case
    yield Case((3, 1001), "float16")
    yield Case((3, 1000), "float64", options=("weight", "smoothing"))


def _compared(device: Device, case: Case) -> Iterator[Row]:
    yield {"status": RIGHT, **compared(device, case, 2**16)}


def few(group: str, dtypes: list[str]) -> list[GridCase]:
    """Choose a few cases of a group of the conformance grid."""
    small = [case for case in cases([group], dtypes) if case.logits.size <= LARGEST]
    return representative(small, EACH)


def on_grid(device: Device, group: str, *, in_parts: bool = False) -> None:
    """Run a few cases of a group of the conformance grid."""
    dtypes = ["float32", "float64"] if group == "special" else ["bfloat16", "float32"]
    dtypes = [name for name in dtypes if name in device.backend.floats]
    chosen = {case.name for case in few(group, dtypes)}

    def leave_out(case: GridCase) -> str:
        return "" if case.name in chosen else "not one of the few"

    with changed(PARTS) if in_parts else contextlib.nullcontext():
        check_implementation(
            device.path, device.backend, groups=[group], dtypes=dtypes, leave_out=leave_out
        )
