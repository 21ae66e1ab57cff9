"""Streams of the emulated devices, on which everything is done at once."""

from __future__ import annotations

import threading

from .. import emulation
from .device import get_device_id

_state = threading.local()


class Stream:
    """A stream of the device that is current when it is made."""

    null: Stream

    def __init__(
        self, null: bool = False, non_blocking: bool = False, ptds: bool = False, priority: int = 0
    ) -> None:
        self.null_ = null
        self.ptr = 0 if null else id(self)
        # The null stream belongs to every device.
        self.device_id = -1 if null else get_device_id()

    def __enter__(self) -> Stream:
        device, before = get_device_id(), get_current_stream()
        self.use()
        _state.__dict__.setdefault("stack", []).append((device, before))
        return self

    def __exit__(self, *_: object) -> None:
        device, before = _state.stack.pop()
        _state.current[device] = before

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.ptr == other.ptr

    def __hash__(self) -> int:
        return hash(self.ptr)

    def __repr__(self) -> str:
        return f"<Stream {self.ptr} (device {self.device_id})>"

    def use(self) -> Stream:
        """Make this stream the current one of the current device."""
        if self.device_id not in (-1, get_device_id()):
            raise RuntimeError(
                f"The device that the stream is created on ({self.device_id}) does not match with "
                f"the current device ({get_device_id()})"
            )
        _state.__dict__.setdefault("current", {})[get_device_id()] = self
        return self

    def synchronize(self) -> None:
        """Count a wait."""
        emulation.synchronizations += 1


Stream.null = Stream(null=True)


def get_current_stream(device_id: int | None = None) -> Stream:
    """Return the current stream of a device, by default of the current one."""
    device_id = get_device_id() if device_id is None else device_id
    return getattr(_state, "current", {}).get(device_id, Stream.null)
