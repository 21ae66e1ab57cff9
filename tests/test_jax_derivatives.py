"""jax's transformations, against jax's own derivatives of the formula where those are right."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import polyce
from conftest import BY_DIGITS, FULL
from hessians import ROWS, hessian

pytestmark = pytest.mark.only(*BY_DIGITS)

OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "all": {"label_smoothing": 0.1, "z_loss": 0.01, "logit_scale": 1.5, "logit_softcap": 5.0},
}


@pytest.fixture
def jax() -> Any:
    import jax

    return jax


@pytest.fixture
def close(backend_name: str) -> Callable[[Any, Any], None]:
    tolerance = 1e-12 if backend_name == "jax-x64" else 2e-5

    def compare(actual: Any, expected: Any) -> None:
        np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)

    return compare


def numbers(kind: str) -> tuple[Any, Any, Any, Any]:
    """Logits, target, class weights and sample weights, far from ties."""
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((4, 5))
    target = rng.dirichlet(np.ones(5), 4) if kind == "probability" else np.array([0, 3, 4, 2])
    return logits, target, rng.uniform(0.5, 2.0, 5), np.array([1.0, 0.0, 2.0, 0.5])


def formula(
    jax: Any, logits: Any, target: Any, weight: Any, sample_weight: Any, options: Any
) -> Any:
    """The mean loss as it stands in the documentation."""
    jnp = jax.numpy
    smoothing, cap = options.get("label_smoothing", 0.0), options.get("logit_softcap")
    x = options.get("logit_scale", 1.0) * logits
    x = x if cap is None else cap * jnp.tanh(x / cap)
    penalty = count = jnp.ones(len(logits))
    if not jnp.issubdtype(target.dtype, jnp.floating):
        penalty = count = weight[target]
        target = jax.nn.one_hot(target, logits.shape[1], dtype=logits.dtype)
    r = weight * ((1 - smoothing) * target + smoothing / logits.shape[1])
    lse = jax.scipy.special.logsumexp(x, axis=1)
    rows = (r * (lse[:, None] - x)).sum(1) + options.get("z_loss", 0.0) * penalty * lse**2
    return (sample_weight * rows).sum() / (sample_weight * count).sum()


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_first_and_second_derivatives_are_those_of_the_formula(
    jax: Any, close: Any, kind: str, options: Any
) -> None:
    logits, target, weight, sample_weight = map(jax.numpy.asarray, numbers(kind))
    direction = jax.numpy.ones_like(logits) * jax.numpy.arange(5.0)

    def ours(x: Any) -> Any:
        return polyce.cross_entropy(x, target, weight, sample_weight=sample_weight, **options)

    def plain(x: Any) -> Any:
        return formula(jax, x, target, weight, sample_weight, options)

    def forward_over_reverse(loss: Any) -> Any:
        return jax.jvp(jax.value_and_grad(loss), (logits,), (direction,))

    def reverse_over_reverse(loss: Any) -> Any:
        return jax.grad(lambda x: (jax.grad(loss)(x) * direction).sum())(logits)

    def hessian(loss: Any) -> Any:
        return jax.hessian(loss)(logits)

    for transform in (forward_over_reverse, reverse_over_reverse, hessian):
        results = [jax.tree.leaves(jax.jit(transform, static_argnums=0)(f)) for f in (ours, plain)]
        for actual, expected in zip(*results, strict=True):
            close(actual, expected)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_derivatives_by_probabilities_and_weight(jax: Any, close: Any, options: Any) -> None:
    logits, target, weight, sample_weight = map(jax.numpy.asarray, numbers("probability"))
    arguments = (logits, target, weight)

    def ours(x: Any, p: Any, w: Any) -> Any:
        return polyce.cross_entropy(x, p, w, sample_weight=sample_weight, **options)

    def plain(x: Any, p: Any, w: Any) -> Any:
        return formula(jax, x, p, w, sample_weight, options)

    for transform in (jax.grad, jax.jacfwd, jax.hessian):
        results = [jax.jit(transform(loss, (0, 1, 2)))(*arguments) for loss in (ours, plain)]
        for actual, expected in zip(*map(jax.tree.leaves, results), strict=True):
            close(actual, expected)


def test_16_bit_arguments_get_16_bit_gradients(jax: Any) -> None:
    arguments = [jax.numpy.asarray(array) for array in numbers("probability")[:3]]
    dtypes = (jax.numpy.bfloat16, jax.numpy.float16, jax.numpy.float32)
    narrow = [array.astype(dtype) for array, dtype in zip(arguments, dtypes, strict=True)]
    wide = [array.astype(jax.numpy.float32) for array in narrow]
    gradient = jax.jit(jax.grad(polyce.cross_entropy, (0, 1, 2)))
    for actual, expected, dtype in zip(gradient(*narrow), gradient(*wide), dtypes, strict=True):
        assert dtype == actual.dtype
        # Rounded once: what float32 gives, in 16 bits.
        assert expected.astype(dtype).tolist() == actual.tolist()


def test_a_probability_of_0_at_a_masked_class_has_an_infinite_gradient_and_no_other(
    jax: Any,
) -> None:
    logits = jax.numpy.asarray([[0.0, -math.inf, 0.0], [math.nan, math.inf, 0.0], [0.0, 0.0, 0.0]])
    target = jax.numpy.asarray([[0.5, 0.0, 0.5], [0.5, 0.5, 0.0], [0.0, 0.5, 0.5]])

    def loss(p: Any, w: Any) -> Any:
        return polyce.cross_entropy(
            logits, p, w, sample_weight=jax.numpy.asarray([1.0, 0.0, 1.0]), reduction="sum"
        )

    by_target, by_weight = jax.grad(loss, (0, 1))(target, jax.numpy.asarray([1.0, 1.0, 0.0]))
    log2, log3 = math.log(2.0), math.log(3.0)
    # A class of weight 0 takes no part, whatever its probability; nor does a row of weight 0.
    expected = [[log2, math.inf, 0.0], [0.0, 0.0, 0.0], [log3, log3, 0.0]]
    np.testing.assert_allclose(by_target, expected, rtol=1e-6)
    np.testing.assert_allclose(by_weight, [log2 / 2, log3 / 2, (log2 + log3) / 2], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("weight", "weight for probability targets only.*stop_gradient"),
        ("sample_weight", "no derivative with respect to sample_weight.*reduction 'none'"),
    ],
)
@pytest.mark.parametrize("function", ["cross_entropy", "nll_loss"])
def test_a_gradient_that_polyce_does_not_give_is_refused(
    jax: Any, function: str, name: str, message: str
) -> None:
    def loss(value: Any) -> Any:
        return getattr(polyce, function)(
            jax.numpy.zeros((3, 3)), jax.numpy.asarray([0, 1, 2]), **{name: value}
        )

    with pytest.raises(TypeError, match=message):
        jax.grad(loss)(jax.numpy.ones(3))


def test_the_normalizer_has_its_gradient(jax: Any) -> None:
    def loss(normalizer: Any) -> Any:
        return polyce.cross_entropy(
            jax.numpy.zeros((3, 2)), jax.numpy.asarray([0, 1, 1]), normalizer=normalizer
        )

    assert float(jax.grad(loss)(2.0)) == pytest.approx(-3 * math.log(2.0) / 4, rel=1e-6)


@pytest.mark.parametrize("kind", ["index", "probability"])
def test_ties_have_exact_derivatives(jax: Any, kind: str) -> None:
    target = jax.numpy.asarray(1 if kind == "index" else [0.0, 1.0])
    logits = jax.numpy.zeros(2)

    def loss(x: Any) -> Any:
        return polyce.cross_entropy(x, target, logit_softcap=4.0)

    for transform in (lambda f: f, jax.jit):
        assert transform(jax.grad(loss))(logits).tolist() == [0.5, -0.5]
        assert transform(jax.hessian(loss))(logits).tolist() == [[0.25, -0.25], [-0.25, 0.25]]


def test_confident_and_ignored_rows_have_finite_derivatives_of_both_orders(jax: Any) -> None:
    logits = jax.numpy.asarray([[800.0, 0.0, -800.0], [math.nan, math.inf, 0.0]])
    target = jax.numpy.asarray([0, -100])
    for options in ({}, {"label_smoothing": 0.1}, {"logit_softcap": 30.0, "z_loss": 0.1}):
        both = jax.value_and_grad(lambda x, o=options: polyce.cross_entropy(x, target, **o))
        # The first result is the value's, beside the gradient's.
        first, second = map(np.asarray, jax.jit(jax.jacfwd(both))(logits))
        assert np.isfinite(first).all()
        assert np.isfinite(second).all()
        assert not first[1].any()
        assert not second[1].any()


@pytest.mark.parametrize("batched", ["all", "input", "weight"])
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_vmap_with_and_without_batched_target_and_weight(
    jax: Any, close: Any, kind: str, batched: str
) -> None:
    logits, target, weight, _ = map(jax.numpy.asarray, numbers(kind))
    stack = [jax.numpy.stack([a, a[::-1]]) for a in (logits, target, weight)]
    axes = {"all": (0, 0, 0), "input": (0, None, None), "weight": (None, None, 0)}[batched]
    whole = (logits, target, weight)
    given = [many if a == 0 else one for many, one, a in zip(stack, whole, axes, strict=True)]
    gradient = jax.value_and_grad(polyce.cross_entropy)
    values, grads = jax.jit(jax.vmap(gradient, axes))(*given)
    for i in range(2):
        one = [
            many[i] if a == 0 else same for many, same, a in zip(stack, whole, axes, strict=True)
        ]
        value, grad = gradient(*one)
        close(values[i], value)
        close(grads[i], grad)


def test_scan_checkpoint_and_eval_shape(jax: Any, close: Any) -> None:
    logits, target, _, _ = map(jax.numpy.asarray, numbers("index"))

    def by_rows(x: Any) -> Any:
        def step(total: Any, row: Any) -> tuple[Any, None]:
            loss = jax.checkpoint(polyce.cross_entropy)
            return total + loss(*row), None

        return jax.lax.scan(step, jax.numpy.zeros((), x.dtype), (x, target))[0]

    def whole(x: Any) -> Any:
        return polyce.cross_entropy(x, target, reduction="sum")

    close(jax.jit(jax.grad(by_rows))(logits), jax.grad(whole)(logits))
    shape = jax.eval_shape(jax.grad(whole), jax.ShapeDtypeStruct(logits.shape, "float16"))
    assert shape.shape == (4, 5)
    assert shape.dtype.name == "float16"


@pytest.mark.parametrize("options", [{}, {"weight": True}, {"label_smoothing": 0.5}], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_forward_mode_past_a_masked_class(jax: Any, compiled: bool, options: Any) -> None:
    """dloss/dp is lse - x, infinite at the masked class, where 0 times it is 0."""
    logits, target = jax.numpy.asarray([-math.inf, 0.0, 0.5]), jax.numpy.asarray([0.0, 1.0, 0.0])
    along = jax.numpy.asarray([[0.0, 0.0, 0.0], [0.0, -1.0, 1.0], [1.0, 0.0, -1.0]])
    weight = jax.numpy.ones(3) if options.get("weight") else None
    smoothing = options.get("label_smoothing", 0.0)

    def push(logits: Any, target: Any, along: Any) -> Any:
        def loss(x: Any, p: Any) -> Any:
            return polyce.cross_entropy(x, p, weight, label_smoothing=smoothing)

        return jax.vmap(lambda dp: jax.jvp(loss, (logits, target), (0 * dp, dp))[1])(along)

    found = (jax.jit(push) if compiled else push)(logits, target, along)
    assert found.tolist() == pytest.approx([0.0, -0.5 * (1 - smoothing), math.inf], rel=1e-6)
    if compiled:
        # With the infinite logits known to the compiler.
        assert jax.jit(lambda dp: push(logits, target, dp))(along).tolist() == found.tolist()


def test_the_second_derivative_at_a_masked_class(jax: Any) -> None:
    """d(lse - x_c)/dx is the softmax minus 1 at c, whether or not class c is masked."""
    logits, target = jax.numpy.asarray([-math.inf, 0.0, 0.5]), jax.numpy.asarray([0.0, 1.0, 0.0])
    softmax = [0.0, 1 / (1 + math.exp(0.5)), 1 / (1 + math.exp(-0.5))]
    mixed = jax.jacfwd(jax.grad(polyce.cross_entropy, 1))(logits, target)
    expected = np.array(softmax) - np.eye(3)
    np.testing.assert_allclose(mixed[1:], expected[1:], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(mixed[0, 1:], expected[0, 1:], rtol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
def test_a_bad_label_without_a_value_gives_derivatives_of_nan(
    jax: Any, name: str, compiled: bool
) -> None:
    logits = jax.numpy.asarray([[1.0, 2.0], [0.5, 0.0], [0.0, 1.0]])
    tangents = jax.numpy.ones((3, 2))
    labels = jax.numpy.asarray([0, 7, -100])

    def both(x: Any, labels: Any) -> Any:
        def losses(x: Any) -> Any:
            options = {} if compiled else {"validate": False}
            return getattr(polyce, name)(x, labels, reduction="none", **options)

        return jax.grad(lambda x: losses(x).sum())(x), jax.jvp(losses, (x,), (tangents,))[1]

    grad, along = (jax.jit(both) if compiled else both)(logits, labels)
    assert np.isnan(grad).tolist() == [[False, False], [True, True], [False, False]]
    assert np.isnan(along).tolist() == [False, True, False]


@pytest.mark.only("jax-x64")
@pytest.mark.parametrize("row", ROWS if FULL else ROWS[::3], ids=str)
def test_second_derivatives_of_confident_rows(jax: Any, row: tuple[float, ...]) -> None:
    logits, want = jax.numpy.asarray(row), hessian(row)
    uniform = jax.numpy.full(logits.shape, 1 / len(row))
    for target in (*map(jax.numpy.asarray, range(len(row))), uniform):

        def loss(x: Any, target: Any = target) -> Any:
            return polyce.cross_entropy(x, target)

        for second in (jax.hessian(loss), jax.jit(jax.jacrev(jax.jacrev(loss)))):
            np.testing.assert_allclose(second(logits), want, rtol=1e-14)
