"""The cupy path on emulated CuPy: where arrays may lie, and that no other memory is touched."""

from __future__ import annotations

import ctypes
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import cupy_calls as calls
import polyce
from cupy_calls import DTYPES, EVERYTHING, draw, expected, inside, settings

pytestmark = [pytest.mark.only("cupy-emulated"), pytest.mark.slow("cupy-emulated")]

# A label read from outside the array would be out of range, and make its row nan.
OUTSIDE = {"index": 10**6, "probability": math.nan}
SHAPES = [
    *((3, 10), (2, 63), (2, 64), (2, 65), (2, 100), (2, 1001), (2, 4099)),
    *((2, 7, 5), (2, 19, 3, 4), (2, 1, 3), (5,), (1, 1)),
]


@pytest.fixture(autouse=True)
def cupy() -> Iterator[Any]:
    import cupy

    cupy.emulation.reset()
    yield cupy
    cupy.emulation.reset()


@pytest.mark.parametrize("kind", OUTSIDE)
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_outside_is_read_or_written(shape: tuple[int, ...], name: str, kind: str) -> None:
    given = draw(shape, name, kind)
    wanted = expected(given, **EVERYTHING)
    x, w, v = (
        inside(values, math.nan, offset).array
        for values, offset in ((given.logits, 5), (given.weight, 1), (given.sample_weight, 2))
    )
    t = inside(given.target, OUTSIDE[kind], 3).array
    out = inside(np.zeros_like(given.logits), math.nan, 6)
    found = polyce.cross_entropy_with_grad(x, t, w, sample_weight=v, out=out.array, **EVERYTHING)
    assert found[1] is out.array
    calls.agree(found, wanted)
    assert out.untouched(math.nan)
    loss, _ = polyce.cross_entropy(x, t, w, sample_weight=v, **EVERYTHING)
    calls.close(loss, wanted[0], calls.CLOSE[str(loss.dtype)])


@pytest.mark.slow("cupy-emulated")
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("classes", [65, 72, 1001])
def test_rows_begin_anywhere(classes: int, name: str) -> None:
    vector = 16 // np.dtype(calls.dtype(name)).itemsize
    for kind, stride in itertools.product(OUTSIDE, (classes, classes + 1, classes + 8)):
        given = draw((2, classes), name, kind)._replace(weight=None, sample_weight=None)
        wanted = expected(given)
        for at, other in itertools.product(range(vector), repeat=2):
            # Only a few of the pairs with the same distance.
            if classes > 100 and at not in (0, 1, other):
                continue
            x = inside(given.logits, math.nan, at, (stride, 1))
            t = given.target
            t = inside(
                t, OUTSIDE[kind], other, (stride, 1) if kind == "probability" else (2,)
            ).array
            out = inside(np.zeros_like(given.logits), 7.0, 3 * other % vector, (stride + at, 1))
            for place in (None, out, x):
                found = polyce.cross_entropy_with_grad(
                    x.array, t, out=None if place is None else place.array
                )
                calls.agree(found, wanted)
            assert out.untouched(7.0)
            assert x.untouched(math.nan)


@pytest.mark.parametrize("name", ["float16", "float64"])
@pytest.mark.parametrize("target", DTYPES)
def test_probabilities_of_another_width(name: str, target: str) -> None:
    given = draw((2, 72), name, "probability")
    given = given._replace(target=given.target.astype(calls.dtype(target)))
    for options in ({}, {"return_stats": True}):
        wanted = expected(given, **options)
        for at, other in itertools.product(range(4), repeat=2):
            x = inside(given.logits, math.nan, at).array
            t = inside(given.target, math.nan, other).array
            w, v = calls.on_device(given.weight, given.sample_weight)
            found = polyce.cross_entropy_with_grad(x, t, w, sample_weight=v, **options)
            calls.agree(found, wanted)


FAR = 2**31 + 64
STRIDES = {
    "rows": ((3, 70), (FAR, 1)),
    "short rows": ((3, 5), (FAR, 1)),
    "classes": ((2, 3, 4), (4, FAR, 1)),
    "neighbours": ((2, 3, 3), (1, 2, FAR)),
    "outer": ((3, 5, 4), (FAR, 4, 1)),
    # 32 bits hold one such stride, but not two.
    "half as far": ((4, 70), (FAR // 2, 1)),
    "classes half as far": ((2, 4, 4), (4, FAR // 2, 1)),
}


@pytest.mark.parametrize("kind", OUTSIDE)
@pytest.mark.parametrize("name", STRIDES)
def test_strides_beyond_32_bits(name: str, kind: str) -> None:
    shape, strides = STRIDES[name]
    given = draw(shape, "float16", kind)._replace(weight=None, sample_weight=None)
    wanted = expected(given)
    x, t = calls.on_device(given.logits, given.target)
    far = calls.far_away(given.logits, strides)
    there = calls.far_away(given.target, strides) if kind == "probability" else t
    for logits, target, out in (
        (far, there, None),
        (x, there, calls.far_away(given.logits * 0, strides)),
    ):
        calls.agree(polyce.cross_entropy_with_grad(logits, target, out=out), wanted)
    loss = polyce.cross_entropy(far, there)
    calls.close(loss, wanted[0], 1e-3)
    calls.agree(polyce.cross_entropy_with_grad(far, t, out=far), wanted)


def test_a_split_row_beyond_32_bits() -> None:
    given = draw((3, 70), "float16", "index")
    wanted = expected(given)
    far = calls.far_away(given.logits, (FAR, 1))
    t, w, v = calls.on_device(*given[1:])
    with settings(**calls.SPLIT):
        found = polyce.cross_entropy_with_grad(far, t, w, sample_weight=v, out=far)
    calls.agree(found, wanted)


@pytest.mark.parametrize("shape", [(3, 5), (2, 5, 4), (2, 3, 5, 4), (5,)])
def test_the_gradient_lies_as_the_logits_do(shape: tuple[int, ...]) -> None:
    given = draw(shape, "float32", "index")
    for order in itertools.permutations(range(len(shape))):
        back = np.argsort(order)
        for kind in OUTSIDE:
            given = draw(shape, "float32", kind)
            wanted = expected(given)
            # In memory the axes come in that order.
            logits = np.ascontiguousarray(given.logits.transpose(order)).transpose(back)
            (x,) = calls.on_device(np.ascontiguousarray(given.logits.transpose(order)))
            x = x.transpose(tuple(back))
            t, w, v = calls.on_device(*given[1:])
            found = polyce.cross_entropy_with_grad(x, t, w, sample_weight=v)
            calls.agree(found, wanted)
            assert found[1].strides == x.strides == logits.strides
            over = polyce.cross_entropy_with_grad(x, t, w, sample_weight=v, out=x)
            assert over[1] is x
            calls.agree(over, wanted)


def test_what_lies_in_no_known_order_is_copied() -> None:
    import cupy

    # One stride does not describe the axes before the classes, nor those after them.
    given = draw((2, 3, 5, 2, 2), "float32", "probability")
    given = given._replace(weight=None, sample_weight=None)
    logits, p = (np.moveaxis(array, 1, 2) for array in (given.logits, given.target))
    wanted = polyce.cross_entropy_with_grad(logits, p, axis=2, implementation="reference")
    mixed = (3, 0, 2, 4, 1)
    x, t, out = (
        cupy.asarray(np.ascontiguousarray(array.transpose(mixed))).transpose(
            tuple(int(i) for i in np.argsort(mixed))
        )
        for array in (logits, p, logits * 0)
    )
    for inputs, place in (((x, t), None), ((x, t), out), ((x, t), x)):
        found = polyce.cross_entropy_with_grad(*inputs, axis=2, out=place)
        calls.agree(found, wanted)
        assert place is None or found[1] is place
        x = out if place is x else x


PRELUDE = """
struct Place_ { unsigned long long first, end, count; };
extern "C" { __attribute__((visibility("default"))) Place_ counted[4]; }
inline void count(const void* address, int size) {
  for (Place_& each : counted)
    if ((unsigned long long)address >= each.first && (unsigned long long)address < each.end)
      each.count += size;
}
"""
# Where the kernels' text loads a logit or a probability or stores a gradient: what goes before.
ACCESSES = {
    r"numbers\[0\] = \(real\)Stored<KIND>::widen\(\*place\);": "count(place, 1); ",
    r"const Words<W \* sizeof\(\*place\) / 4> words = \*": "count(place, W); ",
    r"ahead\[u\] = \*\(const": "count(next + u * step, WIDTH), ",
    r"\*place = Stored<KIND>::narrow\(numbers\[0\]\);": "count(place, 1); ",
    r"\*\(Words<N>\*\)place = words;": "count(place, W); ",
    r"place\[w\] = Stored<LOGITS>::narrow\(result\[u\]\[w\]\);": "count(&place[w], 1), ",
    r"taken\.p\[u\]\[w\] = \(real\)": "count(&p[(c + w) * (WIDTH > 1 ? 1 : call.t_class)], 1), ",
    r"const real label = here": "count(&x[meaning.label * call.x_class], 1); ",
}


@pytest.fixture
def counting(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Return a function that counts a call's accesses to some arrays, in elements."""
    from cupy import _build

    from polyce.implementations.cupy import launch as cupy_launch
    from polyce.implementations.cupy import plan as cupy_plan

    text = cupy_plan.source()
    for access, before in ACCESSES.items():
        text, places = re.subn(f"(?={access})", before, text)
        assert places == 1, f"the kernels do not say {access} any more"
    monkeypatch.setattr(cupy_plan, "_text", [PRELUDE + text])
    monkeypatch.setattr(cupy_launch, "_kernels", {})

    class Place(ctypes.Structure):
        _fields_ = tuple((name, ctypes.c_ulonglong) for name in ("first", "end", "count"))

    def count(call: Callable[[], Any], *arrays: Any) -> list[int]:
        # The first call compiles the kernels that count in the second.
        call()
        places = []
        for kernel in cupy_launch._kernels.values():
            library = _build.library(kernel.code, kernel.options)
            places.append((Place * 4).in_dll(library.handle, "counted"))
            for place, array in zip(places[-1], arrays, strict=False):
                first = array.data.ptr
                place.first, place.end, place.count = first, first + array.nbytes, 0
        call()
        return [sum(each[i].count for each in places) for i in range(len(arrays))]

    return count


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    "shape", [(300, 10), (5, 70), (2, 4099), (2, 19, 10), (2, 3, 4, 5)], ids=str
)
@pytest.mark.parametrize("kind", OUTSIDE)
def test_what_is_read_and_written(
    counting: Callable[..., list[int]], shape: tuple[int, ...], kind: str, split: bool
) -> None:
    given = draw(shape, "float32", kind)
    x, t = calls.on_device(*given[:2])
    grad = calls.on_device(given.logits)[0]
    t_count = t.size if kind == "probability" else 0
    # An ignored row is not read at all; of every other row the label's logit is read once more.
    ignored = int((given.target < 0).sum())
    left_out = ignored * shape[1]
    read = x.size - left_out + (t.size - ignored if kind == "index" else 0)
    with settings(**(calls.SPLIT if split and len(shape) < 3 else {})):
        places = (x, grad, *([t] if t_count else []))
        once = counting(lambda: polyce.cross_entropy(x, t), *places)
        twice = counting(lambda: polyce.cross_entropy_with_grad(x, t, out=grad), *places)
    assert once[:2] == [read, 0]
    # Rows whose gradient is written as zeros may still be read for that.
    assert twice[0] - read in (x.size - left_out, x.size)
    assert twice[1] == x.size
    if t_count:
        assert once[2] == t_count
        assert twice[2] == 2 * t_count
