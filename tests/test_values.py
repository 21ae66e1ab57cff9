"""`log_prob` and `entropy`: arguments, errors and ends. The conformance grid has the numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import polyce
from polyce.testing.backends import Backend

X = np.random.default_rng(1).normal(0.0, 2.0, (3, 5, 2)).astype(np.float32)
ROWS = X[:, :, 0]


# jax compiles each operation of each shape; the conformance grid runs there too.
QUICK = pytest.mark.only("numpy", "strict", "torch", "dask")


def exact(x: Any, axis: int = 1) -> Any:
    """Compute log-probabilities in float64, for moderate logits."""
    x = x.astype(np.float64)
    return x - np.log(np.exp(x).sum(axis, keepdims=True))


def check(backend: Backend, got: Any, want: Any) -> None:
    got = backend.to_numpy(got)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8"])
def test_one_class_of_each_row(backend: Backend, dtype: str) -> None:
    index = np.array([[0, 4], [2, 2], [3, 1]]).astype(dtype)
    got = polyce.log_prob(backend.asarray(X), backend.asarray(index))
    wide = index[:, None].astype(np.int64)
    check(backend, got, np.take_along_axis(exact(X), wide, 1)[:, 0])
    first = polyce.log_prob(backend.asarray(ROWS[0]), backend.asarray(np.array(4)))
    check(backend, first, exact(ROWS[:1])[0, 4])


@QUICK
def test_several_classes_of_each_row(backend: Backend) -> None:
    index = np.array([[[0, 4], [2, 2], [0, 1]], [[0, 0]] * 3, [[4, 3], [2, 1], [1, 0]]])
    got = polyce.log_prob(backend.asarray(X), backend.asarray(index))
    check(backend, got, np.take_along_axis(exact(X), index, 1))
    last = polyce.log_prob(
        backend.asarray(np.moveaxis(X, 1, -1).copy()),
        backend.asarray(np.moveaxis(index, 1, -1).copy()),
        axis=-1,
    )
    check(backend, last, np.moveaxis(np.take_along_axis(exact(X), index, 1), 1, -1))
    row = polyce.log_prob(backend.asarray(ROWS[0]), backend.asarray(np.array([4, 0])))
    check(backend, row, exact(ROWS[:1])[0, [4, 0]])


@QUICK
def test_what_is_ignored_is_0(backend: Backend) -> None:
    x = ROWS.copy()
    x[2] = np.nan
    one = polyce.log_prob(backend.asarray(x), backend.asarray(np.array([1, 7, 7])), ignore_index=7)
    check(backend, one, [exact(ROWS)[0, 1], 0.0, 0.0])
    index = np.array([[1, -100], [-100, 3], [-100, -100]])
    several = polyce.log_prob(backend.asarray(x), backend.asarray(index))
    logs = exact(ROWS)
    check(backend, several, [[logs[0, 1], 0.0], [0.0, logs[1, 3]], [0.0, 0.0]])


@QUICK
def test_no_class_of_each_row(backend: Backend) -> None:
    got = polyce.log_prob(backend.asarray(X), backend.asarray(np.zeros((3, 0, 2), np.int64)))
    assert backend.to_numpy(got).shape == (3, 0, 2)


@QUICK
def test_the_entropy(backend: Backend) -> None:
    logs = exact(X)
    check(backend, polyce.entropy(backend.asarray(X)), -(np.exp(logs) * logs).sum(1))
    logs = exact(2.5 * X, 0)
    got = polyce.entropy(backend.asarray(X), axis=0, logit_scale=2.5)
    check(backend, got, -(np.exp(logs) * logs).sum(0))
    logs = exact(3.0 * np.tanh(X / 3.0), -1)
    got = polyce.entropy(backend.asarray(X), axis=-1, logit_softcap=3.0)
    check(backend, got, -(np.exp(logs) * logs).sum(-1))


@QUICK
def test_the_entropy_of_odd_rows(backend: Backend) -> None:
    x = np.zeros((4, 2), np.float32)
    x[0, 1], x[1, 0], x[2, :] = np.inf, np.nan, -np.inf
    got = backend.to_numpy(polyce.entropy(backend.asarray(x)))
    np.testing.assert_allclose(got, [math.nan] * 3 + [math.log(2.0)], rtol=1e-6)
    one = polyce.entropy(backend.asarray(np.array([[3.0], [-50.0]], np.float32)))
    np.testing.assert_array_equal(backend.to_numpy(one), [0.0, 0.0])
    none = polyce.entropy(backend.asarray(np.zeros((2, 0), np.float32)))
    np.testing.assert_array_equal(backend.to_numpy(none), [math.nan] * 2)
    empty = polyce.entropy(backend.asarray(np.zeros((0, 3), np.float32)))
    assert backend.to_numpy(empty).shape == (0,)


@pytest.mark.only("numpy", "torch")
def test_confident_rows_keep_their_digits(backend: Backend) -> None:
    margins = np.array([20.0, 40.0, 80.0], np.float32)
    x = np.stack([margins, np.zeros(3, np.float32)], 1)
    for index in (np.zeros(3, np.int64), np.zeros((3, 1), np.int64)):
        got = backend.to_numpy(polyce.log_prob(backend.asarray(x), backend.asarray(index)))
        np.testing.assert_allclose(got.reshape(-1), -np.exp(-margins.astype(float)), rtol=4e-7)
    # The likeliest of a thousand offsets; the others are a million away from it.
    far = x + np.float32(1e6)
    got = backend.to_numpy(polyce.log_prob(backend.asarray(far), backend.asarray(index)))
    np.testing.assert_allclose(got[:, 0], -np.exp(-margins.astype(float)), rtol=4e-7)


@pytest.mark.labels_read
@pytest.mark.only("numpy", "strict", "torch", "jax-x32")
def test_an_index_out_of_range(backend: Backend) -> None:
    x = backend.asarray(ROWS)
    match = r"^index must lie in 0 to 4 \(5 classes\), got 5 at position \(1,\); give rows to leave"
    with pytest.raises(IndexError, match=match):
        polyce.log_prob(x, backend.asarray(np.array([0, 5, 1])))
    match = r"^index must lie in 0 to 4 \(5 classes\), got -1 at position \(2, 1\); "
    with pytest.raises(IndexError, match=match):
        polyce.log_prob(x, backend.asarray(np.array([[0, 1], [1, 2], [3, -1]])))
    unchecked = np.array([[0, 1], [1, 2], [3, -1]])
    got = backend.to_numpy(polyce.log_prob(x, backend.asarray(unchecked), validate=False))
    np.testing.assert_array_equal(np.isnan(got), unchecked == -1)
    one = polyce.log_prob(x, backend.asarray(np.array([0, 5, 1])), validate=False)
    np.testing.assert_array_equal(np.isnan(backend.to_numpy(one)), [False, True, False])


@pytest.mark.only("dask")
def test_an_index_without_values_is_not_looked_at(backend: Backend) -> None:
    with pytest.raises(ValueError, match=r"^validate=True needs index's values, but this index is"):
        polyce.log_prob(
            backend.asarray(ROWS), backend.asarray(np.zeros(3, np.int64)), validate=True
        )


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "floats": (
        np.zeros(3, np.float32), TypeError,
        r"^index must hold classes in an integer dtype, got float32 \(3,\); cast it to int64",
    ),
    "bools": (np.zeros(3, bool), TypeError, "^index must hold classes in an integer dtype"),
    "rows": (
        np.zeros(4, np.int32), ValueError,
        r"^index must have the shape of the rows \(3,\), or for K classes of each row \(3, K\)",
    ),
    "classes": (np.zeros((5, 3), np.int32), ValueError, r"got int32 \(5, 3\) for input \(3, 5\)"),
    "axes": (np.zeros((3, 1, 1), np.int32), ValueError, r"got int32 \(3, 1, 1\) for input"),
    "None": (None, TypeError, "^index must be an array, got None; pass the classes to choose"),
    "list": ([0, 1, 2], TypeError, "^index must be an array of an array-API library, got list"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_an_index_that_does_not_fit(backend: Backend, name: str) -> None:
    index, error, message = REFUSED[name]
    if isinstance(index, np.ndarray):
        index = backend.asarray(index)
    with pytest.raises(error, match=message):
        polyce.log_prob(backend.asarray(ROWS), index)


def test_logits_and_options_are_checked(backend: Backend) -> None:
    x, index = backend.asarray(ROWS), backend.asarray(np.zeros(3, np.int64))
    for call in (lambda *a, **o: polyce.log_prob(*a, index, **o), polyce.entropy):
        with pytest.raises(ValueError, match=r"^axis must lie within the 2 axes of input"):
            call(x, axis=2)
        with pytest.raises(ValueError, match=r"^logit_scale must lie between"):
            call(x, logit_scale=0.0)
        with pytest.raises(ValueError, match=r"^implementation must be one of"):
            call(x, implementation="nothing")
        with pytest.raises(TypeError, match=r"^input must be real floating point"):
            call(index)
        with pytest.raises(TypeError, match=r"^input must be an array, got None"):
            call(None)
    with pytest.raises(TypeError, match=r"^ignore_index must be an integer, got 1\.5"):
        polyce.log_prob(x, index, ignore_index=1.5)


@pytest.mark.only("numpy")
def test_explain_tells_what_computes_them() -> None:
    index = np.zeros((3, 2), np.int8)
    told = polyce.explain(ROWS, index, logit_scale=2.0, function=polyce.log_prob)
    assert told.call == (
        "log_prob on numpy / cpu: logits float32 (3, 5), index int8 (3, 2), logit_scale 2"
    )
    assert told.chosen == "native"
    told = polyce.explain(ROWS, implementation="reference", function=polyce.entropy)
    assert told.call == "entropy on numpy / cpu: logits float32 (3, 5)"
    assert told.chosen == "reference"
    with pytest.raises(ValueError, match=r"^index must have the shape of the rows"):
        polyce.explain(ROWS, index[:1], function=polyce.log_prob)
