"""array-api-strict: nothing beyond the standard, on every device, without optional extensions."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import polyce

pytestmark = pytest.mark.only("strict")


@pytest.fixture
def xp() -> Any:
    import array_api_strict

    return array_api_strict


def to_numpy(xp: Any, array: Any) -> Any:
    return np.asarray(array.to_device(xp.Device("CPU_DEVICE")))


def calls(xp: Any, device: Any, dtype: Any) -> None:
    logits = xp.asarray([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]], dtype=dtype, device=device)
    labels = xp.asarray([2, -100], dtype=xp.int32, device=device)
    probabilities = xp.ones((2, 3), dtype=dtype, device=device) / 3
    weight = xp.asarray([1.0, 2.0, 0.5], dtype=dtype, device=device)
    # Without int64, array-api-strict's own argmax fails, which finds the pivot of probabilities.
    has_argmax = "int64" in xp.__array_namespace_info__().dtypes(device=device)
    targets = (labels, probabilities) if has_argmax else (labels,)
    for target, weight_, smoothing, reduction in itertools.product(
        targets, (None, weight), (0.0, 0.1), ("none", "mean", "sum")
    ):
        options = {"label_smoothing": smoothing, "reduction": reduction}
        loss, grad = polyce.cross_entropy_with_grad(logits, target, weight_, **options)
        assert (loss.device, grad.device) == (device, device)
        assert (loss.dtype, grad.dtype) == (dtype, dtype)
        given = [None if a is None else to_numpy(xp, a) for a in (logits, target, weight_)]
        expected = polyce.cross_entropy_with_grad(*given, **options)
        np.testing.assert_allclose(to_numpy(xp, loss), expected[0], rtol=2e-6)
        np.testing.assert_allclose(to_numpy(xp, grad), expected[1], rtol=2e-6, atol=1e-7)
    assert polyce.nll_loss(logits, labels).device == device
    if has_argmax:
        assert polyce.log_softmax(logits).device == device


def test_every_device(xp: Any) -> None:
    for device in xp.__array_namespace_info__().devices():
        wide = "float64" in xp.__array_namespace_info__().dtypes(device=device)
        for dtype in (xp.float32, xp.float64) if wide else (xp.float32,):
            calls(xp, device, dtype)


def test_confident_rows_without_float64(xp: Any) -> None:
    device = xp.Device("no_float64")
    logits = xp.asarray([[70.3, 0.2, -1.7]], dtype=xp.float32, device=device)
    loss = polyce.cross_entropy(logits, xp.asarray([0], dtype=xp.int32, device=device))
    exact = to_numpy(xp, logits).astype(np.float64)[0]
    expected = np.log1p(np.exp(exact[1:] - exact[0]).sum())
    assert float(loss) == pytest.approx(expected, rel=5e-7)


@pytest.mark.parametrize("version", ["2024.12", "2025.12"])
def test_without_data_dependent_shapes(xp: Any, version: str) -> None:
    with xp.ArrayAPIStrictFlags(
        api_version=version, boolean_indexing=False, data_dependent_shapes=False
    ):
        calls(xp, xp.asarray(0).device, xp.float64)


def test_arrays_on_two_devices_are_refused(xp: Any) -> None:
    with pytest.raises(TypeError, match=r"on one device, but input is on .* and target on .*move"):
        polyce.cross_entropy(
            xp.zeros((2, 3)), xp.zeros(2, dtype=xp.int64, device=xp.Device("device1"))
        )
