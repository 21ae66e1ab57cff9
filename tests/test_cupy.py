"""The cupy path on emulated CuPy: its answers, what it launches, what it refuses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import cupy_calls as calls
import polyce
from conftest import FULL
from cupy_calls import draw, expected, inside, on_device, settings
from polyce.testing import GROUPS, check_implementation

pytestmark = pytest.mark.only("cupy-emulated")

ORDERS = ("forward", "reverse", "shuffled")


@pytest.fixture(autouse=True)
def cupy() -> Iterator[Any]:
    import cupy

    cupy.emulation.reset()
    yield cupy
    cupy.emulation.reset()


@pytest.fixture
def emulation(cupy: Any) -> Any:
    return cupy.emulation


def names(emulation: Any) -> list[str]:
    """Return the names of the kernels launched since the last call."""
    found = [launch.name for launch in emulation.launches]
    emulation.launches.clear()
    return found


@pytest.mark.slow("cupy-emulated")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("values", [calls.SPLIT, calls.SHARED], ids=["split", "shared"])
def test_grid_in_parts_and_in_shared_blocks(
    values: dict[str, int], order: str, emulation: Any
) -> None:
    emulation.order = order
    groups = ("shapes", "special", "targets", "combined", "stats", "accuracy")
    with settings(**values):
        report = check_implementation(
            "cupy",
            "cupy",
            groups=GROUPS if FULL else groups,
            leave_out=None if FULL else calls.chosen(groups, 3),
        )
    print(report)
    launched = set(names(emulation))
    wanted = {"join", "backward"} if values is calls.SPLIT else {"reduce", "forward_backward"}
    assert launched >= wanted


def test_the_grid_takes_cupy_for_it() -> None:
    report = check_implementation("cupy", groups=["cotangent"], dtypes=["float32"])
    assert report.backend == "cupy"


@pytest.mark.slow("cupy-emulated")
def test_exponentials_as_inexact_as_a_gpu_s(emulation: Any) -> None:
    # Off by up to two units in the last place, which is within the tolerances.
    emulation.defines = ("-DSHIM_EXP_ERROR=2",)
    report = check_implementation("cupy", "cupy", groups=["accuracy"], dtypes=["float32"])
    assert report.ran["accuracy"] > 40


@pytest.mark.slow("cupy-emulated")
def test_subnormal_numbers_taken_for_0(emulation: Any) -> None:
    # As CuPy compiles all kernels; on a CPU float64 is affected too.
    emulation.flushes = True
    check_implementation("cupy", "cupy", groups=["accuracy"], dtypes=["float32", "bfloat16"])


def bits(found: tuple[Any, ...]) -> list[bytes]:
    """Return the bytes of loss, gradient and stats."""
    results = (*found[:2], *(found[2] if found[2:] else ()))
    return [each.get().tobytes() for each in results if each is not None]


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize(
    ("shape", "values"),
    [
        ((300, 10), {"MOST_BLOCKS": 7}),
        ((3000, 2), {}),
        ((40, 70), {"BLOCK": 32}),
        ((2, 19, 40), {"BLOCK": 64}),
        ((5, 3000), {"BLOCK": 64, "LONG": 256, "PART": 256}),
    ],
)
def test_the_same_bits_again(
    emulation: Any, shape: tuple[int, ...], values: dict[str, int], kind: str
) -> None:
    given = draw(shape, "float32", kind)
    x, t, w, v = on_device(*given)

    def run(order: str, seed: int, out: Any = None) -> list[bytes]:
        emulation.order, emulation.seed = order, seed
        return bits(polyce.cross_entropy_with_grad(x, t, w, sample_weight=v, out=out))

    with settings(**values):
        wanted = run("forward", 0)
        # In reverse order the first block finishes last, in each shuffled order another one.
        for order, seed in (("forward", 1), ("reverse", 0), *(("shuffled", n) for n in range(4))):
            assert run(order, seed) == wanted, (order, seed)
        loss = polyce.cross_entropy(x, t, w, sample_weight=v)
        for order in ORDERS:
            emulation.order = order
            again = polyce.cross_entropy(x, t, w, sample_weight=v)
            assert again.get().tobytes() == loss.get().tobytes()
        other = x.copy()
        assert run("shuffled", 9, out=other) == wanted
        assert run("shuffled", 7, out=x) == wanted
    calls.agree((cupy_array(wanted[0], loss), x), expected(given))


def cupy_array(raw: bytes, like: Any) -> Any:
    import cupy

    return cupy.asarray(np.frombuffer(raw, like.dtype).reshape(like.shape))


FEW_ROWS = (["forward", "join"], ["forward", "backward"])
MANY_ROWS = (["forward", "reduce"], ["weigh", "forward_backward"])
# The launches of a loss, and of a loss with its gradient.
LAUNCHES = {
    ((300, 10), "none"): (["forward"], ["forward_backward"]),
    ((300, 10), "mean"): MANY_ROWS,
    ((300, 10), "sum"): MANY_ROWS,
    ((3, 100), "mean"): MANY_ROWS,
    ((2, 19, 30), "mean"): MANY_ROWS,
    ((100,), "mean"): MANY_ROWS,
    ((2, 40_000), "none"): FEW_ROWS,
    ((2, 40_000), "mean"): FEW_ROWS,
    ((2, 40_000), "sum"): FEW_ROWS,
}


@pytest.mark.parametrize(("shape", "reduction"), LAUNCHES, ids=str)
def test_launches_waits_and_memory(emulation: Any, shape: tuple[int, ...], reduction: str) -> None:
    forward, both = LAUNCHES[shape, reduction]
    given = draw(shape, "float32", "index")
    x, t, w, v = on_device(*given)
    out = on_device(given.logits)[0]
    options = {"reduction": reduction, "sample_weight": v, "return_stats": True}
    emulation.reset()

    def large() -> list[int]:
        found = [size for size in emulation.allocations if size >= x.nbytes]
        emulation.allocations.clear()
        return found

    polyce.cross_entropy(x, t, w, **options)
    assert names(emulation) == forward
    assert large() == []
    polyce.cross_entropy_with_grad(x, t, w, **options)
    assert names(emulation) == both
    assert large() == [x.nbytes]
    for place in (out, x):
        polyce.cross_entropy_with_grad(x, t, w, out=place, **options)
        assert names(emulation) == both
        assert large() == []
    assert (emulation.synchronizations, emulation.other_kernels) == (0, 0)
    polyce.cross_entropy(x, t, w, validate=True, **options)
    assert names(emulation) == forward
    assert emulation.synchronizations > 0


@pytest.mark.parametrize("shape", [(0, 5), (2, 5, 0), (2, 0), (0, 0), (0,)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_no_launch_for_nothing(emulation: Any, shape: tuple[int, ...], reduction: str) -> None:
    for kind in ("index", "probability"):
        rows = (*shape[:1], *shape[2:]) if len(shape) > 1 else ()
        target = np.full(rows, -100) if kind == "index" else np.zeros(shape, np.float32)
        given = calls.Given(np.zeros(shape, np.float32), target, None, None)
        x, t = on_device(*given[:2])
        wanted = expected(given, reduction=reduction)
        for out in (None, x):
            found = polyce.cross_entropy_with_grad(x, t, reduction=reduction, out=out)
            calls.agree(found, wanted)
        calls.close(polyce.cross_entropy(x, t, reduction=reduction), wanted[0], 0.0)
    assert names(emulation) == []


BAD = [-1, 70, 2**31, 2**31 + 3, 2**32 + 3, 2**40, -(2**63)]


@pytest.mark.parametrize("bad", BAD)
def test_bad_labels(bad: int) -> None:
    given = draw((3, 70), "float32", "index", ignored=False)
    labels = given.target.copy()
    labels[1] = bad
    x, t, w = on_device(given.logits, labels, given.weight)
    for options in ({}, {"label_smoothing": 0.1}):
        wanted = expected(given._replace(sample_weight=None), reduction="none", **options)
        wanted[0][1] = wanted[1][1] = math.nan
        for validate in (None, False):
            options |= {"reduction": "none", "validate": validate}
            calls.agree(polyce.cross_entropy_with_grad(x, t, w, **options), wanted)
            calls.close(polyce.cross_entropy(x, t, w, **options), wanted[0], 4e-6)
    out = inside(np.full((3, 70), 7.0, np.float32), 7.0)
    for place in (None, out.array, x):
        with pytest.raises(IndexError, match=rf"0 to 69 .* got {bad} at position \(1,\)"):
            polyce.cross_entropy_with_grad(x, t, w, out=place, validate=True)
    with pytest.raises(IndexError, match=f"got {bad} at"):
        polyce.cross_entropy(x, t, w, validate=True)
    assert (out.memory.get() == 7.0).all()
    assert np.array_equal(x.get(), given.logits)


def test_split_rows_with_bad_and_ignored_labels() -> None:
    given = draw((4, 70), "float32", "index", ignored=False)
    labels = given.target.copy()
    labels[1:3] = (70, -100)
    x, t = on_device(given.logits, labels)
    wanted = polyce.cross_entropy_with_grad(
        given.logits, labels, reduction="none", validate=False, implementation="reference"
    )
    with settings(**calls.SPLIT):
        found = polyce.cross_entropy_with_grad(x, t, reduction="none", return_stats=True)
        calls.agree(found[:2], wanted)
        assert found[2].valid.tolist() == [True, True, False, True]
        assert found[2].correct.tolist()[1:3] == [False, False]
        assert math.isnan(polyce.cross_entropy(x, t))


NUMBERS: list[Any] = [2, 2.0, np.float32(2), np.float64(2), np.int64(2)]
ZERO_D = ["float16", "float32", "float64", "int32", "uint8"]


@pytest.mark.parametrize("split", [False, True])
def test_numbers_and_arrays_without_axes(split: bool) -> None:
    given = draw((3, 70), "float32", "index")
    x, t, w, v = on_device(*given)
    arguments = {"sample_weight": v, "label_smoothing": 0.1}
    with settings(**(calls.SPLIT if split else {})):
        for name, other in (("normalizer", 1.0), ("grad_output", 1.0)):
            wanted = expected(given, label_smoothing=0.1, **{name: 2.0})
            plain = expected(given, label_smoothing=0.1)
            assert not np.array_equal(plain[1], wanted[1])
            values = [*NUMBERS, *(on_device(np.array(2, dtype))[0] for dtype in ZERO_D)]
            for value in values:
                found = polyce.cross_entropy_with_grad(x, t, w, **arguments, **{name: value})
                calls.agree(found, wanted)
                if name == "normalizer":
                    loss = polyce.cross_entropy(x, t, w, normalizer=value, **arguments)
                    calls.close(loss, wanted[0], 4e-6)
            # The plan of the last call must not be reused for the next.
            found = polyce.cross_entropy_with_grad(x, t, w, **arguments, **{name: other})
            calls.agree(
                found,
                plain
                if name == "grad_output"
                else expected(given, label_smoothing=0.1, normalizer=1.0),
            )


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64", "uint8"])
@pytest.mark.parametrize("split", [False, True])
def test_numbers_of_rows(dtype: str, split: bool) -> None:
    shape = (3, 70) if split else (2, 7, 5)
    given = draw(shape, "float32", "index")
    rows = given.target.shape
    g, v = (np.random.default_rng(seed).integers(0, 4, rows).astype(dtype) for seed in (1, 2))
    weight = np.arange(shape[1]).astype(dtype)
    given = given._replace(sample_weight=v, weight=weight)
    wanted = expected(given, reduction="none", grad_output=g)
    x, t = on_device(*given[:2])
    with settings(**(calls.SPLIT if split else {})):
        for step in (1, 2):
            strides = (step,) if split else (5 * step, step)
            spread, sample = (inside(each, 99, 1, strides).array for each in (g, v))
            w = inside(weight, 99, 1, (step,)).array
            found = polyce.cross_entropy_with_grad(
                x, t, w, sample_weight=sample, reduction="none", grad_output=spread
            )
            calls.agree(found, wanted)
