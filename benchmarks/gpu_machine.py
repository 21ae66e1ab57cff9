"""Where the GPU script runs with torch: a CUDA or ROCm device, or a CPU that rehearses it.

The rehearsal goes the same way with tiny arrays: kernels in Triton's interpreter, the host's clock
in place of device events. What needs a device raises `NotHereError`, with the reason.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from gpu_checks import NotHereError
from gpu_device import Timed
from torch.autograd import DeviceType

from polyce.testing import Backend, get_backend


class Machine:
    """A device, with its clock, its memory and what it launches."""

    library = "torch"
    paths = ("triton", "reference")
    rehearses = False
    is_rocm = torch.version.hip is not None
    # A kernel that writes this much runs for a while, in which the host gets ahead of the device;
    # it is more than any device's cache holds.
    flushed_bytes = 2**29

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._flushed: torch.Tensor | None = None

    def synchronize(self) -> None:
        """Wait until everything has run, which is where errors of the device come out."""
        torch.cuda.synchronize(self.device)

    def free_bytes(self) -> int:
        """Tell how much memory there is, with what torch keeps for later."""
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self.device)[0])

    def needs_device(self, what: str) -> None:
        """Leave a check out where there is no device for it."""

    def flush(self) -> None:
        """Write over what the device's caches hold."""
        if self._flushed is None:
            size = min(self.flushed_bytes, self.free_bytes() // 16)
            self._flushed = torch.empty(size, dtype=torch.int8, device=self.device)
        self._flushed.zero_()

    def seconds(self, timed: Timed) -> float:
        """Time one call on the device, with cold caches."""
        state = timed.prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush()
        start.record()
        result = timed.call(state)
        end.record()
        end.synchronize()
        del result
        return float(start.elapsed_time(end)) / 1e3

    def extra_bytes(self, timed: Timed) -> int | None:
        """Tell by how much the memory in use grows at most during a call."""
        state = timed.prepare()
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        result = timed.call(state)
        self.synchronize()
        del result
        return int(torch.cuda.max_memory_allocated(self.device)) - before

    def launches(self, timed: Timed) -> list[str] | None:
        """Name the kernels that a call launches, copies and fills among them."""
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        # None at all means that the driver lets nobody look.
        return self._profiled(timed, kinds) or None

    def _profiled(self, timed: Timed, kinds: list[Any]) -> list[str]:
        state = timed.prepare()
        self.synchronize()
        with torch.profiler.profile(activities=kinds) as profile:
            timed.call(state)
            self.synchronize()
        return [event.name for event in profile.events() if event.device_type == DeviceType.CUDA]

    def describe(self) -> dict[str, Any]:
        """Give the facts of the device."""
        facts = torch.cuda.get_device_properties(self.device)
        names = ("name", "major", "minor", "total_memory", "multi_processor_count", "L2_cache_size")
        found = {name: getattr(facts, name, None) for name in (*names, "gcnArchName")}
        return found | {"devices": torch.cuda.device_count()}

    def selector(self) -> list[str]:
        """Give the arguments that make nvidia-smi tell of this device alone."""
        uuid = getattr(torch.cuda.get_device_properties(self.device), "uuid", None)
        return [] if uuid is None else ["-i", f"GPU-{uuid}"]

    def versions(self) -> dict[str, str]:
        """Give the versions of CUDA and ROCm that torch was made for."""
        return {"CUDA": str(torch.version.cuda), "ROCm": str(torch.version.hip)}

    def backend(self) -> Backend:
        """Give the torch backend with its arrays on the device, strides as they were."""
        backend = get_backend("torch")

        def asarray(array: Any) -> Any:
            tensor = backend.asarray(array)
            if tensor.numel() == 0:
                return tensor.to(self.device)
            # `to` alone would close the gaps between strided elements.
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            extent = 1 + sum((n - 1) * step for n, step in steps)
            memory = torch.as_strided(tensor, (extent,), (1,)).to(self.device)
            return torch.as_strided(memory, tensor.shape, tensor.stride())

        return dataclasses.replace(backend, asarray=asarray)


class Rehearsal(Machine):
    """A CPU in a device's place."""

    rehearses = True

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def synchronize(self) -> None:
        """Do nothing: a CPU has run everything when a call returns."""

    def free_bytes(self) -> int:
        """Give memory for tiny arrays."""
        return 2**24

    def needs_device(self, what: str) -> None:
        """Leave a check out where there is no device for it."""
        raise NotHereError(f"a rehearsal on a CPU has no {what}")

    def flush(self) -> None:
        """Do nothing."""

    def seconds(self, timed: Timed) -> float:
        """Time one call by the host's clock."""
        state = timed.prepare()
        start = time.perf_counter()
        timed.call(state)
        return time.perf_counter() - start

    def extra_bytes(self, timed: Timed) -> int | None:
        """Run it all the same: torch counts no CPU memory."""
        timed.call(timed.prepare())
        return None

    def launches(self, timed: Timed) -> list[str] | None:
        """Run the profiler all the same, which sees no kernels that are interpreted."""
        self._profiled(timed, [torch.profiler.ProfilerActivity.CPU])
        return None
