"""The cases of a linear head: their answers are right, and wrong results are refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import polyce
from polyce.testing import Case
from polyce.testing.linear import check_linear
from polyce.testing.linear_cases import linear_cases

pytestmark = [pytest.mark.only("numpy"), pytest.mark.tests_of_tests]


def log_sum_exp(logits: Any) -> Any:
    top = logits.max(axis=-1, keepdims=True)
    return top + np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def probabilities(case: Case, logits: Any) -> Any:
    """Return a case's target as probabilities of the shape of its rows' logits."""
    if case.kind in ("probability", "teacher"):
        soft = case.target.reshape(logits.shape)
        if case.kind == "probability":
            return soft
        scaled = soft * case.options["teacher_scale"]
        return np.exp(scaled - log_sum_exp(scaled))
    rows, width = len(logits), 1
    chances = np.ones((rows, width))
    if case.target_probability is not None:
        width = case.target.shape[-1]
        chances = case.target_probability.reshape(rows, width)
    classes = case.target.reshape(rows, width)
    return (np.eye(logits.shape[-1])[classes] * chances[..., None]).sum(axis=1)


def test_the_exact_answers_are_those_of_the_textbook() -> None:
    """In float64, for every kind of target without options."""
    plain = [c for c in linear_cases(["float64"]) if c.of_logits.group == "sizes"]
    assert {c.name.split("/")[-2] for c in plain} >= {"sparse", "teacher", "teacher-head"}
    plain = [c for c in plain if c.linear_weight.size]
    assert len(plain) > 8
    for case in plain:
        target, features = case.of_logits.target, case.input.shape[-1]
        hidden = case.input.reshape(math.prod(case.input.shape[:-1]), features)
        bias = 0.0 if case.linear_bias is None else case.linear_bias
        logits = hidden @ case.linear_weight.T + bias
        if case.teacher:
            states, weight, *more = case.teacher
            assert weight.shape[1] == features + 2
            np.testing.assert_array_equal(states @ weight.T + sum(more), target)
        shares = probabilities(case.of_logits, logits)
        logs = logits - log_sum_exp(logits)
        rows = -(shares * logs).sum(axis=-1)
        grad = shares.sum(axis=-1, keepdims=True) * np.exp(logs) - shares
        reduction = case.of_logits.options["reduction"]
        if reduction == "mean":
            grad = grad / max(len(rows), 1)
        loss = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / max(len(rows), 1)}[reduction]
        want = {"input": grad @ case.linear_weight, "linear_weight": grad.T @ hidden}
        want |= {} if case.linear_bias is None else {"linear_bias": grad.sum(axis=0)}
        if len(rows):
            got = case.of_logits.answer.loss.reshape(np.shape(loss))
            np.testing.assert_allclose(got, loss, rtol=1e-12, atol=1e-13)
        assert want.keys() == case.gradients.keys()
        for name, array in want.items():
            got = case.gradients[name]
            np.testing.assert_allclose(got, array.reshape(got.shape), rtol=1e-12, atol=1e-13)


def changed(change: Callable[..., Any]) -> Callable[..., Any]:
    right = polyce.linear_cross_entropy_with_grad

    def wrong(*arrays: Any, **options: Any) -> Any:
        loss, gradients = right(*arrays, **options)
        with np.errstate(all="ignore"):
            return loss, tuple(a if a is None else change(a) for a in gradients)

    return wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a * a.dtype.type(1.001) if a.dtype == np.float32 else a, "d_.*error"),
        (lambda a: a.astype(np.float16).astype(a.dtype), "d_.*of the allowed"),
        (lambda a: a if a.shape[-1] != 7 or a.ndim > 1 else a / 5, "d_linear_bias.*of the allowed"),
        (lambda a: np.where(a == 0, np.nan, a).astype(a.dtype), "got nan, expected 0"),
        (lambda a: a.astype(np.float64), "dtype float64, expected float32"),
        (lambda a: a[..., None], "shape"),
        (lambda a: a.tolist(), "list is not an array of numpy"),
    ],
    ids=["factor", "rounded", "mean", "nan", "dtype", "shape", "list"],
)
def test_wrong_gradients_are_refused(
    monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    monkeypatch.setattr(polyce, "linear_cross_entropy_with_grad", changed(change))
    with pytest.raises(AssertionError, match=message):
        check_linear(None, "numpy")


def test_gradients_that_were_not_asked_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = polyce.linear_cross_entropy_with_grad

    def all_of_them(*arrays: Any, wrt: Any, **options: Any) -> Any:
        return right(*arrays, **options)

    monkeypatch.setattr(polyce, "linear_cross_entropy_with_grad", all_of_them)
    with pytest.raises(AssertionError, match="d_input: ndarray was not asked for"):
        check_linear(None, "numpy")
