"""Memory of the emulated devices: its alignment, the guards around it, who holds it."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import numpy as np

from . import emulation
from .cuda import device

ALIGNMENT = 256
GUARD = 256
# Fresh memory and guards are filled with this 16-bit pattern: a nan in each floating dtype, and a
# nonsensically large number in each integer dtype.
POISON = b"\xff\x7f"

_live: weakref.WeakSet[Memory] = weakref.WeakSet()


class Memory:
    """A stretch of memory between two guards, on the device that is current when it is made."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.device_id = device.get_device_id()
        buffer = np.empty(ALIGNMENT + 2 * GUARD + size, np.uint8)
        before = -(buffer.ctypes.data + GUARD) % ALIGNMENT
        # The rear guard is as long as it takes to end on a whole POISON.
        self._all = buffer[before : before + GUARD + size + GUARD]
        self._all[0::2], self._all[1::2] = POISON
        self.address = self._all.ctypes.data + GUARD
        # CuPy's pool never hands out memory of no bytes.
        self.ptr = self.address if size else 0
        self._behind = bytes(self._all[GUARD + size :])
        emulation.allocations.append(size)
        emulation.held += size
        emulation.most_held = max(emulation.most_held, emulation.held)
        _live.add(self)

    def __del__(self) -> None:
        emulation.held -= self.size

    @property
    def values(self) -> np.ndarray:
        """Return the bytes."""
        return self._all[GUARD : GUARD + self.size]

    @property
    def device(self) -> device.Device:
        return device.Device(self.device_id)

    def holds(self, address: int) -> bool:
        """Tell whether an address lies within this memory."""
        return self.address <= address < self.address + self.size

    def damage(self) -> str:
        """Say which guard was written to, if any."""
        before = ctypes.string_at(self.address - GUARD, GUARD)
        if before != POISON * (GUARD // 2):
            place = max(i for i in range(GUARD) if before[i] != POISON[i % 2])
            return f"{GUARD - place} bytes before the first"
        behind = ctypes.string_at(self.address + self.size, GUARD)
        if behind != self._behind:
            place = min(i for i in range(GUARD) if behind[i] != self._behind[i])
            return f"{place} bytes behind the last"
        return ""


class UnownedMemory:
    """Memory that exists already, as `cupy.cuda.UnownedMemory` takes it; it has no guards.

    An array over it is `cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0), strides)`.
    """

    def __init__(self, ptr: int, size: int, owner: Any, device_id: int = -1) -> None:
        self.ptr = self.address = ptr
        self.size = size
        self.device_id = device.get_device_id() if device_id < 0 else device_id
        self.values = np.frombuffer((ctypes.c_ubyte * size).from_address(ptr), np.uint8)
        self._owner = owner

    device = Memory.device
    holds = Memory.holds


class MemoryPointer:
    """A place in memory, such as `ndarray.data`."""

    def __init__(self, mem: Memory | UnownedMemory, offset: int) -> None:
        self.mem = mem
        self.ptr = mem.ptr + offset
        self.device_id = mem.device_id

    @property
    def device(self) -> Any:
        return self.mem.device

    def __int__(self) -> int:
        return self.ptr

    def __add__(self, offset: int) -> MemoryPointer:
        return MemoryPointer(self.mem, self.ptr - self.mem.ptr + offset)


def check_guards(what: str) -> None:
    """Raise if anything was written before or behind an array."""
    for memory in list(_live):
        damage = memory.damage()
        if damage:
            size = memory.size
            # Reported once only: the next launch has done nothing wrong.
            _live.discard(memory)
            raise emulation.EmulationError(
                f"{what} wrote outside an array: {damage} of its {size} bytes"
            )
