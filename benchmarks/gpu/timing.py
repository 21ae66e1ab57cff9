"""How calls are timed on a device: sizes, calls in turn, and a row of results for each.

No time counts as a failure.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping
from typing import NamedTuple

from gpu.cases import FULL as COMPARED
from gpu.device import Device, Timed
from gpu.ledger import NOT_HERE, RIGHT, WRONG, attempt

from ..measure import Row, take_turns

# What is timed, and how many times at least it reads or writes the logits.
PASSES = {
    "forward": 1,
    "backward": 2,
    "forward and backward": 3,
    "in-place backward": 2,
    "loss and gradient": 2,
    "loss and gradient in place": 2,
}
# The host's time is measured for these.
WHOLE = ("forward", "forward and backward", "loss and gradient")
# Those whose calls are captured in graphs.
CAPTURED = ("polyce", "torch eager")
# The share of the bandwidth that a memory-bound kernel should reach, if rows are long enough.
TARGET, TARGET_CLASSES = 0.85, 4096


class Size(NamedTuple):
    """How much is timed."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    rounds: int
    seconds: float
    copies: int
    """How often the copy is timed that everything is compared with."""
    calls: int
    """How many calls in a row the host's time is measured over."""
    graphs: int
    """How often a captured graph is timed."""
    sweep_logits: int
    sweep_classes: tuple[int, ...]
    sweep_tiles: tuple[int, ...]
    sweep_warps: tuple[int, ...]


FULL = Size(
    shapes=COMPARED.large,
    dtypes=("bfloat16", "float32"),
    rounds=20,
    seconds=0.3,
    copies=50,
    calls=100,
    graphs=0,
    # Enough to keep every multiprocessor busy for a while.
    sweep_logits=2**28,
    sweep_classes=(1000, 4096, 32000, 50257, 128256, 262144),
    sweep_tiles=(1024, 2048, 4096, 8192, 16384, 32768),
    sweep_warps=(4, 8, 16, 32),
)
# For a run of a few minutes.
SHORT = FULL._replace(rounds=7, seconds=0.0, copies=20, graphs=5)
QUICK = FULL._replace(shapes=((4096, 1000), (4096, 32000)), rounds=10, seconds=0.0)
REHEARSAL = Size(
    shapes=((4, 100), (1, 3, 2, 5)),
    dtypes=("bfloat16",),
    rounds=2,
    seconds=0.0,
    copies=5,
    calls=2,
    graphs=1,
    sweep_logits=400,
    sweep_classes=(100,),
    sweep_tiles=(64, 128),
    sweep_warps=(4, 8),
)


def at_most_a_note(name: str, row: Row) -> Row:
    """Mark a peer's failure so that it does not count as polyce's."""
    if row["status"] == WRONG and not name.startswith("polyce"):
        return row | {"status": NOT_HERE, "reason": f"it failed: {row.pop('wrong')}"}
    return row


def in_turn(device: Device, calls: Mapping[str, Timed], size: Size) -> dict[str, dict[str, float]]:
    """Time calls in turn, so that a changing clock affects all of them alike."""
    for timed in calls.values():
        device.seconds(timed)
    taken = take_turns(
        list(calls), lambda name: device.seconds(calls[name]), size.seconds, size.rounds
    )
    return {name: summary(samples) for name, samples in taken.items()}


def summary(samples: list[float]) -> dict[str, float]:
    """Return the median, and the first and last decile of the samples."""
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return {"median_s": statistics.median(samples), "p10_s": tenths[0], "p90_s": tenths[-1]}


def time_what(
    device: Device, size: Size, what: str, calls: Mapping[str, Timed], nbytes: int, copy: float
) -> list[Row]:
    """Time one kind of call of all contenders in turn, after measuring what needs no clock.

    `median_s` is the device's time alone, `whole_s` from an idle device to an idle device, and
    `graph_s` that of a captured graph.
    """
    rows: dict[str, Row] = {}
    for name, timed in calls.items():
        row = attempt("times", functools.partial(once, device, timed, nbytes))
        rows[name] = at_most_a_note(name, row) | {"what": what, "contender": name}
    alive = {name: timed for name, timed in calls.items() if rows[name]["status"] == RIGHT}
    moved = nbytes * PASSES[what]
    for name, times in in_turn(device, alive, size).items():
        speed = moved / times["median_s"] / 1e9
        rows[name] |= times | {"moved_bytes": moved, "gb_per_s": speed, "of_copy": speed / copy}
    for name, timed in alive.items():
        whole = [device.whole_seconds(timed) for _ in range(max(3, size.rounds // 2))]
        rows[name]["whole_s"] = statistics.median(whole)
        if size.graphs and what in WHOLE and name in CAPTURED:
            graph = attempt("graph", functools.partial(of_graph, device, size, timed))
            # Whether a call can be captured is for the tests of behaviour to say.
            told = {"graph_s": graph.get("graph_s"), "graph": graph.get("wrong")}
            rows[name] |= {key: value for key, value in told.items() if value is not None}
    return list(rows.values())


def of_graph(device: Device, size: Size, timed: Timed) -> Row:
    """Time a call as a graph."""
    return {"graph_s": statistics.median(device.graph_seconds(timed, size.graphs))}


def once(device: Device, timed: Timed, nbytes: int) -> Row:
    """Call once, and return the memory that it takes and the kernels that it launches."""
    device.seconds(timed)
    kernels = device.launches(timed)
    return {
        "extra_bytes": device.extra_bytes(timed),
        "logits_bytes": nbytes,
        "launches": None if kernels is None else len(kernels),
        "kernels": kernels,
    }
