"""A CUDA or ROCm device through CuPy, and the emulated CuPy of tests/emulation.

Random numbers are computed from their positions by integer arithmetic, so that every device,
emulated or not, draws the same.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import array_api_compat.cupy as xp
import cupy
import numpy as np

import polyce
from polyce.testing import get_backend
from polyce.testing.dtypes import dtype

from .device import (
    EMULATION,
    REHEARSED_BYTES,
    UNPOOLED,
    Call,
    Device,
    NotHereError,
    Timed,
    host_seconds,
    lacking,
)

# The steps of splitmix64.
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
# How many numbers are drawn at once.
_TOGETHER = 2**24
# The same as on torch.
_FLUSHED_BYTES = 2**29
# A kernel that keeps the device busy for a number of clock ticks.
_SPIN = """
extern "C" __global__ void spin(long long ticks) {
  const long long start = clock64();
  while (clock64() - start < ticks) {}
}
"""
_TICKS = 100_000_000
# So many, about two milliseconds, are more than the host takes for a call.
_AHEAD = 4_000_000


def device() -> Device:
    """Return CuPy's current device."""
    if not cupy.cuda.is_available() or EMULATION in Path(cupy.__file__).parents:
        raise NotHereError(f"cupy {cupy.__version__} finds no device")
    if os.environ.get(UNPOOLED):
        cupy.cuda.set_allocator(None)
    current = cupy.cuda.Device()
    return dataclasses.replace(
        rehearsal(),
        rehearses=False,
        is_rocm=bool(cupy.cuda.runtime.is_hip),
        synchronize=current.synchronize,
        seconds=_seconds,
        whole_seconds=_whole_seconds,
        graph_seconds=_graph_seconds,
        free_bytes=_free_bytes,
        extra_bytes=_extra_bytes,
        launches=_launches,
        keep_busy=_keep_busy,
        without_waiting=_without_waiting,
        captured=_captured,
        facts=functools.partial(_facts, current),
        selector=lambda: ["-i", current.pci_bus_id],
    )


def rehearsal() -> Device:
    """Return the emulated CuPy in a device's place."""
    return Device(
        library="cupy",
        path="cupy",
        rehearses=True,
        is_rocm=False,
        unchecked={},
        xp=xp,
        backend=get_backend("cupy"),
        full=lambda shape, value, name: cupy.full(shape, value, dtype=dtype(name)),
        normal=_normal,
        around_one=_around_one,
        labels=_labels,
        address=lambda array: array.data.ptr,
        alone=functools.partial(polyce.cross_entropy, implementation="cupy"),
        loss_and_grad=_loss_and_grad,
        # An emulated device has run everything when a call returns.
        synchronize=lambda: None,
        seconds=host_seconds,
        whole_seconds=host_seconds,
        graph_seconds=lacking("CUDA graphs"),
        free_bytes=lambda: REHEARSED_BYTES,
        extra_bytes=_allocated,
        launches=_emulated,
        side_stream=_side_stream,
        keep_busy=lambda: None,
        without_waiting=_without_synchronizing,
        captured=lacking("CUDA graphs"),
        device_count=lambda: int(cupy.cuda.runtime.getDeviceCount()),
        current_device=lambda: int(cupy.cuda.runtime.getDevice()),
        device_of=lambda array: array.device.id,
        moved=_moved,
        facts=lacking("device to describe"),
        selector=lacking("clocks"),
        versions=_versions,
    )


def _uniform(start: int, count: int, seed: int) -> Any:
    """Draw float64 numbers, above 0 and up to 1."""
    bits = cupy.arange(start, start + count, dtype=np.uint64) + np.uint64(seed << 44)
    bits *= np.uint64(_STEP)
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        bits ^= bits >> np.uint64(shift)
        bits *= np.uint64(factor)
    bits ^= bits >> np.uint64(31)
    return ((bits >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53


def _normal(array: Any, scale: float, seed: int) -> Any:
    inner = math.prod(array.shape[1:])
    step = max(1, _TOGETHER // max(1, inner))
    for start in range(0, array.shape[0], step):
        part = array[start : start + step]
        # Each seed stands for two streams, since a normal number takes two uniform ones.
        angle = _uniform(start * inner, part.size, 2 * seed + 1) * (2.0 * math.pi)
        length = cupy.sqrt(-2.0 * cupy.log(_uniform(start * inner, part.size, 2 * seed)))
        drawn = length * cupy.cos(angle) * scale
        part[...] = drawn.reshape(part.shape).astype(np.float32).astype(array.dtype)
    return array


def _around_one(shape: tuple[int, ...], name: str, seed: int) -> Any:
    drawn = _uniform(0, math.prod(shape), 2 * seed).reshape(shape) + 0.5
    return drawn.astype(np.float32).astype(dtype(name))


def _labels(shape: tuple[int, ...], classes: int, name: str, seed: int) -> Any:
    drawn = _uniform(0, math.prod(shape), 2 * seed) * classes
    return cupy.minimum(drawn, classes - 1).reshape(shape).astype(name)


def _loss_and_grad(
    logits: Any, *operands: Any, in_place: bool = False, **options: Any
) -> tuple[Any, Any]:
    out = logits if in_place else None
    return polyce.cross_entropy_with_grad(
        logits, *operands, out=out, implementation="cupy", **options
    )


def _seconds(timed: Timed) -> float:
    """Time a call behind a kernel that runs until the host has launched it."""
    state = timed.prepare()
    _flushed().fill(0)
    _keep_busy(_AHEAD)
    return _between_events(lambda: timed.call(state))


def _between_events(call: Call) -> float:
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    start.record()
    result = call()
    end.record()
    end.synchronize()
    del result
    return float(cupy.cuda.get_elapsed_time(start, end)) / 1e3


def _whole_seconds(timed: Timed) -> float:
    state = timed.prepare()
    _flushed().fill(0)
    cupy.cuda.Device().synchronize()
    start = time.perf_counter()
    result = timed.call(state)
    cupy.cuda.Device().synchronize()
    taken = time.perf_counter() - start
    del result
    return taken


def _graph_seconds(timed: Timed, count: int) -> list[float]:
    state = timed.prepare()
    # The results live as long as the graph that writes them.
    graph, side, _results = _graph(lambda: timed.call(state))
    taken = []
    with side:
        for _ in range(count):
            _flushed().fill(0)
            _keep_busy(_AHEAD)
            taken.append(_between_events(lambda: graph.launch(side)))
    return taken


@functools.cache
def _flushed() -> Any:
    """Make memory that is large enough to flush the device's caches when it is written."""
    return cupy.empty(min(_FLUSHED_BYTES, _free_bytes() // 16), cupy.int8)


def _free_bytes() -> int:
    cupy.get_default_memory_pool().free_all_blocks()
    return int(cupy.cuda.runtime.memGetInfo()[0])


def _extra_bytes(timed: Timed) -> int:
    class Most(cupy.cuda.MemoryHook):  # type: ignore[misc]
        name = "polyce: the most"
        now = most = 0

        def malloc_postprocess(self, **facts: Any) -> None:
            self.now += facts["mem_size"]
            self.most = max(self.most, self.now)

        def free_postprocess(self, **facts: Any) -> None:
            self.now -= facts["mem_size"]

    state = timed.prepare()
    cupy.cuda.Device().synchronize()
    with Most() as hook:
        timed.call(state)
        cupy.cuda.Device().synchronize()
    return int(hook.most)


def _allocated(timed: Timed) -> int:
    """Sum all allocations, which is at least the largest amount at one time."""
    state = timed.prepare()
    before = len(cupy.emulation.allocations)
    timed.call(state)
    return sum(cupy.emulation.allocations[before:])


def _launches(timed: Timed) -> list[str] | None:
    """Name the kernels by torch's profiler, if torch is installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    from torch.autograd import DeviceType

    state = timed.prepare()
    cupy.cuda.Device().synchronize()
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        timed.call(state)
        cupy.cuda.Device().synchronize()
    names = [event.name for event in profile.events() if event.device_type == DeviceType.CUDA]
    # No kernels at all means that the driver does not allow profiling.
    return names or None


def _emulated(timed: Timed) -> list[str]:
    """Name polyce's kernels; CuPy's own are only counted."""
    state = timed.prepare()
    before, others = len(cupy.emulation.launches), cupy.emulation.other_kernels
    timed.call(state)
    own = [launch.name for launch in cupy.emulation.launches[before:]]
    return own + ["CuPy's own"] * (cupy.emulation.other_kernels - others)


@contextmanager
def _side_stream() -> Iterator[None]:
    side = cupy.cuda.Stream()
    with side:
        yield
    side.synchronize()


def _keep_busy(ticks: int = _TICKS) -> None:
    cupy.RawKernel(_SPIN, "spin")((1,), (1,), (ticks,))


def _without_waiting(call: Call) -> None:
    # It compiles what it needs.
    call()
    done = cupy.cuda.Event(disable_timing=True)
    cupy.cuda.Device().synchronize()
    _keep_busy()
    call()
    done.record()
    if done.done:
        raise AssertionError("the call came back when the device had done all before it")
    cupy.cuda.Device().synchronize()


def _without_synchronizing(call: Call) -> None:
    call()
    before = cupy.emulation.synchronizations
    call()
    if cupy.emulation.synchronizations != before:
        raise AssertionError("the host waits for the device")


def _captured(call: Call) -> tuple[Any, Call]:
    graph, side, results = _graph(call)

    def replay() -> None:
        graph.launch(side)
        side.synchronize()

    return results, replay


def _graph(call: Call) -> tuple[Any, Any, Any]:
    """Capture a call; return the graph, the stream to launch it on, and the results."""
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as side:
        # Memory freed by this call is reused on this stream, so that the driver is not called.
        call()
        side.synchronize()
        side.begin_capture()
        results = call()
        graph = side.end_capture()
    return graph, side, results


def _moved(array: Any, number: int) -> Any:
    with cupy.cuda.Device(number):
        return cupy.asarray(array)


def _facts(current: Any) -> dict[str, Any]:
    known = cupy.cuda.runtime.getDeviceProperties(current.id)
    names = ("major", "minor", "totalGlobalMem", "multiProcessorCount", "l2CacheSize")
    found = {name: known.get(name) for name in names}
    return {"name": known["name"].decode(), **found, "devices": cupy.cuda.runtime.getDeviceCount()}


def _versions() -> dict[str, str]:
    runtime = cupy.cuda.runtime
    found = {"cupy": cupy.__version__, "CUDA": str(runtime.runtimeGetVersion())}
    return found | {"driver": str(runtime.driverGetVersion())}
