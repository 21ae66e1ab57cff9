"""Compile the kernels' text into a library for the emulation, once for each set of options."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from .cuda.compiler import CompileException

SHIM = Path(__file__).parent.parent
# -O1, since most of the time goes into compiling. Products are rounded before they are added,
# though a GPU's compiler may fuse the two.
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-w", "-fno-gnu-unique", f"-I{SHIM}")
LIBRARY_FLAGS = ("-fPIC", "-fvisibility=hidden", "-fsanitize=alignment", "-DSHIM_ALIGNMENT")
# Options of CuPy's compiler that are not passed on: the flags above mean the same.
KNOWN_OPTIONS = ("--std=c++17", "-std=c++17", "--fmad=false", "-fmad=false")

# In parentheses, and once again within.
BOUNDS = r"__launch_bounds__\s*(?P<{}>\((?:[^()]|\([^()]*\))*\))\s*"
KERNEL = re.compile(
    rf'\bextern\s*"C"\s*__global__\s*(?:{BOUNDS.format("before")})?void\s+'
    rf"(?:{BOUNDS.format('behind')})?(?P<name>[A-Za-z_]\w*)\s*\("
)


class Parameter(ctypes.Structure):
    """The struct of this name in shim_launch.hpp."""

    _fields_ = (
        ("kind", ctypes.c_char),
        ("pointee", ctypes.c_char),
        ("size", ctypes.c_uint),
        ("pointee_size", ctypes.c_uint),
        ("pointee_alignment", ctypes.c_uint),
    )


class Kernel(ctypes.Structure):
    """The struct of this name in shim_launch.hpp."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("bound", ctypes.c_int),
        ("count", ctypes.c_int),
        ("parameters", ctypes.POINTER(Parameter)),
        ("launch", ctypes.c_void_p),
    )


class How(ctypes.Structure):
    """The struct of this name in shim.hpp."""

    _fields_ = (
        ("order", ctypes.c_int),
        ("seed", ctypes.c_uint),
        ("flushes", ctypes.c_bool),
        ("scratch", ctypes.c_void_p),
    )


class Library(NamedTuple):
    """A compiled text, ready to be called."""

    handle: ctypes.PyDLL
    scratch: ctypes.Array[ctypes.c_char]
    """Working memory of a launch: its threads' stacks and the shared memory."""

    def kernel(self, name: str) -> Kernel | None:
        """Find a kernel."""
        found = self.handle.shim_kernel(name.encode())
        return found.contents if found else None


def defines(options: tuple[str, ...]) -> tuple[str, ...]:
    """Return the options to pass to a compiler for CPUs; refuse unknown ones."""
    unknown = [one for one in options if one not in KNOWN_OPTIONS and not re.match(r"-D\w", one)]
    if unknown:
        raise CompileException(f"nvrtc: error: unrecognized options {unknown}", "", "", options)
    return tuple(option for option in options if option.startswith("-D"))


def run(command: list[str], source: str, options: tuple[str, ...], text: str | None = None) -> str:
    """Run a compiler; if it rejects the text, its message is the error."""
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode:
        raise CompileException(done.stderr, source, "kernel.cu", options)
    return done.stdout


def cache() -> Path:
    """Return the folder that keeps what has been compiled."""
    named = os.environ.get("POLYCE_EMULATION_CACHE")
    folder = Path(named or Path(tempfile.gettempdir()) / f"polyce-emulation-{os.getuid()}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def _shim_hash() -> str:
    files = [*sorted(SHIM.glob("*.hpp")), Path(__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def generate(code: str, options: tuple[str, ...]) -> str:
    """Put the shim around the text, with a table of the kernels that these options leave in it."""
    command = ["g++", "-E", "-P", "-x", "c++", *FLAGS, *options, "-"]
    seen = run(command, code, options, code)
    table = [
        f"SHIM_KERNEL({found['name']}, shim::first{found['before'] or found['behind'] or '(0)'}),"
        for found in KERNEL.finditer(seen)
    ]
    if not table:
        message = 'the text has no kernel: extern "C" __global__ void NAME(...)'
        raise CompileException(message, code, "kernel.cu", options)
    return "\n".join(
        [
            '#include "shim.hpp"',
            '#line 1 "kernel.cu"',
            code,
            '#line 1 "the table of kernels"',
            '#include "shim_launch.hpp"',
            "static const shim::Kernel shim_kernels[] = {",
            *table,
            "};",
            "",
        ]
    )


@functools.cache
def library(code: str, options: tuple[str, ...]) -> Library:
    """Load a compiled text; compile it first if that has not been done."""
    options = defines(options)
    key = "\0".join([code, *options, *FLAGS, *LIBRARY_FLAGS, _shim_hash()])
    built = cache() / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=cache()) as folder:
            source, unit, made = (Path(folder) / f"kernel.{end}" for end in ("cpp", "o", "so"))
            source.write_text(generate(code, options) + '#include "shim_library.hpp"\n')
            flags = [*FLAGS, *LIBRARY_FLAGS, *options]
            run(["g++", *flags, "-c", "-o", str(unit), str(source)], code, options)
            # Linked in a separate step, or the sanitizer's library would be linked too.
            run(["g++", "-shared", "-Wl,-Bsymbolic", "-o", str(made), str(unit)], code, options)
            # Another process may have made the same file; either will do, and the rename is atomic.
            made.replace(built)
    # Holds the GIL during calls: the library has one state for all fibers.
    handle = ctypes.PyDLL(str(built))
    handle.shim_scratch.restype = ctypes.c_ulonglong
    handle.shim_kernel.argtypes = [ctypes.c_char_p]
    handle.shim_kernel.restype = ctypes.POINTER(Kernel)
    handle.shim_launch.restype = ctypes.c_char_p
    return Library(handle, _scratch(handle.shim_scratch()))


@functools.cache
def _scratch(size: int) -> ctypes.Array[ctypes.c_char]:
    # Only the pages that are used take memory.
    return (ctypes.c_char * size).from_buffer(mmap.mmap(-1, size))
