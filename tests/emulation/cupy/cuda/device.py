"""The emulated devices, which are only numbers, and the current one."""

from __future__ import annotations

import threading
from typing import Any

from .. import emulation

COUNT = 2

_state = threading.local()


def get_device_id() -> int:
    """Return the number of the current device."""
    return getattr(_state, "current", 0)


def set_device(number: int) -> None:
    """Make a device current."""
    if not 0 <= number < COUNT:
        raise RuntimeError(f"cudaErrorInvalidDevice: invalid device ordinal {number}")
    _state.current = number


class Device:
    """A device; the current one by default."""

    def __init__(self, device: Any = None) -> None:
        self.id = get_device_id() if device is None else int(device)

    def __int__(self) -> int:
        return self.id

    def __enter__(self) -> Device:
        stack = _state.__dict__.setdefault("stack", [])
        stack.append(get_device_id())
        set_device(self.id)
        return self

    def __exit__(self, *_: object) -> None:
        set_device(_state.stack.pop())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"

    def use(self) -> Device:
        """Make this device current."""
        set_device(self.id)
        return self

    def synchronize(self) -> None:
        """Count a wait."""
        emulation.synchronizations += 1

    @property
    def compute_capability(self) -> str:
        return "90"

    @property
    def attributes(self) -> dict[str, int]:
        return {
            "MaxThreadsPerBlock": 1024,
            "MaxSharedMemoryPerBlock": 49152,
            "MaxThreadsPerMultiProcessor": 2048,
            "MultiProcessorCount": 132,
            "WarpSize": 32,
        }
