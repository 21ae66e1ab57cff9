"""The exact answers for many rows at once are those of the oracle of the conformance grid."""

from __future__ import annotations

import numpy as np
import pytest

from polyce.testing import exact_answer

from .exact import Options, exact

pytestmark = pytest.mark.only("numpy")


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_exact_answers_are_the_oracle_s(kind: str, smoothing: float) -> None:
    rng = np.random.default_rng(0)
    logits = 4.0 * rng.standard_normal((12, 9))
    logits[:4, 2] += 40.0
    weight, g = rng.random(9) + 0.5, rng.random(12) + 0.5
    target = rng.integers(0, 9, 12)
    target[:6] = [2, 2, 3, 2, -100, 0]
    if kind == "probability":
        target = rng.dirichlet(np.ones(9), 12)
    want = exact_answer(
        logits, target, weight, reduction="none", label_smoothing=smoothing, grad_output=g
    )
    got = exact(logits, target, g, Options(weight, smoothing))
    kept = np.ones(12, bool) if kind == "probability" else target != -100
    np.testing.assert_allclose(got.loss, want.loss, rtol=1e-14, atol=0)
    np.testing.assert_allclose(got.grad, want.grad, rtol=1e-13, atol=1e-15)
    for name in ("gap", "pivot", "softmax_part", "coefficient_part"):
        np.testing.assert_allclose(
            getattr(got, name)[kept], getattr(want, name)[kept], rtol=1e-13, atol=1e-15
        )
