"""A linear head under jax's transformations, against the unfused loss of the product."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import polyce
from conftest import FULL

pytestmark = pytest.mark.only("jax-x32", "jax-x64")

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

        pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
        for one, other in pairs:
            assert one.dtype == other.dtype
            np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol)

    return compare


def fused(x: Any, w: Any, b: Any, target: Any, **options: Any) -> Any:
    """The loss by chunks of three rows, the last one of a single row."""
    return polyce.linear_cross_entropy(x, w, target, linear_bias=b, **{"chunk_size": 3} | options)


def unfused(x: Any, w: Any, b: Any, target: Any, **options: Any) -> Any:
    options.pop("chunk_size", None)
    logits = x @ w.T if b is None else x @ w.T + b
    return polyce.cross_entropy(logits, target, axis=-1, **options)


BOTH = (fused, unfused)


def given(jax: Any, *arrays: Any, dtype: Any = None) -> tuple[Any, ...]:
    return tuple(jax.numpy.asarray(array, dtype=dtype) for array in arrays or ARRAYS)


def of(function: Any, target: Any, **options: Any) -> Callable[..., Any]:
    """Give the loss, or the sum of its squares, as a function of input, weight and bias."""

    def loss(x: Any, w: Any, b: Any = None) -> Any:
        found = function(x, w, b, target, **options)
        return (found**2).sum() if found.ndim else found

    return loss


CASES = list(itertools.product(REDUCTIONS, TARGETS, [False, True], OPTIONS))


@pytest.mark.parametrize("case", CASES if FULL else CASES[::7], ids=str)
def test_gradients_are_those_of_the_product(jax: Any, close: Any, case: tuple[Any, ...]) -> None:
    reduction, kind, bias, name = case
    arrays = given(jax)[: 3 if bias else 2]
    options = OPTIONS[name] | {"reduction": reduction}
    if reduction != "mean":
        options.pop("normalizer", None)
    options = {
        key: jax.numpy.asarray(value) if isinstance(value, np.ndarray) else value
        for key, value in options.items()
    }
    target = jax.numpy.asarray(TARGETS[kind])
    losses = [of(function, target, **options) for function in BOTH]
    numbers = ALL[: len(arrays)]
    got, want = (jax.jit(jax.value_and_grad(loss, numbers))(*arrays) for loss in losses)
    close(got, want)
    if bias:
        close(jax.value_and_grad(losses[0], numbers)(*arrays), want)
    close(jax.jit(losses[0])(*arrays), want[0])


def products(jax: Any, function: Callable[..., Any], *arrays: Any) -> float:
    """Count the multiplications of the matrix products that a function makes, in N times F times C."""

    def count(jaxpr: Any) -> int:
        total = 0
        for step in jaxpr.eqns:
            times = step.params.get("length", 1)
            for inner in jax.tree.leaves(
                list(step.params.values()),
                is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr"),
            ):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    total += times * count(getattr(inner, "jaxpr", inner))
            if step.primitive.name == "dot_general":
                ((contracted, _), _) = step.params["dimension_numbers"]
                a = step.invars[0].aval.shape
                total += int(np.prod(step.outvars[0].aval.shape)) * a[contracted[0]]
        return total

    return count(jax.make_jaxpr(function)(*arrays).jaxpr) / (N * F * C)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_only_what_is_asked_for_is_computed(jax: Any, close: Any, reduction: str) -> None:
    arrays = given(jax)
    ours, plain = (of(function, LABELS, reduction=reduction) for function in BOTH)
    assert products(jax, ours, *arrays) == 1
    again = reduction == "none"
    for argnums, count in ((0, 2), (1, 2), (2, 1), ((0, 2), 2), ((1, 0), 3)):
        gradient = jax.grad(ours, argnums)
        # What the compiler drops is traced all the same for the losses of rows.
        assert products(jax, gradient, *arrays) <= count + again
        close(jax.jit(gradient)(*arrays), jax.grad(plain, argnums)(*arrays))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", TARGETS)
def test_derivatives_of_both_orders(jax: Any, close: Any, kind: str, reduction: str) -> None:
    arrays, target = given(jax), jax.numpy.asarray(TARGETS[kind])
    tangents = tuple(jax.numpy.cos(array) for array in arrays)

    def every(function: Any) -> Any:
        loss = of(function, target, reduction=reduction)

        def along(*arrays: Any) -> Any:
            """Reverse over reverse."""
            pairs = zip(jax.grad(loss, ALL)(*arrays), tangents, strict=True)
            return sum((a * b).sum() for a, b in pairs)

        return (
            jax.jvp(loss, arrays, tangents),
            jax.jvp(jax.grad(loss, ALL), arrays, tangents)[1],
            jax.grad(along, ALL)(*arrays),
        )

    got, want = (jax.jit(every, static_argnums=0)(function) for function in BOTH)
    close(got, want)


def test_hessian(jax: Any, close: Any) -> None:
    losses = [of(function, LABELS) for function in BOTH]
    got, want = (jax.jit(jax.hessian(loss, ALL))(*given(jax)) for loss in losses)
    close(got, want)


def test_the_losses_of_rows_have_a_jacobian_of_each_mode(jax: Any, close: Any) -> None:
    def rows(function: Any) -> Callable[..., Any]:
        return lambda *arrays: function(*arrays, jax.numpy.asarray(LABELS), reduction="none")

    want = jax.jacrev(rows(unfused), ALL)(*given(jax))
    for mode in (jax.jacrev, jax.jacfwd):
        close(jax.jit(mode(rows(fused), ALL))(*given(jax)), want)


VMAPS: dict[str, tuple[Any, ...]] = {
    "rows": (0, None, None, 0),
    "heads": (None, 0, 0, None),
    "batches": (0, None, None, 0),
    "everything": (0, 0, 0, 0),
}


@pytest.mark.parametrize("name", VMAPS)
def test_vmap(jax: Any, close: Any, name: str) -> None:
    *arrays, target = given(jax, *ARRAYS, LABELS)
    if name != "rows":
        pairs = zip((*arrays, target), VMAPS[name], strict=True)
        *arrays, target = (
            a if axis is None else jax.numpy.stack((a, a[::-1])) for a, axis in pairs
        )

    def every(function: Any) -> Any:
        def loss(x: Any, w: Any, b: Any, y: Any) -> Any:
            # Of a row that does not count there would be no mean.
            return function(x, w, b, y, reduction="sum")

        return jax.vmap(jax.value_and_grad(loss, ALL), VMAPS[name])(*arrays, target)

    got, want = (jax.jit(every, static_argnums=0)(function) for function in BOTH)
    close(got, want)
    if name == "heads":
        squares = [
            jax.grad(lambda w, f=f: (jax.vmap(lambda w: of(f, target)(arrays[0], w))(w) ** 2).sum())
            for f in BOTH
        ]
        close(*(gradient(arrays[1]) for gradient in squares))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_numpys_labels_beside_arrays_of_jax(jax: Any, close: Any, reduction: str) -> None:
    """Of 64 bits, and with a label to ignore that fewer have no room for."""
    arrays = given(jax)
    large = np.where(LABELS < 0, 2**40, LABELS)
    want = jax.grad(of(unfused, jax.numpy.asarray(LABELS), reduction=reduction), ALL)(*arrays)
    for labels, ignored in ((LABELS, -100), (LABELS.astype(np.int8), -100), (large, 2**40)):
        loss = of(fused, labels, reduction=reduction, ignore_index=ignored)
        close(jax.grad(loss, ALL)(*arrays), want)
        close(jax.jit(jax.grad(loss, ALL))(*arrays), want)
    with pytest.raises(IndexError, match=r"labels must lie in 0 to 4 .* got 5 at position \(6,\)"):
        jax.jit(of(fused, np.where(LABELS == 3, 5, LABELS)))(*arrays)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bad_labels_without_values_give_nan(jax: Any, reduction: str) -> None:
    labels = jax.numpy.asarray([0, 5, -1, -100, 1, 2, 3])
    losses = jax.jit(lambda y: fused(*given(jax), y, reduction=reduction))(labels)
    bad = [label in (5, -1) for label in labels.tolist()]
    assert np.isnan(losses).tolist() == (bad if reduction == "none" else True)
    grad = jax.jit(jax.grad(lambda x, y: fused(x, *given(jax)[1:], y, reduction=reduction).sum()))
    found = np.isnan(grad(given(jax)[0], labels)).any(axis=1).tolist()
    # A mean divides by a count that is known all the same.
    assert found == bad


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("how", ["labels", "index", "probability"])
def test_nothing_counts(jax: Any, reduction: str, how: str) -> None:
    arrays = given(jax)
    options = {} if how == "labels" else {"sample_weight": jax.numpy.zeros(N)}
    target = jax.numpy.full(N, -100) if how == "labels" else jax.numpy.asarray(TARGETS[how])

    def loss(*arrays: Any) -> Any:
        return fused(*arrays, target, reduction=reduction, **options).sum()

    for wrap in (jax.jit, lambda f: f):
        value, gradients = wrap(jax.value_and_grad(loss, ALL))(*arrays)
        assert np.isnan(value) if reduction == "mean" else value == 0.0
        assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_left_out_rows_may_hold_anything(
    jax: Any, close: Any, reduction: str, value: float
) -> None:
    arrays, target = given(jax), jax.numpy.asarray(LABELS)
    spoilt, clean = (arrays[0].at[1].set(number) for number in (value, 0.0))

    def every(function: Any, x: Any) -> Any:
        loss = of(function, target, reduction=reduction)

        def squares(*arrays: Any) -> Any:
            return sum((g**2).sum() for g in jax.grad(loss, ALL)(*arrays))

        return jax.value_and_grad(loss, ALL)(x, *arrays[1:]), jax.grad(squares, ALL)(x, *arrays[1:])

    got = jax.jit(every, static_argnums=0)(fused, spoilt)
    close(got, jax.jit(every, static_argnums=0)(unfused, clean))
    assert not got[0][1][0][1].any()


@pytest.mark.parametrize("name", ["target", "weight", "sample_weight"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_has_no_derivative_is_refused(jax: Any, reduction: str, name: str) -> None:
    options = {"target": SOFT, "weight": np.ones(C), "sample_weight": np.ones(N)}

    def loss(value: Any) -> Any:
        arrays = {key: jax.numpy.asarray(array) for key, array in options.items()} | {name: value}
        return fused(*given(jax), **arrays, reduction=reduction).sum()

    for transform in (jax.grad, jax.jacfwd, lambda f: jax.jit(jax.grad(f))):
        with pytest.raises(
            TypeError, match=rf"{name} is being differentiated; pass {name} through"
        ):
            transform(loss)(jax.numpy.asarray(options[name]))


def test_the_normalizer_has_its_gradient(jax: Any, close: Any) -> None:
    target = jax.numpy.asarray(LABELS)
    gradients = [jax.grad(lambda n, f=f: f(*given(jax), target, normalizer=n))(4.0) for f in BOTH]
    close(*gradients)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_with_grad_is_cut_from_derivatives(jax: Any, close: Any, reduction: str) -> None:
    arrays, target = given(jax), jax.numpy.asarray(LABELS)
    by = jax.numpy.linspace(1.0, 2.0, N) if reduction == "none" else 2.5

    def both(x: Any, w: Any, b: Any) -> Any:
        return polyce.linear_cross_entropy_with_grad(
            x, w, target, linear_bias=b, reduction=reduction, grad_output=by, chunk_size=3
        )

    value, pull = jax.vjp(lambda *a: unfused(*a, target, reduction=reduction), *arrays)
    for function in (both, jax.jit(both)):
        close(function(*arrays), (value, pull(jax.numpy.asarray(by, dtype=value.dtype))))
    zeros = jax.grad(lambda *a: sum(g.sum() for g in both(*a)[1]) + both(*a)[0].sum(), ALL)(*arrays)
    assert not any(array.any() for array in zeros)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_16_bits(jax: Any, reduction: str, dtype: str) -> None:
    """Of many rows, where an entry of the logits' gradient, divided by their number, would be 0."""
    rng = np.random.default_rng(0)
    rows, classes = 2048, 32
    shapes = ((rows, F), (classes, F), (classes,))
    narrow = given(jax, *(rng.standard_normal(shape) for shape in shapes), dtype=dtype)
    target = jax.numpy.asarray(rng.integers(0, classes, rows))
    wide = tuple(array.astype("float32") for array in narrow)

    def loss(function: Any) -> Callable[..., Any]:
        return lambda *a: function(*a, target, reduction=reduction, chunk_size=500).mean()

    gradient = jax.jit(jax.value_and_grad(loss(fused), ALL))
    value, found = gradient(*narrow)
    exact, want = jax.value_and_grad(loss(unfused), ALL)(*wide)
    for one, other in ((value, exact), *zip(found, want, strict=True)):
        assert one.dtype == dtype
        error = np.linalg.norm(np.asarray(one, np.float64) - other) / np.linalg.norm(other)
        # What is subnormal in float16 has fewer digits.
        assert error < (2 if one.shape != (rows, F) else 20) * float(jax.numpy.finfo(dtype).eps)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 1, 3)])
def test_any_number_of_rows_and_of_axes(jax: Any, close: Any, shape: tuple[int, ...]) -> None:
    count = int(np.prod(shape))
    arrays = given(jax, ARRAYS[0][:count].reshape(*shape, F), *ARRAYS[1:])
    target = jax.numpy.asarray(LABELS[:count].clip(0).reshape(shape))
    for reduction in REDUCTIONS:
        losses = [of(function, target, reduction=reduction, chunk_size=2) for function in BOTH]
        got, want = (jax.value_and_grad(loss, ALL)(*arrays) for loss in losses)
        close(got, want)


def test_rows_on_several_devices(jax: Any, close: Any) -> None:
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, all_of_it = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        for axes in (("rows",), ())
    )
    x, w, b = given(jax, np.tile(ARRAYS[0][:4], (4, 1)), *ARRAYS[1:])
    target = jax.numpy.asarray(np.tile(LABELS[:4], 4))
    placed = (jax.device_put(x, rows), *(jax.device_put(a, all_of_it) for a in (w, b)))
    gradient = jax.jit(jax.value_and_grad(of(fused, jax.device_put(target, rows)), ALL))
    close(gradient(*placed), jax.value_and_grad(of(unfused, target), ALL)(x, w, b))


@pytest.fixture
def compiled(jax: Any) -> Iterator[list[str]]:
    """List what jax traces and compiles."""
    seen: list[str] = []

    def note(name: str, duration: float, **_: Any) -> None:
        seen.append(name)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield seen
    jax.monitoring.unregister_event_duration_listener(note)


@pytest.mark.parametrize("how", ["loss", "gradient", "with_grad"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_eager_call_compiles_nothing(
    jax: Any, compiled: list[str], reduction: str, how: str
) -> None:
    arrays, target = given(jax), jax.numpy.asarray(LABELS)
    loss = of(fused, target, reduction=reduction)

    def with_grad(x: Any, w: Any, b: Any) -> Any:
        return polyce.linear_cross_entropy_with_grad(
            x, w, target, linear_bias=b, reduction=reduction, chunk_size=3
        )

    call = {"loss": loss, "gradient": jax.grad(loss, ALL), "with_grad": with_grad}[how]
    call(*arrays)
    compiled.clear()
    call(*(2 * array for array in arrays))
    assert compiled == []


def stored(jax: Any, function: Any, rows: int, classes: int, dtype: str) -> float:
    """Bytes of temporary memory of the compiled function, as a part of the logits in float32."""
    shapes = ((rows, 64), (classes, 64), (classes,))
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    labels = jax.ShapeDtypeStruct((rows,), "int32")
    memory = jax.jit(function).lower(*arrays, labels).compile().memory_analysis()
    return float(memory.temp_size_in_bytes) / (4 * rows * classes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("rows", [4096, 4000])
def test_memory(jax: Any, rows: int, reduction: str, dtype: str) -> None:
    """With a last chunk of fewer rows, and without."""

    def rows_of(*arrays: Any) -> Any:
        return fused(*arrays, reduction=reduction, chunk_size=128)

    def total(*arrays: Any) -> Any:
        return rows_of(*arrays).sum()

    assert stored(jax, rows_of, rows, 8192, dtype) < 0.2
    assert stored(jax, jax.value_and_grad(total, ALL), rows, 8192, dtype) < 0.25


def test_memory_by_default(jax: Any) -> None:
    def loss(x: Any, w: Any, b: Any, target: Any) -> Any:
        return polyce.linear_cross_entropy(x, w, target, linear_bias=b)

    assert stored(jax, jax.value_and_grad(loss, ALL), 16384, 16384, "float32") < 1 / 3
