"""What the GPU script times, however the library is called: shapes, rounds, and what is recorded.

No time decides anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from gpu_checks import NOT_HERE, RIGHT, WRONG, attempt
from gpu_device import Device, Timed, interleave
from measure import Row

# What is timed: how often it reads and writes the logits' size at least.
PASSES = {
    "forward": 1,
    "backward": 2,
    "forward and backward": 3,
    "in-place backward": 2,
    "loss and gradient": 2,
    "loss and gradient in place": 2,
}
# What a kernel that waits for nothing but memory should reach, where rows are long enough.
TARGET, TARGET_CLASSES = 0.85, 4096


class Case(NamedTuple):
    """Logits to time."""

    dims: tuple[int, ...]
    dtype: str
    layout: str = "plain"


class Size(NamedTuple):
    """How much is timed."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    rounds: int
    seconds: float
    copies: int
    """How often the copy is timed that all else is compared with."""
    calls: int
    """Calls in a row for the host's share."""
    sweep_classes: tuple[int, ...]
    sweep_tiles: tuple[int, ...]
    sweep_warps: tuple[int, ...]


FULL = Size(
    shapes=(
        (1_048_576, 2),
        (65536, 10),
        (4096, 1000),
        (8192, 4096),
        (4096, 32000),
        (4096, 50257),
        (4096, 128256),
        (2048, 262144),
        (8, 128256),
        (16, 21, 512, 512),
        (8, 19, 1024, 2048),
    ),
    dtypes=("bfloat16", "float32"),
    rounds=20,
    seconds=0.3,
    copies=50,
    calls=100,
    sweep_classes=(1000, 4096, 32000, 50257, 128256, 262144),
    sweep_tiles=(1024, 2048, 4096, 8192, 16384, 32768),
    sweep_warps=(4, 8, 16, 32),
)
QUICK = FULL._replace(shapes=((4096, 1000), (4096, 32000)), rounds=10, seconds=0.0)
REHEARSAL = Size(
    shapes=((4, 100), (1, 3, 2, 5)),
    dtypes=("bfloat16",),
    rounds=2,
    seconds=0.0,
    copies=5,
    calls=2,
    sweep_classes=(100,),
    sweep_tiles=(64, 128),
    sweep_warps=(4, 8),
)


def at_most_a_note(name: str, row: Row) -> Row:
    """Keep a peer's failure from being ours."""
    if row["status"] == WRONG and not name.startswith("polyce"):
        return row | {"status": NOT_HERE, "reason": f"it failed: {row.pop('wrong')}"}
    return row


def time_what(
    machine: Device,
    size: Size,
    what: str,
    calls: Mapping[str, Timed],
    nbytes: int,
    copy: float | None,
) -> list[Row]:
    """Time one thing of all contenders in turn, after what takes no clock."""
    rows: dict[str, Row] = {}
    for name, timed in calls.items():

        def once(timed: Timed = timed) -> Row:
            machine.seconds(timed)
            kernels = machine.launches(timed)
            found: Row = {"extra_bytes": machine.extra_bytes(timed), "logits_bytes": nbytes}
            return found | {
                "launches": None if kernels is None else len(kernels),
                "kernels": kernels,
            }

        rows[name] = at_most_a_note(name, attempt("times", once))
        rows[name] |= {"what": what, "contender": name}
    alive = {name: timed for name, timed in calls.items() if rows[name]["status"] == RIGHT}
    moved = nbytes * PASSES[what]
    for name, times in interleave(machine, alive, size.rounds, size.seconds).items():
        speed = moved / times["median_s"] / 1e9
        rows[name] |= times | {"moved_bytes": moved, "gb_per_s": speed}
        if copy:
            rows[name]["of_copy"] = speed / copy
    return list(rows.values())
