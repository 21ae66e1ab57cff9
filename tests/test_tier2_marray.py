"""marray: arrays with masks, taken where nothing is masked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import polyce

pytestmark = pytest.mark.only("marray")

X = np.array([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]])
T = np.array([0, 1])


@pytest.fixture(params=["numpy", "array_api_strict"])
def mxp(request: pytest.FixtureRequest) -> Any:
    import importlib

    import marray

    return marray.masked_namespace(importlib.import_module(request.param))


def arrays(mxp: Any) -> dict[str, Any]:
    return {
        "input": mxp.asarray(X),
        "target": mxp.asarray(T),
        "weight": mxp.asarray(np.ones(3)),
        "sample_weight": mxp.asarray(np.ones(2)),
        "grad_output": mxp.asarray(np.asarray(1.0)),
    }


@pytest.mark.parametrize("name", ["input", "target", "weight", "sample_weight", "grad_output"])
def test_masked_entries_are_refused(mxp: Any, name: str) -> None:
    given = arrays(mxp)
    loss, grad = polyce.cross_entropy_with_grad(**given)
    assert not np.any(np.asarray(grad.mask))
    assert not bool(loss.mask)
    mask = np.zeros(given[name].shape, dtype=bool)
    mask[(0,) * mask.ndim] = True
    given[name] = mxp.asarray(given[name].data, mask=mask)
    with pytest.raises(ValueError, match=rf"^{name} must have no masked entries, got 1: .*; fill"):
        polyce.cross_entropy_with_grad(**given)


def test_the_way_round_leaves_out_rows_and_classes(mxp: Any) -> None:
    """What the error suggests does what a mask may have meant."""
    labels = mxp.asarray(T, mask=np.array([False, True]))
    xp = labels._xp
    target = mxp.where(mxp.asarray(labels.mask), -100, mxp.asarray(labels.data))
    loss = polyce.cross_entropy(mxp.asarray(X), target)
    np.testing.assert_allclose(np.asarray(loss.data), polyce.cross_entropy(X[:1], T[:1]))

    logits = mxp.asarray(X, mask=np.array([[False, False, True]] * 2))
    filled = mxp.asarray(xp.where(logits.mask, -xp.inf, logits.data))
    loss = polyce.cross_entropy(filled, mxp.asarray(T))
    np.testing.assert_allclose(np.asarray(loss.data), polyce.cross_entropy(X[:, :2], T))


def test_only_numpy_and_array_api_strict_lie_under_it() -> None:
    """With other libraries, reading the mask could start a computation or be impossible."""
    import types

    import marray

    class Under(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(np, name)

    mxp = marray.masked_namespace(Under("cupy"))
    with pytest.raises(TypeError, match=r"over numpy or array_api_strict, got one over cupy; pass"):
        polyce.cross_entropy(mxp.asarray(X), mxp.asarray(T))
