"""Time what the host does for a call on CuPy arrays, but for making memory and starting kernels.

python benchmarks/cupy_host.py [--emulated] [--calls N]

With the CuPy that is installed and no device, its arrays are shells over memory nobody reads: what
polyce asks of them takes as long as ever, and in place of what needs a device stands nothing. With
`--emulated` it is the CuPy of tests/emulation, whose arrays take longer to ask; how much of the
time that is, is estimated from a profile. Target: less than 30 µs.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import measure
import numpy as np

EMULATION = Path(__file__).parents[1] / "tests" / "emulation"
TARGET = 30e-6
_ROUNDS = 15


def main() -> None:
    """Print the times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--emulated", action="store_true", help="use the CuPy of tests/emulation")
    parser.add_argument("--calls", type=int, default=2000, metavar="N", help="calls in a row")
    arguments = parser.parse_args()
    if arguments.emulated:
        sys.path.insert(0, str(EMULATION))
    import cupy

    make = emulated(cupy) if arguments.emulated else shells(cupy)
    rows = []
    for name, call in calls(make).items():
        call()
        taken = median(call, arguments.calls)
        row: dict[str, Any] = {"call": name, "median_s": taken, "met": taken <= TARGET}
        if arguments.emulated:
            row["share of emulated arrays"] = share(call)
        rows.append(row)
    print(f"cupy {cupy.__version__}, polyce's host side of a call on 8x10, without its launches\n")
    measure.show(rows)


def calls(make: Callable[..., Any]) -> dict[str, Callable[[], Any]]:
    """Give the calls, by name."""
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


def median(call: Callable[[], Any], count: int) -> float:
    """Give the median seconds of a call, over several rows of calls."""
    taken = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        for _ in range(count):
            call()
        taken.append((time.perf_counter() - start) / count)
    return statistics.median(taken)


def share(call: Callable[[], Any]) -> float:
    """Estimate what part of a call's time is spent inside the emulated CuPy."""
    inside, total, since = 0.0, time.perf_counter(), 0.0
    depth = 0

    def watch(frame: Any, event: str, _: Any) -> None:
        nonlocal inside, since, depth
        if not frame.f_code.co_filename.startswith(str(EMULATION)):
            return
        if event == "call":
            if depth == 0:
                since = time.perf_counter()
            depth += 1
        elif event == "return" and depth:
            depth -= 1
            if depth == 0:
                inside += time.perf_counter() - since

    sys.setprofile(watch)
    try:
        for _ in range(200):
            call()
    finally:
        sys.setprofile(None)
    return inside / (time.perf_counter() - total)


def emulated(cupy: Any) -> Callable[..., Any]:
    """Launch nothing, and give a maker of arrays."""
    cupy.RawKernel.__call__ = lambda *_, **__: None
    zeros: Callable[..., Any] = cupy.zeros
    return zeros


def shells(cupy: Any) -> Callable[..., Any]:
    """Let nothing need a device, and give a maker of arrays over memory nobody may read."""
    memory = cupy.cuda.UnownedMemory(0x10000, 1 << 30, None, device_id=0)
    pointer = cupy.cuda.MemoryPointer(memory, 0)
    apart = itertools.count(1)

    def empty(shape: Any, dtype: Any = np.float64, order: str = "C") -> Any:
        return cupy.ndarray(shape, dtype, pointer, None, order)

    def make(shape: Any, dtype: Any) -> Any:
        return cupy.ndarray(shape, dtype, pointer + 4096 * next(apart))

    class Device(contextlib.AbstractContextManager[None]):
        def __init__(self, device: int = 0) -> None:
            self.id = device

        def __exit__(self, *_: object) -> None:
            pass

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
