"""jax: functions exported for any number of rows, called with several numbers of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import polyce
from conftest import ANY_WIDTH

pytestmark = pytest.mark.only(*ANY_WIDTH)

CLASSES, FEATURES = 5, 3
HEAD = np.random.default_rng(0).standard_normal((CLASSES, FEATURES)).astype(np.float32)


def check(function: Callable[..., Any], expected: Callable[..., Any], *shapes: Any) -> None:
    """Export a function of arrays of (rows, ...) and compare it with NumPy's results."""
    import jax
    from jax import export

    (rows,) = export.symbolic_shape("rows")
    dtypes = [np.int32 if shape == () else np.float32 for shape in shapes]
    given = [jax.ShapeDtypeStruct((rows, *s), d) for s, d in zip(shapes, dtypes, strict=True)]
    stored = export.export(jax.jit(function))(*given).serialize()
    rng = np.random.default_rng(1)
    for count in (1, 2, 7):
        arrays = [
            rng.integers(0, CLASSES, count, np.int32)
            if shape == ()
            else rng.dirichlet(np.ones(shape[0]), count).astype(np.float32)
            for shape in shapes
        ]
        found = export.deserialize(stored).call(*map(jax.numpy.asarray, arrays))
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected(*arrays)), strict=True)
        for one, other in pairs:
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)


def surprise(x: Any) -> Any:
    """Compute -log softmax in NumPy."""
    x = np.asarray(x, np.float64)
    return np.log(np.exp(x).sum(axis=1, keepdims=True)) - x


@pytest.mark.parametrize("smoothing", [0.0, 0.25])
def test_the_mean_over_probabilities(smoothing: float) -> None:
    def loss(x: Any, p: Any) -> Any:
        return polyce.cross_entropy(x, p, label_smoothing=smoothing)

    def expected(x: Any, p: Any) -> Any:
        p = (1 - smoothing) * p + smoothing / CLASSES
        return (p * surprise(x)).sum(1).mean()

    check(loss, expected, (CLASSES,), (CLASSES,))


def test_loss_with_gradient_and_stats() -> None:
    def both(x: Any, p: Any) -> Any:
        loss, grad, stats = polyce.cross_entropy_with_grad(x, p, return_stats="prediction")
        return loss, grad, stats.prediction

    def expected(x: Any, p: Any) -> Any:
        grad = (np.exp(-surprise(x)) - p) / len(x)
        return (p * surprise(x)).sum(1).mean(), grad, x.argmax(1)

    check(both, expected, (CLASSES,), (CLASSES,))


@pytest.mark.slow("jax-x32")
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_linear_head_and_its_gradients(reduction: str, chunk_size: int | None) -> None:
    import jax

    def loss(x: Any, labels: Any) -> Any:
        options = {"reduction": reduction, "chunk_size": chunk_size}
        return polyce.linear_cross_entropy(x, jax.numpy.asarray(HEAD), labels, **options)

    def every(x: Any, labels: Any) -> Any:
        options = {"reduction": reduction, "chunk_size": chunk_size}
        found = polyce.linear_cross_entropy_with_grad(
            x, jax.numpy.asarray(HEAD), labels, wrt=("input", "linear_weight"), **options
        )
        return loss(x, labels), jax.grad(lambda x: loss(x, labels).sum())(x), found

    def expected(x: Any, labels: Any) -> Any:
        each = surprise(x @ HEAD.T)
        grad = np.exp(-each) - np.eye(CLASSES)[labels]
        rows = each[np.arange(len(x)), labels]
        if reduction == "mean":
            rows, grad = rows.mean(), grad / len(x)
        return rows, grad @ HEAD, (rows, (grad @ HEAD, grad.T @ x, None))

    check(every, expected, (FEATURES,), ())
