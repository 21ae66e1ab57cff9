"""What the emulated CuPy has done, and how it runs kernels.

A test sets and reads the names of this module through the module: `emulation.order = "reverse"`,
`emulation.launches`. `reset` sets all of them back to what they were.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ORDERS = ("forward", "reverse", "shuffled")


class EmulationError(RuntimeError):
    """Undefined behaviour on a GPU, or an argument that CuPy would pass on without a check."""


class Launch(NamedTuple):
    """A kernel that was started."""

    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    options: tuple[str, ...]


class Product(NamedTuple):
    """An m by k matrix multiplied by a k by n one."""

    m: int
    n: int
    k: int
    dtype: str


launches: list[Launch] = []
products: list[Product] = []
"""The products that cuBLAS would have computed."""
allocations: list[int] = []
"""The bytes of every array that was made."""
held = 0
"""The bytes of all arrays that exist."""
most_held = 0
"""The largest number of bytes at one time."""
synchronizations = 0
"""How often the host waited for the device, or would have."""
other_kernels = 0
"""How many of CuPy's own kernels would have been started."""
order = ""
"""One of ORDERS for the threads and blocks of all launches; "cycle" takes them in turn."""
seed = 0
"""Chooses among the shuffled orders."""
IN_FLOAT32 = "-DREAL=FLOAT32"
flushes: bool | str = IN_FLOAT32
"""Whether all kernels treat subnormal numbers as 0, as CuPy compiles them; or an option, and only
kernels compiled with it do. A GPU never does so in float64, but a CPU cannot tell the two apart."""
defines: tuple[str, ...] = ()
"""Additional options that every kernel is compiled with, such as ("-DSHIM_EXP_ERROR=2",)."""
record_folder: Path | None = None


_here = sys.modules[__name__]


def reset() -> None:
    """Forget what was done, and run kernels as if nothing had been set."""
    launches.clear()
    products.clear()
    allocations.clear()
    _here.synchronizations = _here.other_kernels = _here.seed = 0
    _here.most_held = held
    _here.flushes = IN_FLOAT32
    _here.defines = ()
    wanted = os.environ.get("POLYCE_EMULATION_ORDER", "cycle")
    if wanted not in (*ORDERS, "cycle"):
        raise ValueError(
            f"POLYCE_EMULATION_ORDER must be one of {(*ORDERS, 'cycle')}, got {wanted}"
        )
    _here.order = wanted
    folder = os.environ.get("POLYCE_EMULATION_RECORD")
    _here.record_folder = Path(folder) if folder else None


def this_order() -> int:
    """Return the number of the order that the next launch runs in."""
    return ORDERS.index(order) if order in ORDERS else len(launches) % len(ORDERS)


@contextlib.contextmanager
def record(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Record all launches within the block in a folder, from which `replay.py` can run them."""
    before, path = record_folder, Path(folder)
    _here.record_folder = path
    try:
        yield path
    finally:
        _here.record_folder = before


reset()
