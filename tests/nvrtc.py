"""CUDA's run-time compiler, called directly: what a text becomes on each kind of GPU.

This needs no GPU and no CuPy, but adds the options that CuPy adds to every text.
"""

from __future__ import annotations

import ctypes
import functools
import re
from dataclasses import dataclass
from importlib.metadata import files

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
# CuPy adds these after the caller's options, so that they win: float32 arithmetic, and conversion
# from float64, treat subnormal numbers as 0.
CUPY = ("-ftz=true", "--device-as-default-execution-space")


@dataclass(frozen=True)
class Kernel:
    """What the assembler reports of a kernel: a thread's registers, and sizes in bytes."""

    registers: int
    stack: int
    spilled: int
    """Bytes stored and loaded again because registers run out."""
    shared: int


@dataclass(frozen=True)
class Compiled:
    """A text as compiled for one architecture."""

    kernels: dict[str, Kernel]
    cubin: bytes
    ptx: str
    warnings: tuple[str, ...]


class CompileError(Exception):
    """The compiler refused a text; its log is the message."""


@functools.cache
def _library() -> ctypes.CDLL:
    paths = [str(path.locate()) for path in files("nvidia-cuda-nvrtc") or ()]

    def load(name: str) -> ctypes.CDLL:
        (path,) = (path for path in paths if re.search(rf"/{name}\.so[.\d]*$", path))
        return ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)

    # The compiler looks for it only in the system's folders, unless it is loaded already.
    load("libnvrtc-builtins")
    return load("libnvrtc")


def _fetch(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(_library(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(getattr(_library(), f"nvrtcGet{what}")(program, text))
    return text.raw


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"NVRTC's status is {status}")


def _kernels(log: str) -> dict[str, Kernel]:
    """Read the assembler's report on each kernel, including functions that are not inlined."""
    told = re.compile(
        r"Function properties for (\w+)\nptxas *[.:]? *(\d+) bytes stack frame, (\d+) bytes spill "
        r"stores, (\d+) bytes spill loads(?:\nptxas info +: Used (\d+) registers(.*))?"
    )
    every = told.findall(log)
    stack, spilled = 0, 0
    for _, bytes_, stores, loads, registers, _ in every:
        if not registers:
            stack += int(bytes_)
            spilled += int(stores) + int(loads)
    found = {}
    for name, bytes_, stores, loads, registers, rest in every:
        if registers:
            shared = re.search(r"(\d+) bytes smem", rest)
            found[name] = Kernel(
                registers=int(registers),
                stack=int(bytes_) + stack,
                spilled=int(stores) + int(loads) + spilled,
                shared=int(shared[1]) if shared else 0,
            )
    return found


@functools.cache
def compiled(text: str, architecture: int, options: tuple[str, ...] = ()) -> Compiled:
    """Compile a text as CuPy would on a device of this architecture."""
    program = ctypes.c_void_p()
    lists = (0, None, None)
    _check(
        _library().nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"polyce.cu", *lists)
    )
    try:
        every = [*options, *CUPY, f"-arch=sm_{architecture}", "--ptxas-options=-v"]
        array = (ctypes.c_char_p * len(every))(*(option.encode() for option in every))
        status = _library().nvrtcCompileProgram(program, len(every), array)
        log = _fetch(program, "ProgramLog").decode().rstrip("\0")
        if status:
            raise CompileError(log)
        kernels = _kernels(log)
        ptx = _fetch(program, "PTX").decode().rstrip("\0")
        # A kernel that is missing from the report would pass every check.
        assert kernels.keys() == set(re.findall(r"\.entry (\w+)\(", ptx)), log
        warnings = tuple(line for line in log.splitlines() if "warning" in line.lower())
        return Compiled(kernels, _fetch(program, "CUBIN"), ptx, warnings)
    finally:
        _library().nvrtcDestroyProgram(ctypes.byref(program))


def widths(ptx: str) -> tuple[set[int], set[int]]:
    """Return how many bytes at once device memory is loaded in, and stored in."""
    modifiers = r"(?:\.(?!v\d)[A-Za-z][\w:]*)*?"
    found = re.findall(rf"\b(ld|st)\.global{modifiers}(?:\.v(\d))?\.[bfsu](\d+)\s", ptx)
    pairs = [(kind, int(count or 1) * int(bits) // 8) for kind, count, bits in found]
    loads, stores = ({size for kind, size in pairs if kind == what} for what in ("ld", "st"))
    return loads, stores


def generic(ptx: str) -> list[str]:
    """Return the accesses that the compiler does not know to be to device memory."""
    return re.findall(
        r"^\s*(?:@\S+ )?((?:ld|st)(?:\.volatile)?(?:\.v\d)?\.[bfsu]\d+\s.*)$", ptx, re.M
    )


def narrow_products(ptx: str) -> list[str]:
    """Return the 32-bit products in which a block's number along x is a factor.

    A row's offset grows with that number and may exceed 2³¹ elements.
    """
    # Each function has registers of its own.
    bodies = re.findall(r"^\{(.*?)^\}", ptx, re.DOTALL | re.MULTILINE)
    return [product for body in bodies for product in _narrow_products(body)]


def _narrow_products(body: str) -> dict[str, None]:
    lines = [re.sub(r"^\s*(@!?%\w+\s+)?", "", line) for line in body.splitlines()]
    operation = re.compile(r"(?!ld|atom|shfl|setp)([a-z]\w*)\S*\s+(%\w+),\s*(.*);")
    made = [operation.match(line) for line in lines]
    # A remainder is a number minus a product that cannot exceed it.
    quotients = {each[2] for each in made if each and each[1] == "div"}
    grown, found = {"%ctaid.x"}, dict[str, None]()
    before = 0
    while len(grown) > before:
        before = len(grown)
        for each in made:
            sources = set(re.findall(r"%\w+(?:\.[xyz])?", each[3])) if each else set()
            if not each or grown.isdisjoint(sources):
                continue
            grown.add(each[2])
            product = re.match(r"m(?:ul|ad)\.lo\.[su]32 \s*%\w+, (%[\w.]+), (%[\w.]+)", each[0])
            if product and grown & {*product.groups()} and not quotients & {*product.groups()}:
                found[each[0]] = None
    return found
