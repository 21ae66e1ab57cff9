"""The loss of a linear head: the grid, cases with exact answers, and what its options mean."""

from __future__ import annotations

import dataclasses
import itertools
import math
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import polyce
from conftest import FEW, FULL, TIER_2
from polyce.linear import chunks
from polyce.testing import GROUPS, Case, cases, check_implementation
from polyce.testing.backends import Backend, get_backend
from polyce.testing.dtypes import dtype
from polyce.testing.linear import GRADIENTS, check_linear, grid_functions, leave_out
from polyce.testing.linear_cases import LinearCase, linear_cases
from polyce.testing.selection import representative
from test_tier2 import BACKENDS, WRAPPERS, unsuited

# jax compiles nearly every call anew.
pytestmark = pytest.mark.slow("jax-x32")

# All backends that compute: the others only compile, or refuse.
everywhere = pytest.mark.only(
    "numpy", "strict", "torch", "torch-cuda", "jax-x32", "jax-x64", "dask", "cupy",
    "cupy-emulated", "triton", *TIER_2,
)  # fmt: skip

# jax compiles each call anew, and its two widths differ only in the exact answers.
once = pytest.mark.only("numpy", "strict", "torch", "jax-x32", "dask")

# How many cases are chosen from a group; None, for all, if each takes less than a millisecond.
MOST = {
    "numpy": 4 if FEW else None,
    "strict": 20, "torch": 20, "torch-cuda": 20, "cupy": 20,
    "jax-x32": 1, "jax-x64": 1, "dask": 4, "cupy-emulated": 2, "triton": 2,
    "ndonnx": 1, "cubed": 1, "mlx": 4, "mparray": 4, "marray": 4,
}  # fmt: skip
# And how many of the cases of linear heads.
MOST_LINEAR = {
    "jax-x32": 4, "jax-x64": 2, "dask": 20, "cupy-emulated": 8, "triton": 8, "ndonnx": 4,
    "cubed": 3, "mlx": 20, "mparray": 20, "marray": 20,
}  # fmt: skip
# Dtypes in which the gradient of the logits is multiplied in 16 bits.
NARROW = {"jax": ("float16", "bfloat16"), "torch": ("bfloat16",)}
IMPLEMENTATIONS = {"numpy": (None, "reference"), "torch": (None, "reference")}

# A thousand equal logits below a large one.
EQUAL_CLASSES = "accuracy/margins/1000/wrong/float32"


def libraries(backend: Backend, backend_name: str) -> list[Backend]:
    """Return the backends that a run's arrays are tried as."""
    return [get_backend(name) for name in BACKENDS.get(backend_name, ())] or [backend]


def reason_against(case: Case, library: Backend, teacher_heads: bool = False) -> str:
    """Return the reason why a case of the grid is not for a library."""
    narrow = NARROW.get(library.name, ())
    if "cuda" in str(getattr(library.asarray(np.zeros(1)), "device", "")):
        narrow = ("float16", "bfloat16")
    if library.name == "jax" and "float64" not in library.floats and case.name == EQUAL_CLASSES:
        return "XLA adds up a few rows' classes one by one, see docs/accuracy.md"
    reason = leave_out(case, narrow, teacher_heads=teacher_heads)
    return unsuited(case, library.name) or reason


def few(
    group: str, library: Backend, most: int, reason_against: Callable[..., str]
) -> Callable[[Case], str]:
    """Leave out all but a few cases of a group."""
    small = [
        case
        for case in cases([group], library.floats)
        if case.logits.size <= 500 and case.logits.dtype.name in library.floats
    ]
    suited = [case for case in small if not reason_against(case)]
    if library.name == "cubed":
        # Cases with more take it many seconds.
        suited = [c for c in suited if len(c.options) + len(c.arrays) <= 5] or suited
    names = {case.name for case in representative(suited, most)}
    return lambda case: "" if case.name in names else "not among the few that stand for its group"


# A teacher's head is more than its logits.
HEADS = (*(group for group in GROUPS if not (FEW and group == "teacher")), "teacher-head")


@everywhere
@pytest.mark.parametrize("group", HEADS)
def test_grid(backend: Backend, backend_name: str, group: str) -> None:
    most, is_head = None if FULL else MOST[backend_name], group == "teacher-head"
    group = "teacher" if is_head else group
    for library in libraries(backend, backend_name):
        every = partial(reason_against, library=library, teacher_heads=is_head)
        # The kernels do not serve all stats; polyce chooses for the others.
        on_triton = backend_name == "triton" and group != "target-stats"
        report = check_implementation(
            "triton" if on_triton else None,
            library,
            groups=[group],
            leave_out=every if most is None else few(group, library, most, every),
            wrap=WRAPPERS.get(library.name),
            functions=grid_functions(chunks=3, teacher_heads=is_head),
        )
        print(report)


def few_linear(floats: tuple[str, ...], most: int) -> Callable[[LinearCase], bool]:
    """Choose the cases of a head that between them have most traits."""
    every = [case.of_logits for case in linear_cases(floats)]
    names = {case.name for case in representative(every, most)}
    return lambda case: case.name in names


@everywhere
@pytest.mark.slow("cupy-emulated")
def test_exact_answers(backend: Backend, backend_name: str) -> None:
    most = None if FULL else MOST_LINEAR.get(backend_name)
    names = ("triton",) if backend_name == "triton" else IMPLEMENTATIONS.get(backend_name, (None,))
    for library, name in itertools.product(libraries(backend, backend_name), names):
        among = None if most is None else few_linear(library.floats, most)

        def suited(case: LinearCase, library: str = library.name, among: Any = among) -> bool:
            # A product over no features is a sum over nothing, which marray masks.
            masked = library.startswith("marray") and case.input.size == 0
            suits = not masked and not unsuited(case.of_logits, library)
            return suits and (among is None or among(case))

        print(check_linear(name, library, chosen=suited, wrap=WRAPPERS.get(library.name)))


@pytest.mark.only("jax-x32", "jax-x64")
def test_exact_answers_under_jit(backend: Backend) -> None:
    import jax

    among = None if FULL else few_linear(backend.floats, 3)
    print(check_linear(None, backend, chosen=among, wrap=jax.jit))


@pytest.mark.only("numpy", "strict", "torch")
def test_exact_answers_in_small_chunks_and_blocks(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If polyce chooses, chunks of a few rows; and the weight in blocks of three classes."""
    limits = dataclasses.replace(chunks.CPU, bytes=200, fewest=1, multiple=1, block_bytes=1)
    monkeypatch.setattr(chunks, "CPU", limits)
    monkeypatch.setattr(chunks, "_CLASSES", 3)
    print(check_linear(None, backend))


# What the loss means.

N, F, C = 11, 6, 9
RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(0.0, 1.0, (N, F)).astype(np.float32)
HEAD = RNG.normal(0.0, 0.7, (C, F)).astype(np.float32)
BIAS = RNG.normal(0.0, 1.0, C).astype(np.float32)
LABELS = RNG.integers(0, C, N).astype(np.int32)
LABELS[3] = -100
SOFT = RNG.dirichlet(np.ones(C), N).astype(np.float32)


def result(
    backend: Backend, hidden: Any = HIDDEN, head: Any = HEAD, target: Any = LABELS, **given: Any
) -> list[Any]:
    """Return the loss and the three gradients of NumPy arrays, as NumPy arrays."""
    arrays = [backend.asarray(array) for array in (hidden, head, target)]
    given = {
        key: backend.asarray(value) if isinstance(value, np.ndarray) else value
        for key, value in given.items()
    }
    loss, gradients = polyce.linear_cross_entropy_with_grad(*arrays, **given)
    for name in ("wrt", "grad_output"):
        given.pop(name, None)
    alone = polyce.linear_cross_entropy(*arrays, **given)
    # XLA fuses operations differently with and without the gradients.
    rtol = 1e-6 if backend.name == "jax" else 0
    np.testing.assert_allclose(backend.to_numpy(alone), backend.to_numpy(loss), rtol=rtol)
    assert len(gradients) == len(GRADIENTS)
    return [a if a is None else backend.to_numpy(a) for a in (loss, *gradients)]


def textbook(
    hidden: Any = HIDDEN, head: Any = HEAD, target: Any = LABELS, linear_bias: Any = 0, **given: Any
) -> list[Any]:
    """Compute the loss of the product and its gradients, in float64 and all at once."""
    hidden, head = hidden.astype(np.float64), head.astype(np.float64)
    logits = hidden @ head.T + linear_bias
    loss, grad = polyce.cross_entropy_with_grad(logits, target, axis=-1, **given)
    rows = math.prod(hidden.shape[:-1])
    grad = grad.reshape(rows, head.shape[0])
    of_head = grad.T @ hidden.reshape(rows, head.shape[1])
    return [loss, (grad @ head).reshape(hidden.shape), of_head, grad.sum(axis=0)]


def close(got: list[Any], want: list[Any], rtol: float = 2e-5) -> None:
    # Sums of a dozen float32 terms, of up to 3, that may cancel.
    assert [a is None for a in got] == [a is None for a in want]
    for one, other in zip(got, want, strict=True):
        if other is not None:
            assert one.shape == np.shape(other)
            np.testing.assert_allclose(one, other, rtol=rtol, atol=2e-6)


def equal(got: list[Any], want: list[Any]) -> None:
    assert [a is None for a in got] == [a is None for a in want]
    for one, other in zip(got, want, strict=True):
        if other is not None:
            np.testing.assert_array_equal(one, other)


@once
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_it_is_the_loss_of_the_product(backend: Backend, reduction: str, kind: str) -> None:
    options: dict[str, Any] = {"reduction": reduction, "linear_bias": BIAS}
    options |= {"label_smoothing": 0.1, "weight": np.linspace(0.5, 2.0, C, dtype=np.float32)}
    target = LABELS if kind == "index" else SOFT
    got = result(backend, target=target, chunk_size=4, **options)
    close(got, textbook(target=target, **options))


@once
def test_chunks_make_no_difference(backend: Backend) -> None:
    want = textbook(linear_bias=BIAS, z_loss=0.01)
    sizes = [4, 100] if backend.name == "jax" else [1, 2, 4, N - 1, N, N + 1, 100, np.int64(3)]
    for chunk_size in (*sizes, None):
        close(result(backend, linear_bias=BIAS, z_loss=0.01, chunk_size=chunk_size), want)


@once
@pytest.mark.parametrize("shape", [(1, N), (N, 1), (N, 1, 1)])
def test_leading_axes_are_rows(backend: Backend, shape: tuple[int, ...]) -> None:
    hidden, labels = HIDDEN.reshape(*shape, F), LABELS.reshape(shape)
    for target in (labels, SOFT.reshape(*shape, C)):
        rows = np.arange(N, dtype=np.float32).reshape(shape)
        options = {"sample_weight": rows, "reduction": "none", "grad_output": rows + 1}
        got = result(backend, hidden, target=target, chunk_size=4, **options)
        close(got[:3], textbook(hidden, target=target, **options)[:3])


@once
def test_one_row_may_have_no_axis(backend: Backend) -> None:
    want = textbook(HIDDEN[0], target=LABELS[0], linear_bias=BIAS)
    for target in (LABELS[0].reshape(()), LABELS[:1].copy()):
        close(result(backend, HIDDEN[0].copy(), target=target, linear_bias=BIAS), want)
    soft = textbook(HIDDEN[0], target=SOFT[0])[:3]
    close(result(backend, HIDDEN[0].copy(), target=SOFT[0].copy()), [*soft, None])
    # And with an axis of one row.
    one = textbook(HIDDEN[:1], target=LABELS[:1])[:3]
    close(result(backend, HIDDEN[:1].copy(), target=LABELS[:1].copy()), [*one, None])


@once
def test_no_rows(backend: Backend) -> None:
    for reduction, want in (("none", np.zeros(0)), ("sum", 0.0), ("mean", np.nan)):
        for target in (LABELS[:0].copy(), SOFT[:0].copy()):
            options = {"linear_bias": BIAS, "reduction": reduction, "chunk_size": 3}
            got = result(backend, HIDDEN[:0].copy(), target=target, **options)
            equal(got, [want, np.zeros((0, F)), np.zeros((C, F)), np.zeros(C)])


@once
def test_any_memory_layout(backend: Backend) -> None:
    want = textbook(linear_bias=BIAS)
    wide = np.full((N, 2 * F), np.nan, np.float32)
    wide[:, ::2] = HIDDEN
    hidden = [np.asfortranarray(HIDDEN), wide[:, ::2], HIDDEN[::-1].copy()[::-1]]
    heads = [
        np.asfortranarray(HEAD),
        np.repeat(HEAD, 2, axis=0)[::2],
        HEAD[:, ::-1].copy()[:, ::-1],
    ]
    for one, other in zip(hidden, heads, strict=True):
        bias, labels = np.repeat(BIAS, 2)[::2], np.repeat(LABELS, 2)[::2]
        got = result(backend, one, other, labels, linear_bias=bias, chunk_size=4)
        close(got, want)


@once
def test_wrt_names_what_is_computed(backend: Backend) -> None:
    for bias in (BIAS, None):
        every = result(backend, linear_bias=bias, chunk_size=4)
        assert (every[3] is None) == (bias is None)
        asked: list[Any] = [
            "linear_weight",
            ("linear_bias", "input"),
            ["input"],
            (),
            ("input",) * 2,
        ]
        # jax compiles each call.
        for wrt in asked[: 2 if backend.name == "jax" else None]:
            names = (wrt,) if isinstance(wrt, str) else wrt
            want = [a if n in names else None for n, a in zip(GRADIENTS, every[1:], strict=True)]
            equal(result(backend, linear_bias=bias, wrt=wrt, chunk_size=4), [every[0], *want])


@once
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_does_not_count_may_hold_anything(backend: Backend, value: float) -> None:
    counts = np.ones(N, np.float32)
    counts[[0, 6, 7]] = 0.0
    left_out = LABELS.copy()
    left_out[[0, 6, 7]] = 4
    spoilt = HIDDEN.copy()
    spoilt[[0, 3, 6, 7]] = value
    for options in ({"target": np.where(counts > 0, LABELS, -100)}, {"sample_weight": counts}):
        for chunk_size in (2,) if backend.name == "jax" else (2, None):
            given: dict[str, Any] = options | {"linear_bias": BIAS, "chunk_size": chunk_size}
            got = result(backend, spoilt, **given)
            equal(got, result(backend, **given))
            assert not got[1][[0, 3, 6, 7]].any()
    got = result(backend, spoilt, target=np.full(N, -100), linear_bias=BIAS)
    equal(got, [np.nan, np.zeros((N, F)), np.zeros((C, F)), np.zeros(C)])


@pytest.mark.only("numpy", "torch", "dask")
def test_float16_is_computed_in_float32(backend: Backend) -> None:
    half = [array.astype(np.float16) for array in (HIDDEN, HEAD, BIAS)]
    wide = [array.astype(np.float32) for array in half]
    for reduction in ("none", "mean"):
        options = {"reduction": reduction, "chunk_size": 4}
        got = result(backend, *half[:2], linear_bias=half[2], **options)
        want = result(backend, *wide[:2], linear_bias=wide[2], **options)
        assert {array.dtype for array in got} == {np.dtype(np.float16)}
        equal(got, [array.astype(np.float16) for array in want])


@once
def test_results_have_the_dtypes_of_their_arrays(backend: Backend) -> None:
    for i, name in enumerate(backend.floats):
        *given, soft, bias = (array.astype(dtype(name)) for array in (HIDDEN, HEAD, SOFT, BIAS))
        got = result(backend, *given, (LABELS, soft)[i % 2], linear_bias=bias)
        assert [array.dtype.name for array in got] == [name] * 4
    # As for logits, the probabilities may be wider.
    soft = SOFT.astype(backend.floats[-1])
    got = result(backend, target=soft, linear_bias=BIAS)
    assert [a.dtype.name for a in got] == [backend.floats[-1], *["float32"] * 3]


@once
def test_no_argument_is_changed(backend: Backend) -> None:
    arrays = {
        "hidden": HIDDEN, "head": HEAD, "target": LABELS, "linear_bias": BIAS,
        "weight": np.linspace(0.5, 2.0, C, dtype=np.float32),
        "sample_weight": np.arange(N, dtype=np.float32), "grad_output": np.float32(2).reshape(()),
    }  # fmt: skip
    given = {name: backend.asarray(array.copy()) for name, array in arrays.items()}
    for array in given.values():
        if isinstance(array, np.ndarray):
            array.flags.writeable = False
    # None of the arrays may be converted again.
    same = dataclasses.replace(backend, asarray=lambda array: array)
    result(same, **given, chunk_size=4)
    for name, array in arrays.items():
        np.testing.assert_array_equal(backend.to_numpy(given[name]), array)


@pytest.mark.only("jax-x32", "jax-x64", "dask")
def test_numpy_arrays_may_be_among_them(backend: Backend) -> None:
    want = result(backend, linear_bias=BIAS)
    loss, gradients = polyce.linear_cross_entropy_with_grad(
        backend.asarray(HIDDEN), HEAD, LABELS, linear_bias=BIAS
    )
    assert all(map(backend.owns, (loss, *gradients)))
    equal([backend.to_numpy(array) for array in (loss, *gradients)], want)


@pytest.mark.only("numpy")
def test_the_loss_is_numpys_scalar() -> None:
    assert type(polyce.linear_cross_entropy(HIDDEN, HEAD, LABELS)) is np.float32
    assert type(polyce.linear_cross_entropy(HIDDEN, HEAD, LABELS, reduction="none")) is np.ndarray
    assert type(polyce.linear_cross_entropy_with_grad(HIDDEN, HEAD, LABELS)[0]) is np.float32


@pytest.mark.only("numpy")
def test_all_logits_are_never_there() -> None:
    rows, classes = 2048, 2048
    hidden, head = np.ones((rows, 2), np.float32), np.ones((classes, 2), np.float32)
    labels = np.zeros(rows, np.int32)
    polyce.linear_cross_entropy_with_grad(hidden, head, labels, chunk_size=rows)
    tracemalloc.start()
    try:
        polyce.linear_cross_entropy_with_grad(hidden, head, labels, chunk_size=64)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * 64 * classes * 4
