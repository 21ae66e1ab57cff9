"""dask: the loss of a linear head, a task for each block of rows."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

import polyce

pytestmark = pytest.mark.only("dask")

N, F, C = 30, 6, 11


@pytest.fixture
def da() -> Any:
    import dask.array as da

    return da


def data() -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape, dtype=np.float32) for shape in ((N, F), (C, F)))
    target = rng.integers(0, C, N)
    target[::7] = -100
    return x, w, target


def lazy(da: Any, chunks: Any = ((7, 13, 10), (4, 2))) -> tuple[Any, Any, Any]:
    x, w, target = data()
    rows = da.from_array(target, chunks=10)
    return da.from_array(x, chunks=chunks), da.from_array(w, chunks=(5, 3)), rows


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_blocks_of_any_rows(da: Any, reduction: str) -> None:
    x, w, target = lazy(da)
    weight = np.linspace(0.5, 2.0, C, dtype=np.float32)
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": 0.1}
    loss, gradients = polyce.linear_cross_entropy_with_grad(
        x, w, target, weight=da.from_array(weight), chunk_size=4, **options
    )
    assert [type(each) for each in (loss, *gradients[:2])] == [da.Array] * 3
    assert gradients[0].chunks == x.chunks
    want, (d_x, d_w, _) = polyce.linear_cross_entropy_with_grad(*data(), weight=weight, **options)
    np.testing.assert_allclose(loss.compute(), want, rtol=1e-6)
    np.testing.assert_allclose(gradients[0].compute(), d_x, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradients[1].compute(), d_w, rtol=1e-5, atol=1e-6)
    assert gradients[2] is None


def test_more_axes_probabilities_and_sample_weights(da: Any) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((4, 5, F))
    w, b = rng.standard_normal((C, F)), rng.standard_normal(C)
    target, sample = rng.dirichlet(np.ones(C), (4, 5)), rng.random((4, 5))
    chunks = (2, (1, 4))
    loss, found = polyce.linear_cross_entropy_with_grad(
        da.from_array(x, chunks=(*chunks, F)),
        da.from_array(w),
        da.from_array(target, chunks=(*chunks, 3)),
        linear_bias=da.from_array(b),
        sample_weight=da.from_array(sample, chunks=chunks),
    )
    want, gradients = polyce.linear_cross_entropy_with_grad(
        x, w, target, linear_bias=b, sample_weight=sample
    )
    np.testing.assert_allclose(loss.compute(), want, rtol=1e-12)
    for got, expected in zip(found, gradients, strict=True):
        np.testing.assert_allclose(got.compute(), expected, rtol=1e-10, atol=1e-14)


def test_each_block_is_computed_once_and_can_be_sent(
    da: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dask
    from dask.base import unpack_collections

    from polyce.linear import compute

    runs = []
    real = compute.loss_and_sums
    monkeypatch.setattr(compute, "loss_and_sums", lambda *args: (runs.append(1), real(*args))[1])
    x, w, target = lazy(da)
    loss, (d_x, d_w, _) = polyce.linear_cross_entropy_with_grad(x, w, target)
    assert not runs
    dask.compute(loss, d_x, d_w, scheduler="threads")
    assert len(runs) == x.numblocks[0]
    collections, _ = unpack_collections(loss, d_x, d_w)
    for each in collections:
        pickle.dumps(dict(each.__dask_graph__()))


def test_labels_of_numpy_are_looked_at_now(da: Any) -> None:
    x, w, _ = lazy(da)
    with pytest.raises(IndexError, match="got 11 at position"):
        polyce.linear_cross_entropy(x, w, np.full(N, C))


def test_the_implementation_is_heeded(da: Any) -> None:
    x, w, target = lazy(da)
    told = polyce.explain(x, w, target, function=polyce.linear_cross_entropy)
    assert told.chosen == "dask"
    assert "within each of dask's blocks" in str(told)
    plain = polyce.linear_cross_entropy(x, w, target)
    for name in ("dask", "reference"):
        with polyce.use(name):
            loss = polyce.linear_cross_entropy(x, w, target)
            np.testing.assert_allclose(loss.compute(), plain.compute(), rtol=1e-6)
    with pytest.raises(ValueError, match="cannot serve this call"):
        polyce.linear_cross_entropy(x, w, target, implementation="triton")
