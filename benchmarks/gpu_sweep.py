"""Try tiles and numbers of warps for rows of contiguous classes, and tell the best of each.

What comes out belongs into the table at the top of `polyce.implementations.triton_layout`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import gpu_contenders
import gpu_times
from gpu_checks import NOT_HERE, RIGHT, attempt, require
from gpu_device import Timed, interleave
from gpu_machine import Machine
from gpu_timing import Case, Size
from measure import Row

from polyce.implementations import triton_layout
from polyce.implementations.triton_layout import Tile

# What Triton raises where a program wants more of the device than there is: no error of polyce's.
TOO_LARGE = ("OutOfResources", "PTXASError")
WHATS = ("forward", "backward")
# Enough to keep every multiprocessor busy for long.
LOGITS = 2**28


@contextlib.contextmanager
def launched_with(tile: Tile) -> Iterator[None]:
    """Let every program take this tile, whatever the table says."""
    before = triton_layout.tile
    triton_layout.tile = lambda *_, **__: tile
    try:
        yield
    finally:
        triton_layout.tile = before


def check(machine: Machine, size: Size) -> list[Row]:
    """Time every tile with every number of warps, for each dtype and number of classes."""
    rows = []
    for dtype in size.dtypes:
        for classes in size.sweep_classes:
            dims = (4 if machine.rehearses else min(8192, LOGITS // classes), classes)
            logits, labels = gpu_times.problem(machine, Case(dims, dtype))
            want = gpu_times.exact_mean(logits, labels)
            for what in WHATS:
                rows += one(machine, size, what, (logits, labels, want), dtype)
    return rows


def one(machine: Machine, size: Size, what: str, problem: Any, dtype: str) -> list[Row]:
    """Time all tiles for one case, in turn."""
    logits, labels, want = problem
    classes = logits.shape[1]
    contender = gpu_contenders.Contender(lambda: gpu_contenders.ours)
    plain = gpu_contenders.timed(contender, gpu_contenders.ours, what, logits, labels)
    rows: list[Row] = []
    calls: dict[str, Timed] = {}
    # A tile of twice the classes is half empty.
    for tile in (Tile(n, 1, warps) for n in size.sweep_tiles for warps in size.sweep_warps):
        if tile.classes >= 2 * classes:
            continue
        timed = Timed(plain.prepare, _with(tile, plain))
        name = f"{tile.classes} classes, {tile.warps} warps"

        def right(timed: Timed = timed, tile: Tile = tile) -> Row:
            with launched_with(tile):
                loss = float(gpu_contenders.ours(logits.detach(), labels))
            require(abs(loss - want) <= 2e-2 * abs(want), f"the loss is {loss}, not {want}")
            machine.seconds(timed)
            return {}

        row = attempt("sweep", right) | {"tile": tile.classes, "warps": tile.warps}
        if row.get("wrong", "").startswith(TOO_LARGE):
            row |= {"status": NOT_HERE, "reason": f"it failed: {row.pop('wrong')}"}
        rows.append(row | {"dims": tuple(logits.shape), "dtype": dtype, "what": what, "name": name})
        if row["status"] == RIGHT:
            calls[name] = timed
    if not calls:
        return rows
    times = interleave(machine, calls, size.rounds, 0.0)
    rows = [row | times.get(row["name"], {}) for row in rows]
    best = min(times, key=lambda name: times[name]["median_s"])
    return [row | {"best": row["name"] == best} for row in rows]


def _with(tile: Tile, plain: Timed) -> Any:
    def call(state: Any) -> Any:
        with launched_with(tile):
            return plain.call(state)

    return call
