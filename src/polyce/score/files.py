"""Arrays in files: .npy and .npz mapped into memory, .safetensors and zarr read box by box."""

from __future__ import annotations

import math
import mmap
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from polyce.arrays import find
from polyce.score.passes import Readable
from polyce.score.totals import Box

FORMATS = (".npy", ".npz", ".safetensors", ".zarr")


@dataclass(frozen=True)
class Mapped:
    """An array whose numbers lie in a file as they would in memory."""

    memory: mmap.mmap
    offset: int
    shape: tuple[int, ...]
    dtype: Any
    is_fortran: bool
    chunks: tuple[int, ...] | None = None

    def read(self, box: Box) -> Any:
        """Return a view of the file, and let go of what was read before."""
        if hasattr(mmap, "MADV_DONTNEED"):
            # Pages stay mapped, and count as this process's memory, until they are given back.
            self.memory.madvise(mmap.MADV_DONTNEED)
        return np.ndarray(
            self.shape,
            self.dtype,
            self.memory,
            self.offset,
            order="F" if self.is_fortran else "C",
        )[box]


@dataclass(frozen=True)
class Tensor:
    """A tensor in a .safetensors file."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: Any
    chunks: tuple[int, ...] | None = None

    def read(self, box: Box) -> Any:
        """Copy a box of the tensor, from a file that is opened for it.

        Open, it would keep all that was read mapped.
        """
        from safetensors import safe_open

        with safe_open(self.path, "numpy") as file:
            return file.get_slice(self.name)[box]


@dataclass(frozen=True)
class Stored:
    """A zarr array."""

    array: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the array's shape."""
        return tuple(self.array.shape)

    @property
    def dtype(self) -> Any:
        """Return the array's dtype."""
        return self.array.dtype

    @property
    def chunks(self) -> tuple[int, ...]:
        """Return the shape of what is read at once."""
        return tuple(self.array.chunks)

    def read(self, box: Box) -> Any:
        """Read a box of the array."""
        return np.asarray(self.array[box])


def open_array(given: str, usual: str) -> Readable:
    """Open an array in a file, ``FILE`` or ``FILE:NAME``.

    Without a name it is the only array in the file, or the one with the usual name.
    """
    path, name = _split(given)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    match path.suffix:
        case ".npy":
            with path.open("rb") as file:
                return _map(file, path, 0, path.stat().st_size)
        case ".npz":
            return _open_npz(path, name, usual)
        case ".safetensors":
            return _open_safetensors(path, name, usual)
        case ".zarr":
            return _open_zarr(path, name, usual)
    raise ValueError(
        f"{path} must be named as one of {', '.join(FORMATS)}, got the suffix {path.suffix!r}; "
        "save it with numpy.save"
    )


def need(module: str, what: str, package: str = "'polyce[score]'") -> None:
    """Raise ImportError with the command that installs a library, if it is not there."""
    if not find.installed(module):
        raise ImportError(f"{what} needs {module}, which is not installed: pip install {package}")


def path_of(given: str) -> Path:
    """Return the file of ``FILE`` or ``FILE:NAME``."""
    return _split(given)[0]


def _split(given: str) -> tuple[Path, str | None]:
    """Tell the name of an array from that of its file."""
    path, colon, name = given.rpartition(":")
    if colon and Path(path).suffix in FORMATS:
        return Path(path), name
    return Path(given), None


def _choose(path: Path, name: str | None, usual: str, names: list[str]) -> str:
    """Return the name of the array that is meant."""
    wanted = name or (names[0] if len(names) == 1 else usual)
    if wanted not in names:
        raise ValueError(
            f"{path} has no array {wanted!r}, got {', '.join(names) or 'none'}; "
            f"name one of them: {path}:NAME"
        )
    return wanted


def _map(file: IO[bytes], path: Path, start: int, size: int) -> Mapped:
    """Map the array of an .npy file, or of a part of a file that holds one."""
    file.seek(start)
    try:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, is_fortran, dtype = read(file)
    except (ValueError, KeyError) as problem:
        raise ValueError(
            f"{path} must hold an array as numpy.save writes it, got a header that does not: "
            f"{problem}; save it again"
        ) from None
    if dtype.hasobject:
        raise ValueError(f"{path} must hold numbers, got Python objects; save it with a dtype")
    offset = file.tell()
    wanted, there = math.prod(shape) * dtype.itemsize, size - (offset - start)
    if wanted > there:
        raise ValueError(
            f"{path} is cut short: {dtype} {shape} takes {wanted} bytes, got {max(there, 0)}; "
            "save it again"
        )
    memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return Mapped(memory, offset, shape, dtype, is_fortran)


def _open_npz(path: Path, name: str | None, usual: str) -> Mapped:
    try:
        with zipfile.ZipFile(path) as archive, tempfile.TemporaryFile() as whole:
            names = [entry.removesuffix(".npy") for entry in archive.namelist()]
            chosen = f"{_choose(path, name, usual, names)}.npy"
            # Compressed or not, it can be mapped only from a file of its own.
            with archive.open(chosen) as member:
                shutil.copyfileobj(member, whole, 1 << 20)
            return _map(whole, path, 0, whole.tell())
    except (zipfile.BadZipFile, EOFError) as problem:
        raise ValueError(
            f"{path} must be an archive of arrays, got one that cannot be read: {problem}; "
            "save it again"
        ) from None


def _open_safetensors(path: Path, name: str | None, usual: str) -> Tensor:
    need("safetensors", f"reading {path}")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            chosen = _choose(path, name, usual, list(file.keys()))
            part = file.get_slice(chosen)
            shape, kind = tuple(part.get_shape()), part.get_dtype()
            if kind == "BF16":
                need("ml_dtypes", f"bfloat16 in {path}")
            empty = part[(slice(0, 0),) * len(shape)]
    except SafetensorError as problem:
        raise ValueError(
            f"{path} must be a .safetensors file, got one that cannot be read: {problem}; "
            "save it again"
        ) from None
    return Tensor(path, chosen, shape, empty.dtype)


def _open_zarr(path: Path, name: str | None, usual: str) -> Stored:
    need("zarr", f"reading {path}")
    import zarr

    try:
        found = zarr.open(path, mode="r")
    except (FileNotFoundError, ValueError) as problem:
        raise ValueError(
            f"{path} must be a zarr array or group, got none that can be read: {problem}; "
            "save it again"
        ) from None
    if isinstance(found, zarr.Group):
        found = found[_choose(path, name, usual, sorted(found.array_keys()))]
    return Stored(found)
