"""Linear heads on a GPU: values with exact answers, and times beside those of products alone."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import polyce
from polyce.testing import Backend, check_linear, get_backend, linear_cases
from polyce.testing.dtypes import dtype
from polyce.testing.selection import representative

from .device import Timed, find
from .ledger import RIGHT, Row, Step

# Tokens, features and classes; and of a rehearsal.
DIMS, TINY = (4096, 2048, 32000), (6, 4, 10)
DTYPES = ("bfloat16", "float32")
# Cases with exact answers; jax compiles several programs for each.
FEW, FEW_ON_JAX = 8, 3
ROUNDS = 5
_SECONDS = 4.0


class Place(NamedTuple):
    """Where heads are computed."""

    backend: Backend
    rehearses: bool
    path: str | None
    """The implementation to name; None leaves the choice to polyce."""
    xp: Any
    compiled: Callable[[Callable[..., Any]], Callable[..., Any]]
    seconds: Callable[[Callable[[], Any]], float]


def steps(library: str, rehearse: bool) -> Iterator[Step]:
    """Yield the steps."""
    place = of_jax(rehearse) if library == "jax" else of_device(library, rehearse)
    count = FEW_ON_JAX if library == "jax" else FEW
    cases = representative([case.of_logits for case in linear_cases()], count)
    for case in cases:
        run = functools.partial(_exact, place, case.name)
        yield Step(f"exact: {case.name}", _SECONDS, run)
    for name in DTYPES:
        yield Step(f"times: {name}", _SECONDS, functools.partial(times, place, name))


def of_device(library: str, rehearse: bool) -> Place:
    """Return torch's or CuPy's device."""
    device = find(library, rehearse)

    def seconds(call: Callable[[], Any]) -> float:
        return device.seconds(Timed(lambda: None, lambda _: call()))

    # The interpreter runs when it is named.
    path = device.path if rehearse else None
    return Place(device.backend, rehearse, path, device.xp, lambda function: function, seconds)


def of_jax(rehearse: bool) -> Place:
    """Return jax's default device."""
    import jax

    from . import on_jax

    on_jax.check_device(rehearse)
    return Place(get_backend("jax"), rehearse, None, jax.numpy, jax.jit, on_jax.seconds)


def _exact(place: Place, name: str) -> None:
    check_linear(place.path, place.backend, chosen=lambda case: case.name == name)


def times(place: Place, name: str) -> Iterator[Row]:
    """Time loss and gradients by a head, by all logits at once, and the products alone."""
    rows, features, classes = TINY if place.rehearses else DIMS
    x, w, t = _problem(place, (rows, features, classes), name)
    option = {"implementation": place.path}

    def head(x: Any, w: Any, t: Any) -> Any:
        loss, (of_x, of_w, _) = polyce.linear_cross_entropy_with_grad(x, w, t, **option)
        return loss, of_x, of_w

    def all_logits(x: Any, w: Any, t: Any) -> Any:
        loss, grad = polyce.cross_entropy_with_grad(x @ w.T, t, **option)
        return loss, grad @ w, grad.T @ x

    def products(x: Any, w: Any, t: Any) -> Any:
        logits = x @ w.T
        return logits[0, 0], logits @ w, logits.T @ x

    contenders = {"polyce": head, "all logits at once": all_logits, "products alone": products}
    calls = {
        what: functools.partial(place.compiled(function), x, w, t)
        for what, function in contenders.items()
    }
    losses = {what: _number(place, call()[0]) for what, call in calls.items()}
    ours, theirs = losses["polyce"], losses["all logits at once"]
    # The other's logits are rounded to 16 bits, and so is its loss.
    if not abs(ours - theirs) <= (2e-2 if name == "bfloat16" else 1e-4) * abs(theirs):
        raise ValueError(f"the head's loss is {ours}, that of all logits at once {theirs}")
    taken = [{what: place.seconds(call) for what, call in calls.items()} for _ in range(ROUNDS)]
    for what in calls:
        median = statistics.median(each[what] for each in taken)
        facts = {"dims": (rows, features, classes), "dtype": name, "contender": what}
        yield {"check": "head", "status": RIGHT, "median_s": median, **facts}


def _problem(place: Place, dims: tuple[int, int, int], name: str) -> tuple[Any, Any, Any]:
    """Make hidden states, a head whose logits have variance 1, and labels, the same everywhere."""
    import numpy as np

    rng = np.random.default_rng(0)
    rows, features, classes = dims

    def normal(shape: tuple[int, ...], scale: float) -> Any:
        drawn = rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)
        return place.backend.asarray(drawn.astype(dtype(name)))

    labels = place.backend.asarray(rng.integers(0, classes, rows).astype(np.int32))
    return normal((rows, features), 1.0), normal((classes, features), features**-0.5), labels


def _number(place: Place, loss: Any) -> float:
    return float(place.backend.to_numpy(loss))
