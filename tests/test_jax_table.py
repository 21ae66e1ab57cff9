"""jax: every derivative in every way to call, with all pairs of options and targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import polyce
from conftest import FULL
from jax_table import (
    FUNCTIONS,
    IGNORED,
    Case,
    Numbers,
    cases,
    class_axis,
    derivative,
    is_soft,
    numbers,
    textbook,
)

# Here numbers are compared to 11 digits; the full run uses 32-bit types too.
pytestmark = pytest.mark.only("jax-x64", *(["jax-x32"] if FULL else []))

DEVICES = 2
CASES = [case for name in FUNCTIONS for case in cases(name, 4 if FULL else 1)]
BY_ROWS = ("input", "target", "sample_weight")


@pytest.fixture
def jax() -> Any:
    import jax

    return jax


@pytest.fixture
def close(backend_name: str) -> Callable[[Any, Any], None]:
    digits = 1e-11 if backend_name == "jax-x64" else 5e-5

    def compare(actual: Any, expected: Any) -> None:
        import jax

        leaves = [jax.tree.leaves_with_path(jax.device_get(tree)) for tree in (actual, expected)]
        for (path, one), (there, other) in zip(*leaves, strict=True):
            assert there == path
            np.testing.assert_allclose(one, other, rtol=digits, atol=digits, err_msg=str(path))

    return compare


def ours(case: Case, arrays: dict[str, Any]) -> Any:
    """The loss, or the log-probabilities, as polyce gives them."""
    options = {k: v for k, v in case.options.items() if k not in ("weight", "sample_weight")}
    if case.function == "log_softmax":
        return polyce.log_softmax(arrays["input"], class_axis(case), **options)
    options["reduction"] = "mean" if case.reduction == "normalizer" else case.reduction
    if case.kind == "index":
        options["ignore_index"] = IGNORED
    if case.function == "linear_cross_entropy":
        # Without jit operations take long, and they are the same for each chunk.
        options["chunk_size"] = None if case.way == "disable_jit" else 3
    elif case.layout in ("last", "images"):
        options["axis"] = -1 if case.layout == "last" else None
    found = getattr(polyce, case.function)(**arrays, **options)
    return found[0] if "return_stats" in options else found


def spec(jax: Any, case: Case, name: str) -> Any:
    """Return how an argument is sharded over the mesh."""
    P = jax.sharding.PartitionSpec
    if case.layout != "classes" or case.way == "shard_map":
        return P("devices") if name in BY_ROWS else P()
    if name in ("weight", "linear_weight", "linear_bias"):
        return P("devices")
    is_logits = name == "input" and case.function != "linear_cross_entropy"
    return P(None, "devices") if is_logits or (name == "target" and is_soft(case)) else P()


def by_blocks(jax: Any, case: Case, arrays: dict[str, Any]) -> Any:
    """Compute the textbook's answer for each device's rows separately."""
    parts = []
    for rows in np.split(np.arange(4), DEVICES):
        own = {k: v[rows] if k in BY_ROWS else v for k, v in arrays.items()}
        parts.append(textbook(jax, case, own))
    return jax.numpy.concatenate(parts) if parts[0].ndim else sum(parts)


def on_each_device(jax: Any, case: Case, mesh: Any, arrays: dict[str, Any]) -> Any:
    P = jax.sharding.PartitionSpec
    is_whole = case.function != "log_softmax" and case.reduction != "none"

    def local(arrays: dict[str, Any]) -> Any:
        found = ours(case, arrays)
        return jax.lax.psum(found, "devices") if is_whole else found

    specs = {name: spec(jax, case, name) for name in arrays}
    out = P() if is_whole else P("devices")
    return jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=out)(arrays)


def exported(jax: Any, case: Case, compute: Any, given: Numbers) -> Any:
    """Export a function for any number of rows, store it, and run it."""
    from jax import export

    (rows,) = export.symbolic_shape("rows")

    def shape(path: Any, array: Any) -> Any:
        names = [getattr(key, "key", None) for key in path]
        known = names[-1] not in BY_ROWS if names[-1] else array.ndim == 0
        sizes = array.shape if known else (rows, *array.shape[1:])
        return jax.ShapeDtypeStruct(sizes, array.dtype)

    shapes = jax.tree_util.tree_map_with_path(shape, tuple(given))
    stored = export.export(jax.jit(compute))(*shapes).serialize()
    return export.deserialize(stored).call(*given)


def run(jax: Any, case: Case, given: Numbers) -> Any:
    """Compute the case's derivative of polyce's function, in the way that the case says."""

    def loss(arrays: dict[str, Any]) -> Any:
        return ours(case, arrays)

    compute = derivative(jax, case, loss)
    if case.way == "eager":
        return compute(*given)
    if case.way == "jit":
        return jax.jit(compute)(*given)
    if case.way == "disable_jit":
        with jax.disable_jit():
            return compute(*given)
    if case.way == "export":
        return exported(jax, case, compute, given)
    kinds = jax.sharding.AxisType
    kind = kinds.Explicit if case.way == "explicit" else kinds.Auto
    mesh = jax.make_mesh((DEVICES,), ("devices",), axis_types=(kind,))
    if case.way == "shard_map":
        compute = derivative(jax, case, lambda arrays: on_each_device(jax, case, mesh, arrays))
        return jax.jit(compute)(*given)

    def place(name: str, array: Any) -> Any:
        return jax.device_put(array, jax.NamedSharding(mesh, spec(jax, case, name)))

    placed = [{k: place(k, v) for k, v in arrays.items()} for arrays in given[:3]]
    with jax.set_mesh(mesh):
        return jax.jit(compute)(*placed, given.cotangent)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_derivatives_are_those_of_the_formula(jax: Any, close: Any, case: Case) -> None:
    raw = numbers(case)
    given = Numbers(*jax.tree.map(jax.numpy.asarray, tuple(raw)))
    formula = by_blocks if case.way == "shard_map" else textbook
    expected = jax.jit(derivative(jax, case, lambda arrays: formula(jax, case, arrays)))(*given)
    if case.layout == "numpy" and case.way in ("eager", "disable_jit"):
        given = given._replace(fixed=raw.fixed)
    close(run(jax, case, given), expected)
