"""How the rows are cut into blocks, each a box of the logits that holds whole rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from polyce.score.totals import Box

BLOCK_BYTES = 64 << 20
"""Size of a block's logits, in the dtype they are computed in. Such a block takes ten times as long
as the Python code around it, and about as much memory as Python and NumPy do. The reference needs
eight times as much."""
LARGER = 2
"""A block may be so many times as large to hold whole chunks: a part takes as long to read."""


def boxes(
    shape: tuple[int, ...], axis: int, itemsize: int, chunks: tuple[int, ...] | None = None
) -> Iterator[Box]:
    """Cut logits into boxes along the outermost axes of the rows, in C order.

    Where the logits are stored in chunks, boxes have whole ones unless those are too large.
    """
    steps = list(shape)
    room = max(1, BLOCK_BYTES // max(1, itemsize))
    for one in range(len(shape)):
        if one == axis or math.prod(steps) <= room:
            continue
        step = max(1, room // max(1, math.prod(steps) // steps[one]))
        unit = chunks[one] if chunks else 1
        if unit <= LARGER * step:
            step = max(unit, step // unit * unit)
        steps[one] = min(step, steps[one])
    yield from itertools.product(
        *(
            [slice(start, min(start + step, size)) for start in range(0, size, max(1, step))]
            for size, step in zip(shape, steps, strict=True)
        )
    )
