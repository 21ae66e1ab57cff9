"""Where polyce's meaning goes beyond torch's, and the shapes and dtypes of its results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import polyce
from polyce.testing.backends import Backend, get_backend
from polyce.testing.dtypes import dtype

X = np.array([[1.5, -0.5, 0.25], [-2.0, 3.0, 1.0], [0.0, 0.5, -1.0]], np.float32)
T = np.array([2, 0, 1], np.int32)
INF, NAN = float("inf"), float("nan")


def log_probabilities(logits: Any) -> Any:
    """Compute the textbook's answer in float64, along the last axis."""
    wide = np.asarray(logits, np.float64)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def rows_and_grad(backend: Backend, *arrays: Any, **options: Any) -> tuple[Any, Any]:
    """Return the rows' losses and the gradient of NumPy arrays, as NumPy arrays."""
    options = {"reduction": "none"} | options
    given = [backend.asarray(np.asarray(array)) for array in arrays]
    loss, grad = polyce.cross_entropy_with_grad(*given, **options)
    assert backend.owns(loss)
    assert backend.owns(grad)
    return backend.to_numpy(loss), backend.to_numpy(grad)


def close(got: Any, want: Any) -> None:
    # Sums of three float32 terms.
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


# Integer targets.


def test_every_integer_dtype_holds_labels(backend: Backend) -> None:
    want, want_grad = rows_and_grad(backend, X, T)
    for name in backend.integers:
        rows, grad = rows_and_grad(backend, X, T.astype(name))
        np.testing.assert_array_equal(rows, want)
        np.testing.assert_array_equal(grad, want_grad)
        rows, grad = rows_and_grad(backend, X, T.astype(name), ignore_index=0)
        assert (rows == 0).tolist() == [False, True, False]


MANY = np.zeros((3, 160), np.float32)


@pytest.mark.parametrize(
    ("ignore_index", "ignored"),
    [
        (156, [True, False, True]),
        (-100, [False] * 3),
        (300, [False] * 3),
        (0, [False, True, False]),
    ],
)
def test_ignore_index_is_compared_as_a_number(
    backend: Backend, ignore_index: int, ignored: list[bool]
) -> None:
    """As uint8, -100 is 156 and 300 is 44."""
    target = np.array([156, 0, 156], np.uint8)
    rows, _ = rows_and_grad(backend, MANY, target, ignore_index=ignore_index)
    assert (rows == 0).tolist() == ignored
    target = np.array([44, 1, 44], np.uint8)
    rows, _ = rows_and_grad(backend, MANY, target, ignore_index=ignore_index)
    assert (rows == 0).tolist() == [False] * 3


def test_ignore_index_does_not_become_negative(backend: Backend) -> None:
    """As int8, 156 is -100, a bad label."""
    target = np.array([-100, 0, 1], np.int8)
    rows, _ = rows_and_grad(backend, MANY, target, ignore_index=156, validate=False)
    assert np.isnan(rows).tolist() == [True, False, False]


def test_the_largest_unsigned_labels(backend: Backend) -> None:
    """Beyond the signed integers of the same size."""
    for name, largest in (("uint32", 2**32 - 1), ("uint64", 2**64 - 1)):
        if name in backend.integers:
            target = np.array([largest, 2, largest - 1], name)
            rows, _ = rows_and_grad(backend, X, target, ignore_index=largest, validate=False)
            close(rows, [0, -log_probabilities(X)[1, 2], NAN])


# Bad labels that are not checked.


def unlooked(function: Callable[..., Any], backend: Backend, **options: Any) -> Any:
    target, weight = np.array([2, 7, -1], np.int32), np.full(3, 2, np.float32)
    return function(*(backend.asarray(array) for array in (X, target, weight)), **options)


def check_nan_rows(backend: Backend, call: Callable[..., Any]) -> None:
    """Check that a bad label affects only its own row, which counts as 1 beside the other's 2."""
    logs = log_probabilities(X)[0]
    grad = 2 * (np.exp(logs) - [0, 0, 1])
    for reduction, divisor in (("none", 1), ("sum", 1), ("mean", 2 + 1 + 1)):
        want = [-2 * logs[2], NAN, NAN] if reduction == "none" else NAN
        loss, got = call(polyce.cross_entropy_with_grad, backend, reduction=reduction)
        close(backend.to_numpy(loss), want)
        close(backend.to_numpy(got), [grad / divisor, [NAN] * 3, [NAN] * 3])
        close(backend.to_numpy(call(polyce.cross_entropy, backend, reduction=reduction)), want)
    rows = backend.to_numpy(call(polyce.nll_loss, backend, reduction="none"))
    close(rows, [-2 * X[0, 2], NAN, NAN])


def test_unvalidated_labels_give_nan(backend: Backend) -> None:
    def call(function: Callable[..., Any], backend: Backend, **options: Any) -> Any:
        return unlooked(function, backend, validate=False, **options)

    check_nan_rows(backend, call)


@pytest.mark.only("dask", "torch-cuda", "cupy", "jax-gpu")
def test_labels_not_computed_yet_or_on_a_gpu_give_nan(backend: Backend) -> None:
    check_nan_rows(backend, unlooked)


@pytest.mark.only("jax-x32", "jax-x64")
def test_traced_labels_give_nan(backend: Backend) -> None:
    import jax

    def call(function: Callable[..., Any], backend: Backend, **options: Any) -> Any:
        return unlooked(jax.jit(lambda *arrays: function(*arrays, **options)), backend)

    check_nan_rows(backend, call)


@pytest.mark.labels_read
@pytest.mark.only("jax-x32", "jax-x64")
@pytest.mark.parametrize(
    "function", [polyce.cross_entropy, polyce.cross_entropy_with_grad, polyce.nll_loss]
)
def test_labels_known_while_tracing_are_looked_at(
    backend: Backend, function: Callable[..., Any]
) -> None:
    import jax

    x, t, bad = (backend.asarray(array) for array in (X, T, T + 1))
    traced, plain = jax.jit(lambda logits: function(logits, t))(x), function(x, t)
    for got, want in zip(jax.tree.leaves(traced), jax.tree.leaves(plain), strict=True):
        close(backend.to_numpy(got), backend.to_numpy(want))
    with pytest.raises(IndexError, match=r"got 3 at position \(0,\)"):
        jax.jit(lambda logits: function(logits, bad))(x)


# Infinities, nans, empty arrays.


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_an_ignored_row_may_hold_anything(backend: Backend, value: float, smoothing: float) -> None:
    options = {"label_smoothing": smoothing, "reduction": "mean", "ignore_index": 0}
    want, want_grad = rows_and_grad(backend, X[::2].copy(), T[::2].copy(), **options)
    for bad in ([value] * 3, [value, 1.0, 2.0]):
        logits = np.stack([X[0], np.array(bad, np.float32), X[2]])
        loss, grad = rows_and_grad(backend, logits, T, **options)
        close(loss, want)
        close(grad[::2], want_grad)
        assert grad[1].tolist() == [0, 0, 0]


def test_a_coefficient_of_zero_drops_an_infinite_logit(backend: Backend) -> None:
    logits = np.array([[0.0, -INF, 0.0]], np.float32)
    rows, grad = rows_and_grad(backend, logits, np.array([[1.0, 0.0, 0.0]], np.float32))
    close(rows, [np.log(2)])
    close(grad, [[-0.5, 0.0, 0.5]])
    weight = np.array([1.0, 0.0, 1.0], np.float32)
    rows, grad = rows_and_grad(backend, logits, np.array([1], np.int32), weight)
    close(rows, [0])
    close(grad, [[0, 0, 0]])


def test_full_smoothing_keeps_the_labels_own_share(backend: Backend) -> None:
    logits = np.array([[-INF, 0.0, 0.0]], np.float32)
    rows, _ = rows_and_grad(backend, logits, np.array([0], np.int32), label_smoothing=1.0)
    assert rows.tolist() == [INF]


def test_a_mean_over_no_weight_divides_by_zero(backend: Backend) -> None:
    weight, target = np.array([0.0, 1.0, 1.0], np.float32), np.zeros(3, np.int32)
    loss, _ = rows_and_grad(backend, X, target, weight, reduction="mean", label_smoothing=0.1)
    assert loss == INF
    loss, _ = rows_and_grad(backend, X, target, weight, reduction="mean")
    assert np.isnan(loss)


@pytest.mark.parametrize("shape", [(2, 0), (2, 0, 3), (2, 0, 3, 4)])
@pytest.mark.parametrize("soft", [False, True])
def test_no_classes(backend: Backend, shape: tuple[int, ...], soft: bool) -> None:
    logits, rows = np.zeros(shape, np.float32), shape[:1] + shape[2:]
    target = logits if soft else np.full(rows, -100, np.int32)
    loss, grad = rows_and_grad(backend, logits, target)
    assert loss.shape == rows
    assert not loss.any()
    assert grad.shape == shape
    assert rows_and_grad(backend, logits, target, reduction="sum")[0] == 0
    assert np.isnan(rows_and_grad(backend, logits, target, reduction="mean")[0])


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_one_row_takes_a_target_of_one(backend: Backend, reduction: str) -> None:
    for options in ({}, {"label_smoothing": 0.1}):
        loss, grad = rows_and_grad(backend, X[0], T[0], reduction=reduction, **options)
        got, got_grad = rows_and_grad(backend, X[0], T[:1], reduction=reduction, **options)
        assert got.shape == loss.shape == ()
        assert got == loss
        np.testing.assert_array_equal(got_grad, grad)
    # One class: the shapes are the same, but integers are still indices.
    only = np.zeros(1, np.int32)
    loss, grad = rows_and_grad(backend, X[0, :1], only, reduction=reduction)
    assert (loss, grad.tolist()) == (0, [0])


def test_a_confident_row_keeps_its_digits(backend: Backend) -> None:
    logits = np.array([[50.0, 0.0], [0.0, -30.0]], np.float32)
    rows, grad = rows_and_grad(backend, logits, np.zeros(2, np.int32))
    tail = np.log1p(np.exp([-50.0, -30.0]))
    np.testing.assert_allclose(rows, tail, rtol=1e-6)
    np.testing.assert_allclose(grad, np.stack([-tail, tail], axis=1), rtol=1e-6)


@pytest.mark.only("numpy", "torch", "torch-cuda", "jax-x32", "jax-x64", "dask", "cupy")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_float16_means_of_many_rows(backend: Backend, smoothing: float) -> None:
    """The sum of these losses is beyond float16, and so is their number."""
    if backend.name.startswith("dask"):
        backend = get_backend("dask")
    rows = 65536
    logits, target = np.zeros((rows, 4), np.float16), np.ones(rows, np.int32)
    options = {"reduction": "mean", "label_smoothing": smoothing}
    loss, grad = rows_and_grad(backend, logits, target, **options)
    assert loss == np.float16(np.log(4))
    share = (1 - smoothing) / rows
    want = np.array([0.25, -0.75, 0.25, 0.25]) * share
    np.testing.assert_array_equal(grad[-1], want.astype(np.float16))
    assert rows_and_grad(backend, logits, target, reduction="sum")[0] == INF


# Dtypes.


def test_weight_is_of_any_real_dtype(backend: Backend) -> None:
    weight = np.array([1.0, 2.0, 3.0], np.float32)
    want, want_grad = rows_and_grad(backend, X, T, weight)
    for name in (*backend.floats, *backend.integers):
        for reduction in ("none", "mean"):
            loss, grad = rows_and_grad(
                backend, X, T, weight.astype(dtype(name)), reduction=reduction
            )
            assert (loss.dtype, grad.dtype) == (np.float32, np.float32)
            if reduction == "none":
                np.testing.assert_array_equal(loss, want)
                np.testing.assert_array_equal(grad, want_grad)


PROMOTIONS = {
    ("float16", "float16"): "float16",
    ("float16", "bfloat16"): "float32",
    ("float16", "float32"): "float32",
    ("float16", "float64"): "float64",
    ("bfloat16", "bfloat16"): "bfloat16",
    ("bfloat16", "float32"): "float32",
    ("bfloat16", "float64"): "float64",
    ("float32", "float32"): "float32",
    ("float32", "float64"): "float64",
    ("float64", "float64"): "float64",
}


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(
    ("pair", "promoted"), [pytest.param(*row, id="-".join(row[0])) for row in PROMOTIONS.items()]
)
def test_probabilities_promote(
    backend: Backend, pair: tuple[str, str], promoted: str, reduction: str
) -> None:
    if not set(pair) <= set(backend.floats):
        return  # the library lacks one of them
    soft = np.full((3, 3), 0.25)
    for one, other in (pair, pair[::-1]):
        x, p = X.astype(dtype(one)), soft.astype(dtype(other))
        loss, grad = rows_and_grad(backend, x, p, reduction=reduction)
        assert (loss.dtype.name, grad.dtype.name) == (promoted, one)
        weight = np.ones(3, dtype(other))
        loss, grad = rows_and_grad(backend, x, soft.astype(dtype(one)), weight, reduction=reduction)
        assert (loss.dtype.name, grad.dtype.name) == (promoted, one)
    loss, _ = rows_and_grad(backend, x, p, np.ones(3, np.int32), reduction=reduction)
    assert loss.dtype.name == promoted


def test_index_targets_keep_the_logits_dtype(backend: Backend) -> None:
    for name in backend.floats:
        for reduction in ("none", "sum", "mean"):
            loss, grad = rows_and_grad(backend, X.astype(dtype(name)), T, reduction=reduction)
            assert (loss.dtype.name, grad.dtype.name) == (name, name)
        logs = polyce.log_softmax(backend.asarray(X.astype(dtype(name))))
        assert backend.to_numpy(logs).dtype.name == name


@pytest.mark.only("numpy")
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_byte_swapped_arrays(backend: Backend, reduction: str) -> None:
    weight, soft = np.array([1.0, 2.0, 3.0]), np.full((3, 3), 0.25)
    for arrays in ((X, T, weight), (X, soft, weight), (X.astype(np.float16), T)):
        swapped = [array.astype(array.dtype.newbyteorder()) for array in arrays]
        # Floats in the other byte order go to the reference; labels and weights may have any order.
        ways = [(swapped, "reference")]
        if arrays[1] is T:
            ways.append(([arrays[0], *swapped[1:]], "native"))
        for given, name in ways:
            options = {"reduction": reduction, "implementation": name}
            want, want_grad = rows_and_grad(backend, *arrays, **options)
            loss, grad = rows_and_grad(backend, *given, reduction=reduction)
            np.testing.assert_array_equal(loss, want)
            np.testing.assert_array_equal(grad, want_grad)
            assert (loss.dtype.name, grad.dtype.name) == (want.dtype.name, want_grad.dtype.name)


# Types of results, and arguments left unchanged.


@pytest.mark.only("numpy", "jax-x32", "jax-x64", "dask")
@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_a_numpy_scalar_is_a_target(backend: Backend, kind: Callable[[int], Any]) -> None:
    loss = polyce.cross_entropy(backend.asarray(X[0]), kind(2))
    assert backend.owns(loss)
    close(backend.to_numpy(loss), -log_probabilities(X)[0, 2])


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_a_reduced_loss_is_what_the_librarys_sum_is(backend: Backend, reduction: str) -> None:
    for name in ("float32", "float64"):
        if name not in backend.floats:
            continue
        x, t = backend.asarray(X.astype(name)), backend.asarray(T)
        for loss in (
            polyce.cross_entropy(x, t, reduction=reduction),
            polyce.cross_entropy_with_grad(x, t, reduction=reduction)[0],
            polyce.nll_loss(x, t, reduction=reduction),
        ):
            assert backend.owns(loss)
            assert tuple(loss.shape) == ((3,) if reduction == "none" else ())
            if backend.name == "numpy" and reduction != "none":
                assert type(loss) is {"float32": np.float32, "float64": np.float64}[name]


def test_the_class_axis_is_the_same_for_all_functions(backend: Backend) -> None:
    cube = np.stack([X, -X, X + 1])
    want = np.moveaxis(log_probabilities(np.moveaxis(cube, 1, -1)), -1, 1)
    logs = polyce.log_softmax(backend.asarray(cube))
    close(backend.to_numpy(logs), want)
    target = backend.asarray(np.zeros((3, 3), np.int32))
    close(backend.to_numpy(polyce.nll_loss(logs, target, reduction="none")), -want[:, 0])


@pytest.mark.parametrize("soft", [False, True])
def test_no_argument_is_changed(backend: Backend, soft: bool) -> None:
    odd = np.array([[NAN, 0.0, 1.0], [INF, 0.0, 0.0], [-INF, 1.0, 2.0]], np.float32)
    arrays = [odd, np.eye(3, dtype=np.float32) if soft else T, np.ones(3, np.float32)]
    given = [backend.asarray(array.copy()) for array in arrays]
    for array in given:
        if isinstance(array, np.ndarray):
            array.flags.writeable = False
    for options in ({}, {"label_smoothing": 0.1}, {"reduction": "none"}):
        polyce.cross_entropy(*given, **options)
        upstream = np.ones(3 if "reduction" in options else (), np.float32)
        grad_output = backend.asarray(upstream.copy())
        polyce.cross_entropy_with_grad(*given, **options, grad_output=grad_output)
        np.testing.assert_array_equal(backend.to_numpy(grad_output), upstream)
    polyce.log_softmax(given[0])
    for array, want in zip(given, arrays, strict=True):
        np.testing.assert_array_equal(backend.to_numpy(array), want)


@pytest.mark.only("numpy", "strict")
def test_no_warning_comes_out_whatever_numpy_is_told(backend: Backend) -> None:
    logits = np.array([[NAN, 0, 1], [INF, 0, 0], [-INF] * 3, [3e38, -3e38, 0]], np.float32)
    labels, soft = np.array([0, 1, -100, 0]), np.eye(4, 3, dtype=np.float32)
    with np.errstate(all="raise"):
        for target in (labels, np.full(4, -100), soft):
            for reduction in ("none", "sum", "mean"):
                for smoothing in (0.0, 0.1):
                    rows_and_grad(
                        backend, logits, target, reduction=reduction, label_smoothing=smoothing
                    )
        polyce.log_softmax(backend.asarray(logits))
        polyce.nll_loss(backend.asarray(logits), backend.asarray(labels))
        assert np.geterr()["over"] == "raise"
