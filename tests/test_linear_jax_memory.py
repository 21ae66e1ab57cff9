"""jax: what the loss of a linear head stores, as the compiler reports it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import polyce
from conftest import ANY_WIDTH, BY_DIGITS

pytestmark = pytest.mark.only(*BY_DIGITS)


def stored(function: Any, rows: int, features: int, classes: int, dtype: str = "float32") -> float:
    """Return the bytes of temporary memory of the compiled function."""
    import jax

    shapes = ((rows, features), (classes, features), (classes,))
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    labels = jax.ShapeDtypeStruct((rows,), "int32")
    memory = jax.jit(function).lower(*arrays, labels).compile().memory_analysis()
    return float(memory.temp_size_in_bytes)


@pytest.mark.slow("jax-x32")
@pytest.mark.only(*ANY_WIDTH)
@pytest.mark.parametrize(
    ("rows", "reduction", "dtype", "chunk_size", "most"),
    [
        (4096, "none", "float32", 128, 0.25),
        # With a last chunk of fewer rows.
        (4000, "mean", "bfloat16", 128, 0.25),
        (4000, "none", "float32", 128, 0.25),
        (32768, "mean", "float32", None, 0.3),
    ],
)
def test_what_a_compiled_function_stores(
    rows: int, reduction: str, dtype: str, chunk_size: int | None, most: float
) -> None:
    import jax

    def losses(x: Any, w: Any, b: Any, target: Any) -> Any:
        options = {"reduction": reduction, "chunk_size": chunk_size}
        return polyce.linear_cross_entropy(x, w, target, linear_bias=b, **options)

    gradient = jax.value_and_grad(lambda *arrays: losses(*arrays).sum(), (0, 1, 2))
    logits = 4 * rows * 8192
    assert stored(gradient, rows, 64, 8192, dtype) < most * logits
    assert stored(losses, rows, 64, 8192, dtype) < most * logits


@pytest.mark.slow("jax-x32")
@pytest.mark.only(*ANY_WIDTH)
@pytest.mark.parametrize("what", ["stats", "log_prob", "sparse", "teacher"])
def test_what_other_values_store(what: str) -> None:
    import jax

    def total(x: Any, w: Any, b: Any, target: Any) -> Any:
        if what == "log_prob":
            return polyce.linear_log_prob(x, w, target, linear_bias=b).sum()
        if what == "sparse":
            of_some = polyce.SparseTarget(target[:, None], jax.numpy.ones((len(target), 1)))
            return polyce.linear_cross_entropy(x, w, of_some)
        if what == "teacher":
            teacher = polyce.TeacherHead(*map(jax.lax.stop_gradient, (x, w, b)), 0.5)
            rows = polyce.linear_cross_entropy(x, w, teacher, reduction="none")
            return polyce.linear_cross_entropy(x, w, teacher) + (rows * rows).mean()
        loss, stats = polyce.linear_cross_entropy(x, w, target, linear_bias=b, return_stats=True)
        return loss + stats.entropy.mean()

    gradient = jax.value_and_grad(total, (0, 1, 2))
    assert stored(gradient, 32768, 64, 8192) < 0.3 * 4 * 32768 * 8192


@pytest.fixture
def one_device(monkeypatch: Any) -> None:
    """Make jax report one device instead of the tests' four."""
    import jax

    monkeypatch.setattr(jax, "device_count", lambda: 1)


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("left_out", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_blocks_of_classes(reduction: str, left_out: bool) -> None:
    import jax

    rng = np.random.default_rng(0)
    x, w, b = (rng.standard_normal(shape) for shape in ((250, 512), (4000, 512), (4000,)))
    x /= 16
    target = rng.integers(0, 4000, 250)
    target[::3] = -100 if left_out else target[::3]
    arrays = [jax.numpy.asarray(array) for array in (x, w, target)]
    loss, found = polyce.linear_cross_entropy_with_grad(
        *arrays, linear_bias=jax.numpy.asarray(b), reduction=reduction, chunk_size=100
    )
    want, grad = polyce.cross_entropy_with_grad(x @ w.T + b, target, reduction=reduction)
    exact = (want, grad @ w, grad.T @ x, grad.sum(axis=0))
    digits = {"rtol": 1e-9, "atol": 1e-12} if loss.dtype == np.float64 else {"rtol": 2e-4}
    for one, other in zip((loss, *found), exact, strict=True):
        limit = digits | {"atol": digits.get("atol", 1e-5 * np.abs(other).max())}
        np.testing.assert_allclose(one, other, **limit)


@pytest.mark.usefixtures("one_device")
def test_second_derivatives_through_blocks_of_classes() -> None:
    import jax

    rng = np.random.default_rng(0)
    arrays = (rng.standard_normal((3, 1500)) / 40, rng.standard_normal((2000, 1500)))
    x, w = (jax.numpy.asarray(array) for array in arrays)
    labels = np.array([0, 1500, 1999])

    def second(function: Any) -> Any:
        along = jax.grad(lambda w: jax.numpy.sum(jax.grad(function, 1)(x, w) * w))
        scales = jax.numpy.asarray([1.0, 0.5])
        return jax.jit(jax.vmap(lambda scale: along(scale * w)))(scales)

    found = second(lambda x, w: polyce.linear_cross_entropy(x, w, labels))
    wanted = second(lambda x, w: polyce.cross_entropy(x @ w.T, labels))
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.only(*ANY_WIDTH)
@pytest.mark.usefixtures("one_device")
def test_no_second_gradient_of_a_wide_head_is_held() -> None:
    import jax

    def loss(x: Any, w: Any, b: Any, target: Any) -> Any:
        return polyce.linear_cross_entropy(x, w, target, linear_bias=b, chunk_size=64)

    def gradients(x: Any, w: Any, b: Any, target: Any) -> Any:
        options = {"linear_bias": b, "chunk_size": 64}
        return polyce.linear_cross_entropy_with_grad(x, w, target, **options)[1]

    head = 4 * 32768 * 512
    assert stored(gradients, 256, 512, 32768) < 0.5 * head
    # XLA multiplies by the cotangent into separate memory.
    assert stored(jax.grad(loss, (0, 1, 2)), 256, 512, 32768) < 1.5 * head
