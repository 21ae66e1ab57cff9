"""The CuPy arrays that the GPU script runs on: drawn on the device, in many layouts.

Numbers are made of their places by integers alone, so that every device, and the emulated one,
draws the same.
"""

from __future__ import annotations

import math
from typing import Any

import cupy
import numpy as np
from gpu_cases import IGNORED, REACH, Case
from gpu_checks import NotHereError
from gpu_cupy_machine import Machine

from polyce.testing.dtypes import dtype

# The steps of splitmix64.
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
# So many numbers are drawn at once.
_TOGETHER = 2**24


def uniform(start: int, count: int, seed: int) -> Any:
    """Draw float64 numbers, above 0 and up to 1."""
    bits = cupy.arange(start, start + count, dtype=np.uint64) + np.uint64(seed << 44)
    bits *= np.uint64(_STEP)
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        bits ^= bits >> np.uint64(shift)
        bits *= np.uint64(factor)
    bits ^= bits >> np.uint64(31)
    return ((bits >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53


def normal(start: int, count: int, seed: int) -> Any:
    """Draw float64 numbers around 0."""
    angle = uniform(start, count, seed + 1) * (2.0 * math.pi)
    return cupy.sqrt(-2.0 * cupy.log(uniform(start, count, seed))) * cupy.cos(angle)


def fill(array: Any, scale: float, seed: int = 0) -> Any:
    """Draw an array's numbers, a few rows at a time, and give it."""
    inner = math.prod(array.shape[1:])
    step = max(1, _TOGETHER // max(1, inner))
    for start in range(0, array.shape[0], step):
        part = array[start : start + step]
        drawn = normal(start * inner, part.size, seed) * scale
        part[...] = drawn.reshape(part.shape).astype(np.float32).astype(array.dtype)
    return array


def labels(shape: tuple[int, ...], classes: int, kind: str = "int64", seed: int = 2) -> Any:
    """Draw labels."""
    drawn = uniform(0, math.prod(shape), seed) * classes
    return cupy.minimum(drawn, classes - 1).reshape(shape).astype(kind)


def half_to_three_halves(shape: tuple[int, ...], name: str, seed: int) -> Any:
    """Draw numbers around 1, in the logits' dtype, which is the losses' then."""
    drawn = uniform(0, math.prod(shape), seed).reshape(shape) + 0.5
    return drawn.astype(np.float32).astype(dtype(name))


def softmax(x: Any) -> Any:
    """Make probabilities of numbers along axis 1, in their dtype."""
    parts = cupy.exp(x.astype(np.float32))
    return (parts / parts.sum(axis=1, keepdims=True)).astype(x.dtype)


def problem(dims: tuple[int, ...], name: str = "float32", scale: float = 3.0) -> tuple[Any, Any]:
    """Draw plain logits and labels."""
    logits = fill(cupy.empty(dims, dtype(name)), scale)
    return logits, labels((dims[0], *dims[2:]), dims[1])


def arranged(dims: tuple[int, ...], case: Case) -> Any:
    """Make room for logits in a layout; what lies between them is nan."""

    def room(*shape: int) -> Any:
        return cupy.full(shape, float("nan"), dtype=dtype(case.dtype))

    first, classes = dims[:2]
    if case.layout == "channels last":
        return cupy.moveaxis(room(first, *dims[2:], classes), -1, 1)
    if case.layout == "misaligned":
        return room(math.prod(dims) + 1)[1:].reshape(dims)
    if case.layout == "row-strided":
        return room(first, classes + 3)[:, :classes]
    if case.layout == "column-major":
        return room(classes, first).T
    if case.layout == "every second":
        return room(first, 2 * classes)[:, ::2]
    if case.layout == "rows far apart":
        return room(first, REACH + 64)[:, :classes]
    return room(*dims)


def fitting(machine: Machine, case: Case) -> tuple[int, ...]:
    """Give the dims, with fewer rows where memory is short and the case allows that."""
    item = dtype(case.dtype).itemsize
    # Logits and gradient, what isfinite makes of them, probabilities and what they are made of.
    copies = 9 if "probabilities" in case.options else 4
    one = math.prod(case.dims[1:]) * item * copies
    if case.layout == "rows far apart":
        one = (REACH + 64) * item
    room = int(0.8 * machine.free_bytes()) - 2**18
    if one * case.dims[0] <= room:
        return case.dims
    if case.scales and room >= one:
        return (room // one, *case.dims[1:])
    raise NotHereError(f"needs {one * case.dims[0] / 1e9:.1f} GB, there are {room / 1e9:.1f}")


def some_rows(count: int, most: int) -> np.ndarray:
    """Choose the rows to check: all, or the first, the last and some between."""
    if count <= most:
        return np.arange(count)
    return np.linspace(0, count - 1, most).astype(np.int64)


def make_confident(rows: Any, places: tuple[Any, ...], chosen: Any) -> None:
    """Put the label of every fourth row ahead of all other classes together, by about 8."""
    for_label = cupy.where(chosen[::4] == IGNORED, 0, chosen[::4]).astype(np.int64)
    # The largest of C normal numbers is about sqrt(2 log C).
    ahead = 3.0 * math.sqrt(2.0 * math.log(rows.shape[-1] + 1)) + 8.0
    rows[(*(index[::4] for index in places), for_label)] = ahead


def bits(array: Any) -> Any:
    """Give an array's bits as integers, on the host."""
    return cupy.asnumpy(cupy.ascontiguousarray(array)).view(f"i{array.itemsize}")


def same(got: tuple[Any, ...], want: tuple[Any, ...], what: str) -> None:
    """Require the same bits, nans among them."""
    for name, here, there in zip(("loss", "gradient"), got, want, strict=False):
        equal = here.shape == there.shape and here.dtype == there.dtype
        if not (equal and np.array_equal(bits(here), bits(there))):
            wide = (cupy.asnumpy(each).astype(np.float64) for each in (here, there))
            off = np.abs(np.subtract(*wide)).max()
            raise AssertionError(f"{what}: the {name} differs, by up to {float(off):.3g}")
