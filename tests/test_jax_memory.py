"""jax: what a compiled gradient stores besides itself, as the compiler reports it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import polyce
from conftest import ANY_WIDTH

pytestmark = pytest.mark.only(*ANY_WIDTH)

# Enough classes to make the per-row numbers small compared with the logits.
ROWS, CLASSES = 512, 8192
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "scale": {"logit_scale": 0.5, "z_loss": 1e-4},
    "softcap": {"logit_softcap": 30.0, "z_loss": 1e-4},
    "weight": {"weight": np.ones(CLASSES, np.float32)},
    "sample_weight": {"sample_weight": np.ones(ROWS, np.float32)},
}


def stored(function: Any, dtype: str, target: Any, options: Any) -> float:
    """Temporary memory of the compiled function, as a multiple of the logits in float32."""
    import jax

    logits = jax.ShapeDtypeStruct((ROWS, CLASSES), dtype)
    compiled = jax.jit(lambda x, t: function(x, t, **options)).lower(logits, target).compile()
    return float(compiled.memory_analysis().temp_size_in_bytes) / (4 * ROWS * CLASSES)


@pytest.mark.slow("jax-x32")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_loss_and_gradient_store_nothing_beside_the_gradient(options: Any, dtype: str) -> None:
    import jax

    labels = jax.ShapeDtypeStruct((ROWS,), "int32")
    # XLA for CPUs cannot widen, cap and exclude within a reduction.
    allowed = 1.01 if dtype == "bfloat16" and "logit_softcap" in options else 0.05
    for function in (jax.value_and_grad(polyce.cross_entropy), polyce.cross_entropy_with_grad):
        assert stored(function, dtype, labels, options) < allowed


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=["plain", "smoothing"])
def test_what_the_gradient_for_probabilities_stores_beside_it(options: Any) -> None:
    import jax

    target = jax.ShapeDtypeStruct((ROWS, CLASSES), "float32")
    # With 64-bit types XLA for CPUs stores the widened probabilities before it sums them.
    wide = 2.0 if jax.config.jax_enable_x64 else 0.0
    assert stored(jax.grad(polyce.cross_entropy), "float32", target, options) < wide + 0.05
    # The loss sums probability times logit, and has to put the products somewhere.
    both = jax.value_and_grad(polyce.cross_entropy)
    assert stored(both, "float32", target, options) < wide + 1.01
