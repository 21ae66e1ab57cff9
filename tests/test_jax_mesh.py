"""jax: rows or classes spread over a mesh of four devices, emulated on one CPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import polyce
from conftest import ANY_WIDTH

pytestmark = pytest.mark.only(*ANY_WIDTH)

# So many rows and classes that no vector over one of them is as long as a device's logits.
ROWS, CLASSES = 16, 64
OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.01, "logit_softcap": 20.0, "logit_scale": 0.5}
COLLECTIVES = (
    r"= (.*?) (all-gather|all-to-all|collective-\w+|reduce-scatter|all-reduce)(?:-start)?\("
)


@pytest.fixture(autouse=True)
def four_devices() -> None:
    import jax

    if jax.device_count() < 4:
        pytest.skip(f"needs four devices, there are {jax.device_count()}")


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


@pytest.mark.slow("jax-x32")
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


@pytest.mark.slow("jax-x32")
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


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("outside", [False, True])
def test_a_linear_head_within_shard_map(reduction: str, outside: bool) -> None:
    """Rows on four devices, the head on all: its gradient is added up over them."""
    import jax

    P = jax.sharding.PartitionSpec
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((ROWS, 3), (5, 3)))
    labels = rng.integers(0, 5, ROWS)
    mesh = jax.make_mesh((4,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))

    def total(x: Any, w: Any, labels: Any) -> Any:
        options = {"reduction": reduction, "chunk_size": 3}
        loss = polyce.linear_cross_entropy(x, w, labels, **options)
        return jax.lax.psum(loss.sum(), "devices")

    def gradients(x: Any, w: Any, labels: Any) -> Any:
        return jax.grad(total, (0, 1))(x, w, labels)

    specs = {"mesh": mesh, "in_specs": (P("devices"), P(), P("devices"))}
    if outside:
        function = jax.grad(jax.shard_map(total, **specs, out_specs=P()), (0, 1))
    else:
        function = jax.shard_map(gradients, **specs, out_specs=(P("devices"), P()))
    of_input, of_head = jax.jit(function)(x, w, labels)
    grad = np.exp(x @ w.T) / np.exp(x @ w.T).sum(1, keepdims=True) - np.eye(5)[labels]
    np.testing.assert_allclose(of_input, grad @ w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(of_head, grad.T @ x, rtol=1e-5, atol=1e-6)


def test_stats_beside_a_gradient_within_shard_map() -> None:
    import jax

    P = jax.sharding.PartitionSpec
    logits, labels, *_ = numbers("index")
    labels = np.abs(labels) % CLASSES
    mesh = jax.make_mesh((4,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(x: Any, labels: Any) -> Any:
        losses, stats = polyce.cross_entropy(x, labels, reduction="none", return_stats="correct")
        return jax.lax.psum(losses.sum(), "devices"), stats.correct

    function = jax.shard_map(
        jax.value_and_grad(loss, has_aux=True),
        mesh=mesh,
        in_specs=P("devices"),
        out_specs=((P(), P("devices")), P("devices")),
    )
    (value, correct), grad = jax.jit(function)(logits, labels)
    wide = logits.astype(np.float64)
    softmax = np.exp(wide) / np.exp(wide).sum(1, keepdims=True)
    rows = np.arange(ROWS)
    np.testing.assert_allclose(value, -np.log(softmax[rows, labels]).sum(), rtol=1e-5)
    assert correct.tolist() == (logits.argmax(1) == labels).tolist()
    np.testing.assert_allclose(grad, softmax - np.eye(CLASSES)[labels], rtol=1e-4, atol=1e-6)


@pytest.mark.slow("jax-x32")
@pytest.mark.parametrize(
    ("compiled", "reduction", "axis"),
    [(True, "none", "rows"), (False, "mean", "rows"), (True, "mean", "classes")],
)
def test_a_linear_head_with_its_gradients_on_a_mesh(
    mesh: Any, compiled: bool, reduction: str, axis: str
) -> None:
    import jax

    P = jax.sharding.PartitionSpec
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((8, 2, 3), (4, 3)))
    labels = rng.integers(0, 4, (8, 2))
    labels[0, 0] = -100
    by_rows, by_classes = (P("devices"), P()) if axis == "rows" else (P(), P("devices"))
    placed = [
        jax.device_put(array, jax.NamedSharding(mesh, spec))
        for array, spec in ((x, by_rows), (w, by_classes), (labels, by_rows))
    ]

    def every(x: Any, w: Any, labels: Any) -> Any:
        return polyce.linear_cross_entropy_with_grad(
            x, w, labels, reduction=reduction, chunk_size=3, wrt=("input", "linear_weight")
        )

    loss, (of_input, of_head, _) = (jax.jit(every) if compiled else every)(*placed)
    logits = x @ w.T
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    counted = labels >= 0
    losses = counted * -np.log(np.take_along_axis(softmax, abs(labels[..., None]) % 4, -1))[..., 0]
    grad = counted[..., None] * (softmax - np.eye(4)[abs(labels) % 4])
    if reduction == "mean":
        losses, grad = losses.sum() / counted.sum(), grad / counted.sum()
    np.testing.assert_allclose(loss, losses, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(of_input, grad @ w, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(of_head, np.einsum("abc,abf->cf", grad, x), rtol=1e-4, atol=1e-6)
    assert of_input.sharding.is_equivalent_to(placed[0].sharding, 3)
    assert of_head.sharding.is_equivalent_to(placed[1].sharding, 2)


@pytest.mark.slow("jax-x32")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("axis", ["rows", "classes"])
def test_derivatives_of_a_linear_heads_losses_on_a_mesh(
    mesh: Any, axis: str, compiled: bool
) -> None:
    """With respect to one input at a time, the others being constants of the rule, and to all."""
    import jax

    P = jax.sharding.PartitionSpec
    rng = np.random.default_rng(0)
    shapes = ((ROWS, 3), (8, 3), (8,))
    x, w, b = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    labels, scale = rng.integers(0, 8, ROWS), rng.uniform(0.5, 2.0, ROWS).astype(np.float32)
    by_rows, by_classes = (P("devices"), P()) if axis == "rows" else (P(), P("devices"))
    specs = (by_rows, by_classes, by_classes, by_rows, by_rows)
    *inputs, placed_labels, placed_scale = (
        jax.device_put(array, jax.NamedSharding(mesh, spec))
        for array, spec in zip((x, w, b, labels, scale), specs, strict=True)
    )

    def total(x: Any, w: Any, b: Any) -> Any:
        options = {"linear_bias": b, "reduction": "none", "chunk_size": 3}
        losses = polyce.linear_cross_entropy(x, w, placed_labels, **options)
        return (placed_scale * losses).sum()

    grad = np.exp(x @ w.T + b) / np.exp(x @ w.T + b).sum(1, keepdims=True) - np.eye(8)[labels]
    grad *= scale[:, None]
    expected = (grad @ w, grad.T @ x, grad.sum(0))
    for chosen in ((0,), (1,), (2,), (0, 1, 2)):
        function = jax.grad(total, chosen)
        found = (jax.jit(function) if compiled else function)(*inputs)
        for index, actual in zip(chosen, found, strict=True):
            np.testing.assert_allclose(actual, expected[index], rtol=1e-4, atol=1e-6)
            # On automatic axes the compiler chooses the sharding.
            assert jax.typeof(actual).sharding == jax.typeof(inputs[index]).sharding
