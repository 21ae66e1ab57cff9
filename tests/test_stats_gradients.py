"""`grad_stats`: what it means beside the other arguments. The conformance grid has the numbers."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest

import polyce
from polyce.call.options import Options
from polyce.call.problem import describe
from polyce.implementations import registry
from polyce.testing import exact_answer
from polyce.testing.backends import Backend

X = np.random.default_rng(0).normal(0.0, 2.0, (4, 5))
LABELS = np.array([0, 4, -100, 2])
OF_LSE = np.array([1.0, -0.5, 3.0, 2.0])
OF_ENTROPY = np.array([0.25, 1.0, -2.0, -1.0])


# jax compiles each operation of each shape; the conformance grid runs there too.
QUICK = pytest.mark.only("numpy", "strict", "torch", "dask")


def given(backend: Backend, *arrays: Any) -> list[Any]:
    """Convert arrays, in float32, which every library has."""
    floats = [a.astype(np.float32) if a.dtype == np.float64 else a for a in arrays]
    return [backend.asarray(array) for array in floats]


def gradient(backend: Backend, *arrays: Any, **options: Any) -> Any:
    _, grad, _ = polyce.cross_entropy_with_grad(*arrays, return_stats=True, **options)
    return backend.to_numpy(grad)


@QUICK
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_gradient_of_0_leaves_out_the_loss(backend: Backend, reduction: str) -> None:
    x, labels, of_lse, of_entropy = given(backend, X, LABELS, OF_LSE, OF_ENTROPY)
    zero = given(backend, np.zeros(4))[0] if reduction == "none" else 0.0
    options = {"reduction": reduction, "grad_output": zero}
    got = gradient(backend, x, labels, grad_stats={"lse": of_lse, "entropy": of_entropy}, **options)
    softmax = np.exp(X) / np.exp(X).sum(1, keepdims=True)
    entropy = -(softmax * np.log(softmax)).sum(1, keepdims=True)
    slope = OF_LSE[:, None] - OF_ENTROPY[:, None] * (np.log(softmax) + entropy)
    want = softmax * slope * (LABELS != -100)[:, None]
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)


@QUICK
def test_the_gradients_add_up(backend: Backend) -> None:
    x, labels, of_lse = given(backend, X, LABELS, OF_LSE)
    both = gradient(backend, x, labels, grad_stats={"lse": of_lse}, grad_output=0.5)
    loss = gradient(backend, x, labels, grad_output=0.5)
    lse = gradient(backend, x, labels, grad_stats={"lse": of_lse}, grad_output=0.0)
    np.testing.assert_allclose(both, loss + lse, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(
        gradient(backend, x, labels, grad_output=0.5, grad_stats={}), loss
    )
    assert np.abs(lse).sum() > 1.0


@QUICK
def test_rows_that_do_not_count_pass_nothing_back(backend: Backend) -> None:
    x = X.copy()
    x[2] = np.nan
    x[3, 0] = np.inf
    nothing = OF_LSE.copy()
    nothing[2:] = np.nan
    weight = np.array([1.0, 2.0, 1.0, 0.0])
    arrays = given(backend, x, LABELS, nothing, weight)
    got = gradient(
        backend, *arrays[:2], sample_weight=arrays[3],
        grad_stats={"lse": arrays[2], "entropy": arrays[2]},
    )  # fmt: skip
    assert np.isfinite(got[:2]).all()
    np.testing.assert_array_equal(got[2:], 0.0)


def test_a_row_without_softmax_is_nan_and_a_masked_class_gets_nothing(backend: Backend) -> None:
    x = X.copy()
    x[0, 1], x[1, 2] = -np.inf, np.inf
    x, labels, of_entropy = given(backend, x, np.zeros(4, np.int64), OF_ENTROPY)
    got = gradient(backend, x, labels, grad_stats={"entropy": of_entropy}, grad_output=0.0)
    assert got[0, 1] == 0.0
    assert np.isfinite(got[[0, 2, 3]]).all()
    assert np.isnan(got[1]).all()


@QUICK
def test_one_row_takes_a_number(backend: Backend) -> None:
    x, label, of_lse = given(backend, X[0], np.array(1), np.array(2.0))
    got = gradient(backend, x, label, grad_stats={"lse": 2, "entropy": 0.5}, grad_output=0.0)
    answer = exact_answer(
        X[0].astype(np.float32), np.array(1), grad_output=0.0,
        grad_lse=np.array(2.0), grad_entropy=np.array(0.5),
    )  # fmt: skip
    np.testing.assert_allclose(got, answer.grad, rtol=1e-5, atol=1e-7)
    array = gradient(backend, x, label, grad_stats={"lse": of_lse}, grad_output=0.0)
    number = gradient(backend, x, label, grad_stats={"lse": 2.0}, grad_output=0.0)
    np.testing.assert_array_equal(array, number)


@pytest.mark.only("numpy", "torch")
def test_the_gradient_goes_where_the_caller_wants_it(backend: Backend) -> None:
    x, labels, of_lse = given(backend, X, LABELS, OF_LSE)
    answer = exact_answer(X.astype(np.float32), LABELS, grad_lse=OF_LSE)
    _, grad, _ = polyce.cross_entropy_with_grad(
        x, labels, return_stats="lse", grad_stats={"lse": of_lse}, out=x
    )
    assert grad is x
    np.testing.assert_allclose(backend.to_numpy(x), answer.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.only("numpy", "torch")
def test_a_call_like_one_that_the_core_keeps_is_no_answer(
    backend: Backend, empty_door: None
) -> None:
    x, labels, of_lse = given(backend, X, LABELS, OF_LSE)
    for _ in range(2):
        polyce.cross_entropy_with_grad(x, labels)
    with pytest.raises(ValueError, match="which return_stats does not ask for"):
        polyce.cross_entropy_with_grad(x, labels, grad_stats={"lse": of_lse})


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "no gradient": (
        {"prediction": OF_LSE}, ValueError,
        "grad_stats takes the names lse and entropy, which have a gradient, got 'prediction'",
    ),
    "unknown": ({"lsE": OF_LSE}, ValueError, "grad_stats takes the names lse and entropy, .*'lsE'"),
    "kind": (OF_LSE, TypeError, "grad_stats must be a mapping from the names lse and entropy to"),
    "list": (["lse"], TypeError, "grad_stats must be a mapping .*, got list; pass a dict"),
    "None": ({"lse": None}, TypeError, r"grad_stats\['lse'\] must be an array, got None; leave"),
    "bool": ({"lse": True}, TypeError, r"grad_stats\['lse'\] must be a real number or an array"),
    "text": ({"lse": "1"}, TypeError, r"grad_stats\['lse'\] must be an array of an array-API"),
    "number": (
        {"entropy": 1.0}, ValueError,
        r"grad_stats\['entropy'\] must have the shape of the rows \(4,\), got the number 1.0; pass",
    ),
    "shape": (
        {"entropy": OF_LSE[:3]}, ValueError,
        r"grad_stats\['entropy'\] must have the shape of the rows \(4,\), got shape \(3,\); pass",
    ),
    "complex": (
        {"lse": OF_LSE.astype(np.complex64)}, TypeError,
        r"grad_stats\['lse'\] must be real numbers, got complex64; convert",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(backend: Backend, name: str) -> None:
    grad_stats, error, message = REFUSED[name]
    if isinstance(grad_stats, dict):
        grad_stats = {
            key: given(backend, value)[0] if isinstance(value, np.ndarray) else value
            for key, value in grad_stats.items()
        }
    x, labels = given(backend, X, LABELS)
    with pytest.raises(error, match=message):
        gradient(backend, x, labels, grad_stats=grad_stats)


def test_a_name_must_be_asked_for(backend: Backend) -> None:
    x, labels, of_lse = given(backend, X, LABELS, OF_LSE)
    message = "grad_stats holds 'lse', which return_stats does not ask for; add the name to"
    for asked in (False, "entropy", ()):
        with pytest.raises(ValueError, match=message):
            polyce.cross_entropy_with_grad(
                x, labels, return_stats=asked, grad_stats={"lse": of_lse}
            )


@pytest.mark.only("torch")
def test_arrays_of_another_library_are_refused_by_name(backend: Backend) -> None:
    x, labels = given(backend, X, LABELS)
    message = re.escape("and grad_stats['lse'] is numpy; convert grad_stats['lse'] with")
    with pytest.raises(TypeError, match=message):
        gradient(backend, x, labels, grad_stats={"lse": OF_LSE})


@pytest.mark.only("numpy")
def test_explain_says_which_path_takes_them() -> None:
    told = polyce.explain(
        X, LABELS, return_stats="lse", grad_stats={"lse": OF_LSE},
        function=polyce.cross_entropy_with_grad,
    )  # fmt: skip
    assert not told.is_kept
    assert told.reasons["native"] == told.reasons["reference"] == ()
    lacking = dataclasses.replace(registry.find("reference"), takes_grad_stats=False)
    problem, _ = describe(X, LABELS, options=Options(stats="lse"), grad_stats={"lse": OF_LSE})
    assert lacking.reasons(problem) == ("takes no cotangents of stats (grad_stats)",)
