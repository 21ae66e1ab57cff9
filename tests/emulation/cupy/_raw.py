"""`RawModule` and `RawKernel`: kernels, compiled when first asked for, and their launches."""

from __future__ import annotations

import ctypes
import os
from typing import Any

from . import _record, emulation
from ._arguments import pack
from ._build import How, Kernel, Library, library
from ._memory import check_guards
from .cuda import device
from .cuda.driver import CUDADriverError
from .cuda.stream import Stream, get_current_stream
from .emulation import EmulationError

MOST_BLOCKS = (2**31 - 1, 65535, 65535)
MOST_IN_BLOCK = (1024, 1024, 64)
MOST_THREADS = 1024


class RawModule:
    """The kernels of a text."""

    def __init__(
        self,
        *,
        code: str | None = None,
        path: str | None = None,
        options: tuple[str, ...] = (),
        backend: str = "nvrtc",
        translate_cucomplex: bool = False,
        enable_cooperative_groups: bool = False,
        name_expressions: Any = None,
        jitify: Any = None,
    ) -> None:
        if not isinstance(code, str) or path is not None:
            raise TypeError("Exactly one of `code` and `path` must be given; here it must be code")
        if not isinstance(options, tuple):
            raise TypeError(f"Argument 'options' has incorrect type (expected tuple): {options!r}")
        if backend != "nvrtc" or name_expressions or jitify or translate_cucomplex:
            raise NotImplementedError("the emulation knows nvrtc alone, without templates")
        if enable_cooperative_groups:
            raise NotImplementedError("the emulation has no cooperative groups")
        self.code = code
        self.options = options
        self.backend = backend

    def compile(self, log_stream: Any = None) -> None:
        """Compile now."""
        library(self.code, (*self.options, *emulation.defines))

    def get_function(self, name: str) -> RawKernel:
        """Compile, and find a kernel."""
        kernel = RawKernel(self.code, name, self.options)
        kernel._find()
        return kernel


class RawKernel:
    """A kernel of a text."""

    def __init__(
        self, code: str, name: str, options: tuple[str, ...] = (), backend: str = "nvrtc"
    ) -> None:
        self.code = code
        self.name = self.__name__ = name
        self.options = options
        self.backend = backend

    def _find(self) -> tuple[Library, Kernel]:
        built = library(self.code, (*self.options, *emulation.defines))
        kernel = built.kernel(self.name)
        if kernel is None:
            raise CUDADriverError("CUDA_ERROR_NOT_FOUND", "named symbol not found")
        return built, kernel

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: tuple[Any, ...],
        *,
        shared_mem: int = 0,
        stream: Stream | None = None,
    ) -> None:
        """Start it and wait until it has ended, which a launch on a GPU does not."""
        built, kernel = self._find()
        grid = _extents(f"{self.name}, grid", grid, MOST_BLOCKS)
        block = _extents(f"{self.name}, block", block, MOST_IN_BLOCK)
        threads = block[0] * block[1] * block[2]
        most = min(MOST_THREADS, kernel.bound or MOST_THREADS)
        if threads > most:
            raise EmulationError(
                f"{self.name} takes blocks of at most {most} threads, got {threads}"
            )
        if shared_mem:
            raise EmulationError(f"{self.name}: shared_mem must be 0, got {shared_mem}")
        _check_stream(self.name, stream)
        packed = pack(self.name, kernel, args)

        buffers = [ctypes.create_string_buffer(value, len(value)) for value in packed]
        addresses = (ctypes.c_void_p * max(len(buffers), 1))(*map(ctypes.addressof, buffers))
        order = emulation.this_order()
        how = How(
            order,
            emulation.seed + len(emulation.launches),
            emulation.flushes is True or emulation.flushes in self.options,
            ctypes.addressof(built.scratch),
        )
        options = (*self.options, *emulation.defines)
        emulation.launches.append(emulation.Launch(self.name, grid, block, self.options))
        with _record.launch(self.code, options, self.name, grid, block, args, packed):
            failure = built.handle.shim_launch(
                ctypes.byref(kernel),
                addresses,
                (ctypes.c_uint * 3)(*grid),
                (ctypes.c_uint * 3)(*block),
                ctypes.byref(how),
            )
        what = f"{self.name} (grid {grid}, block {block}, {emulation.ORDERS[order]} order)"
        if failure:
            raise EmulationError(f"{what}: {os.fsdecode(failure)}")
        check_guards(what)


def _extents(what: str, given: Any, most: tuple[int, int, int]) -> tuple[int, int, int]:
    if (
        not isinstance(given, tuple)
        or not 1 <= len(given) <= 3
        or not all(type(extent) is int for extent in given)
    ):
        raise EmulationError(f"{what} must be a tuple of one to three ints, got {given!r}")
    extents = (*given, 1, 1)[:3]
    # CuPy would silently turn anything less into 1.
    if min(extents) < 1:
        raise EmulationError(f"{what} must not be empty, got {given}; start no kernel at all")
    if any(extent > limit for extent, limit in zip(extents, most, strict=True)):
        raise EmulationError(f"{what} must be at most {most}, got {given}")
    return extents


def _check_stream(name: str, stream: Stream | None) -> None:
    stream = get_current_stream() if stream is None else stream
    if not isinstance(stream, Stream):
        raise EmulationError(f"{name}: stream must be a Stream, got {type(stream).__name__}")
    if stream.device_id not in (-1, device.get_device_id()):
        raise EmulationError(
            f"{name}: the stream is of device {stream.device_id}, but the current device is "
            f"{device.get_device_id()}; enter `with` that device"
        )
