"""jax on a GPU: losses with exact answers, and times beside those of jax's own operations."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

import polyce
from polyce.testing import check_implementation, get_backend
from polyce.testing.dtypes import dtype

from .device import NotHereError
from .ledger import RIGHT, Row, Step
from .smoke import few

# Rows and classes; and of a rehearsal.
SHAPES, TINY = ((4096, 32000), (65536, 10)), ((4, 10),)
DTYPES = ("bfloat16", "float32")
GROUPS = ("options", "special", "stats", "transform")
ROUNDS = 7
_SECONDS = 4.0


def check_device(rehearse: bool) -> None:
    """Raise if jax has no device, and none is to be rehearsed."""
    if not rehearse and jax.default_backend() == "cpu":
        raise NotHereError(f"jax {jax.__version__} finds no device: its default backend is cpu")


def seconds(call: Callable[[], Any]) -> float:
    """Time a call, with the host's part: jax has no events."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def steps(rehearse: bool) -> Iterator[Step]:
    """Yield the steps."""
    check_device(rehearse)
    for group in GROUPS:
        yield Step(f"grid: {group}", _SECONDS, functools.partial(_on_grid, group))
    for dims in TINY if rehearse else SHAPES:
        for name in DTYPES:
            run = functools.partial(times, dims, name)
            yield Step(f"times: {'x'.join(map(str, dims))}, {name}", _SECONDS, run)


def _on_grid(group: str) -> None:
    backend = get_backend("jax")
    chosen = {case.name for case in few(group, ["float32"])}
    check_implementation(
        "reference",
        backend,
        groups=[group],
        dtypes=["float32"],
        leave_out=lambda case: "" if case.name in chosen else "not one of the few",
    )


def times(dims: tuple[int, int], name: str) -> Iterator[Row]:
    """Time loss and gradient, compiled, beside what one would write by hand."""
    rng = np.random.default_rng(0)
    logits = jax.numpy.asarray(rng.standard_normal(dims, dtype=np.float32).astype(dtype(name)))
    labels = jax.numpy.asarray(rng.integers(0, dims[1], dims[0]).astype(np.int32))

    def by_hand(logits: Any, labels: Any) -> Any:
        wide = logits.astype("float32")
        ahead = jax.numpy.take_along_axis(wide, labels[:, None], axis=1)[:, 0]
        return (jax.nn.logsumexp(wide, axis=1) - ahead).mean()

    functions = {"polyce": polyce.cross_entropy, "by hand": by_hand}
    calls = {
        what: functools.partial(jax.jit(jax.value_and_grad(function)), logits, labels)
        for what, function in functions.items()
    }
    ours, theirs = (float(call()[0]) for call in calls.values())
    if not abs(ours - theirs) <= (5e-3 if name == "bfloat16" else 1e-4) * abs(theirs):
        raise ValueError(f"polyce gives the loss {ours}, by hand it is {theirs}")
    taken = [{what: seconds(call) for what, call in calls.items()} for _ in range(ROUNDS)]
    for what in calls:
        median = statistics.median(each[what] for each in taken)
        facts = {"dims": dims, "dtype": name, "what": "loss and gradient", "contender": what}
        yield {"check": "times", "status": RIGHT, "median_s": median, **facts}
