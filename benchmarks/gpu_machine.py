"""Where the GPU script runs: a CUDA or ROCm device, or a CPU that rehearses it.

The rehearsal goes the same way with tiny arrays: kernels in Triton's interpreter, the host's clock
in place of device events. What needs a device raises `NotHereError`, with the reason.
"""

from __future__ import annotations

import itertools
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from measure import Row
from torch.autograd import DeviceType

RIGHT, WRONG, NOT_HERE = "right", "wrong", "not here"


class NotHereError(Exception):
    """What was to be checked or measured cannot be, for the reason that is the message."""


class Timed(NamedTuple):
    """Something to time."""

    prepare: Callable[[], Any]
    """What goes before, untimed; it returns what the call takes."""
    call: Callable[[Any], Any]


class Machine:
    """A device, with its clock, its memory and what it launches."""

    rehearses = False
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


def attempt(name: str, check: Callable[[], Row | None], **facts: Any) -> Row:
    """Run a check, and say how it went: what it returns or raises, and how long it took.

    A check that finds something wrong returns it as "wrong" beside its facts, or raises.
    """
    row: Row = {"check": name, "status": RIGHT} | facts
    start = time.perf_counter()
    try:
        found = check() or {}
        row |= found | ({"status": WRONG} if found.get("wrong") else {})
    except NotHereError as reason:
        row |= {"status": NOT_HERE, "reason": str(reason)}
    except torch.OutOfMemoryError as error:
        row |= {"status": NOT_HERE, "reason": f"out of memory: {str(error).splitlines()[0]}"}
    except Exception as error:  # noqa: BLE001  (the check's failure, not the run's)
        row |= {"status": WRONG, "wrong": f"{type(error).__name__}: {error}"}
        if not isinstance(error, AssertionError):
            row["traceback"] = traceback.format_exc()
    return row | {"took_s": time.perf_counter() - start}


def require(holds: bool, message: str) -> None:
    """Raise what a check has found to be wrong."""
    if not holds:
        raise AssertionError(message)


def interleave(
    machine: Machine, calls: Mapping[str, Timed], rounds: int, budget: float
) -> dict[str, dict[str, float]]:
    """Time calls in turn, so that a clock that changes does so for all of them alike.

    There are `rounds`, or as many more as take `budget` seconds; each begins with another call.
    """
    for timed in calls.values():
        machine.seconds(timed)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    if not order:
        return {}
    end = time.perf_counter() + budget
    for done in itertools.count():
        if done >= rounds and time.perf_counter() >= end:
            break
        for name in order:
            samples[name].append(machine.seconds(calls[name]))
        order.append(order.pop(0))
    return {name: summary(taken) for name, taken in samples.items()}


def summary(samples: list[float]) -> dict[str, float]:
    """Give the median, and where the middle four fifths of the samples end."""
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return {"median_s": statistics.median(samples), "p10_s": tenths[0], "p90_s": tenths[-1]}
