"""What tests of the cupy path share: arrays anywhere in memory, and settings for small ones."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

import polyce
from polyce import SparseTarget, TeacherLogits
from polyce.testing import Case, cases
from polyce.testing.dtypes import dtype
from polyce.testing.selection import representative

DTYPES = ("float16", "bfloat16", "float32", "float64")
# These make a small call take the ways of a large one: rows of a few classes are split over blocks,
SPLIT = {"BLOCK": 4, "LONG": 4, "FEW_ROWS": 64, "PART": 2, "MOST_PARTS": 3, "VECTORS": 8}
# and blocks take several groups of rows, each row's classes shared by threads.
SHARED = {
    "BLOCK": 16,
    "MOST_BLOCKS": 2,
    "PER_THREAD": 1,
    "NEIGHBOURS": 4,
    "VECTORS": 8,
    "FILLING": 2,
}
EVERYTHING: dict[str, Any] = {
    "label_smoothing": 0.1,
    "z_loss": 0.01,
    "logit_softcap": 20.0,
    "return_stats": True,
}
# Both sides round once, and neither is exact.
CLOSE = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 4e-6, "float64": 1e-14}


@contextlib.contextmanager
def settings(**values: int) -> Iterator[None]:
    """Plan launches by other numbers within the block."""
    from polyce.implementations.cupy import launch as cupy_launch

    # The plan that is in use: tests replace it by faulty ones.
    plan = cupy_launch.cupy_plan
    before = {name: getattr(plan, name) for name in values}
    cupy_launch._plans.clear()
    for name, value in values.items():
        setattr(plan, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(plan, name, value)
        cupy_launch._plans.clear()


def chosen(
    groups: Sequence[str], count: int, floats: Sequence[str] = DTYPES, largest: int = 400
) -> Callable[[Case], str]:
    """Leave out all but so many cases of each group, and cases with too many logits."""
    names = set()
    for group in groups:
        short = [case for case in cases([group], floats) if case.logits.size < largest]
        names |= {case.name for case in representative(short, count)}
    return lambda case: "" if case.name in names else "left out here"


class Given(NamedTuple):
    """The arrays of a call, in NumPy."""

    logits: Any
    target: Any
    weight: Any
    sample_weight: Any


def draw(shape: tuple[int, ...], name: str, kind: str, ignored: bool = True) -> Given:
    """Draw the arrays of a call; if there are three labels or more, the first is ignored."""
    rng = np.random.default_rng(math.prod(shape))
    axis = min(1, len(shape) - 1)
    rows = shape[:axis] + shape[axis + 1 :]
    logits = rng.normal(0.0, 2.0, shape).astype(dtype(name))
    target = np.asarray(rng.integers(0, shape[axis], rows))
    if ignored and target.size > 2:
        target.flat[0] = -100
    if kind == "probability":
        target = rng.random(shape).astype(dtype(name))
    if kind == "teacher":
        target = TeacherLogits(rng.normal(0.0, 3.0, shape).astype(dtype(name)), 0.5)
    if kind == "sparse":
        index = rng.integers(0, shape[axis], (*rows, 4))
        # The likeliest class, and another one twice; one entry is ignored.
        index[..., 0], index[..., 1] = np.argmax(logits, axis), index[..., 2]
        index[0, ..., 3] = -100
        chance = rng.random(index.shape).astype(dtype(name))
        target = SparseTarget(*(np.moveaxis(array, -1, axis) for array in (index, chance)))
    weight = rng.uniform(0.5, 1.5, shape[axis]).astype(np.float32)
    return Given(logits, target, weight, np.asarray(rng.uniform(0.5, 1.5, rows)))


class Inside(NamedTuple):
    """An array that lies among other numbers, and the memory that holds both."""

    array: Any
    memory: Any
    outside: Any
    """A mask of the memory's entries that do not belong to the array."""

    def untouched(self, filler: float) -> bool:
        """Tell whether all the other numbers are what they were."""
        rest = self.memory.get()[self.outside]
        return bool(np.array_equal(rest, np.full_like(rest, filler), equal_nan=rest.dtype != int))


def inside(
    values: Any, filler: float, offset: int = 0, strides: tuple[int, ...] | None = None
) -> Inside:
    """Put an array's values among other numbers, at an offset and strides counted in elements."""
    import cupy

    if strides is None:
        strides = tuple(math.prod(values.shape[i + 1 :]) for i in range(values.ndim))
    reach = sum((n - 1) * step for n, step in zip(values.shape, strides, strict=True))
    memory = np.full(offset + reach + 9, filler, values.dtype)
    outside = np.ones(memory.shape, bool)
    for whole, part in ((memory, values), (outside, False)):
        steps = tuple(step * whole.itemsize for step in strides)
        np.lib.stride_tricks.as_strided(whole[offset:], values.shape, steps)[...] = part
    moved = cupy.asarray(memory)
    size = values.itemsize
    place = moved.data + offset * size
    array = cupy.ndarray(values.shape, values.dtype, place, tuple(s * size for s in strides))
    return Inside(array, moved, outside)


def far_away(values: Any, strides: tuple[int, ...]) -> Any:
    """Put values at any strides, in elements, in memory whose pages exist only once written."""
    import cupy

    size = values.itemsize
    steps = tuple(step * size for step in strides)
    reach = sum((n - 1) * step for n, step in zip(values.shape, steps, strict=True)) + size
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, reach, flags=flags)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    there = cupy.cuda.UnownedMemory(address, reach, memory)
    array = cupy.ndarray(values.shape, values.dtype, cupy.cuda.MemoryPointer(there, 0), steps)
    array[...] = cupy.asarray(values)
    return array


def on_device(*values: Any) -> list[Any]:
    """Copy arrays to the current device, whatever their strides."""
    import cupy

    def moved(value: Any) -> Any:
        if isinstance(value, (SparseTarget, TeacherLogits)):
            return type(value)(*map(moved, value))
        return cupy.asarray(value) if isinstance(value, np.ndarray) else value

    return [moved(value) for value in values]


def expected(given: Given, **options: Any) -> tuple[Any, ...]:
    """Return loss, gradient and stats as the reference computes them in NumPy."""
    logits, target, weight, sample = given
    return polyce.cross_entropy_with_grad(
        logits, target, weight, sample_weight=sample, implementation="reference", **options
    )


def close(found: Any, wanted: Any, share: float, floor: float = 0.0) -> None:
    """Compare numbers of any dtype, and nans."""
    got, want = (np.asarray(each, np.float64) for each in (found.get(), wanted))
    assert found.dtype == np.asarray(wanted).dtype
    np.testing.assert_allclose(got, want, rtol=share, atol=floor, equal_nan=True)


def agree(found: Sequence[Any], wanted: Sequence[Any]) -> None:
    """Compare loss, gradient and, where there are any, stats."""
    name = str(wanted[1].dtype)
    # The coefficient and the softmax of a class may cancel.
    largest = np.abs(np.nan_to_num(wanted[1].astype(np.float64))).max(initial=0.0)
    close(found[0], wanted[0], CLOSE[str(wanted[0].dtype)])
    close(
        found[1],
        wanted[1],
        CLOSE[name],
        CLOSE["float64" if name == "float64" else "float32"] * largest,
    )
    if len(wanted) < 3:
        return
    for what, got, want in zip(wanted[2]._fields, found[2], wanted[2], strict=True):
        if got is None or want is None:
            assert got is want, what
        elif want.dtype.kind == "f":
            close(got, want, CLOSE[str(want.dtype)], CLOSE[str(want.dtype)])
        else:
            assert got.tolist() == want.tolist(), what
