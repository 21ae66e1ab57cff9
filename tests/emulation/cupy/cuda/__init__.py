"""The devices of the emulated CuPy."""

from . import compiler, device, driver, runtime, stream
from .device import Device
from .stream import Stream, get_current_stream

__all__ = [
    "Device",
    "MemoryPointer",
    "Stream",
    "UnownedMemory",
    "compiler",
    "device",
    "driver",
    "get_current_stream",
    "is_available",
    "runtime",
    "stream",
]


def is_available() -> bool:
    """Tell whether there is a device: there always is."""
    return True


def __getattr__(name: str) -> object:
    # Their module needs this one.
    if name in ("MemoryPointer", "UnownedMemory"):
        from .. import _memory

        return getattr(_memory, name)
    raise AttributeError(f"the emulated cupy.cuda has no {name}")
