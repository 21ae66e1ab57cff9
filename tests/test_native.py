"""The compiled kernels: the grid on every instruction set, the same bits everywhere, 4 ulp."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest

import polyce
from conftest import FEW, FULL
from polyce.implementations.native import core as native
from polyce.testing import GROUPS, Case, cases, check_implementation, exact_answer
from polyce.testing.backends import Backend
from polyce.testing.dtypes import FORMATS
from polyce.testing.dtypes import dtype as dtype_named
from polyce.testing.selection import representative

pytestmark = pytest.mark.only("numpy", "torch")

ISAS = native.core().isas()
# Without fused multiply-add, sums round in more places.
FUSED = [name for name in ISAS if name != "baseline"]


@pytest.fixture
def settings() -> Iterator[Any]:
    """The core; its instruction set and number of threads are restored after the test."""
    core = native.core()
    isa, threads = core.isa(), core.get_num_threads()
    yield core
    core.use_isa(isa)
    core.set_num_threads(threads)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("group", GROUPS)
def test_grid(backend: Backend, settings: Any, isa: str, group: str) -> None:
    assert settings.use_isa(isa)
    leave_out = None
    if FEW or (isa != ISAS[0] and not FULL):
        chosen = {case.name for case in representative(cases([group]))}

        def leave_out(case: Case) -> str:
            return "" if case.name in chosen else "not among the few that stand for its group"

    print(check_implementation("native", backend, groups=[group], leave_out=leave_out))


def arrays(rows: int, classes: int, dtype: str = "float32") -> tuple[Any, Any]:
    rng = np.random.default_rng(rows * classes)
    logits = 4 * rng.standard_normal((rows, classes))
    return logits.astype(dtype), rng.integers(0, classes, rows)


# One for each way through the kernels: across rows in one chunk or several, along rows with or
# without a tail, blocks of rows that keep their exponentials.
SHAPES = [(1, 1), (5, 2), (300, 10), (129, 64), (40, 65), (7, 1000), (3, 2048), (2, 9001)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1},
    {"logit_softcap": 5.0},
    {"logit_scale": 0.7, "z_loss": 0.1, "return_stats": True},
    {"return_stats": ("top_probability", "brier")},
]


def everything(logits: Any, target: Any, options: dict[str, Any]) -> list[bytes]:
    """Return the bits of everything that a call computes, for rows and reduced."""
    found: list[Any] = []
    for reduction in ("none", "mean"):
        alone = polyce.cross_entropy(logits, target, reduction=reduction, **options)
        both = polyce.cross_entropy_with_grad(logits, target, reduction=reduction, **options)
        loss = alone[0] if options.get("return_stats") else alone
        assert np.asarray(loss).tobytes() == np.asarray(both[0]).tobytes(), "loss without gradient"
        found += [both[0], both[1], *(both[2] if len(both) == 3 else ())]
    return [np.ascontiguousarray(array).tobytes() for array in found]


@pytest.mark.same_everywhere
@pytest.mark.only("numpy")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_the_same_bits(settings: Any, shape: tuple[int, int], options: dict[str, Any]) -> None:
    for dtype in ("float16", "float32", "float64"):
        logits, labels = arrays(*shape, dtype)
        soft = np.abs(logits) / 10
        for target in (labels, soft):
            for layout in (logits, np.asfortranarray(logits)):
                bits = []
                for isa in FUSED or ISAS[:1]:
                    for threads in (1, 2, 64):
                        settings.use_isa(isa)
                        settings.set_num_threads(threads)
                        bits.append(everything(layout, target, options))
                assert all(one == bits[0] for one in bits), (dtype, isa)


@pytest.mark.same_everywhere
@pytest.mark.only("numpy")
@pytest.mark.parametrize("shape", [(130, 10), (17, 65), (5, 1000), (2, 9001)], ids=str)
def test_the_same_bits_for_sparse_targets_and_teachers(
    settings: Any, shape: tuple[int, int]
) -> None:
    for dtype in ("float16", "float32", "float64"):
        logits, labels = arrays(*shape, dtype)
        index = np.stack([labels, labels, (labels + 3) % shape[1]], axis=1)
        sparse = polyce.SparseTarget(index, np.abs(logits[:, :3]) / 10)
        for target in (sparse, polyce.TeacherLogits(logits[::-1], 0.7)):
            for options in OPTIONS[:4]:
                bits = []
                for isa, threads in product(FUSED or ISAS[:1], (1, 3)):
                    settings.use_isa(isa)
                    settings.set_num_threads(threads)
                    bits.append(everything(logits, target, options))
                assert all(one == bits[0] for one in bits), (dtype, options)


@pytest.mark.same_everywhere
@pytest.mark.only("numpy")
@pytest.mark.parametrize("classes", [2, 5, 64, 70, 1000])
def test_float32_rows_with_a_teacher_are_within_4_ulp(settings: Any, classes: int) -> None:
    form, rows = FORMATS["float32"], 6 if classes == 1000 else 12
    rng = np.random.default_rng(classes)
    random, other = rng.standard_normal((2, rows, classes))
    ahead, sure = random.copy(), other.copy()
    ahead[:, 0] += np.linspace(5, 85, rows)
    sure[:, 0] += np.linspace(85, 45, rows)
    families = [(ahead, sure), (sure, sure), (random, sure), (np.roll(ahead, 1, 1), sure)]
    families += [(ahead + 1e4, sure - 3e4), (10 * random, 10 * other)]
    for (x, t), scale in product(families, (1.0, 0.3)):
        logits, teacher = x.astype(np.float32), t.astype(np.float32)
        answer = exact_answer(logits, teacher, reduction="none", teacher_scale=scale)
        for order, isa in product("CF", ISAS):
            settings.use_isa(isa)
            given, target = (np.asarray(a, order=order) for a in (logits, teacher))
            loss = polyce.cross_entropy(
                given, polyce.TeacherLogits(target, scale), reduction="none",
                implementation="native",
            )  # fmt: skip
            ulps = np.abs(loss.astype(np.float64) - answer.loss) / form.spacing(answer.loss)
            assert ulps.max() <= 4.0, (order, isa, scale, ulps.max())


@pytest.mark.same_everywhere
@pytest.mark.only("numpy")
@pytest.mark.parametrize(
    "classes", [2, 5, 10, 64, 1000, pytest.param(32000, marks=pytest.mark.slow("numpy"))]
)
def test_float32_rows_and_label_entries_are_within_4_ulp(settings: Any, classes: int) -> None:
    form = FORMATS["float32"]
    rng = np.random.default_rng(classes)
    rows = {1000: 24 if FULL else 6, 32000: 4 if FULL else 2}.get(classes, 24)
    labels = rng.integers(0, classes, rows)
    random = rng.standard_normal((rows, classes))
    flat = np.full((rows, classes), 0.3)
    ahead = random.copy()
    ahead[np.arange(rows), labels] += np.linspace(-20, 80, rows)
    families = [random, 3 * random, 10 * random, 300 * random, flat, flat + 1e-7 * random]
    families += [ahead, random + 1e4, 3 * random - 3e4, ahead + 1e4]
    for index, family in enumerate(families):
        logits = family.astype(np.float32)
        answer = exact_answer(logits, labels, reduction="none")
        for order, isa in product(("C", "F"), ISAS):
            settings.use_isa(isa)
            loss, grad = polyce.cross_entropy_with_grad(
                np.asarray(logits, order=order), labels, reduction="none", implementation="native"
            )
            place = (np.arange(rows), labels)
            for got, want in ((loss, answer.loss), (grad[place], answer.grad[place])):
                ulps = np.abs(got.astype(np.float64) - want) / form.spacing(np.abs(want))
                assert ulps.max() <= 4.0, (index, order, isa, ulps.max())
            beside = ("entropy",) if index % 2 else ()
            _, stats = polyce.cross_entropy(
                np.asarray(logits, order=order), labels, implementation="native",
                return_stats=("top_probability", "brier", "rank", *beside),
            )  # fmt: skip
            for name in ("top_probability", "brier"):
                want = getattr(answer.stats, name)
                ulps = np.abs(getattr(stats, name) - want) / form.spacing(want)
                assert ulps.max() <= 4.0, (name, index, order, isa, ulps.max())
            assert np.array_equal(stats.rank, answer.stats.rank)


@pytest.mark.same_everywhere
@pytest.mark.only("numpy")
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_number_of_classes(settings: Any, dtype: str, order: str) -> None:
    """Row i has label i: a pivot at every place of a register, and every length of the last one."""
    form = FORMATS[dtype]
    limit = 16.0 if dtype == "float64" else 4.0  # the reference's own error among them
    rng = np.random.default_rng(7)
    step = 1 if FULL else 3
    counts = [*range(1, 40), *range(40, 301, step), 2047, 2048, 2049, 2063, 4097]
    for classes in counts:
        labels = np.arange(classes) if classes <= 300 else rng.integers(1, classes, 8)
        logits = 3 * rng.standard_normal((len(labels), classes))
        logits[np.arange(0, len(labels), 3), labels[::3]] += 20
        logits[1::7, 0] = -np.inf
        given = np.asarray(logits.astype(dtype_named(dtype)), order=order)
        wide = given.astype(np.float64)
        exact = polyce.cross_entropy_with_grad(
            wide, labels, reduction="none", implementation="reference"
        )
        # Of gaps that were rounded are the small entries made.
        gap = np.minimum(wide.max(axis=1, keepdims=True) - wide, 100)
        bits = []
        for isa in ISAS:
            settings.use_isa(isa)
            loss, grad = polyce.cross_entropy_with_grad(
                given, labels, reduction="none", implementation="native"
            )
            for got, want, ulps in ((loss, exact[0], limit), (grad, exact[1], limit * (1 + gap))):
                error = np.abs(got.astype(np.float64) - want)
                assert (error <= ulps * form.spacing(np.abs(want))).all(), (classes, isa)
            alone = polyce.cross_entropy(given, labels, reduction="none", implementation="native")
            assert alone.tobytes() == loss.tobytes(), (classes, isa)
            out = given.copy(order="K")
            polyce.cross_entropy_with_grad(
                out, labels, reduction="none", implementation="native", out=out
            )
            assert out.tobytes() == grad.tobytes(), (classes, isa)
            if isa in FUSED:
                bits.append(loss.tobytes() + grad.tobytes())
        assert all(one == bits[0] for one in bits), classes


@pytest.mark.only("numpy")
@pytest.mark.parametrize("classes", [4, 70])
def test_entries_of_a_masked_class_that_cancel_have_no_effect(classes: int) -> None:
    x = np.zeros((1, classes))
    x[0, :4] = 1.0, -np.inf, 2.0, 0.5
    index = np.array([[1, 3, 1]])
    for shares, loss in (((0.5, 1.0, -0.5), "finite"), ((0.5, 1.0, 0.25), "inf")):
        got = polyce.cross_entropy(
            x, polyce.SparseTarget(index, np.array([shares])), implementation="native"
        )
        dense = np.zeros((1, classes))
        np.add.at(dense, (0, index[0]), np.array(shares))
        assert np.isinf(got) == (loss == "inf")
        np.testing.assert_allclose(got, polyce.cross_entropy(x, dense), rtol=1e-14)


@pytest.mark.only("numpy")
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("classes", [9, 70, 5000, 70_000])
def test_targets_of_many_classes(classes: int, order: str) -> None:
    """Of several tiles or blocks of a row, each raises the largest logit and the teacher's."""
    rng = np.random.default_rng(classes)
    rising = np.linspace(0.0, 30.0, classes)
    x, teacher = (np.asarray(rng.standard_normal((5, classes)) + rising, order=order) for _ in "ab")
    index, shares = rng.integers(0, classes, (5, 3)), rng.random((5, 3))
    index[:, 2] = index[:, 1]
    index[0, 0] = x[0].argmax()
    soft = np.zeros((5, classes))
    np.add.at(soft, (np.arange(5)[:, None], index), shares)
    softmax = np.exp(polyce.log_softmax(teacher, logit_scale=0.5))
    for target, dense in (
        (polyce.SparseTarget(index, shares), soft),
        (polyce.TeacherLogits(teacher, 0.5), softmax),
    ):
        for options in ({}, {"label_smoothing": 0.1, "return_stats": "entropy"}):
            got = polyce.cross_entropy_with_grad(x, target, implementation="native", **options)
            want = polyce.cross_entropy_with_grad(x, dense, implementation="reference", **options)
            np.testing.assert_allclose(got[0], want[0], rtol=1e-13)
            np.testing.assert_allclose(got[1], want[1], rtol=1e-9, atol=1e-16)


@pytest.mark.only("numpy")
@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint64"])
def test_weights_and_sample_weights_of_any_kind(dtype: str) -> None:
    logits, labels = arrays(9, 12)
    weight, sample = np.arange(12).astype(dtype), np.arange(9).astype(dtype)[::-1]
    got = polyce.cross_entropy_with_grad(logits, labels, weight, sample_weight=sample)
    wide = polyce.cross_entropy_with_grad(
        logits, labels, weight.astype(np.float32), sample_weight=sample.astype(np.float64)
    )
    np.testing.assert_array_equal(got[0], wide[0])
    np.testing.assert_array_equal(got[1], wide[1])


@pytest.mark.only("numpy")
@pytest.mark.parametrize("threads", [1, 2, 64])
def test_the_first_bad_label_is_named(settings: Any, threads: int) -> None:
    settings.set_num_threads(threads)
    logits, labels = np.zeros((200_000, 3), np.float32), np.zeros(200_000, np.int64)
    labels[150_000], labels[160_000] = 3, -7
    before = logits.copy()
    with pytest.raises(IndexError, match=r"got 3 at position \(150000,\)"):
        polyce.cross_entropy_with_grad(logits, labels, out=logits)
    np.testing.assert_array_equal(logits, before)
    labels[70_001] = -7
    with pytest.raises(IndexError, match=r"got -7 at position \(70001,\)"):
        polyce.cross_entropy(logits, labels)


@pytest.mark.same_everywhere
@pytest.mark.only("numpy")
@pytest.mark.parametrize("options", OPTIONS[:3], ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_of_many_blocks(settings: Any, options: dict[str, Any], order: str) -> None:
    """The maximum rises from block to block, and the earlier sums are carried over."""
    rng = np.random.default_rng(3)
    for classes in (200, 2049, 10_000):
        rising = np.linspace(0.0, 30.0, classes) + rng.standard_normal((3, classes))
        for logits in (rising, rising[:, ::-1]):
            given = np.asarray(logits, np.float32, order=order)
            labels = np.array([0, classes // 2, classes - 1])
            exact = polyce.cross_entropy_with_grad(
                given.astype(np.float64), labels, implementation="reference", **options
            )
            for isa in ISAS:
                settings.use_isa(isa)
                loss, grad = polyce.cross_entropy_with_grad(
                    given, labels, implementation="native", **options
                )
                np.testing.assert_allclose(loss, exact[0], rtol=1e-6)
                np.testing.assert_allclose(grad, exact[1], rtol=2e-5, atol=1e-12)


@pytest.mark.only("numpy")
@pytest.mark.parametrize("shape", [(0,), (1, 0), (3, 0), (0, 3), (2, 0, 3), (2, 3, 0)])
def test_log_softmax_of_nothing(shape: tuple[int, ...]) -> None:
    result = polyce.log_softmax(np.zeros(shape, np.float32))
    assert (result.shape, result.dtype) == (shape, np.float32)


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_rows_without_classes_read_no_memory_of_others(name: str) -> None:
    nothing = np.zeros((5, 0), name)
    del [np.full(size, np.nan) for size in range(1, 4000, 7)][:]  # freed, full of nans
    loss = polyce.cross_entropy(nothing, nothing, reduction="none", implementation="native")
    np.testing.assert_array_equal(loss, np.zeros(5))
