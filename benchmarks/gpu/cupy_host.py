"""Time what the host does for a call on CuPy arrays, without allocations and launches.

python -m benchmarks.gpu.cupy_host [--calls N]

Arrays of the real CuPy lie over memory that is never read: what polyce asks of them takes its
normal time, and whatever needs a device is replaced by nothing. Target: less than 30 µs.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..measure import sample
from ..tables import show

TARGET = 30e-6
_ROUNDS = 15


def main() -> None:
    """Print the times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=2000, metavar="N", help="calls in a row")
    arguments = parser.parse_args()
    import cupy

    rows = []
    for name, call in calls(shells(cupy)).items():
        call()
        taken = statistics.median(sample(call, arguments.calls) for _ in range(_ROUNDS))
        rows.append({"call": name, "median_s": taken, "met": taken <= TARGET})
    print(f"cupy {cupy.__version__}, polyce's host side of a call on 8x10, without its launches\n")
    show(rows)


def calls(make: Callable[..., Any]) -> dict[str, Callable[[], Any]]:
    """Return the calls, by name."""
    import polyce

    logits, labels = make((8, 10), "float32"), make((8,), "int64")
    weight = make((10,), "float32")

    def alone(**options: Any) -> Callable[[], Any]:
        return lambda: polyce.cross_entropy(logits, labels, **options)

    return {
        "mean": alone(),
        "none": alone(reduction="none"),
        "weight": alone(weight=weight),
        "by name": alone(implementation="cupy"),
        "with gradient": lambda: polyce.cross_entropy_with_grad(logits, labels),
        "with gradient, out": lambda: polyce.cross_entropy_with_grad(logits, labels, out=logits),
    }


def shells(cupy: Any) -> Callable[..., Any]:
    """Replace all that needs a device, and return a maker of arrays over unreadable memory."""
    memory = cupy.cuda.UnownedMemory(0x10000, 1 << 30, None, device_id=0)
    pointer = cupy.cuda.MemoryPointer(memory, 0)
    apart = itertools.count(1)

    class Device(contextlib.nullcontext[None]):
        def __init__(self, device: int = 0) -> None:
            super().__init__()
            self.id = device

    class Shell(cupy.ndarray):  # type: ignore[misc]
        # A real array's device calls the driver when it becomes the current one.
        device = Device()

    def empty(shape: Any, dtype: Any = np.float64, order: str = "C") -> Any:
        return Shell(shape, dtype, pointer, None, order)

    def make(shape: Any, dtype: Any) -> Any:
        return Shell(shape, dtype, pointer + 4096 * next(apart))

    def nothing(*_: Any, **__: Any) -> None:
        pass

    cupy.empty = empty
    cupy.empty_like = lambda like: empty(like.shape, like.dtype)
    cupy.cuda.Device = Device
    cupy.cuda.is_available = lambda: True
    cupy.cuda.runtime.getDevice = lambda: 0
    cupy.RawModule = lambda **_: SimpleNamespace(get_function=lambda _: nothing)
    cupy.RawKernel = lambda *_, **__: nothing
    return make


if __name__ == "__main__":
    main()
