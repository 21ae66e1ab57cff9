"""Times on a device: kernels against the bandwidth of a copy and against peers, and the host."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Collection, Iterator
from typing import Any

from gpu.arrays import case_problem, exact_mean
from gpu.cases import Case
from gpu.device import Device, NotHereError, Timed
from gpu.ledger import NOT_HERE, RIGHT, Step, attempt

from ..measure import Row, loss_of, sample
from .contenders import Contender, Made, contenders
from .header import header
from .timing import PASSES, REHEARSAL, SHORT, WHOLE, Size, at_most_a_note, summary, time_what

# What a short run times, first what most depends on: losses of language models, then rows with few
# classes, images, and few rows.
SESSION = (
    ((4096, 32000), "bfloat16"),
    ((4096, 32000), "float32"),
    ((1_048_576, 2), "bfloat16"),
    ((4096, 50257), "bfloat16"),
    ((4096, 1000), "float32"),
    ((8, 19, 1024, 2048), "bfloat16"),
    ((8, 128256), "bfloat16"),
    ((4096, 128256), "bfloat16"),
    ((65536, 10), "float32"),
    ((131072, 1000), "bfloat16"),
)
# These take seconds to compile for every shape, so they are timed apart, at the end.
COMPILED = "torch compiled"
# By estimate, what the contenders of one case take.
_SECONDS, _SECONDS_COMPILED = 3.0, 15.0


def session_cases(device: Device) -> list[Case]:
    """Return what a short run times."""
    if device.rehearses:
        return [Case(dims, name) for dims in REHEARSAL.shapes for name in REHEARSAL.dtypes]
    return [Case(dims, name, scales=True) for dims, name in SESSION]


def steps(device: Device) -> Iterator[Step]:
    """Yield the steps of a short run: the device, each case, the host's time, compiled peers."""
    size = REHEARSAL if device.rehearses else SHORT
    copy = functools.cache(lambda: copy_bandwidth(device, size))

    def of_case(case: Case, names: Collection[str]) -> Iterator[Row]:
        yield from time_case(device, size, case, copy()["gb_per_s"], names)

    def facts() -> Iterator[Row]:
        yield {"check": "header", "status": RIGHT, **header(device), "copy": copy()}

    yield Step("the device", _SECONDS, facts)
    names = contenders(device).keys() - {COMPILED}
    found = session_cases(device)
    for case in found:
        yield Step(case.name, _SECONDS, functools.partial(of_case, case, names))
    yield Step("the host", _SECONDS, functools.partial(host, device, size, names))
    if COMPILED in contenders(device):
        for case in found[:2]:
            both = ("polyce", COMPILED)
            run = functools.partial(of_case, case, both)
            yield Step(f"{case.name}, compiled", _SECONDS_COMPILED, run)


def copy_bandwidth(device: Device, size: Size) -> Row:
    """Time a copy within the device's memory, of 1 to 4 GB, or a quarter of what is free."""
    count = min(4 * 10**9, device.free_bytes() // 4)
    source = device.full((count,), 1, "int8")
    target = device.xp.empty_like(source)

    def copy(_: Any) -> None:
        target[...] = source

    timed = Timed(lambda: None, copy)
    device.seconds(timed)
    times = summary([device.seconds(timed) for _ in range(size.copies)])
    return times | {"bytes": 2 * count, "gb_per_s": 2 * count / times["median_s"] / 1e9}


def all_times(device: Device, size: Size, copy: float) -> Iterator[Row]:
    """Time all cases."""
    for dims in size.shapes:
        # CuPy has two 16-bit kernels.
        more = ("float16",) if device.library == "cupy" and len(dims) == 2 else ()
        for dtype in (*size.dtypes, *more):
            for layout in ("plain", "channels last") if len(dims) > 2 else ("plain",):
                yield from time_case(
                    device, size, Case(dims, dtype, layout=layout, scales=True), copy
                )
    yield from host(device, size)


def time_case(
    device: Device, size: Size, case: Case, copy: float, names: Collection[str] | None = None
) -> Iterator[Row]:
    """Time contenders of one case in turn, by default all, once their losses have been compared."""
    facts: Row = {"dims": case.dims, "dtype": case.dtype, "layout": case.layout}
    try:
        logits, labels = case_problem(device, case)
    except NotHereError as reason:
        yield {"check": "times", "status": NOT_HERE, "reason": str(reason)} | facts
        return
    facts["dims"] = tuple(logits.shape)
    want = exact_mean(device, logits, labels)
    made: dict[str, Made] = {}
    for name, contender in chosen(device, names).items():
        row = attempt(
            "agrees with float64",
            functools.partial(agrees, device, name, contender, made, (logits, labels), want),
        )
        yield at_most_a_note(name, row) | facts | {"contender": name}
        if row["status"] != RIGHT:
            made.pop(name, None)
    for what in PASSES:
        calls = {
            name: each.ways[what](logits, labels)
            for name, each in made.items()
            if what in each.ways
        }
        for row in time_what(device, size, what, calls, logits.nbytes, copy):
            yield row | facts


def agrees(
    device: Device,
    name: str,
    contender: Contender,
    made: dict[str, Made],
    given: tuple[Any, Any],
    want: float,
) -> Row:
    """Make a contender, and compare its loss with float64's."""
    logits, labels = given
    if logits.ndim > 2 and not contender.images:
        raise NotHereError("takes two dimensions only")
    made[name] = contender.make()
    # Some contenders write over them.
    own = device.xp.asarray(logits, copy=True)
    got = loss_of(made[name].loss(own, labels))
    ours = name.startswith("polyce")
    # 16-bit losses are rounded, and those of some peers on the way too.
    allowed = {2: 5e-3 if ours else 2e-2, 4: 1e-4, 8: 1e-9}[logits.itemsize]
    if abs(got - want) <= allowed * abs(want):
        return {"loss": got}
    differs = f"{name} gives the loss {got}, where float64 gives {want}"
    if ours:
        raise ValueError(differs)
    return {"loss": got, "note": differs}


def chosen(device: Device, names: Collection[str] | None) -> dict[str, Contender]:
    """Return the contenders of these names, or all."""
    found = contenders(device)
    return {name: each for name, each in found.items() if names is None or name in names}


def host(device: Device, size: Size, names: Collection[str] | None = None) -> Iterator[Row]:
    """Time what the host does for a call: one row of ten classes, without waiting."""
    given = case_problem(device, Case((1, 10), "float32"))
    for name, contender in chosen(device, names).items():
        if contender.spoils:
            continue
        made = attempt("host", lambda contender=contender: {"ways": contender.make().ways})
        ways = made.pop("ways", {})
        if not ways:
            yield at_most_a_note(name, made) | {"contender": name}
        for what in WHOLE:
            if what in ways:
                timed = functools.partial(host_seconds, device, ways[what](*given), size.calls)
                row = at_most_a_note(name, attempt("host", timed))
                yield row | {"what": what, "contender": name}


def host_seconds(device: Device, timed: Timed, calls: int) -> Row:
    """Time calls in a row, without waiting for what they launch."""
    state = timed.prepare()
    taken = []
    for _ in range(7):
        device.synchronize()
        taken.append(sample(functools.partial(timed.call, state), calls))
    device.synchronize()
    # The first calls compile.
    return {"median_s": statistics.median(taken[2:])}
