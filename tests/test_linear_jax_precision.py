"""jax: a linear head's matrix products state their precision, whatever jax's default is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import polyce
from conftest import ANY_WIDTH

pytestmark = pytest.mark.only(*ANY_WIDTH)


def products(jax: Any, program: Any) -> Iterator[Any]:
    """Yield every matrix product of a program, including its inner programs."""

    def is_program(value: Any) -> bool:
        return hasattr(value, "eqns") or hasattr(value, "jaxpr")

    for step in getattr(program, "jaxpr", program).eqns:
        if step.primitive.name == "dot_general":
            yield step
        inner = jax.tree.leaves(list(step.params.values()), is_leaf=is_program)
        for value in filter(is_program, inner):
            yield from products(jax, value)


@pytest.mark.slow("jax-x32")
@pytest.mark.parametrize("default", [None, "tensorfloat32"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_is_multiplied_as_such(dtype: str, reduction: str, default: str | None) -> None:
    import jax

    def loss(x: Any, w: Any) -> Any:
        labels = jax.numpy.zeros(4, "int32")
        options = {"reduction": reduction, "chunk_size": 3}
        return polyce.linear_cross_entropy(x, w, labels, **options).sum()

    def second(x: Any, w: Any) -> Any:
        return jax.grad(lambda w: (jax.grad(loss, 1)(x, w) * w).sum())(w)

    def with_grad(x: Any, w: Any) -> Any:
        return polyce.linear_cross_entropy_with_grad(x, w, jax.numpy.zeros(4, "int32"))

    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((4, 3), (5, 3))]
    with jax.default_matmul_precision(default):
        for function in (loss, jax.grad(loss, (0, 1)), second, with_grad):
            found = list(products(jax, jax.make_jaxpr(function)(*shapes)))
            assert found
            for step in found:
                stated = step.params["precision"]
                if dtype == "float32":
                    assert stated == (jax.lax.Precision.HIGHEST,) * 2
                elif default is None:
                    # The fastest product keeps all digits of 16-bit numbers.
                    assert stated is None
