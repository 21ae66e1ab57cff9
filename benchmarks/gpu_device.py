"""What the GPU script asks of the machine that it runs on, and times calls by.

Each array library has its own: a device that the library finds, and a CPU that rehearses it.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from polyce.testing import Backend


class Timed(NamedTuple):
    """Something to time."""

    prepare: Callable[[], Any]
    """What goes before, untimed; it returns what the call takes."""
    call: Callable[[Any], Any]


class Device(Protocol):
    """A device, or what stands for one, as seen through an array library."""

    library: str
    """What `gpu.py --library` calls it."""
    paths: tuple[str, ...]
    """The implementations that the grid is run through."""
    rehearses: bool
    is_rocm: bool

    def synchronize(self) -> None:
        """Wait until everything has run, which is where errors of the device come out."""

    def free_bytes(self) -> int:
        """Tell how much memory there is, with what the library keeps for later."""

    def needs_device(self, what: str) -> None:
        """Leave a check out where there is no device for it."""

    def seconds(self, timed: Timed) -> float:
        """Time one call on the device, with cold caches."""

    def extra_bytes(self, timed: Timed) -> int | None:
        """Tell by how much the memory in use grows at most during a call."""

    def launches(self, timed: Timed) -> list[str] | None:
        """Name the kernels that a call launches, copies and fills among them."""

    def describe(self) -> dict[str, Any]:
        """Give the facts of the device."""

    def selector(self) -> list[str]:
        """Give the arguments that make nvidia-smi tell of this device alone."""

    def versions(self) -> dict[str, str]:
        """Give the versions of CUDA and ROCm that the library was made for."""

    def backend(self) -> Backend:
        """Give the conformance grid's converters to arrays on the device and back."""


def interleave(
    machine: Device, calls: Mapping[str, Timed], rounds: int, budget: float
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
