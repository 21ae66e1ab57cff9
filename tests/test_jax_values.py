"""Derivatives of lse, entropy and log-probabilities on jax, against those of the formula."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import polyce
from conftest import BY_DIGITS, FULL
from polyce.testing import exact_answer

pytestmark = pytest.mark.only(*BY_DIGITS)

X = np.random.default_rng(5).normal(0.0, 2.0, (3, 5))
LABELS = np.array([0, -100, 3])
SOFT = np.random.default_rng(6).dirichlet(np.ones(5), 3)
OF_LSE, OF_ENTROPY = np.array([0.5, 2.0, -1.0]), np.array([1.5, -1.0, 0.25])
SAMPLED = np.array([1.0, 0.0, 0.5])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"z_loss": 0.1, "logit_scale": 1.5, "logit_softcap": 5.0},
}


@pytest.fixture
def jax() -> Any:
    import jax

    return jax


def total(jax: Any, x: Any, kind: str, options: dict[str, Any]) -> Any:
    target = LABELS if kind == "index" else SOFT
    loss, stats = polyce.cross_entropy(
        x, target, reduction="none", sample_weight=SAMPLED, return_stats=True, **options
    )
    values = stats.lse * OF_LSE + stats.entropy * OF_ENTROPY
    return loss.sum() + jax.numpy.where(stats.valid, values, 0.0).sum()


def formula(jax: Any, x: Any, kind: str, options: dict[str, Any]) -> Any:
    """The same as it stands in the documentation; right where no logits tie."""
    jnp = jax.numpy
    x = x * options.get("logit_scale", 1.0)
    cap = options.get("logit_softcap")
    x = x if cap is None else cap * jnp.tanh(x / cap)
    lse = jax.nn.logsumexp(x, axis=1)
    surprise = lse[:, None] - x
    entropy = (jnp.exp(-surprise) * surprise).sum(1)
    target = np.eye(5)[np.maximum(LABELS, 0)] if kind == "index" else SOFT
    losses = (target * surprise).sum(1) + options.get("z_loss", 0.0) * lse**2
    rows = losses * SAMPLED + OF_LSE * lse + OF_ENTROPY * entropy
    return (rows * (SAMPLED != 0.0)).sum()


def derivatives(jax: Any, function: Any) -> Any:
    """Return a value and its derivatives; outside of a jit jax compiles each operation."""

    @jax.jit
    def found(x: Any) -> Any:
        batched = jax.vmap(jax.grad(function))(jax.numpy.stack([x, 2 * x]))
        first = jax.value_and_grad(function)(x)
        return *first, jax.jacfwd(function)(x), batched, jax.hessian(function)(x)

    return found(X)


CASES = [("index", "all"), ("probability", "plain"), ("index", "plain"), ("probability", "all")]


@pytest.mark.parametrize(("kind", "option"), CASES if FULL else CASES[:2])
def test_derivatives_agree_with_those_of_the_formula(jax: Any, kind: str, option: str) -> None:
    options = OPTIONS[option]

    def own(x: Any) -> Any:
        return total(jax, x, kind, options)

    def want(x: Any) -> Any:
        return formula(jax, x, kind, options)

    for got, expected in zip(derivatives(jax, own), derivatives(jax, want), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-11)


def test_rows_that_do_not_count_pass_nothing_back(jax: Any) -> None:
    x = X.copy()
    x[1] = math.nan

    def value(x: Any) -> Any:
        return total(jax, x, "index", {})

    both = jax.jit(lambda x: (jax.grad(value)(x), jax.hessian(value)(x)))
    grad, second = map(np.asarray, both(x))
    assert np.isfinite(grad[[0, 2]]).all()
    assert grad[1].tolist() == [0.0] * 5
    assert np.isfinite(second[0, :, 0]).all()


def test_stats_that_are_looked_at(jax: Any) -> None:
    def loss(x: Any) -> Any:
        return polyce.cross_entropy(x, LABELS, return_stats=True)

    (_, stats), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(jax.numpy.asarray(X))
    plain = jax.jit(jax.grad(lambda x: polyce.cross_entropy(x, LABELS)))(X)
    np.testing.assert_allclose(grad, plain, rtol=1e-14)
    assert stats.valid.tolist() == [True, False, True]
    assert stats.prediction.tolist() == [int(X[0].argmax()), -1, int(X[2].argmax())]

    def beside(x: Any) -> Any:
        _, stats = polyce.cross_entropy(x, LABELS, return_stats=("brier", "top_probability"))
        return jax.numpy.nansum(stats.brier + stats.top_probability)

    assert not jax.grad(beside)(jax.numpy.asarray(X)).any()


def test_a_mesh_of_devices(jax: Any) -> None:
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((2, 2), ("rows", "classes"))
    x = np.random.default_rng(7).normal(0.0, 2.0, (4, 6))
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("rows", "classes")))
    labels = jax.device_put(np.array([0, 5, 2, 1]), NamedSharding(mesh, PartitionSpec("rows")))

    def value(x: Any) -> Any:
        loss, stats = polyce.cross_entropy(x, labels, return_stats=("lse", "entropy"))
        return loss + stats.lse.sum() - stats.entropy.sum()

    answer = exact_answer(x, np.array([0, 5, 2, 1]), grad_lse=np.ones(4), grad_entropy=-np.ones(4))
    grad = jax.jit(jax.grad(value))(placed)
    np.testing.assert_allclose(grad, answer.grad, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(jax.jit(polyce.entropy)(placed), answer.stats.entropy, rtol=1e-13)


INDEX = {"one": LABELS, "several": np.array([[0, 1, 1], [-100, -100, -100], [3, -100, 0]])}


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("name", INDEX)
def test_derivatives_of_log_prob(jax: Any, name: str, softcap: float | None) -> None:
    index = INDEX[name]
    many = index.reshape(3, -1)
    weights = np.random.default_rng(8).normal(size=many.shape)

    def own(x: Any) -> Any:
        values = polyce.log_prob(x, jax.numpy.asarray(index), logit_softcap=softcap)
        return (values.reshape(many.shape) * weights).sum()

    def want(x: Any) -> Any:
        x = x if softcap is None else softcap * jax.numpy.tanh(x / softcap)
        logs = jax.nn.log_softmax(x, axis=1)
        chosen = jax.numpy.take_along_axis(logs, np.maximum(many, 0), axis=1)
        return jax.numpy.where(many >= 0, chosen * weights, 0.0).sum()

    def both(function: Any) -> Any:
        return jax.jit(lambda x: (*jax.value_and_grad(function)(x), jax.hessian(function)(x)))(X)

    for got, expected in zip(both(own), both(want), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-11)


def test_gradients_of_several_log_probabilities_keep_their_digits(jax: Any) -> None:
    logits = np.random.default_rng(3).normal(0.0, 1.0, (3, 50))
    logits[:, 7] = logits.max(1) + np.array([0.0, 20.0, 60.0])
    index, weights = np.array([[7, 7, 2]] * 3), np.array([[1.0, 0.5, 1e-8]] * 3)
    weights[1:, 2] = 0.0

    def own(x: Any) -> Any:
        return (polyce.log_prob(x, jax.numpy.asarray(index)) * weights).sum()

    want = sum(
        -exact_answer(logits, index[:, k], reduction="none", grad_output=weights[:, k]).grad
        for k in range(3)
    )
    np.testing.assert_allclose(jax.jit(jax.grad(own))(logits), want, rtol=1e-12)


def test_an_index_that_a_jit_closes_over_is_checked(jax: Any) -> None:
    for index in (np.array([0, 5, 1]), np.array([[0], [5], [1]])):
        with pytest.raises(IndexError, match=r"^index must lie in 0 to 4"):
            jax.jit(lambda x, index=index: polyce.log_prob(x, index))(X)
        traced = jax.jit(polyce.log_prob)(X, index).reshape(-1)
        assert np.isnan(traced).tolist() == [False, True, False]


def test_the_entropy_of_narrow_logits_is_rounded_once(jax: Any) -> None:
    x = jax.numpy.asarray(X, dtype=jax.numpy.bfloat16)
    got = jax.jit(polyce.entropy)(x)
    want = exact_answer(np.asarray(x).astype(np.float64), LABELS * 0).stats.entropy
    assert got.dtype == x.dtype
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=2.0**-8)
    grad = jax.jit(jax.grad(lambda x: polyce.entropy(x).sum()))(x)
    assert grad.dtype == x.dtype
