"""Launches recorded, with everything it takes to run them again without Python.

A folder of recordings holds one folder for each text and its options, with `kernel.cpp`, the text
within the shim, `options.txt`, and the launches, PROCESS-NUMBER.launch: lines of text

    kernel NAME
    grid X Y Z
    block X Y Z
    extent OFFSET BYTES           a stretch of memory, OFFSET bytes behind a multiple of 256
    pointer EXTENT OFFSET         an argument: so many bytes into that stretch
    value BYTES DIGITS            an argument: these bytes, in hexadecimal
    end

then the bytes of each extent as they were before, then those of each as they were afterwards.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import emulation
from ._build import defines, generate
from ._memory import ALIGNMENT, MemoryPointer
from ._ndarray import ndarray

# Processes may write to one folder together.
_number = itertools.count(1)


class Extent(NamedTuple):
    """A stretch of memory: its first address, and the one after its last."""

    first: int
    end: int

    def bytes(self) -> bytes:
        """Return what it holds now."""
        return ctypes.string_at(self.first, self.end - self.first)


def extent_of(argument: ndarray | MemoryPointer) -> Extent:
    """Return the stretch that holds an array's entries; for a pointer, all memory after it."""
    if isinstance(argument, MemoryPointer):
        memory = argument.mem
        return Extent(argument.ptr, memory.ptr + memory.size)
    first = argument.data.ptr
    if not argument.size:
        return Extent(first, first)
    steps = [(n - 1) * step for n, step in zip(argument.shape, argument.strides, strict=True)]
    reach = sum(step for step in steps if step > 0) + argument.itemsize
    return Extent(first + sum(step for step in steps if step < 0), first + reach)


def joined(extents: list[Extent]) -> list[Extent]:
    """Join stretches that overlap, so that arguments that share memory go on sharing it."""
    result: list[Extent] = []
    for extent in sorted(extents):
        if result and extent.first < result[-1].end:
            result[-1] = Extent(result[-1].first, max(result[-1].end, extent.end))
        elif extent.end > extent.first:
            result.append(extent)
    return result


def _folder(code: str, options: tuple[str, ...]) -> Path:
    assert emulation.record_folder is not None
    name = hashlib.sha256("\0".join([code, *options]).encode()).hexdigest()[:16]
    folder = emulation.record_folder / name
    if not folder.exists():
        folder.mkdir(parents=True)
        (folder / "options.txt").write_text("\n".join(defines(options)))
        (folder / "kernel.cpp").write_text(generate(code, defines(options)))
    return folder


def _spaced(numbers: tuple[int, ...]) -> str:
    return " ".join(map(str, numbers))


@contextlib.contextmanager
def launch(
    code: str,
    options: tuple[str, ...],
    name: str,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    arguments: tuple[Any, ...],
    packed: list[bytes],
) -> Iterator[None]:
    """Record the launch made within the block, if launches are to be recorded."""
    if emulation.record_folder is None:
        yield
        return
    pointers = [one for one in arguments if isinstance(one, ndarray | MemoryPointer)]
    extents = joined([extent_of(one) for one in pointers])
    lines = [f"kernel {name}", f"grid {_spaced(grid)}", f"block {_spaced(block)}"]
    for extent in extents:
        lines.append(f"extent {extent.first % ALIGNMENT} {extent.end - extent.first}")
    for argument, value in zip(arguments, packed, strict=True):
        place = int.from_bytes(value, "little")
        holders = [i for i, extent in enumerate(extents) if extent.first <= place < extent.end]
        if isinstance(argument, ndarray | MemoryPointer) and holders:
            lines.append(f"pointer {holders[0]} {place - extents[holders[0]].first}")
        elif isinstance(argument, ndarray | MemoryPointer):
            lines.append(f"value 8 {bytes(8).hex()}")
        else:
            lines.append(f"value {len(value)} {value.hex()}")
    before = [extent.bytes() for extent in extents]
    yield
    after = [extent.bytes() for extent in extents]
    folder = _folder(code, options)
    path = folder / f"{os.getpid()}-{next(_number):06}.launch"
    path.write_bytes("\n".join([*lines, "end", ""]).encode() + b"".join(before + after))
