"""mlx: lazy arrays, its own transformations, and bad labels that must never reach a gather."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import polyce

pytestmark = pytest.mark.only("mlx")

# Ties, a masked class, a confident row, an ignored one.
X = np.array([[0, 0, 0], [5, -np.inf, 1], [30, 0, 0], [1, 2, 3], [2, 2, -1]], dtype=np.float32)
T = np.array([1, 2, 0, -100, 1])
P = np.array(
    [[0.5, 0.25, 0.25], [0.5, 0, 0.5], [1, 0, 0], [0.2, 0.3, 0.5], [0, 1, 0]], dtype=np.float32
)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "z-loss": {"z_loss": 0.1},
    "softcap": {"logit_softcap": 5.0, "logit_scale": 0.5},
    "sum": {"reduction": "sum"},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("target", [T, P], ids=["index", "probability"])
def test_grad(target: Any, options: str) -> None:
    import mlx.core as mx

    chosen = OPTIONS[options]
    x, t = mx.array(X), mx.array(target)

    def loss(logits: Any) -> Any:
        return polyce.cross_entropy(logits, t, **chosen)

    want, want_grad = polyce.cross_entropy_with_grad(X, target, **chosen)
    value, grad = mx.value_and_grad(loss)(x)
    np.testing.assert_allclose(np.array(value), want, rtol=2e-6)
    np.testing.assert_allclose(np.array(grad), want_grad, rtol=1e-5, atol=2e-8)


def test_compile() -> None:
    """Only one case: on a CPU mlx calls a C++ compiler for each of its kernels."""
    import mlx.core as mx

    def rows(logits: Any, labels: Any) -> Any:
        return polyce.cross_entropy(logits, labels, reduction="none")

    bad = np.array([1, -1, 3, -100, 2**31 - 1], dtype=np.int32)
    want = polyce.cross_entropy(X, bad, reduction="none", validate=False)
    got = mx.compile(rows)(mx.array(X), mx.array(bad))
    np.testing.assert_allclose(np.array(got), want, rtol=2e-6)


def test_vmap() -> None:
    import mlx.core as mx

    rows = mx.vmap(lambda x, t: polyce.cross_entropy(x, t, reduction="sum"))(
        mx.array(X), mx.array(T)
    )
    want = polyce.cross_entropy(X, T, reduction="none")
    np.testing.assert_allclose(np.array(rows), want, rtol=2e-6, atol=1e-12)


def test_second_derivatives() -> None:
    import mlx.core as mx

    zero = mx.array([0])

    def first(x: Any) -> Any:
        return mx.grad(lambda y: polyce.cross_entropy(y, zero))(x)[0, 0]

    # p (1 - p) and - p q, at a tie of three.
    hessian_row = mx.grad(first)(mx.zeros((1, 3)))
    np.testing.assert_allclose(np.array(hessian_row), [[2 / 9, -1 / 9, -1 / 9]], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "uint32"])
def test_no_label_out_of_range_reaches_a_gather(dtype: str) -> None:
    """A label that did would end the process."""
    import mlx.core as mx

    bad = np.array([0, 2, 3, 200, np.iinfo(dtype).max, np.iinfo(dtype).min]).astype(dtype)
    x, weight = mx.zeros((6, 3)), mx.array([1.0, 2.0, 3.0])

    def rows(labels: Any) -> Any:
        loss, grad = polyce.cross_entropy_with_grad(
            x, labels, weight, validate=False, label_smoothing=0.1, reduction="none"
        )
        return loss, grad, polyce.nll_loss(x, labels, weight, reduction="none", validate=False)

    want = [not 0 <= int(label) < 3 for label in bad]
    loss, grad, nll = rows(mx.array(bad, dtype=getattr(mx, dtype)))
    assert want == np.isnan(np.array(loss)).tolist()
    assert want == np.isnan(np.array(grad)).all(axis=1).tolist()
    assert want == np.isnan(np.array(nll)).tolist()


def test_a_call_evaluates_nothing() -> None:
    """Under vmap no array has a value, and mlx raises if one is asked for."""
    import mlx.core as mx

    def call(x: Any) -> Any:
        return polyce.cross_entropy_with_grad(x, mx.argmax(x, axis=0), return_stats=True)[0]

    loss = mx.vmap(call)(mx.zeros((2, 3)))
    np.testing.assert_allclose(np.array(loss), [np.log(3)] * 2, rtol=1e-6)


def test_sums_keep_their_digits() -> None:
    """On a CPU mlx's own sum of this many equal numbers is off by 3e-4."""
    import mlx.core as mx

    rows = 70_000
    logits = np.tile(np.array([[0.0, 0.1]], np.float32), (rows, 1))
    labels = np.zeros(rows, np.int32)
    got = polyce.cross_entropy(mx.array(logits), mx.array(labels))
    assert float(got) == pytest.approx(np.log1p(np.exp(np.float64(logits[0, 1]))), rel=2e-7)
    flat = np.full((1, rows), 0.1, np.float32)
    lse = polyce.cross_entropy(mx.array(flat), mx.array([3], dtype=mx.int32))
    assert float(lse) == pytest.approx(np.log(rows), rel=2e-7)


def test_float64_stays_float64() -> None:
    import mlx.core as mx

    loss, grad = polyce.cross_entropy_with_grad(
        mx.array(X.astype(np.float64), dtype=mx.float64), mx.array(T)
    )
    assert (mx.float64, mx.float64) == (loss.dtype, grad.dtype)
