"""dask arrays whose chunks do not have the declared dtype, as after map_overlap with a meta."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import polyce

pytestmark = pytest.mark.only("dask")

RNG = np.random.default_rng(0)
LOGITS = 3.0 * RNG.standard_normal((6, 5))
LABELS = np.array([0, 4, -100, 1, 2, 0])
POSITIVE = np.array([0, 4, 3, 1, 2, 0])
SHARES = RNG.dirichlet(np.ones(5), 6)
# Chunks of whole rows, and chunks that cut the classes too.
CUTS = pytest.mark.parametrize("chunks", [(2, 5), (4, 2)])


def said(array: Any, dtype: str, chunks: Any) -> Any:
    """Make a dask array whose declared dtype is not that of its chunks."""
    import dask.array as da

    meta = np.empty((0,) * array.ndim, dtype)
    return da.from_array(array, chunks=chunks).map_blocks(lambda block: block, meta=meta)


def want(logits: Any, target: Any) -> tuple[Any, Any]:
    """Compute the loss of such values and its gradient in float64, by the textbook's formula."""
    x = logits.astype(np.float64)
    softmax = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    if target.ndim == 1:
        counted = target != -100
        target = np.eye(x.shape[1])[np.where(counted, target, 0)] * counted[:, None]
        rows = counted.sum()
    else:
        target, rows = target.astype(np.float64), len(target)
    gradient = target.sum(1, keepdims=True) * softmax - target
    return -(target * np.log(softmax)).sum() / rows, gradient / rows


@CUTS
@pytest.mark.parametrize("inside", ["float16", "float32", "float64", "int32"])
@pytest.mark.parametrize("outside", ["float32", "float64"])
def test_logits(chunks: Any, outside: str, inside: str) -> None:
    import dask

    logits = LOGITS.astype(inside)
    found = polyce.cross_entropy_with_grad(
        said(logits, outside, chunks),
        said(LABELS, "int64", 2),
        return_stats=polyce.Stats._fields[:-1],
    )
    promised = [array.dtype for array in (*found[:2], *found[2])]
    assert promised[:2] == [outside, outside]
    loss, grad, stats = dask.compute(*found)
    assert [array.dtype for array in (loss, grad, *stats)] == promised
    loss_wanted, grad_wanted = want(logits, LABELS)
    # The chunks' own precision is used, whatever dtype the array declares.
    rtol = 1e-12 if inside == outside == "float64" else 1e-6
    np.testing.assert_allclose(loss, loss_wanted, rtol=rtol)
    np.testing.assert_allclose(grad, grad_wanted, rtol=4 * rtol, atol=rtol)


@CUTS
@pytest.mark.parametrize(
    ("outside", "inside"), [("int64", "int32"), ("int64", "uint8"), ("uint8", "int64")]
)
def test_labels(chunks: Any, outside: str, inside: str) -> None:
    import dask

    logits, labels = said(LOGITS, "float64", chunks), POSITIVE.astype(inside)
    given = said(labels, outside, 2)
    # An ignore_index that exists in both dtypes.
    loss, grad = dask.compute(*polyce.cross_entropy_with_grad(logits, given, ignore_index=4))
    loss_wanted, grad_wanted = want(LOGITS, np.where(POSITIVE == 4, -100, POSITIVE))
    np.testing.assert_allclose(loss, loss_wanted, rtol=1e-12)
    np.testing.assert_allclose(grad, grad_wanted, rtol=1e-12, atol=1e-15)


@CUTS
@pytest.mark.parametrize(("outside", "inside"), [("float64", "float32"), ("float32", "float64")])
def test_probabilities(chunks: Any, outside: str, inside: str) -> None:
    import dask

    shares = SHARES.astype(inside)
    found = polyce.cross_entropy_with_grad(
        said(LOGITS.astype(np.float32), "float32", chunks), said(shares, outside, chunks)
    )
    loss, grad = dask.compute(*found)
    assert (loss.dtype, grad.dtype) == (outside, "float32")
    loss_wanted, grad_wanted = want(LOGITS.astype(np.float32), shares)
    np.testing.assert_allclose(loss, loss_wanted, rtol=1e-6)
    np.testing.assert_allclose(grad, grad_wanted, rtol=1e-5, atol=1e-7)


def test_what_map_overlap_makes_of_no_meta() -> None:
    import dask.array as da

    logits = da.from_array(LOGITS.astype(np.float32), chunks=(2, 5))
    logits = da.map_overlap(lambda block: block, logits, depth=0, meta=np.array(()))
    assert logits.dtype == np.float64
    loss = polyce.cross_entropy(logits, da.from_array(LABELS, chunks=2)).compute()
    np.testing.assert_allclose(loss, want(LOGITS.astype(np.float32), LABELS)[0], rtol=1e-6)


@CUTS
@pytest.mark.parametrize(
    ("target", "says", "match"),
    [
        (POSITIVE.astype(np.float32), "int64", "target must hold integers .* one is float32; give"),
        (SHARES.astype(np.int64), "float64", "target must hold floats .* but one is int64; give"),
        # Ignored rows would be seen only where losses are computed, not where the mean is divided.
        (LABELS, "uint8", "target must hold uint8 in all of its chunks, .* but one is int64; give"),
    ],
)
def test_targets_that_are_something_else(chunks: Any, target: Any, says: str, match: str) -> None:
    logits = said(LOGITS, "float64", chunks)
    given = said(target, says, chunks if target.ndim == 2 else 2)
    for reduction in ("mean", "none"):
        loss = polyce.cross_entropy(logits, given, reduction=reduction)
        with pytest.raises(TypeError, match=f"^{match} map_blocks"):
            loss.compute()


@pytest.mark.parametrize(
    ("outside", "inside"), [("float32", "float64"), ("float64", "float32"), ("float16", "float32")]
)
def test_a_linear_head(outside: str, inside: str) -> None:
    import dask

    hidden, head = RNG.standard_normal((6, 4)).astype(inside), RNG.standard_normal((5, 4))
    head = head.astype(inside)
    found = polyce.linear_cross_entropy_with_grad(
        said(hidden, outside, (2, 4)), said(head, outside, (5, 4)), said(LABELS, "int32", 2)
    )
    promised = [array.dtype for array in (found[0], *found[1][:2])]
    assert promised[0] == outside
    results = dask.compute(found[0], *found[1][:2])
    assert [array.dtype for array in results] == promised
    x, w = hidden.astype(np.float64), head.astype(np.float64)
    loss_wanted, grad_wanted = want(x @ w.T, LABELS)
    rtol = 2e-3 if outside == "float16" else 1e-5
    np.testing.assert_allclose(results[0], loss_wanted, rtol=rtol)
    np.testing.assert_allclose(results[1], grad_wanted @ w, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(results[2], grad_wanted.T @ x, rtol=rtol, atol=rtol)


def test_masked_chunks_are_refused() -> None:
    import dask.array as da

    masked = da.from_array(np.ma.masked_array(LOGITS), chunks=2)
    match = r"^input must have plain chunks, got numpy.ma.*; pass dask.array.ma.getdata\(input\)"
    for function in (polyce.cross_entropy, polyce.nll_loss, polyce.cross_entropy_with_grad):
        with pytest.raises(TypeError, match=match):
            function(masked, da.from_array(LABELS, chunks=2))
    labels = da.from_array(np.ma.masked_array(LABELS), chunks=2)
    with pytest.raises(TypeError, match=r"^target must have plain chunks"):
        polyce.cross_entropy(da.from_array(LOGITS, chunks=2), labels)
