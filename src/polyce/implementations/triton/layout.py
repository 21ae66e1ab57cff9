"""What a program of the triton kernels reads at once, by how the rows lie: the launch table."""

from __future__ import annotations

from typing import NamedTuple

from polyce.implementations.strides import Rows, power_of_two

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


class Tile(NamedTuple):
    """What a program reads at once."""

    classes: int
    lanes: int
    warps: int
    """Of 32 threads."""


def tile(rows: Rows, classes: int, share: int = 1) -> Tile:
    """Choose what a program reads at once: of its usual tile, one in `share`."""
    power, lanes = power_of_two(classes), 1
    if rows.strides[2] != 1 and classes > 1:
        share = min(share, 2)
        by_thread = _NEIGHBOURS_BY_THREAD // share
        lanes = min(power_of_two(rows.inner), _NEIGHBOURS)
        by_class = min(power, _NEIGHBOURS_TILE // (share * lanes))
    elif classes <= SHORT:
        by_thread, by_class = _SHORT_BY_THREAD, power
        lanes = min(power_of_two(rows.inner), _SHORT_TILE // power)
    else:
        by_thread, by_class = _TILE_BY_THREAD // share, min(power, _TILE // share)
    warps = by_class * lanes // (32 * by_thread)
    return Tile(by_class, lanes, min(max(warps, 1), _MOST_WARPS))
