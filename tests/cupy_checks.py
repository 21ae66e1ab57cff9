"""Checks of the cupy path that its mutants must fail: each checks one thing with few kernels."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

import cupy_calls as calls
import polyce
from cupy_calls import Given, draw, expected, inside, on_device, settings

Check = Callable[[], None]

ORDERS = ("forward", "reverse", "shuffled")
# Without a reduction one kernel gives the loss, and one the loss with its gradient.
ROWS = {"reduction": "none"}


def answers(
    given: Given,
    *,
    grad: bool = True,
    in_place: bool = False,
    table: dict[str, int] | None = None,
    orders: Sequence[str] = ("shuffled",),
    **options: Any,
) -> None:
    """Compare a call's answers with the reference's."""
    from cupy import emulation

    options = ROWS | options
    cotangent = {key: options.pop(key) for key in ("grad_output", "grad_stats") if key in options}
    wanted = expected(given, **options, **cotangent)
    for order in orders:
        emulation.order = order
        x, t, w, v = on_device(*given)
        options["sample_weight"] = v
        with settings(**(table or {})):
            if grad:
                more = {key: moved(value) for key, value in cotangent.items()}
                place = x if in_place else None
                found = polyce.cross_entropy_with_grad(x, t, w, out=place, **options, **more)
                calls.agree(found, wanted)
            else:
                found = polyce.cross_entropy(x, t, w, **options)
                loss = found[0] if "return_stats" in options else found
                calls.close(loss, wanted[0], calls.CLOSE[str(loss.dtype)])


def moved(value: Any) -> Any:
    """Copy an array, or those of a dict, to the current device."""
    if isinstance(value, dict):
        return {key: moved(each) for key, each in value.items()}
    return on_device(value)[0]


def right(shape: tuple[int, ...], name: str = "float32", kind: str = "index", **how: Any) -> Check:
    """Make a check of a call on random arrays."""
    return lambda: answers(draw(shape, name, kind), **how)


def in_parts(shape: tuple[int, ...], kind: str = "index", **options: Any) -> Check:
    """Make a check of calls on random arrays whose classes are read and written in parts."""

    def check() -> None:
        from in_parts import cut_functions, of_parts

        given = draw(shape, "float32", kind)
        wanted = expected(given, **ROWS, **options)
        functions = cut_functions(of_parts("cupy"))
        arrays = dict(
            zip(("input", "target", "weight", "sample_weight"), on_device(*given), strict=True)
        )
        # Cut at other places each time.
        for _ in range(2):
            found = functions.cross_entropy_with_grad(**arrays, **ROWS, **options)
            calls.agree(found, wanted)

    return check


def of_rows(rows: list[list[float]], target: Any, **how: Any) -> Check:
    """Make a check of a call on these float32 logits."""
    given = Given(np.array(rows, np.float32), np.array(target), None, None)
    return lambda: answers(given, **how)


def thirds(count: int) -> Any:
    """Make this many cotangents, all different."""
    return np.arange(count) / 3.0


def zones(
    shape: tuple[int, ...],
    at: int = 0,
    other: int = 0,
    out_at: int = 0,
    name: str = "float32",
    target: str = "",
    **how: Any,
) -> Check:
    """Make a check that nothing outside the rows is read or written, for rows at some offsets."""

    def check() -> None:
        given = draw(shape, name, "probability" if target else "index")
        given = given._replace(weight=None, sample_weight=None)
        if target:
            given = given._replace(target=given.target.astype(calls.dtype(target)))
        wanted = expected(given, **ROWS, **how)
        x = inside(given.logits, math.nan, at).array
        t = inside(given.target, math.nan if target else 10**6, other).array
        out = inside(np.zeros_like(given.logits), 7.0, out_at)
        found = polyce.cross_entropy_with_grad(x, t, out=out.array, **ROWS, **how)
        calls.agree(found, wanted)
        assert out.untouched(7.0)

    return check


def far(shape: tuple[int, ...], strides: tuple[int, ...], what: str) -> Check:
    """Make a check of one array whose entries lie further apart than 32 bits can express."""

    def check() -> None:
        given = draw(shape, "float16", "probability" if what == "target" else "index")
        given = given._replace(weight=None, sample_weight=None)
        wanted = expected(given, **ROWS)
        x, t = on_device(*given[:2])
        there = calls.far_away(given.target if what == "target" else given.logits, strides)
        if what == "out":
            found = polyce.cross_entropy_with_grad(x, t, out=there, **ROWS)
            calls.agree(found, wanted)
            return
        loss = polyce.cross_entropy(*((x, there) if what == "target" else (there, t)), **ROWS)
        calls.close(loss, wanted[0], 1e-3)

    return check


def labels(values: list[int], dtype: str, bad: list[int], **options: Any) -> Check:
    """Make a check of which labels are out of range, so that their rows are nan."""

    def check() -> None:
        x, t = on_device(np.zeros((len(values), 70), np.float32), np.array(values, dtype))
        loss = polyce.cross_entropy(x, t, **ROWS, **options).get()
        assert np.isnan(loss).tolist() == [i in bad for i in range(len(values))]
        _, grad = polyce.cross_entropy_with_grad(x, t, **ROWS, **options)
        assert np.isnan(grad.get()).all(1).tolist() == np.isnan(loss).tolist()

    return check


def bad_entries() -> None:
    """Check that a row with a class out of range is nan, and no other."""
    x, index, chance = on_device(
        np.zeros((2, 5), np.float32), np.array([[0, 5], [1, 4]]), np.full((2, 2), 0.5, np.float32)
    )
    loss, grad = polyce.cross_entropy_with_grad(x, polyce.SparseTarget(index, chance), **ROWS)
    assert np.isnan(loss.get()).tolist() == [True, False]
    assert np.isnan(grad.get()).all(1).tolist() == [True, False]


def refused_labels() -> None:
    """Check that a label out of range raises with validate=True."""
    x, t = on_device(np.zeros((2, 5), np.float32), np.array([0, 5]))
    try:
        polyce.cross_entropy(x, t, validate=True)
    except IndexError:
        return
    raise AssertionError("a bad label was not refused")


def ignored() -> None:
    """Check that rows which do not count have gradient 0, whatever they hold."""
    x, t = on_device(np.full((2, 5), math.nan, np.float32), np.array([-100, 1]))
    _, grad = polyce.cross_entropy_with_grad(x, t, **ROWS)
    assert grad.get()[0].tolist() == [0.0] * 5


def equal_terms() -> None:
    """Check a row of equal terms, for which rounding errors all go one way."""
    rows = np.zeros((1, 100_000), np.float32)
    rows[0, 0] = 2.3
    given = Given(rows, np.array([1]), None, None)
    with settings(BLOCK=4, LONG=10**6):
        _, grad = polyce.cross_entropy_with_grad(*on_device(*given[:2]), **ROWS)
    wanted = expected(given, **ROWS)[1]
    np.testing.assert_allclose(grad.get(), wanted, rtol=2e-6)


def many_equal_terms() -> None:
    """Check a long row of float64, in which each addition loses as much as the one before."""
    classes = 100_003
    rows, probabilities = np.zeros((1, classes)), np.full((1, classes), 1 / classes)
    with settings(BLOCK=4, LONG=10**6):
        loss = polyce.cross_entropy(*on_device(rows, probabilities), implementation="cupy")
    wanted = float(Fraction(1 / classes) * classes) * math.log(classes)
    assert abs(float(loss) - wanted) <= 4 * math.ulp(wanted)


def equal_rows() -> None:
    """Check the sum of rows that are equal."""
    rows = np.tile(np.array([2.3, 0.0], np.float32), (20_000, 1))
    table = {"BLOCK": 4, "MOST_BLOCKS": 1}
    answers(
        Given(rows, np.zeros(20_000, int), None, None), grad=False, table=table, reduction="sum"
    )


def confident() -> None:
    """Check rows that are nearly certain, to a few units in the last place."""
    rows = np.random.default_rng(0).normal(0.0, 2.0, (8, 10)).astype(np.float32)
    rows[:, 3] += 30.3
    given = Given(rows, np.full(8, 3), None, None)
    exact = expected(given._replace(logits=rows.astype(np.float64)), **ROWS)
    loss = polyce.cross_entropy(*on_device(*given[:2]), **ROWS)
    np.testing.assert_allclose(loss.get(), exact[0], rtol=5e-7)


def distant_teacher() -> None:
    """Check rows that are certain of one class, as their teacher is, to a few units."""
    rows = np.random.default_rng(0).normal(0.0, 2.0, (64, 10)).astype(np.float32)
    rows[:, 0] += 70
    gaps = rows[:, :1].astype(np.float64) - rows[:, 1:]
    others = np.exp(-gaps)
    total = others.sum(1)
    exact = (others * gaps).sum(1) / (1 + total) + np.log1p(total)
    (logits,) = on_device(rows)
    loss = polyce.cross_entropy(logits, polyce.TeacherLogits(logits), reduction="none")
    np.testing.assert_allclose(loss.get(), exact, rtol=7e-7)


def unlikely_labels(**table: int) -> Check:
    """Make a check of the entropy of rows whose label is not the class that leads by far."""

    def check() -> None:
        rows = np.random.default_rng(0).normal(0.0, 1.0, (8, 70))
        rows[:, 3] += 20.0
        x, t = on_device(rows.astype(np.float32), np.full(8, 41))
        with settings(**table):
            _, stats = polyce.cross_entropy(x, t, return_stats="entropy", **ROWS)
        p = np.exp(x.get().astype(np.float64))
        p /= p.sum(1, keepdims=True)
        np.testing.assert_allclose(stats.entropy.get(), -(p * np.log(p)).sum(1), rtol=1e-6)

    return check


def flat() -> None:
    """Check the gradient of the likeliest class where it is barely ahead of the others."""
    rows = np.random.default_rng(0).normal(0.0, 0.25, (8, 512)).astype(np.float32)
    given = Given(rows, np.full((8, 512), 1 / 512, np.float32), None, None)
    wanted = expected(Given(*(a if a is None else a.astype(np.float64) for a in given)), **ROWS)[1]
    _, grad = polyce.cross_entropy_with_grad(*on_device(*given[:2]), **ROWS)
    top = rows.argmax(1)[:, None]
    found, wanted = (np.take_along_axis(a, top, 1) for a in (grad.get(), wanted))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def rounded_once() -> None:
    """Check a loss that float32 would round to the middle between two float16 numbers."""
    x, t = on_device(np.zeros((1, 2), np.float16), np.array([0]))
    wanted = 1 + 2.0**-11 + 2.0**-30
    (v,) = on_device(np.array([wanted / float(np.float32(math.log(2)))]))
    loss = polyce.cross_entropy(x, t, sample_weight=v, reduction="none")
    assert loss.get().tolist() == [1 + 2.0**-10]


def nearest() -> None:
    """Check that bfloat16 gradients are rounded to the nearest."""
    given = draw((20, 40), "bfloat16", "index", ignored=False)
    given = given._replace(weight=None, sample_weight=None)
    wanted = expected(given, **ROWS)[1]
    _, found = polyce.cross_entropy_with_grad(*on_device(*given[:2]), **ROWS)
    assert np.mean(found.get() == wanted) > 0.97


def same_bits() -> None:
    """Check that no order of blocks changes a bit."""
    from cupy import emulation

    given = draw((200, 10), "float64", "index")
    x, t, w, v = on_device(*given)
    seen = set()
    with settings(BLOCK=32, MOST_BLOCKS=40):
        orders = [("forward", 0), ("reverse", 0), *(("shuffled", seed) for seed in range(6))]
        for emulation.order, emulation.seed in orders:
            loss, grad = polyce.cross_entropy_with_grad(x, t, w, sample_weight=v)
            seen.add(loss.get().tobytes() + grad.get().tobytes())
    assert len(seen) == 1


def two_calls(first: dict[str, Any], second: dict[str, Any]) -> Check:
    """Make a check of two calls in a row that differ in where their arrays lie."""

    def check() -> None:
        for how in (first, second):
            shape, out_at, apart = (how.get(key, 0) for key in ("shape", "out_at", "apart"))
            given = draw(shape, "float32", "index")._replace(weight=None, sample_weight=None)
            x = inside(given.logits, math.nan, 0, (shape[1] + apart, 1)).array
            out = inside(given.logits, 7.0, out_at)
            (t,) = on_device(given.target)
            found = polyce.cross_entropy_with_grad(x, t, out=out.array, **ROWS)
            calls.agree(found, expected(given, **ROWS))

    return check


def elsewhere() -> None:
    """Check a call on arrays of the device that is not the current one."""
    import cupy

    with cupy.cuda.Device(1):
        x, t, w, v = on_device(*draw((3, 5), "float32", "index"))
    _, grad = polyce.cross_entropy_with_grad(x, t, w, sample_weight=v, **ROWS)
    assert grad.data.device_id == 1
    assert polyce.cross_entropy(x, t, w, sample_weight=v, **ROWS).data.device_id == 1


def odd_layout() -> None:
    """Check arrays in an order that the kernels do not know."""
    given = draw((2, 3, 5, 2, 2), "float32", "index")
    given = given._replace(weight=None, sample_weight=None)
    wanted = expected(given, **ROWS)
    order = (4, 0, 3, 1, 2)
    back = tuple(int(i) for i in np.argsort(order))
    x, out = (
        on_device(np.ascontiguousarray(array.transpose(order)))[0].transpose(back)
        for array in (given.logits, given.logits * 0)
    )
    (t,) = on_device(given.target)
    calls.agree(polyce.cross_entropy_with_grad(x, t, out=out, **ROWS), wanted)


def races() -> None:
    """Replay a mean over several blocks under ThreadSanitizer."""
    import replay
    from cupy import emulation

    given = draw((12, 10), "float32", "index")
    x, t = on_device(*given[:2])
    with (
        settings(BLOCK=32, MOST_BLOCKS=4, PER_THREAD=2),
        tempfile.TemporaryDirectory() as folder,
    ):
        with emulation.record(folder):
            polyce.cross_entropy_with_grad(x, t)
        assert replay.main([folder, "--sanitize", "thread"]) == 0
