"""Logits and targets on a device, in many layouts, and comparisons of the results."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from polyce.testing.dtypes import dtype

from .cases import IGNORED, REACH, Case
from .device import Device, NotHereError

NAN = math.nan


def problem(
    device: Device, dims: tuple[int, ...], name: str = "float32", scale: float = 3.0
) -> tuple[Any, Any]:
    """Draw plain logits and labels."""
    logits = device.normal(device.full(dims, NAN, name), scale, 0)
    return logits, device.labels((dims[0], *dims[2:]), dims[1], "int64", 1)


def softmax(device: Device, array: Any) -> Any:
    """Turn numbers into probabilities along axis 1, in their dtype."""
    xp = device.xp
    parts = xp.exp(xp.astype(array, xp.float32))
    return xp.astype(parts / xp.sum(parts, axis=1, keepdims=True), array.dtype)


def arranged(device: Device, dims: tuple[int, ...], case: Case) -> Any:
    """Make memory for logits in a layout, with nans between them."""
    first, classes = dims[:2]
    shape: tuple[int, ...] = dims
    if case.layout == "channels last":
        shape = (first, *dims[2:], classes)
    elif case.layout == "misaligned":
        shape = (math.prod(dims) + 1,)
    elif case.layout == "row-strided":
        shape = (first, classes + 3)
    elif case.layout == "column-major":
        shape = (classes, first)
    elif case.layout == "every second":
        shape = (first, 2 * classes)
    elif case.layout == "rows far apart":
        shape = (first, REACH + 64)
    room = device.full(shape, NAN, case.dtype)
    if case.layout == "channels last":
        return device.xp.moveaxis(room, -1, 1)
    if case.layout == "misaligned":
        return room[1:].reshape(dims)
    if case.layout == "column-major":
        return room.T
    return room[:, ::2] if case.layout == "every second" else room[:, :classes]


def fitting(device: Device, case: Case, copies: int = 4) -> tuple[int, ...]:
    """Return the dims, with fewer rows where memory is short and the case allows that.

    `copies` of the logits are to fit, by default those of logits and gradient and of what isfinite
    makes of them.
    """
    item = dtype(case.dtype).itemsize
    if "probabilities" in case.options:
        copies += 5  # the logits and the numbers they are made from
    one = math.prod(case.dims[1:]) * item * copies
    if case.layout == "rows far apart":
        one = (REACH + 64) * item
    room = int(0.8 * device.free_bytes()) - 2**18
    if one * case.dims[0] <= room:
        return case.dims
    if case.scales and room >= one:
        return (room // one, *case.dims[1:])
    raise NotHereError(f"needs {one * case.dims[0] / 1e9:.1f} GB, there are {room / 1e9:.1f}")


def case_problem(device: Device, case: Case) -> tuple[Any, Any]:
    """Draw logits of a case and labels, fewer rows where there is no memory for as many."""
    # As many copies as chains of a library's own functions make, and contenders keep.
    dims = fitting(device, case, copies=10)
    logits = device.normal(arranged(device, dims, case), 1.0, 0)
    return logits, device.labels((dims[0], *dims[2:]), dims[1], "int64", 1)


def exact_mean(device: Device, logits: Any, labels: Any) -> float:
    """Compute the mean loss in float64 on the device, a few rows at a time."""
    step = max(1, 2**24 // math.prod(logits.shape[1:]))
    parts = (slice(start, start + step) for start in range(0, logits.shape[0], step))
    sums = (device.xp.sum(wide_rows(device, logits[part], labels[part])[0]) for part in parts)
    return sum(map(float, sums)) / math.prod(labels.shape)


def wide_rows(device: Device, logits: Any, labels: Any) -> tuple[Any, Any]:
    """Compute losses in float64 on the device, and their gradient, if none of them is small."""
    xp = device.xp
    wide = xp.astype(logits, xp.float64)
    shifted = wide - xp.max(wide, axis=1, keepdims=True)
    parts = xp.exp(shifted)
    total = xp.sum(parts, axis=1, keepdims=True)
    classes = device.backend.asarray(np.arange(logits.shape[1]))
    at = classes.reshape((1, -1, *(1,) * (logits.ndim - 2))) == xp.expand_dims(labels, axis=1)
    ahead = xp.sum(xp.where(at, shifted, 0.0), axis=1)
    losses = xp.log(total[:, 0, ...]) - ahead
    return losses, parts / total - xp.astype(at, xp.float64)


def some_rows(count: int, most: int) -> np.ndarray:
    """Choose the rows to check: all, or the first, the last and some in between."""
    if count <= most:
        return np.arange(count)
    return np.linspace(0, count - 1, most).astype(np.int64)


def make_confident(device: Device, rows: Any, places: tuple[Any, ...], chosen: Any) -> None:
    """Put the label of every fourth row about 8 ahead of all other classes together."""
    xp = device.xp
    for_label = xp.astype(xp.where(chosen[::4] == IGNORED, 0, chosen[::4]), xp.int64)
    # The largest of C normal numbers is about sqrt(2 log C).
    ahead = 3.0 * math.sqrt(2.0 * math.log(rows.shape[-1] + 1)) + 8.0
    rows[(*(index[::4] for index in places), for_label)] = ahead


def bits(device: Device, array: Any) -> np.ndarray:
    """Return an array's bits as integers, on the host."""
    host = np.ascontiguousarray(device.backend.to_numpy(array))
    return host.view(f"i{host.itemsize}")


def same(device: Device, got: tuple[Any, ...], want: tuple[Any, ...], what: str = "") -> None:
    """Check that loss and gradient, if there is one, have the same bits, nans included."""
    for name, here, there in zip(("loss", "gradient"), got, want, strict=False):
        alike = here.shape == there.shape and here.dtype == there.dtype
        if not (alike and np.array_equal(bits(device, here), bits(device, there))):
            wide = (device.backend.to_numpy(each).astype(np.float64) for each in (here, there))
            off = np.abs(np.subtract(*wide)).max()
            raise AssertionError(f"{what}: the {name} differs, by up to {float(off):.3g}")


def without_rows() -> list[tuple[tuple[int, ...], bool, str]]:
    """Return dims that have no row, or none that counts, and reductions."""
    shapes = (((0, 10), False), ((0, 3, 2, 2), False), ((3, 10), True))
    reductions = ("none", "sum", "mean")
    return [(*shape, reduction) for shape, reduction in itertools.product(shapes, reductions)]
