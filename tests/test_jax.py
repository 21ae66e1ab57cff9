"""jax: the derivative rule under grad, jvp, jit and vmap, with 32- and with 64-bit numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import polyce
from conftest import BY_DIGITS

pytestmark = pytest.mark.only(*BY_DIGITS)


@pytest.fixture
def jax() -> Any:
    import jax

    return jax


@pytest.fixture
def tolerance(backend_name: str) -> float:
    return 1e-12 if backend_name == "jax-x64" else 2e-6


def problem(kind: str = "index") -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((4, 5))
    if kind == "index":
        return logits, np.array([0, -100, 4, 2])
    return logits, rng.dirichlet(np.ones(5), 4)


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_grad_is_the_gradient_of_cross_entropy_with_grad(
    jax: Any, tolerance: float, kind: str, reduction: str, smoothing: float
) -> None:
    logits, target = (jax.numpy.asarray(array) for array in problem(kind))
    weight = jax.numpy.asarray([0.5, 1.0, 2.0, 1.0, 0.25])

    def loss(x: Any) -> Any:
        return polyce.cross_entropy(
            x, target, weight, reduction=reduction, label_smoothing=smoothing
        ).sum()

    _, expected = polyce.cross_entropy_with_grad(
        logits, target, weight, reduction=reduction, label_smoothing=smoothing
    )
    close = {"rtol": tolerance, "atol": tolerance}
    np.testing.assert_allclose(jax.grad(loss)(logits), expected, **close)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(logits), expected, **close)
    direction = jax.numpy.ones_like(logits) * jax.numpy.arange(5.0)
    _, along = jax.jvp(loss, (logits,), (direction,))
    np.testing.assert_allclose(along, (expected * direction).sum(), **close)


def test_a_tie_between_two_classes_has_the_exact_gradient(jax: Any) -> None:
    target = jax.numpy.asarray([0, 1])
    grad = jax.grad(lambda x: polyce.cross_entropy(x, target, reduction="sum"))(
        jax.numpy.zeros((2, 2))
    )
    assert grad.tolist() == [[-0.5, 0.5], [0.5, -0.5]]


def test_second_derivative_at_a_tie(jax: Any) -> None:
    hessian = jax.hessian(lambda x: polyce.cross_entropy(x, jax.numpy.asarray(1)))
    assert hessian(jax.numpy.zeros(2)).tolist() == [[0.25, -0.25], [-0.25, 0.25]]


def test_second_derivatives_agree_with_those_of_log_softmax(jax: Any, tolerance: float) -> None:
    logits, target = (jax.numpy.asarray(array) for array in problem("probability"))

    def plain(x: Any) -> Any:
        return -(target * jax.nn.log_softmax(x, axis=1)).sum()

    def ours(x: Any) -> Any:
        return polyce.cross_entropy(x, target, reduction="sum")

    np.testing.assert_allclose(
        jax.hessian(ours)(logits), jax.hessian(plain)(logits), rtol=0, atol=4 * tolerance
    )


def test_confident_rows_keep_their_gradient_under_jit(jax: Any) -> None:
    def loss(x: Any) -> Any:
        return polyce.cross_entropy(x, jax.numpy.asarray([0]))

    value, grad = jax.jit(jax.value_and_grad(loss))(jax.numpy.asarray([[40.25, 0.0]]))
    assert float(value) == pytest.approx(math.log1p(math.exp(-40.25)), rel=1e-6)
    assert float(grad[0, 0]) == pytest.approx(-math.exp(-40.25), rel=1e-6)


@pytest.mark.parametrize("all_ignored", [False, True])
def test_ignored_rows_have_gradient_zero_whatever_they_hold(jax: Any, all_ignored: bool) -> None:
    logits = jax.numpy.asarray([[math.nan, math.inf], [0.0, 1.0]])
    target = jax.numpy.asarray([-100, -100 if all_ignored else 1])
    for transform in (lambda f: f, jax.jit):
        grad = transform(jax.grad(lambda x: polyce.cross_entropy(x, target)))(logits)
        assert grad[0].tolist() == [0.0, 0.0]
        assert not np.isnan(grad).any()


def test_vmap_over_rows_is_the_batch(jax: Any, tolerance: float) -> None:
    logits, target = (jax.numpy.asarray(array) for array in problem())
    rows = jax.vmap(lambda x, y: polyce.cross_entropy(x, y, reduction="none"))(logits, target)
    expected = polyce.cross_entropy(logits, target, reduction="none")
    np.testing.assert_allclose(rows, expected, rtol=tolerance)


def test_log_softmax_has_its_derivative_rule(jax: Any, tolerance: float) -> None:
    logits = jax.numpy.asarray(problem()[0])

    def picked(function: Any) -> Any:
        return jax.grad(lambda x: (function(x) * jax.numpy.arange(5.0)).sum())(logits)

    np.testing.assert_allclose(
        picked(polyce.log_softmax), picked(jax.nn.log_softmax), rtol=1e-5, atol=10 * tolerance
    )


def test_labels_known_while_tracing_are_checked(jax: Any) -> None:
    target = jax.numpy.asarray([0, 5])
    with pytest.raises(IndexError, match=r"got 5 at position \(1,\)"):
        jax.jit(lambda x: polyce.cross_entropy(x, target))(jax.numpy.zeros((2, 3)))


def test_traced_bad_labels_give_nan(jax: Any) -> None:
    rows = jax.jit(lambda x, y: polyce.cross_entropy(x, y, reduction="none"))(
        jax.numpy.zeros((3, 4)), jax.numpy.asarray([0, 4, -1])
    )
    assert np.isnan(rows).tolist() == [False, True, True]


def test_with_grad_stops_derivatives(jax: Any) -> None:
    target = jax.numpy.asarray([0, 1])
    grad = jax.grad(lambda x: polyce.cross_entropy_with_grad(x, target)[0])(jax.numpy.ones((2, 3)))
    assert not np.asarray(grad).any()


@pytest.mark.only("jax-x32")
def test_numpy_labels_beyond_32_bits_are_not_cut_down(jax: Any) -> None:
    target = np.array([0, 2**32 + 1])
    with pytest.raises(IndexError, match="got 4294967297"):
        polyce.cross_entropy(jax.numpy.zeros((2, 3)), target)


@pytest.mark.parametrize("dtype", ["int2", "uint2", "int4", "uint4"])
@pytest.mark.parametrize("ignored", [-100, -1, 1, 9])
def test_labels_below_a_byte(jax: Any, dtype: str, ignored: int) -> None:
    rng = np.random.default_rng(0)
    classes = 9 if dtype == "int4" else 3
    logits = jax.numpy.asarray(rng.standard_normal((3, classes)), "float32")
    narrow = jax.numpy.asarray(np.array([0, 1, 1]), dtype)
    wide, options = narrow.astype("int32"), {"ignore_index": ignored, "label_smoothing": 0.1}

    def gradient(labels: Any) -> Any:
        return jax.jit(jax.grad(lambda x: polyce.cross_entropy(x, labels, **options)))(logits)

    want = gradient(wide)
    np.testing.assert_array_equal(gradient(narrow), want)
    np.testing.assert_array_equal(jax.jit(gradient)(narrow), want)
    want = polyce.cross_entropy(logits, wide, **options)
    assert polyce.cross_entropy(logits, narrow, **options) == want
    assert polyce.cross_entropy(logits, np.asarray(narrow), **options) == want
    # NumPy arrays, with labels that the kernels cannot read.
    ours = polyce.cross_entropy(np.asarray(logits), np.asarray(narrow), **options)
    np.testing.assert_allclose(ours, want, rtol=1e-6)


def test_a_bad_label_below_a_byte(jax: Any) -> None:
    labels = jax.numpy.asarray(np.array([1, -8]), "int4")
    with pytest.raises(IndexError, match=r"^labels must lie in 0 to 2 .*got -8 at position \(1,\)"):
        polyce.cross_entropy(jax.numpy.zeros((2, 3)), labels)
    rows = jax.jit(lambda *given: polyce.cross_entropy(*given, reduction="none"))
    assert np.isnan(rows(jax.numpy.zeros((2, 3)), labels)).tolist() == [False, True]


@pytest.mark.parametrize("way", ["eager", "disable_jit"])
def test_derivatives_outside_of_jit(jax: Any, way: str) -> None:
    logits = jax.numpy.asarray([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])
    target = jax.numpy.asarray([0, 2])

    def loss(x: Any) -> Any:
        return polyce.cross_entropy(x, target, label_smoothing=0.1)

    with jax.disable_jit(way == "disable_jit"):
        found = jax.grad(loss)(logits), jax.vjp(loss, logits)[1](1.0)[0]
        along = jax.linearize(loss, logits)[1](logits)
    expected = np.array([[-0.4217, 0.1057, 0.3160], [0.0893, 0.2714, -0.3607]])
    for grad in found:
        np.testing.assert_allclose(grad, expected, atol=6e-5)
    assert float(along) == pytest.approx((expected * np.asarray(logits)).sum(), abs=5e-4)
