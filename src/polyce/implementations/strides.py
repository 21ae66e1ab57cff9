"""How kernels go over an array of logits: rows by two indices, in parts where they are long.

Everything here follows from shapes and strides alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Rows(NamedTuple):
    """The rows of an array of logits: sizes of outer index and lane; strides of these and class."""

    outer: int
    inner: int
    strides: tuple[int, int, int]


def rows_of(shape: Sequence[int], axis: int, *strides: Sequence[int]) -> tuple[Rows | None, ...]:
    """Return the rows of arrays of one shape with these strides, in the same indices for all.

    None stands for an array whose rows no two indices reach; it must be copied first.
    """
    before, behind = slice(0, axis), slice(axis + 1, None)
    outer, inner = math.prod(shape[before]), math.prod(shape[behind])
    together = [*shape[before], *shape[behind]]
    lanes = [_stride(together, [*own[before], *own[behind]]) for own in strides]
    places: list[tuple[int | None, int | None]] = [(0, lane) for lane in lanes]
    if None not in lanes:
        outer, inner = 1, outer * inner
    else:
        places = [
            (_stride(shape[before], own[before]), _stride(shape[behind], own[behind]))
            for own in strides
        ]
    return tuple(
        None if a is None or b is None else Rows(outer, inner, (a, b, own[axis]))
        for (a, b), own in zip(places, strides, strict=True)
    )


def _stride(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """Return the one stride that walks over several axes in order; None if there is none."""
    step, reach = 0, None
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size == 1:
            continue
        if reach is None:
            step, reach = stride, stride * size
        elif stride == reach:
            reach = stride * size
        else:
            return None
    return step


def cut(classes: int, size: int, wanted: int) -> tuple[int, int]:
    """Cut a row into about `wanted` parts of whole tiles; return their number and length."""
    tiles = cdiv(classes, size)
    chunk = size * cdiv(tiles, min(tiles, wanted))
    return cdiv(classes, chunk), chunk


def cdiv(size: int, step: int) -> int:
    """Divide and round up."""
    return -(-size // step)


def power_of_two(size: int) -> int:
    """Return the smallest power of two that is at least `size`."""
    return 1 << max(size - 1, 0).bit_length()
