"""Try tiles and numbers of warps for rows of contiguous classes, and report the best.

The results belong in the table at the top of `polyce.implementations.triton.layout`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from gpu.arrays import case_problem, exact_mean
from gpu.cases import Case
from gpu.device import Device, Timed
from gpu.ledger import NOT_HERE, RIGHT, attempt
from polyce.implementations.triton import layout as triton_layout
from polyce.implementations.triton import plans
from polyce.implementations.triton.layout import Tile

from ..measure import Row, loss_of
from .contenders import contenders
from .timing import Size, in_turn

# What Triton raises if a program needs more of the device than it has; no error of polyce's.
TOO_LARGE = ("OutOfResources", "PTXASError")
WHATS = ("forward", "backward")


@contextlib.contextmanager
def launched_with(tile: Tile) -> Iterator[None]:
    """Make every program take this tile, whatever the table says."""
    before = triton_layout.tile
    plans.forget()
    triton_layout.tile = lambda *_, **__: tile
    try:
        yield
    finally:
        triton_layout.tile = before
        plans.forget()


def sweep(device: Device, size: Size) -> Iterator[Row]:
    """Time every tile with every number of warps, for each dtype and number of classes."""
    for dtype in size.dtypes:
        for classes in size.sweep_classes:
            case = Case((min(8192, size.sweep_logits // classes), classes), dtype, scales=True)
            given = case_problem(device, case)
            want = exact_mean(device, *given)
            for what in WHATS:
                yield from one(device, size, what, given, want)


def one(
    device: Device, size: Size, what: str, given: tuple[Any, Any], want: float
) -> Iterator[Row]:
    """Time all tiles for one case, in turn."""
    plain = contenders(device)["polyce"].make().ways[what](*given)
    logits = given[0]
    facts = {"dims": tuple(logits.shape), "dtype": str(logits.dtype).split(".")[-1], "what": what}
    rows: list[Row] = []
    calls: dict[str, Timed] = {}
    for tile in (Tile(n, 1, warps) for n in size.sweep_tiles for warps in size.sweep_warps):
        # A tile of twice the row's classes is half empty.
        if tile.classes >= 2 * logits.shape[1]:
            continue
        name = f"{tile.classes} classes, {tile.warps} warps"
        timed = Timed(plain.prepare, functools.partial(with_tile, tile, plain))
        row = attempt("sweep", functools.partial(right, device, tile, timed, given, want))
        if row.get("wrong", "").startswith(TOO_LARGE):
            row |= {"status": NOT_HERE, "reason": f"it failed: {row.pop('wrong')}"}
        rows.append(row | facts | {"name": name, "tile": tile.classes, "warps": tile.warps})
        if row["status"] == RIGHT:
            calls[name] = timed
    times = in_turn(device, calls, size._replace(seconds=0.0))
    best = min(times, key=lambda name: times[name]["median_s"], default=None)
    for row in rows:
        yield row | times.get(row["name"], {}) | {"best": row["name"] == best}


def with_tile(tile: Tile, plain: Timed, state: Any) -> Any:
    """Make a call with a tile."""
    with launched_with(tile):
        return plain.call(state)


def right(device: Device, tile: Tile, timed: Timed, given: tuple[Any, Any], want: float) -> Row:
    """Check the loss with a tile, and call once."""
    with launched_with(tile):
        loss = loss_of(device.alone(*given))
    if not abs(loss - want) <= 2e-2 * abs(want):
        raise ValueError(f"the loss is {loss}, not {want}")
    device.seconds(timed)
    return {}
