"""The loss of a linear head on CuPy: its answers, launches, memory and waits."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import cupy_calls as calls
import polyce
from cupy_calls import DTYPES, inside, on_device, settings
from polyce.arrays import find
from polyce.implementations import registry
from polyce.linear import chunks
from polyce.testing.dtypes import dtype as named

pytestmark = pytest.mark.only("cupy-emulated")

N, F, C = 37, 6, 150
BLOCKS = (64, 64, 22)
IGNORED = [0, 5, 36]
WRT = ("input", "linear_weight", "linear_bias")


@pytest.fixture(autouse=True)
def emulation(backend_name: str) -> Iterator[Any]:
    if backend_name != "cupy-emulated":
        yield None
        return
    from cupy import emulation

    emulation.reset()
    yield emulation
    emulation.reset()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut even small calls into several chunks, and each chunk into several blocks of classes."""
    limits = {"bytes": 4 * 8 * C, "fewest": 1, "multiple": 4}
    limits |= {"block_bytes": 1, "large_block_bytes": 1}
    monkeypatch.setattr(chunks, "ACCELERATOR", dataclasses.replace(chunks.ACCELERATOR, **limits))


def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take all classes in one block, and all rows in one chunk unless a test says how many."""
    limits = {"bytes": 1 << 30, "fewest": 128, "block_bytes": 1 << 30}
    monkeypatch.setattr(chunks, "ACCELERATOR", dataclasses.replace(chunks.ACCELERATOR, **limits))


def draw(name: str, kind: str = "index") -> dict[str, Any]:
    """Draw the arrays of a call; some rows are ignored, one of them only by its weight."""
    rng = np.random.default_rng(3)
    hidden, head = rng.normal(0.0, 1.0, (N, F)), rng.normal(0.0, 1.0, (C, F))
    target: Any = rng.integers(0, C, N)
    target[IGNORED[:2]] = -100
    if kind == "probability":
        target = rng.dirichlet(np.ones(C), N).astype(named(name))
    # With probabilities the loss has the dtype that weight promotes to.
    of_weight = named(name if kind == "probability" else "float32")
    sample_weight = rng.uniform(0.5, 1.5, N)
    sample_weight[IGNORED if kind == "probability" else IGNORED[2:]] = 0.0
    return {
        "input": hidden.astype(named(name)),
        "linear_weight": head.astype(named(name)),
        "target": target,
        "linear_bias": rng.normal(0.0, 1.0, C).astype(named(name)),
        "weight": rng.uniform(0.5, 1.5, C).astype(of_weight),
        "sample_weight": sample_weight,
    }


def there(given: dict[str, Any]) -> dict[str, Any]:
    """Copy the arrays of a call to the current device."""
    return dict(zip(given, on_device(*given.values()), strict=True))


def textbook(given: dict[str, Any], **options: Any) -> list[Any]:
    """Compute the loss of the product and its gradients, all at once and in float64."""
    given = dict(given)
    hidden, head = (given.pop(key).astype(np.float64) for key in ("input", "linear_weight"))
    bias, target = given.pop("linear_bias", None), given.pop("target")
    logits = hidden @ head.T + (0.0 if bias is None else bias.astype(np.float64))
    target = target.astype(np.float64) if target.ndim > 1 else target
    loss, grad = polyce.cross_entropy_with_grad(
        logits, target, **given, **options, implementation="reference"
    )
    of_bias = None if bias is None else grad.sum(axis=0)
    return [loss, grad @ head, grad.T @ hidden, of_bias]


def result(given: dict[str, Any], **options: Any) -> list[Any]:
    """Return loss and gradients on CuPy, after checking that the loss alone is the same."""
    given = there(given)
    loss, gradients = polyce.linear_cross_entropy_with_grad(**given, **options)
    options = {key: value for key, value in options.items() if key not in ("wrt", "grad_output")}
    alone = polyce.linear_cross_entropy(**given, **options)
    assert alone.dtype == loss.dtype
    calls.close(alone, loss.get(), 1e-6 if loss.dtype != np.float64 else 1e-14)
    return [loss, *gradients]


def agree(found: list[Any], wanted: list[Any], name: str) -> None:
    """Compare a call's results, computed in at least float32 and rounded once, with float64's."""
    for got, want in zip(found, wanted, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            assert (got.dtype, got.shape) == (named(name), np.shape(want))
            # Sums of some hundred terms that cancel.
            largest = np.abs(want).max(initial=0.0)
            floor = (1e-13 if name == "float64" else 1e-5) * largest
            numbers = got.get().astype(np.float64)
            np.testing.assert_allclose(numbers, want, rtol=calls.CLOSE[name], atol=floor)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("name", DTYPES)
def test_it_is_the_loss_of_the_product(
    small: None, monkeypatch: pytest.MonkeyPatch, name: str, kind: str, reduction: str
) -> None:
    given = draw(name, kind)
    plain = {key: given[key] for key in ("input", "linear_weight", "target")}
    for arguments, sizes in ((plain, (8,)), (given, (1, 7, None))):
        wanted = textbook(arguments, reduction=reduction)
        for chunk_size in sizes:
            found = result(arguments, reduction=reduction, chunk_size=chunk_size)
            agree(found, wanted, name)
    at_once(monkeypatch)
    agree(result(given, reduction=reduction), wanted, name)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_every_option(small: None, kind: str, split: bool) -> None:
    given = draw("float32", kind)
    options: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.01, "logit_softcap": 5.0}
    options |= {"logit_scale": 0.5}
    if kind == "index":
        given["target"][given["target"] == -100] = options["ignore_index"] = 3
    rows = np.linspace(-1.0, 2.0, N)
    with settings(**(calls.SPLIT if split else {})):
        for more in ({"normalizer": 9.0, "grad_output": 3.0}, {"reduction": "none"}):
            extra = {"grad_output": rows} if "reduction" in more else {}
            wanted = textbook(given, **options, **more, **extra)
            extra = {key: on_device(value)[0] for key, value in extra.items()}
            agree(result(given, **options, **more, **extra), wanted, "float32")
        number = on_device(np.array(9.0))[0]
        found = result(given, **options, normalizer=number, grad_output=number)
        agree(found, textbook(given, **options, normalizer=9.0, grad_output=9.0), "float32")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_rows_are_masked(
    small: None, emulation: Any, reduction: str, kind: str, value: float
) -> None:
    given = draw("float32", kind)
    wanted = textbook(given, reduction=reduction)
    spoilt = given["input"].copy()
    spoilt[IGNORED] = value
    found = result(given | {"input": spoilt}, reduction=reduction, chunk_size=7)
    agree(found, wanted, "float32")
    assert not found[1].get()[IGNORED].any()
    nothing = given | {"input": np.full_like(spoilt, value), "sample_weight": np.zeros(N)}
    found = result(nothing, reduction=reduction)
    assert np.isnan(found[0].get()).all() == (reduction == "mean")
    assert not any(grad.get().any() for grad in found[1:])


def test_rows_of_several_axes_and_none(small: None) -> None:
    given = draw("float32")
    given = {key: given[key][:36] if len(given[key]) == N else given[key] for key in given}
    wanted = textbook(given)
    shaped = given | {"input": given["input"].reshape(4, 9, F)}
    shaped |= {key: given[key].reshape(4, 9) for key in ("target", "sample_weight")}
    loss, of_input, *others = result(shaped)
    assert of_input.shape == (4, 9, F)
    agree([loss, of_input.reshape(36, F), *others], wanted, "float32")
    empty = {key: given[key][:0] if len(given[key]) == 36 else given[key] for key in given}
    for reduction, loss in (("sum", 0.0), ("none", np.zeros(0))):
        found = result(empty, reduction=reduction)
        agree(found, [loss, np.zeros((0, F)), np.zeros((C, F)), np.zeros(C)], "float32")


def test_arrays_may_lie_anywhere(small: None) -> None:
    given = draw("float32")
    wanted = textbook(given)
    x, w, t, b, c, v = on_device(*given.values())
    hidden, head = given["input"], given["linear_weight"]
    for states, weight in (
        (inside(hidden, math.nan, 5, (1, N)), inside(head, 9.0, 3)),
        (inside(hidden, math.nan, 1, (17, 2)), inside(head, 9.0, 0, (9, 1))),
    ):
        loss, gradients = polyce.linear_cross_entropy_with_grad(
            states.array, weight.array, t, linear_bias=b, weight=c, sample_weight=v
        )
        agree([loss, *gradients], wanted, "float32")
        assert states.untouched(math.nan)
        assert weight.untouched(9.0)
    for key, array in zip(given, (x, w, t, b, c, v), strict=True):
        assert np.array_equal(array.get(), given[key]), key


def products(rows: list[int], blocks: tuple[int, ...], wrt: tuple[str, ...]) -> list[Any]:
    """Return the extents m, n and k of the products of a call, in order."""
    found: list[Any] = []
    for this, following in zip([0, *rows], [*rows, 0], strict=True):
        for c in blocks:
            back = zip(WRT, ((this, F, c), (c, F, this), (1, c, this)), strict=True)
            found += [extents for name, extents in back if name in wrt and this]
            found += [(following, c, F)] * (following > 0)
    return found


@pytest.mark.parametrize("wrt", [None, (), ("input",), ("linear_weight",), WRT], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("blocks", [BLOCKS, (C,)], ids=str)
def test_launches_products_and_waits(
    small: None,
    emulation: Any,
    monkeypatch: pytest.MonkeyPatch,
    blocks: tuple[int, ...],
    reduction: str,
    wrt: Any,
) -> None:
    if blocks != BLOCKS:
        at_once(monkeypatch)
    given = there(draw("float32"))
    options: dict[str, Any] = {"reduction": reduction, "chunk_size": 9}
    rows = [9, 9, 9, 9, 1]
    for split in (False, True):
        emulation.reset()
        with settings(**(calls.SPLIT if split else {})):
            if wrt is None:
                polyce.linear_cross_entropy(**given, **options)
            else:
                polyce.linear_cross_entropy_with_grad(**given, **options, wrt=wrt)
        one = ["forward", "join" if not wrt else "backward"] if split else ["forward_backward"]
        one = one if split or wrt else ["forward"]
        assert [launch.name for launch in emulation.launches] == one * len(rows)
        assert [each[:3] for each in emulation.products] == products(rows, blocks, wrt or ())
        assert {each.dtype for each in emulation.products} == {"float32"}
        assert emulation.synchronizations == 0


@pytest.mark.parametrize("kind", ["index", "probability"])
def test_a_look_only_where_it_is_asked_for(small: None, emulation: Any, kind: str) -> None:
    given = there(draw("float16", kind))
    emulation.reset()
    for options in ({}, {"validate": False}, {"reduction": "none"}, {"normalizer": 3.0}):
        polyce.linear_cross_entropy(**given, **options)
        polyce.linear_cross_entropy_with_grad(**given, **options)
    assert emulation.synchronizations == 0
    if kind == "probability":
        return
    polyce.linear_cross_entropy_with_grad(**given, validate=True)
    assert emulation.synchronizations > 0
    given["target"][17] = C
    loss, gradients = polyce.linear_cross_entropy_with_grad(**given, reduction="none")
    for array, odd in ((loss, [17]), (gradients[0], [17]), (gradients[1], range(C))):
        lost = np.isnan(array.get().reshape(len(array), -1).astype(np.float32))
        assert np.flatnonzero(lost.all(axis=1)).tolist() == list(odd)
        assert not np.delete(lost, odd, axis=0).any()
    del emulation.products[:], emulation.launches[:]
    with pytest.raises(IndexError, match=rf"0 to {C - 1} .* got {C} at position \(17,\)"):
        polyce.linear_cross_entropy_with_grad(**given, validate=True)
    assert emulation.products == emulation.launches == []


def kernels(blocks: int, grad: bool, bias: bool, narrow: bool) -> int:
    """Return how many of its own kernels CuPy starts for a chunk, with labels.

    The states of rows that do not count are masked, and losses are stored. 16-bit arrays are
    widened. For each block of classes the bias is added and gradients are summed; if there are
    several blocks, one copy takes a block out of the gradient, and another fills the logits.
    """
    several = blocks > 1
    by_block = bias + narrow + several + grad * (1 + bias + several)
    return 2 + narrow + blocks * by_block + grad * (blocks - 1)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["float16", "float32"])
def test_kernels_of_cupy_itself(
    small: None,
    emulation: Any,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    bias: bool,
    grad: bool,
) -> None:
    given = there(draw(name) | ({} if bias else {"linear_bias": None}))
    loss, both = polyce.linear_cross_entropy, polyce.linear_cross_entropy_with_grad

    def of_a_chunk() -> int:
        counts = []
        for size in (12, 9):  # four chunks and five
            emulation.reset()
            (both if grad else loss)(**given, chunk_size=size)
            counts.append(emulation.other_kernels)
        return counts[1] - counts[0]

    assert of_a_chunk() == kernels(len(BLOCKS), grad, bias, name == "float16")
    at_once(monkeypatch)
    assert of_a_chunk() == kernels(1, grad, bias, name == "float16")


@pytest.mark.parametrize("name", ["float16", "float64"])
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_memory(emulation: Any, monkeypatch: pytest.MonkeyPatch, kind: str, name: str) -> None:
    rows, classes, features, at_a_time = 400, 1500, 4, 8
    rng = np.random.default_rng(0)
    size = 8 if name == "float64" else 4
    limits = {"bytes": at_a_time * classes * size, "fewest": 1, "multiple": 1}
    monkeypatch.setattr(chunks, "ACCELERATOR", dataclasses.replace(chunks.ACCELERATOR, **limits))
    target: Any = rng.integers(0, classes, rows)
    if kind == "probability":
        target = rng.random((rows, classes)).astype(named(name))
    x, w, b, t = on_device(
        rng.normal(size=(rows, features)).astype(named(name)),
        rng.normal(size=(classes, features)).astype(named(name)),
        rng.normal(size=classes).astype(named(name)),
        target,
    )
    logits = at_a_time * classes * size
    # For the head: its gradient, a product, and a widened product; and some numbers for each row.
    beside = size * (3 * w.size + 2 * x.size + 3 * classes) + 8 * 20 * rows
    assert 8 * (logits + beside) < size * rows * classes
    emulation.reset()
    before = emulation.held
    polyce.linear_cross_entropy(x, w, t, linear_bias=b)
    results = polyce.linear_cross_entropy_with_grad(x, w, t, linear_bias=b)
    assert max(emulation.allocations) == logits
    assert emulation.most_held - before < logits + beside
    assert emulation.held - before == sum(array.nbytes for array in (results[0], *results[1]))


def test_it_runs_on_the_device_of_its_arrays(
    small: None, emulation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cupy

    given = draw("float32")
    wanted = textbook(given)
    with cupy.cuda.Device(1):
        elsewhere = there(given)
    loss, gradients = polyce.linear_cross_entropy_with_grad(**elsewhere)
    assert cupy.cuda.Device() == cupy.cuda.Device(0)
    assert {array.device.id for array in (loss, *gradients)} == {1}
    assert polyce.linear_cross_entropy(**elsewhere).device.id == 1
    with cupy.cuda.Device(1):
        agree([loss, *gradients], wanted, "float32")
    monkeypatch.setattr(find.named("cupy"), "computing", lambda _: contextlib.nullcontext())
    with pytest.raises((ValueError, emulation.EmulationError), match="current device"):
        polyce.linear_cross_entropy_with_grad(**elsewhere)


def test_explain(small: None) -> None:
    given = there(draw("bfloat16"))
    told = polyce.explain(**given, function=polyce.linear_cross_entropy_with_grad)
    assert told.chosen == "cupy"
    assert told.call.startswith("linear_cross_entropy_with_grad on cupy / cuda: input bfloat16 (37")
    assert str(told.chunks).startswith("5 chunks of 8 rows: ")


@pytest.mark.only("cupy-dispatch")
@pytest.mark.parametrize("name", DTYPES)
def test_real_arrays_reach_the_same_decisions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    def shell(shape: tuple[int, ...], dtype: Any) -> Any:
        memory = cupy.cuda.UnownedMemory(1 << 32, 1 << 40, None, device_id=0)
        return cupy.ndarray(shape, dtype, memptr=cupy.cuda.MemoryPointer(memory, 0))

    monkeypatch.setattr(registry, "_choices", {})
    monkeypatch.setattr(cupy.cuda, "is_available", lambda: True)
    rows, features, classes = 20_000, 512, 100_000
    head = [shell((rows, features), named(name)), shell((classes, features), named(name))]
    labels = shell((rows,), np.int64)
    for function in (polyce.linear_cross_entropy, polyce.linear_cross_entropy_with_grad):
        told = polyce.explain(*head, labels, function=function)
        assert told.chosen == "cupy"
        assert f"on cupy / cuda: input {name} (20000, 512), " in told.call
        assert "10 chunks of 2048 rows: " in str(told.chunks)
        other = shell((classes, features), named("float32" if name != "float32" else "float64"))
        with pytest.raises(TypeError, match="must have one dtype"):
            polyce.explain(head[0], other, labels, function=function)
