"""A linear head under jax's transformations, against the unfused loss of the product."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import polyce
from conftest import BY_DIGITS, FULL

pytestmark = pytest.mark.only(*BY_DIGITS)

N, F, C = 7, 3, 5
ALL = (0, 1, 2)
RNG = np.random.default_rng(0)
ARRAYS = tuple(RNG.standard_normal(shape) for shape in ((N, F), (C, F), (C,)))
LABELS = np.array([0, -100, 4, 2, 1, 1, 3])
SOFT = RNG.dirichlet(np.ones(C), N)
TARGETS = {"index": LABELS, "probability": SOFT}
REDUCTIONS = ("none", "mean", "sum")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weighted": {"label_smoothing": 0.1, "weight": np.linspace(0.5, 1.5, C)},
    "sampled": {"sample_weight": np.linspace(0.0, 2.0, N), "normalizer": 3.0, "z_loss": 0.1},
    "capped": {"logit_softcap": 2.0, "logit_scale": 0.5, "weight": np.linspace(0.5, 1.5, C)},
}


@pytest.fixture
def jax() -> Any:
    import jax

    return jax


@pytest.fixture
def close(backend_name: str) -> Callable[..., None]:
    rtol = 1e-12 if backend_name == "jax-x64" else 2e-5

    def compare(actual: Any, expected: Any) -> None:
        import jax

        found = jax.device_get((actual, expected))
        for one, other in zip(*map(jax.tree.leaves, found), strict=True):
            np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol)

    return compare


def fused(x: Any, w: Any, b: Any, target: Any, **options: Any) -> Any:
    """Compute the loss by chunks of three rows, the last one of a single row."""
    return polyce.linear_cross_entropy(x, w, target, linear_bias=b, **{"chunk_size": 3} | options)


def unfused(x: Any, w: Any, b: Any, target: Any, **options: Any) -> Any:
    options.pop("chunk_size", None)
    logits = x @ w.T if b is None else x @ w.T + b
    return polyce.cross_entropy(logits, target, axis=-1, **options)


def both(jax: Any, compute: Callable[[Any], Any]) -> Any:
    """Join what is computed with either loss in one function, so that it compiles once."""
    return jax.jit(lambda *arrays: (compute(fused)(*arrays), compute(unfused)(*arrays)))


def given(jax: Any, *arrays: Any, dtype: Any = None) -> tuple[Any, ...]:
    return tuple(jax.numpy.asarray(array, dtype=dtype) for array in arrays or ARRAYS)


def of(function: Any, target: Any, **options: Any) -> Callable[..., Any]:
    """Return the loss, or the sum of its squares, as a function of input, weight and bias."""

    def loss(x: Any, w: Any, b: Any = None) -> Any:
        found = function(x, w, b, target, **options)
        return (found**2).sum() if found.ndim else found

    return loss


CASES = list(itertools.product(REDUCTIONS, TARGETS, [False, True], OPTIONS))


@pytest.mark.parametrize("case", CASES if FULL else CASES[::11], ids=str)
def test_gradients_of_the_product(jax: Any, close: Any, case: tuple[Any, ...]) -> None:
    reduction, kind, bias, name = case
    arrays = given(jax)[: 3 if bias else 2]
    options = OPTIONS[name] | {"reduction": reduction}
    if reduction != "mean":
        options.pop("normalizer", None)
    options = {
        key: jax.numpy.asarray(value) if isinstance(value, np.ndarray) else value
        for key, value in options.items()
    }

    def compute(function: Any) -> Any:
        loss = of(function, jax.numpy.asarray(TARGETS[kind]), **options)
        return lambda *a: (loss(*a), jax.value_and_grad(loss, ALL[: len(a)])(*a))

    close(*both(jax, compute)(*arrays))


def products(jax: Any, function: Callable[..., Any], *arrays: Any) -> float:
    """Count the multiplications in the matrix products of a function, in N F C."""

    def is_program(value: Any) -> bool:
        return hasattr(value, "eqns") or hasattr(value, "jaxpr")

    def count(program: Any) -> int:
        total = 0
        for step in getattr(program, "jaxpr", program).eqns:
            inner = jax.tree.leaves(list(step.params.values()), is_leaf=is_program)
            total += step.params.get("length", 1) * sum(map(count, filter(is_program, inner)))
            if step.primitive.name == "dot_general":
                ((contracted, _), _) = step.params["dimension_numbers"]
                length = step.invars[0].aval.shape[contracted[0]]
                total += int(np.prod(step.outvars[0].aval.shape)) * length
        return total

    return count(jax.make_jaxpr(function)(*arrays)) / (N * F * C)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_what_is_asked_for_is_computed(jax: Any, close: Any, reduction: str) -> None:
    arrays, target = given(jax), jax.numpy.asarray(LABELS)
    ours = of(fused, target, reduction=reduction)
    assert products(jax, ours, *arrays) == 1
    again = reduction == "none"
    asked: list[tuple[Any, int]] = [(0, 2), (1, 2), (2, 1), ((0, 2), 2), ((1, 0), 3)]
    for argnums, count in asked:
        # For the losses of rows, unused products are traced too, and the compiler drops them.
        assert products(jax, jax.grad(ours, argnums), *arrays) <= count + again

    def compute(function: Any) -> Any:
        loss = of(function, target, reduction=reduction)
        return lambda *a: [jax.grad(loss, argnums)(*a) for argnums, _ in asked]

    close(*both(jax, compute)(*arrays))


@pytest.mark.parametrize(("kind", "reduction"), [("index", "mean"), ("probability", "none")])
def test_derivatives_of_both_orders(jax: Any, close: Any, kind: str, reduction: str) -> None:
    arrays, target = given(jax), jax.numpy.asarray(TARGETS[kind])
    tangents = tuple(np.cos(array) for array in ARRAYS)

    def compute(function: Any) -> Any:
        loss = of(function, target, reduction=reduction)
        gradient = jax.grad(loss, ALL)

        def along(*arrays: Any) -> Any:
            pairs = zip(gradient(*arrays), tangents, strict=True)
            return sum((a * b).sum() for a, b in pairs)

        def every(*arrays: Any) -> Any:
            directions = tuple(map(jax.numpy.asarray, tangents))
            return (
                jax.jvp(loss, arrays, directions),
                jax.jvp(gradient, arrays, directions)[1],
                jax.grad(along, ALL)(*arrays),
                jax.hessian(loss, (1, 2))(*arrays) if reduction == "mean" else None,
            )

        return every

    close(*both(jax, compute)(*arrays))


def test_the_losses_of_rows_have_a_jacobian_of_each_mode(jax: Any, close: Any) -> None:
    def compute(function: Any) -> Any:
        def rows(*arrays: Any) -> Any:
            return function(*arrays, jax.numpy.asarray(LABELS), reduction="none")

        return lambda *a: (jax.jacrev(rows, ALL)(*a), jax.jacfwd(rows, ALL)(*a))

    close(*both(jax, compute)(*given(jax)))


def test_vmap(jax: Any, close: Any) -> None:
    *one, target = given(jax, *ARRAYS, LABELS)
    many = [jax.numpy.stack((array, array[::-1])) for array in (*one, target)]

    def compute(function: Any) -> Any:
        def loss(*arrays: Any) -> Any:
            return function(*arrays, reduction="sum")

        gradient = jax.value_and_grad(loss, ALL)

        def heads(x: Any, w: Any, b: Any) -> Any:
            return (jax.vmap(lambda w, b: loss(x, w, b, target))(w, b) ** 2).sum()

        def every(*arrays: Any) -> Any:
            rows = jax.vmap(gradient, (0, None, None, 0))(*one, target)
            batches = jax.vmap(gradient, (0, None, None, 0))(arrays[0], *one[1:], arrays[3])
            everything = jax.vmap(gradient)(*arrays)
            return rows, batches, everything, jax.grad(heads, ALL)(one[0], *arrays[1:3])

        return every

    close(*both(jax, compute)(*many))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_numpys_labels_beside_arrays_of_jax(jax: Any, close: Any, reduction: str) -> None:
    """The labels have 64 bits, and an ignore_index that does not fit in fewer."""
    x, w, b = (array.astype(np.float32) for array in ARRAYS)
    want, grad = polyce.cross_entropy_with_grad(x @ w.T + b, LABELS, reduction=reduction)
    arrays = given(jax, dtype="float32")
    large = np.where(LABELS < 0, 2**40, LABELS)
    for labels, ignored in ((LABELS.astype(np.int8), -100), (large, 2**40)):
        found = fused(*arrays, labels, reduction=reduction, ignore_index=ignored)
        np.testing.assert_allclose(found, want, rtol=2e-6)

    def loss(w: Any) -> Any:
        return fused(*arrays[:1], w, *arrays[2:], large, reduction=reduction, ignore_index=2**40)

    found = jax.jit(jax.grad(lambda w: loss(w).sum()))(arrays[1])
    np.testing.assert_allclose(found, grad.T @ x, rtol=2e-5, atol=2e-6)
    with pytest.raises(IndexError, match=r"labels must lie in 0 to 4 .* got 5 at position \(6,\)"):
        jax.jit(of(fused, np.where(LABELS == 3, 5, LABELS)))(*arrays)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bad_labels_without_values_give_nan(jax: Any, reduction: str) -> None:
    x, w, b = given(jax)
    labels = np.array([0, 5, -1, -100, 1, 2, 3])
    bad = [label in (5, -1) for label in labels]

    def loss(x: Any, y: Any) -> Any:
        found = fused(x, w, b, y, reduction=reduction)
        return found.sum(), found

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    grad, losses = gradient(x, jax.numpy.asarray(labels))
    assert np.isnan(losses).tolist() == (bad if reduction == "none" else True)
    # The count that a mean divides by is still known.
    assert np.isnan(grad).any(axis=1).tolist() == bad


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_counts(jax: Any, reduction: str) -> None:
    ignored, none, soft = given(jax, np.full(N, -100), np.zeros(N), SOFT)
    calls: list[tuple[Any, dict[str, Any]]] = [(ignored, {}), (soft, {"sample_weight": none})]

    def every(*arrays: Any) -> Any:
        found = []
        for target, options in calls:
            loss = of(fused, target, reduction=reduction, **options)
            found.append(jax.value_and_grad(loss, ALL)(*arrays))
        return found

    for value, gradients in jax.jit(every)(*given(jax)):
        assert np.isnan(value) if reduction == "mean" else float(value) == 0.0
        assert not any(np.asarray(gradient).any() for gradient in gradients)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_left_out_rows_may_hold_anything(jax: Any, close: Any, reduction: str) -> None:
    target = jax.numpy.asarray(LABELS)

    def compute(function: Any) -> Any:
        loss = of(function, target, reduction=reduction)

        def squares(*arrays: Any) -> Any:
            return sum((g**2).sum() for g in jax.grad(loss, ALL)(*arrays))

        return lambda *a: (jax.value_and_grad(loss, ALL)(*a), jax.grad(squares, ALL)(*a))

    def every(spoilt: Any, clean: Any, *head: Any) -> Any:
        return compute(fused)(spoilt, *head), compute(unfused)(clean, *head)

    compiled = jax.jit(every)
    for value in (np.inf, np.nan):
        spoilt, clean = ARRAYS[0].copy(), ARRAYS[0].copy()
        spoilt[1], clean[1] = value, 0.0
        got, want = compiled(*given(jax, spoilt, clean, *ARRAYS[1:]))
        close(got, want)
        assert not np.asarray(got[0][1][0])[1].any()


@pytest.mark.parametrize("name", ["target", "weight", "sample_weight"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_has_no_derivative_is_refused(jax: Any, reduction: str, name: str) -> None:
    options = {"target": SOFT, "weight": np.ones(C), "sample_weight": np.ones(N)}
    options = {key: jax.numpy.asarray(array) for key, array in options.items()}

    def loss(value: Any) -> Any:
        return fused(*given(jax), **options | {name: value}, reduction=reduction).sum()

    for transform in (jax.grad, jax.jacfwd, lambda f: jax.jit(jax.grad(f))):
        with pytest.raises(TypeError, match=rf"{name} is being differentiated; pass {name} th"):
            jax.make_jaxpr(transform(loss))(options[name])


def test_the_normalizer_has_its_gradient(jax: Any, close: Any) -> None:
    arrays, target = given(jax), jax.numpy.asarray(LABELS)

    gradient = both(jax, lambda f: jax.grad(lambda n: f(*arrays, target, normalizer=n)))
    close(*gradient(4.0))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_with_grad_is_cut_from_derivatives(jax: Any, close: Any, reduction: str) -> None:
    target, rows = given(jax, LABELS, np.linspace(1.0, 2.0, N))
    by = rows if reduction == "none" else 2.5

    def ours(x: Any, w: Any, b: Any) -> Any:
        return polyce.linear_cross_entropy_with_grad(
            x, w, target, linear_bias=b, reduction=reduction, grad_output=by, chunk_size=3
        )

    def everything(*arrays: Any) -> Any:
        return sum(a.sum() for a in jax.tree.leaves(ours(*arrays)))

    def every(*arrays: Any) -> Any:
        value, pull = jax.vjp(lambda *a: unfused(*a, target, reduction=reduction), *arrays)
        want = value, pull(by * jax.numpy.ones_like(value))
        return ours(*arrays), want, jax.grad(everything, ALL)(*arrays)

    got, want, zeros = jax.jit(every)(*given(jax))
    close(got, want)
    assert not any(np.asarray(array).any() for array in zeros)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits(jax: Any, dtype: str) -> None:
    """With so many rows, an entry of the logits' gradient divided by their number would be 0."""
    rng = np.random.default_rng(0)
    rows, classes = 2048, 32
    shapes = ((rows, F), (classes, F), (classes,))
    narrow = given(jax, *(rng.standard_normal(shape) for shape in shapes), dtype=dtype)
    target = jax.numpy.asarray(rng.integers(0, classes, rows))

    def gradients(function: Any, *arrays: Any) -> Any:
        def loss(reduction: str) -> Callable[..., Any]:
            return lambda *a: function(*a, target, reduction=reduction, chunk_size=500).mean()

        return [jax.value_and_grad(loss(reduction), ALL)(*arrays) for reduction in ("mean", "none")]

    @jax.jit
    def every(*arrays: Any) -> Any:
        wide = (array.astype("float32") for array in arrays)
        return gradients(fused, *arrays), gradients(unfused, *wide)

    for one, other in zip(*map(jax.tree.leaves, every(*narrow)), strict=True):
        assert one.dtype == dtype
        error = np.linalg.norm(np.asarray(one, np.float64) - other) / np.linalg.norm(other)
        # Subnormal float16 numbers have fewer digits.
        assert error < (2 if one.shape != (rows, F) else 20) * float(jax.numpy.finfo(dtype).eps)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 1, 3)])
def test_any_number_of_rows_and_of_axes(jax: Any, close: Any, shape: tuple[int, ...]) -> None:
    count = int(np.prod(shape))
    labels = LABELS[:count].clip(0).reshape(shape)
    x, target = given(jax, ARRAYS[0][:count].reshape(*shape, F), labels)

    def compute(function: Any) -> Any:
        losses = [of(function, target, reduction=r, chunk_size=2) for r in ("mean", "none")]
        return lambda *a: [jax.value_and_grad(loss, ALL)(*a) for loss in losses]

    close(*both(jax, compute)(x, *given(jax)[1:]))


def test_rows_on_several_devices(jax: Any, close: Any) -> None:
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = map(jax.sharding.PartitionSpec, ("rows", None))
    rows, whole = (jax.sharding.NamedSharding(mesh, spec) for spec in specs)
    x, w, b = given(jax, np.tile(ARRAYS[0][:4], (4, 1)), *ARRAYS[1:])
    target = jax.device_put(jax.numpy.asarray(np.tile(LABELS[:4], 4)), rows)
    placed = (jax.device_put(x, rows), *(jax.device_put(a, whole) for a in (w, b)))

    gradient = both(jax, lambda function: jax.value_and_grad(of(function, target), ALL))
    close(*gradient(*placed))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_eager_call_compiles_nothing(jax: Any, reduction: str) -> None:
    arrays, other, target = given(jax), given(jax, *(2 * a for a in ARRAYS)), given(jax, LABELS)[0]

    def call(*arrays: Any) -> None:
        jax.grad(of(fused, target, reduction=reduction), ALL)(*arrays)
        polyce.linear_cross_entropy_with_grad(*arrays[:2], target, reduction=reduction)

    call(*arrays)
    compiled: list[str] = []

    def note(name: str, duration: float, **_: Any) -> None:
        compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        call(*other)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert compiled == []
