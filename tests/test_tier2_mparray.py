"""mparray: the same formula, with as many digits as are asked for."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import polyce

pytestmark = pytest.mark.only("mparray")

DIGITS = 50
X = np.random.default_rng(0).standard_normal((3, 4)) * 3
X[1, 2] += 90  # confident: 1 - p has 39 zeros
T = np.array([0, 2, -100])
P = np.random.default_rng(1).random((3, 4))
W = np.array([0.3, 1.7, 2.1, 0.9])
V = np.array([0.3, 1.7, 2.1])

REDUCTIONS = ("none", "sum", "mean")
TRANSFORMS = ((1.0, None), (1.3, None), (1.3, 7.1))


def textbook(
    target: Any, weight: Any, smoothing: float, sample_weight: Any, z_loss: float,
    scale: float, cap: float | None,
) -> tuple[list[Any], list[list[Any]], Any]:  # fmt: skip
    """Compute losses, gradients and the mean's denominator as the documentation writes them.

    This loses digits, so it computes with more of them.
    """
    from mpmath import mp

    classes = X.shape[1]
    exactly = np.vectorize(mp.mpf, otypes=[object])
    weights = exactly(np.ones(classes) if weight is None else weight)
    counts = exactly(np.ones(3) if sample_weight is None else sample_weight)
    losses, grads, total = [], [], mp.mpf(0)
    for i, row in enumerate(exactly(X)):
        soft = target.ndim == 2
        if not soft and target[i] == -100:
            losses.append(mp.mpf(0))
            grads.append([mp.mpf(0)] * classes)
            continue
        p = exactly(target[i]) if soft else exactly(np.arange(classes) == target[i])
        spread = mp.mpf(smoothing) / classes
        own = weights if soft else weights[target[i]]
        r = (1 - mp.mpf(smoothing)) * p * own + spread * weights
        y = [mp.mpf(scale) * x for x in row]
        slope = [mp.mpf(scale)] * classes
        if cap:
            slope = [mp.mpf(scale) * mp.sech(x / mp.mpf(cap)) ** 2 for x in y]
            y = [mp.mpf(cap) * mp.tanh(x / mp.mpf(cap)) for x in y]
        lse = mp.log(sum(mp.exp(x) for x in y))
        of_lse = mp.mpf(z_loss) * (1 if soft else weights[target[i]])
        losses.append(counts[i] * (sum(r * (lse - np.array(y))) + of_lse * lse**2))
        factor = sum(r) + 2 * of_lse * lse
        grads.append(
            [counts[i] * (factor * mp.exp(x - lse) - c) * s for x, c, s in zip(y, r, slope)]  # noqa: B905
        )
        total += counts[i] * (1 if soft else weights[target[i]])
    return losses, grads, total


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_fifty_digits(kind: str, smoothing: float) -> None:
    import mparray as xp
    from mpmath import mp

    target = T if kind == "index" else P
    for weight, sample_weight, z_loss, (scale, cap) in itertools.product(
        (None, W), (None, V), (0.0, 1e-3), TRANSFORMS
    ):
        with mp.workdps(3 * DIGITS):
            losses, grads, total = textbook(
                target, weight, smoothing, sample_weight, z_loss, scale, cap
            )
        for reduction in REDUCTIONS:
            with mp.workdps(DIGITS):
                loss, grad = polyce.cross_entropy_with_grad(
                    xp.asarray(X),
                    xp.asarray(target),
                    None if weight is None else xp.asarray(weight),
                    label_smoothing=smoothing,
                    reduction=reduction,
                    sample_weight=None if sample_weight is None else xp.asarray(sample_weight),
                    z_loss=z_loss,
                    logit_scale=scale,
                    logit_softcap=cap,
                )
            with mp.workdps(3 * DIGITS):
                divisor = total if reduction == "mean" else mp.mpf(1)
                want = losses if reduction == "none" else [sum(losses) / divisor]
                close(want, loss)
                close([value / divisor for row in grads for value in row], grad)


def close(want: list[Any], got: Any) -> None:
    for one, other in zip(want, np.ravel(got._data), strict=True):
        assert abs(one - other) <= abs(one) * 10.0 ** (5 - DIGITS), (one, other)


def test_labels_of_mparray_are_checked() -> None:
    import mparray as xp

    with pytest.raises(IndexError, match=r"got 9 at position \(1,\)"):
        polyce.cross_entropy(xp.asarray(X), xp.asarray(np.array([0, 9, 1])))


@pytest.mark.parametrize("normalizer", [0.0, 3.0])
def test_a_normalizer(normalizer: float) -> None:
    import mparray as xp
    from mpmath import mp

    with mp.workdps(DIGITS):
        x, t = xp.asarray(X), xp.asarray(T)
        total, by_one = polyce.cross_entropy_with_grad(x, t, reduction="sum")
        loss, grad = polyce.cross_entropy_with_grad(x, t, normalizer=normalizer)
        if normalizer:
            close([total._data[()] / 3], loss)
            close([value / 3 for value in np.ravel(by_one._data)], grad)
        else:
            assert float(loss) == np.inf
