"""jax: the derivatives of a linear head's loss, and what its compiled functions store."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import polyce

pytestmark = pytest.mark.only("jax-x32", "jax-x64")

N, F, C = 13, 5, 7
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def data() -> tuple[Any, Any, Any, Any]:
    import jax.numpy as jnp

    rng = np.random.default_rng(0)
    shapes = ((N, F), (C, F), (C,))
    x, w, b = (jnp.asarray(rng.standard_normal(shape, dtype=np.float32)) for shape in shapes)
    target = rng.integers(0, C, N)
    target[[2, 7]] = -100
    return x, w, b, target


def fused(target: Any, **options: Any) -> Any:
    def loss(x: Any, w: Any, b: Any) -> Any:
        given = options | {"linear_bias": b, "chunk_size": 4}
        return (polyce.linear_cross_entropy(x, w, target, **given) * 2.0).sum()

    return loss


def unfused(target: Any, **options: Any) -> Any:
    def loss(x: Any, w: Any, b: Any) -> Any:
        return (polyce.cross_entropy(x @ w.T + b, target, **options) * 2.0).sum()

    return loss


def close(got: Any, want: Any, tolerance: float = 2e-5) -> None:
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


@REDUCTIONS
def test_gradients_of_any_of_the_three(reduction: str) -> None:
    import jax

    *arrays, target = data()
    want = jax.grad(unfused(target, reduction=reduction), (0, 1, 2))(*arrays)
    got = fused(target, reduction=reduction)
    close(jax.jit(jax.grad(got, (0, 1, 2)))(*arrays), want)
    if reduction == "mean":
        close(jax.grad(got, (0, 1, 2))(*arrays), want)
        for place in range(3):
            close([jax.jit(jax.grad(got, place))(*arrays)], [want[place]])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_and_tangents(reduction: str) -> None:
    import jax

    *arrays, target = data()
    tangents = [np.cos(np.arange(a.size, dtype=np.float32)).reshape(a.shape) for a in arrays]
    answers = []
    for loss in (fused(target, reduction=reduction), unfused(target, reduction=reduction)):
        of_gradient = jax.jvp(jax.grad(loss, (0, 1, 2)), tuple(arrays), tuple(tangents))[1]
        twice = jax.grad(lambda x, loss=loss: (jax.grad(loss, 1)(x, *arrays[1:]) ** 2).sum())
        answers.append((jax.jvp(loss, arrays, tangents)[1], *of_gradient, twice(arrays[0])))
    close(*answers, tolerance=2e-4)


def test_it_maps() -> None:
    import jax

    x, w, b, target = data()
    many = np.stack([x, 2.0 * x, x - 1.0])
    got = jax.vmap(jax.grad(fused(target), 1), in_axes=(0, None, None))(many, w, b)
    close(got, [jax.grad(unfused(target), 1)(each, w, b) for each in many])


@REDUCTIONS
def test_rows_that_do_not_count(reduction: str) -> None:
    import jax

    x, w, b, target = data()
    x = x.at[2].set(np.inf).at[7].set(np.nan)
    clean = x.at[2].set(0.0).at[7].set(0.0)
    want = jax.grad(unfused(target, reduction=reduction), (0, 1, 2))(clean, w, b)
    close(jax.grad(fused(target, reduction=reduction), (0, 1, 2))(x, w, b), want)
    nothing = np.full(N, -100)
    for grad in jax.grad(fused(nothing, reduction=reduction), (0, 1, 2))(x, w, b):
        assert not np.any(grad)


def test_no_derivative_by_what_has_none() -> None:
    import jax

    x, w, _, target = data()
    with pytest.raises(TypeError, match="sample_weight is being differentiated; pass"):
        jax.grad(lambda v: polyce.linear_cross_entropy(x, w, target, sample_weight=v))(
            np.ones(N, np.float32)
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_compiled_function_stores_some_chunks(reduction: str, dtype: str) -> None:
    import jax

    rows, features, classes, size = 1000, 16, 8192, 64
    x, w = (jax.ShapeDtypeStruct((n, features), dtype) for n in (rows, classes))
    target = jax.ShapeDtypeStruct((rows,), "int32")

    def loss(x: Any, w: Any, t: Any) -> Any:
        options: dict[str, Any] = {"reduction": reduction, "chunk_size": size}
        return polyce.linear_cross_entropy(x, w, t, **options).sum()

    for function in (loss, jax.value_and_grad(loss, (0, 1))):
        compiled = jax.jit(function).lower(x, w, target).compile()
        stored = compiled.memory_analysis().temp_size_in_bytes
        # In 64-bit types sums of the classes are wide, and XLA for CPUs may store what it sums.
        wide = 2 if jax.config.jax_enable_x64 else 1
        assert stored < wide * 8 * 4 * size * classes < 4 * rows * classes
