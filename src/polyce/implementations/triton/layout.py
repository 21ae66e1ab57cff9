"""The launch table: what a program of the triton kernels reads at once, by how the rows lie."""

from __future__ import annotations

from typing import NamedTuple

import triton

from polyce.implementations.strides import Rows, cdiv, power_of_two

# The launch parameters, not tuned on a GPU yet: they keep 4 to 16 numbers a thread in flight, and
# registers low enough for two programs or more to share a multiprocessor.
#
# One program takes a row of contiguous classes, in tiles of up to this many: at 16 numbers a thread
# that is 8 warps, as many as can wait for one another without harm.
_TILE = 4096
_TILE_BY_THREAD = 16
# Rows of up to this many contiguous classes share a program, which would have little to do
# otherwise. Of up to SHORTEST classes a thread has whole rows, and keeps no other row's state; the
# first cache then serves its loads of single numbers. Longer rows would need too many lines of it.
# Triton 3.6 gives each class of such a tile to another thread whatever it is told.
SHORT = 64
_SHORT_TILE = 1024
_SHORT_BY_THREAD = 4
SHORTEST = 16 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else 0
# Where neighbouring rows are contiguous instead of the classes: a thread has two rows and 16 of
# their classes, all in flight at once, so that it adds them up alone and a warp's loads are whole
# cache lines. The states of more rows would take its registers. Where there are few programs,
# several warps read a row's classes.
_NEIGHBOURS = 128
_NEIGHBOURS_TILE = 2048
_NEIGHBOURS_BY_THREAD = 32
_NEIGHBOURS_WARPS = 4
_MOST_WARPS = 8
# By the size of a logit, the tile is divided by this, plain and with a softcap or a teacher, which
# take registers. Each thread still reads 16 bytes or more.
SHARES = {2: (1, 2), 4: (1, 4), 8: (2, 4)}
# Rows of more than LONG classes are split over programs where there are fewer than FEW_PROGRAMS, so
# that twice as many fill a large device: 132 multiprocessors with registers for five programs each.
# A part has about PART classes at least, a tile. A program waits for the memory once for each tile,
# for LONG classes about as long as the launch that joins parts takes.
LONG, FEW_PROGRAMS, PART = 16384, 330, 4096
# How many parts of a row are joined at once, one to a thread.
_JOINED = 128
# Loss and gradient in one pass: of so many contiguous classes a row is one tile, of so many classes
# a row among neighbours. A thread keeps its numbers.
WHOLE, _WHOLE_NEIGHBOURS = 8192, 32
# The rows' weights are added up before by up to so many programs, so many rows at once.
WEIGHERS, WEIGHED = 128, 4096
# How many entries of a sparse target a program reads at once, one or two to a thread.
_ENTRIES = 256
# How many of them a program of one thread to each takes, where their gradient is computed alone.
ENTRIES_ALONE = 128
# About this many programs write a gradient where there are few rows: as many as fill such a device.
WRITERS = 660
# How many sums a program of a reduction adds at once, eight to a thread. One program adds up to
# MANY_SUMS; where there are more, several programs first add CHUNK_OF_SUMS each: one would wait for
# the memory once for each of its turns, for longer than a launch takes.
SUMS = 1024
MANY_SUMS, CHUNK_OF_SUMS = 8192, 4096


class Tile(NamedTuple):
    """What a program reads at once."""

    classes: int
    lanes: int
    warps: int
    """Of 32 threads."""
    by_two: bool
    """Whether a thread loads and stores two neighbouring rows at once, not classes."""


def tile(rows: Rows, classes: int, share: int = 1, *, is_heavy: bool = False) -> Tile:
    """Choose what a program reads at once: its usual tile divided by `share`.

    With `is_heavy`, for what takes more registers, a tile of several rows is half of that or less.
    """
    power, lanes, half = power_of_two(classes), 1, 2 if is_heavy else 1
    has_neighbours = rows.strides[2] != 1 and classes > 1
    if has_neighbours:
        share = 2 * share if is_heavy else min(share, 2)
        by_thread = _NEIGHBOURS_BY_THREAD // share
        lanes = min(power_of_two(rows.inner), _NEIGHBOURS)
        numbers = _NEIGHBOURS_TILE // share
        if rows.outer * cdiv(rows.inner, lanes) < FEW_PROGRAMS:
            numbers *= _NEIGHBOURS_WARPS
        by_class = min(power, max(numbers // lanes, 1))
    elif classes <= SHORT:
        by_thread = power // share if power <= SHORTEST else _SHORT_BY_THREAD
        by_thread = max(by_thread // half, 1)
        by_class = power
        lanes = min(power_of_two(rows.inner), max(_SHORT_TILE // (power * half), 1))
    else:
        by_thread, by_class = _TILE_BY_THREAD // share, min(power, _TILE // share)
    warps = by_class * lanes // (32 * by_thread)
    return Tile(by_class, lanes, min(max(warps, 1), _MOST_WARPS), has_neighbours)


def whole_tile(rows: Rows, classes: int, share: int, *, is_heavy: bool) -> Tile | None:
    """Choose the tile of a program that keeps whole rows; None for rows that are too long."""
    power, usual = power_of_two(classes), tile(rows, classes, share, is_heavy=is_heavy)
    if power > (_WHOLE_NEIGHBOURS if usual.by_two else WHOLE // share):
        return None
    if usual.by_two:
        lanes = max(min(usual.lanes, _NEIGHBOURS_TILE // (share * power)), 1)
        warps = power * lanes * share // (32 * _NEIGHBOURS_BY_THREAD)
        return Tile(power, lanes, max(warps, 1), usual.by_two)
    if classes <= SHORT:
        return usual
    warps = power * share // (32 * _TILE_BY_THREAD)
    return Tile(power, 1, max(warps, 1), usual.by_two)


def entries_at_once(entries: int, lanes: int) -> int:
    """Choose how many entries of each row of a program are read at once."""
    return min(power_of_two(max(entries, 1)), max(_ENTRIES // lanes, 1))


def parts_at_once(parts: int, lanes: int) -> int:
    """Choose how many parts of each row of a program are joined at once."""
    return min(power_of_two(parts), max(_JOINED // lanes, 1))
