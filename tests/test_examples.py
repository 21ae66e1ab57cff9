"""Worked examples with known answers, printed to four digits: the same on every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import polyce
from polyce.testing.backends import Backend

FIVE = [
    [-0.6314, 0.6876, 0.8655, -1.8212, 0.0963],
    [-0.5437, 0.2778, -0.1662, -0.0784, -0.6565],
    [-0.1164, 0.3882, 0.2487, -0.5318, 0.3943],
]
ONE_ROW = [[-2.1188, 0.0635, -1.4555, -0.0126, -0.1548]]
FOUR = [[7.4, 2.8, -0.6, 6.3], [-1.9, 4.2, 3.9, 5.1], [9.3, -5.3, 7.2, -8.4]]
THREE = [[7.4, 2.8, -0.6], [6.3, -1.9, 4.2]]
SCORES = np.array([[3.9, 5.1, 9.3], [-5.3, 7.2, -8.4]])
SOFT = np.exp(SCORES) / np.exp(SCORES).sum(axis=1, keepdims=True)

# Name, logits, target, options, loss.
EXAMPLES: list[tuple[str, Any, Any, dict[str, Any], Any]] = [
    ("five classes", FIVE, [1, 0, 0], {}, 1.6557),
    ("one row", ONE_ROW, [1], {}, 1.1192),
    ("one row, one-hot", ONE_ROW, [[0.0, 1.0, 0.0, 0.0, 0.0]], {}, 1.1192),
    ("one row, smoothed", ONE_ROW, [1], {"reduction": "sum", "label_smoothing": 0.5}, 1.5187),
    ("one row, mixed", ONE_ROW, [[0.1, 0.6, 0.1, 0.1, 0.1]], {"reduction": "sum"}, 1.5187),
    (
        "one row, weighted",
        ONE_ROW,
        [1],
        {"weight": [4, 3, 2, 1, 1], "reduction": "sum", "label_smoothing": 0},
        3.3575,
    ),
    (
        "one row, weighted and smoothed",
        ONE_ROW,
        [1],
        {"weight": [3, 2, 2, 1, 1], "reduction": "sum", "label_smoothing": 0.5},
        3.1143,
    ),
    ("indices", FOUR, [3, 0, 2], {}, 3.7154),
    ("indices, sum", FOUR, [3, 0, 2], {"reduction": "sum"}, 11.1463),
    ("indices, none", FOUR, [3, 0, 2], {"reduction": "none"}, [1.3951, 7.5357, 2.2155]),
    ("indices, weight", FOUR, [3, 0, 2], {"weight": [0.0, 1.0, 2.0, 3.0]}, 1.7233),
    ("indices, ignore_index", FOUR, [3, 0, 2], {"ignore_index": 2}, 4.4654),
    ("indices, label_smoothing", FOUR, [3, 0, 2], {"label_smoothing": 0.8}, 4.8088),
    ("probabilities", THREE, SOFT, {}, 8.1203),
    ("probabilities, sum", THREE, SOFT, {"reduction": "sum"}, 16.2406),
    ("probabilities, none", THREE, SOFT, {"reduction": "none"}, [7.9249, 8.3157]),
    ("probabilities, weight", THREE, SOFT, {"weight": [0.0, 1.0, 2.0]}, 12.0488),
    ("probabilities, label_smoothing", THREE, SOFT, {"label_smoothing": 0.8}, 4.7278),
]
TABLE = pytest.mark.parametrize(
    ("logits", "target", "options", "loss"),
    [pytest.param(*example[1:], id=example[0]) for example in EXAMPLES],
)


def arrays(
    backend: Backend, dtype: str, logits: Any, target: Any, options: dict[str, Any]
) -> tuple[Any, Any, dict[str, Any]]:
    """Convert the arrays to the dtype, or to float32 if the library lacks it."""
    if dtype not in backend.floats:
        dtype = "float32"
    target = np.asarray(target)
    options = dict(options)
    if "weight" in options:
        options["weight"] = backend.asarray(np.array(options["weight"], dtype))
    target = target.astype(dtype if target.dtype.kind == "f" else "int32")
    return backend.asarray(np.array(logits, dtype)), backend.asarray(target), options


def check(backend: Backend, got: Any, loss: Any) -> None:
    assert tuple(got.shape) == np.shape(loss)
    np.testing.assert_allclose(backend.to_numpy(got), loss, rtol=0, atol=2e-4)


@TABLE
def test_functions(
    backend: Backend, logits: Any, target: Any, options: dict[str, Any], loss: Any
) -> None:
    x, t, options = arrays(backend, "float32", logits, target, options)
    check(backend, polyce.cross_entropy(x, t, **options), loss)
    check(backend, polyce.cross_entropy_with_grad(x, t, **options)[0], loss)


@TABLE
def test_class(
    backend: Backend, logits: Any, target: Any, options: dict[str, Any], loss: Any
) -> None:
    x, t, options = arrays(backend, "float64", logits, target, options)
    check(backend, polyce.CrossEntropyLoss(**options)(x, t), loss)


HARD = [
    pytest.param(*example[1:], id=example[0])
    for example in EXAMPLES
    if np.ndim(example[2]) == 1 and not example[3].get("label_smoothing")
]


@pytest.mark.parametrize(("logits", "target", "options", "loss"), HARD)
def test_negative_log_likelihood_of_log_softmax(
    backend: Backend, logits: Any, target: Any, options: dict[str, Any], loss: Any
) -> None:
    x, t, options = arrays(backend, "float64", logits, target, options)
    options.pop("label_smoothing", None)
    log_probabilities = polyce.log_softmax(x, 1)
    check(backend, polyce.nll_loss(log_probabilities, t, **options), loss)
    check(backend, polyce.NLLLoss(**options)(log_probabilities, t), loss)


def test_positional_arguments_of_the_first_signature(backend: Backend) -> None:
    x, t, _ = arrays(backend, "float32", FIVE, [1, 0, 0], {})
    check(backend, polyce.cross_entropy(x, t, None, None, -100, None, "mean"), 1.6557)
    log_probabilities = polyce.log_softmax(x, 1)
    check(backend, polyce.nll_loss(log_probabilities, t, None, None, -100, None, "mean"), 1.6557)


@pytest.mark.parametrize(("reduction", "loss"), [("none", 0.0), ("sum", 0.0), ("mean", np.nan)])
def test_empty_probabilities(backend: Backend, reduction: str, loss: float) -> None:
    x, t, _ = arrays(backend, "float32", [], np.zeros(0), {})
    check(backend, polyce.cross_entropy(x, t, reduction=reduction), loss)
    check(backend, polyce.CrossEntropyLoss(reduction=reduction)(x, t), loss)


def test_an_index_target_may_have_no_axes_or_one(backend: Backend) -> None:
    x, t, _ = arrays(backend, "float32", ONE_ROW[0], 1, {})
    check(backend, polyce.cross_entropy(x, t), 1.1192)
    x, t, _ = arrays(backend, "float32", ONE_ROW, [1], {})
    check(backend, polyce.cross_entropy(x, t), 1.1192)


def test_attributes_and_repr_of_the_class() -> None:
    loss = polyce.CrossEntropyLoss()
    assert (loss.weight, loss.ignore_index) == (None, -100)
    assert (loss.reduction, loss.label_smoothing) == ("mean", 0.0)
    assert repr(loss) == "CrossEntropyLoss()"
