"""How the triton kernels go over an array: rows by two indices, and the table of what they take.

Facts of shapes and strides alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

# The launch parameters. None has met a GPU yet: they keep 4 to 16 numbers of a thread in flight and
# the registers low enough for two programs or more to share a multiprocessor.
#
# A row of contiguous classes is one program's, which goes along it in tiles of up to so many
# classes: with 16 numbers a thread that is 8 warps, as many as wait for one another without harm.
_TILE = 4096
_TILE_BY_THREAD = 16
# Rows of up to so many contiguous classes share a program, which else would have little to do. What
# is kept for each row, several float64 in each thread, then limits the tile.
SHORT = 64
_SHORT_TILE = 1024
_SHORT_BY_THREAD = 4
# Where not the classes but neighbouring rows are contiguous: 64 of them, a whole line of memory in
# 16 bits, and 16 classes at once.
_NEIGHBOURS = 64
_NEIGHBOURS_TILE = 1024
_NEIGHBOURS_BY_THREAD = 8
_MOST_WARPS = 8
# What is read at once of the above, by the size of a logit: one part in so many, without a softcap
# and with one, which takes registers. Still 16 bytes or more for each thread.
SHARES = {2: (1, 2), 4: (1, 4), 8: (2, 4)}
# Rows of more classes are split over programs where there are fewer rows than would fill a large
# device twice over; a part is long enough to be worth a second launch that joins them.
LONG, FEW_PROGRAMS, PART = 65536, 256, 16384
# Programs to write a gradient with, where there are fewer rows.
WRITERS = 512
# The programs' sums that the one program of a reduction adds at once, eight to a thread.
SUMS = 1024


class Rows(NamedTuple):
    """The rows of an array of logits: outer index, lane and class, and the strides of these."""

    outer: int
    inner: int
    strides: tuple[int, int, int]


class Tile(NamedTuple):
    """What a program reads at once."""

    classes: int
    lanes: int
    warps: int
    """Of 32 threads."""


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


def tile(rows: Rows, classes: int, share: int = 1) -> Tile:
    """Choose what a program reads at once: of its usual tile, one in `share`."""
    power, lanes = _power(classes), 1
    if rows.strides[2] != 1 and classes > 1:
        share = min(share, 2)
        by_thread = _NEIGHBOURS_BY_THREAD // share
        lanes = min(_power(rows.inner), _NEIGHBOURS)
        by_class = min(power, _NEIGHBOURS_TILE // (share * lanes))
    elif classes <= SHORT:
        by_thread, by_class = _SHORT_BY_THREAD, power
        lanes = min(_power(rows.inner), _SHORT_TILE // power)
    else:
        by_thread, by_class = _TILE_BY_THREAD // share, min(power, _TILE // share)
    warps = by_class * lanes // (32 * by_thread)
    return Tile(by_class, lanes, min(max(warps, 1), _MOST_WARPS))


def _power(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def parts(classes: int, size: int, wanted: int) -> tuple[int, int]:
    """Cut a row into about so many parts, each a whole number of tiles: how many, how long."""
    tiles = cdiv(classes, size)
    chunk = size * cdiv(tiles, min(tiles, wanted))
    return cdiv(classes, chunk), chunk


def cdiv(size: int, step: int) -> int:
    """Divide and round up."""
    return -(-size // step)
