"""How kernels go over an array of logits: its rows by two indices, in parts where they are long.

Facts of shapes and strides alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Rows(NamedTuple):
    """The rows of an array of logits: outer index, lane and class, and the strides of these."""

    outer: int
    inner: int
    strides: tuple[int, int, int]


def rows_of(shape: Sequence[int], axis: int, *strides: Sequence[int]) -> tuple[Rows | None, ...]:
    """Give the rows of arrays of one shape that lie as `strides` say, in common indices.

    None stands for an array whose rows no two indices reach, which must be copied first.
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
    """Give the one stride that several axes have together; None if there is none."""
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
    """Cut a row into about so many parts, each a whole number of tiles: how many, how long."""
    tiles = cdiv(classes, size)
    chunk = size * cdiv(tiles, min(tiles, wanted))
    return cdiv(classes, chunk), chunk


def cdiv(size: int, step: int) -> int:
    """Divide and round up."""
    return -(-size // step)


def power_of_two(size: int) -> int:
    """Give the next power of two, from a number from 1 on up."""
    return 1 << max(size - 1, 0).bit_length()
