"""Where the GPU script runs with CuPy: a CUDA or ROCm device, or the emulated CuPy that rehearses.

The rehearsal goes the same way with tiny arrays: kernels run by tests/emulation, the host's clock
in place of device events.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import cupy
import measure
from gpu_checks import NotHereError, require
from gpu_device import Timed
from gpu_processes import UNPOOLED

from polyce.testing import Backend, get_backend

# A kernel that keeps the device busy for so many of its clock's ticks.
_SPIN = """
extern "C" __global__ void spin(long long ticks) {
  const long long start = clock64();
  while (clock64() - start < ticks) {}
}
"""
_TICKS = 100_000_000


class Machine:
    """A device, with its clock, its memory and what it launches."""

    library = "cupy"
    paths = ("cupy", "reference")
    rehearses = False
    is_rocm = bool(cupy.cuda.runtime.is_hip)
    # As in `gpu_machine`.
    flushed_bytes = 2**29

    def __init__(self) -> None:
        self.device = cupy.cuda.Device()
        self._flushed: Any = None
        if os.environ.get(UNPOOLED):
            cupy.cuda.set_allocator(None)

    def synchronize(self) -> None:
        """Wait until everything has run, which is where errors of the device come out."""
        self.device.synchronize()

    def free_bytes(self) -> int:
        """Tell how much memory there is, with what CuPy keeps for later."""
        cupy.get_default_memory_pool().free_all_blocks()
        return int(cupy.cuda.runtime.memGetInfo()[0])

    def needs_device(self, what: str) -> None:
        """Leave a check out where there is no device for it."""

    def flush(self) -> None:
        """Write over what the device's caches hold."""
        if self._flushed is None:
            size = min(self.flushed_bytes, self.free_bytes() // 16)
            self._flushed = cupy.empty(size, cupy.int8)
        self._flushed.fill(0)

    def seconds(self, timed: Timed) -> float:
        """Time one call on the device, with cold caches."""
        state = timed.prepare()
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        self.flush()
        start.record()
        result = timed.call(state)
        end.record()
        end.synchronize()
        del result
        return float(cupy.cuda.get_elapsed_time(start, end)) / 1e3

    def extra_bytes(self, timed: Timed) -> int | None:
        """Tell by how much the memory in use grows at most during a call."""

        class Most(cupy.cuda.MemoryHook):  # type: ignore[misc]
            name = "polyce: the most"
            now = most = 0

            def malloc_postprocess(self, **facts: Any) -> None:
                self.now += facts["mem_size"]
                self.most = max(self.most, self.now)

            def free_postprocess(self, **facts: Any) -> None:
                self.now -= facts["mem_size"]

        state = timed.prepare()
        self.synchronize()
        with Most() as hook:
            timed.call(state)
            self.synchronize()
        return int(hook.most)

    def launches(self, timed: Timed) -> list[str] | None:
        """Name the kernels that a call launches, where torch is there with its profiler."""
        if not measure.installed("torch"):
            return None
        import torch

        if not torch.cuda.is_available():
            return None
        from torch.autograd import DeviceType

        state = timed.prepare()
        self.synchronize()
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=kinds) as profile:
            timed.call(state)
            self.synchronize()
        names = [event.name for event in profile.events() if event.device_type == DeviceType.CUDA]
        # None at all means that the driver lets nobody look.
        return names or None

    def describe(self) -> dict[str, Any]:
        """Give the facts of the device."""
        facts = cupy.cuda.runtime.getDeviceProperties(self.device.id)
        names = ("major", "minor", "totalGlobalMem", "multiProcessorCount", "l2CacheSize")
        found = {name: facts.get(name) for name in names}
        count = cupy.cuda.runtime.getDeviceCount()
        return {"name": facts["name"].decode(), **found, "devices": count}

    def selector(self) -> list[str]:
        """Give the arguments that make nvidia-smi tell of this device alone."""
        return ["-i", self.device.pci_bus_id]

    def versions(self) -> dict[str, str]:
        """Give the versions of CuPy, and of what it found to compile and run with."""
        runtime = cupy.cuda.runtime
        found = {"cupy": cupy.__version__, "CUDA": str(runtime.runtimeGetVersion())}
        return found | {"driver": str(runtime.driverGetVersion())}

    def backend(self) -> Backend:
        """Give the grid's converters."""
        return get_backend("cupy")

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Keep the current stream waiting, so that what it is given runs later."""
        cupy.RawKernel(_SPIN, "spin")((1,), (1,), (_TICKS,))
        yield

    def waits(self, call: Callable[[], Any]) -> None:
        """Raise if the host waits for the device during a call."""
        call()
        done = cupy.cuda.Event(disable_timing=True)
        self.synchronize()
        with self.busy():
            call()
            done.record()
            require(not done.done, "the call came back when the device had done all before it")
        self.synchronize()


class Rehearsal(Machine):
    """The emulated CuPy in a device's place."""

    rehearses = True

    def __init__(self) -> None:
        self.device = cupy.cuda.Device()

    def synchronize(self) -> None:
        """Do nothing: an emulated device has run everything when a call returns."""

    def free_bytes(self) -> int:
        """Give memory for tiny arrays."""
        return 2**24

    def needs_device(self, what: str) -> None:
        """Leave a check out where there is no device for it."""
        raise NotHereError(f"the emulated CuPy has no {what}")

    def flush(self) -> None:
        """Do nothing."""

    def seconds(self, timed: Timed) -> float:
        """Time one call by the host's clock."""
        state = timed.prepare()
        start = time.perf_counter()
        timed.call(state)
        return time.perf_counter() - start

    def extra_bytes(self, timed: Timed) -> int | None:
        """Add up all that is asked for, which is at least the most there is at once."""
        state = timed.prepare()
        before = len(cupy.emulation.allocations)
        timed.call(state)
        return sum(cupy.emulation.allocations[before:])

    def launches(self, timed: Timed) -> list[str] | None:
        """Name polyce's kernels; CuPy's own are counted alone."""
        state = timed.prepare()
        before, others = len(cupy.emulation.launches), cupy.emulation.other_kernels
        timed.call(state)
        own = [launch.name for launch in cupy.emulation.launches[before:]]
        return own + ["CuPy's own"] * (cupy.emulation.other_kernels - others)

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Do nothing."""
        yield

    def waits(self, call: Callable[[], Any]) -> None:
        """Raise if the host would wait for a device during a call."""
        before = cupy.emulation.synchronizations
        call()
        require(cupy.emulation.synchronizations == before, "the host waits for the device")
