"""jax: rows or classes spread over a mesh of four devices, which are one CPU posing as them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import polyce
from conftest import ANY_WIDTH

pytestmark = pytest.mark.only(*ANY_WIDTH)

# Rows and classes such that no vector of one is as long as the logits of a device.
ROWS, CLASSES = 16, 64
OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.01, "logit_softcap": 20.0, "logit_scale": 0.5}
COLLECTIVES = (
    r"= (.*?) (all-gather|all-to-all|collective-\w+|reduce-scatter|all-reduce)(?:-start)?\("
)


@pytest.fixture(params=["Auto", "Explicit"])
def mesh(request: pytest.FixtureRequest) -> Iterator[Any]:
    import jax

    kind = getattr(jax.sharding.AxisType, request.param)
    with jax.set_mesh(jax.make_mesh((4,), ("devices",), axis_types=(kind,))) as mesh:
        yield jax.sharding.get_mesh() if mesh is None else mesh


def numbers(kind: str) -> tuple[Any, Any, Any, Any]:
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((ROWS, CLASSES)).astype(np.float32)
    target: Any = rng.integers(0, CLASSES, ROWS)
    target[3] = -100
    if kind == "probability":
        target = rng.dirichlet(np.ones(CLASSES), ROWS).astype(np.float32)
    weight = rng.uniform(0.5, 2.0, CLASSES).astype(np.float32)
    return logits, target, weight, rng.uniform(0.5, 2.0, ROWS).astype(np.float32)


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("axis", ["rows", "classes"])
@pytest.mark.parametrize("options", ["plain", "all"])
def test_compiled_loss_and_gradient_exchange_rows_only(
    mesh: Any, axis: str, kind: str, options: str
) -> None:
    import jax

    P = jax.sharding.PartitionSpec
    rows, classes = ("devices", None) if axis == "rows" else (None, "devices")
    specs = [P(rows, classes), P(rows), P(classes), P(rows)]
    if kind == "probability":
        specs[1] = specs[0]
    arrays = numbers(kind)[: 2 if options == "plain" else 4]

    def loss(x: Any, t: Any, w: Any = None, v: Any = None) -> Any:
        chosen = {} if options == "plain" else OPTIONS
        return polyce.cross_entropy(x, t, w, sample_weight=v, **chosen)

    given = [
        jax.device_put(array, jax.NamedSharding(mesh, spec))
        for array, spec in zip(arrays, specs, strict=False)
    ]
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*given).compile()
    value, grad = compiled(*given)
    expected = polyce.cross_entropy_with_grad(
        arrays[0],
        *arrays[1:3],
        **({} if options == "plain" else {"sample_weight": arrays[3]} | OPTIONS),
    )
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(grad, expected[1], rtol=1e-4, atol=1e-7)
    assert grad.sharding.is_equivalent_to(given[0].sharding, 2)
    exchanged = re.findall(COLLECTIVES, compiled.as_text())
    assert exchanged
    for shapes, operation in exchanged:
        assert operation == "all-reduce"
        for shape in re.findall(r"\[([\d,]*)\]", shapes):
            assert np.prod([int(size) for size in shape.split(",") if size]) <= ROWS


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("axis", ["rows", "classes"])
def test_calls_outside_of_jit(mesh: Any, axis: str, kind: str) -> None:
    import jax

    P = jax.sharding.PartitionSpec
    spec = P("devices", None) if axis == "rows" else P(None, "devices")
    arrays = numbers(kind)
    logits = jax.device_put(arrays[0], jax.NamedSharding(mesh, spec))
    # The others lie on every device.
    target, weight, _ = (jax.device_put(a, jax.NamedSharding(mesh, P())) for a in arrays[1:])
    loss, grad = polyce.cross_entropy_with_grad(logits, target, weight)
    expected = polyce.cross_entropy_with_grad(*arrays[:3])
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    np.testing.assert_allclose(grad, expected[1], rtol=1e-4, atol=1e-7)
    assert grad.sharding.is_equivalent_to(logits.sharding, 2)
    result = polyce.log_softmax(logits)
    np.testing.assert_allclose(result, polyce.log_softmax(arrays[0]), rtol=1e-5)


def test_gradients_of_probabilities_and_weight_on_a_mesh(mesh: Any) -> None:
    import jax

    P = jax.sharding.PartitionSpec
    arrays = numbers("probability")[:3]
    specs = (P(None, "devices"), P(None, "devices"), P("devices"))
    given = [
        jax.device_put(array, jax.NamedSharding(mesh, spec))
        for array, spec in zip(arrays, specs, strict=True)
    ]
    gradient = jax.jit(jax.grad(polyce.cross_entropy, (1, 2)))
    expected = jax.grad(polyce.cross_entropy, (1, 2))(*map(jax.numpy.asarray, arrays))
    for actual, wanted, array in zip(gradient(*given), expected, given[1:], strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4)
        assert actual.sharding.is_equivalent_to(array.sharding, array.ndim)
