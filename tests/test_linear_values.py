"""`linear_log_prob`: what it means, its gradients and its errors. The grid has the numbers."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import numpy as np
import pytest

import polyce
from polyce.testing.backends import Backend

N, F, C = 7, 3, 5
RNG = np.random.default_rng(0)
X, W, B = (RNG.standard_normal(shape).astype(np.float32) for shape in ((N, F), (C, F), (C,)))
INDEX = np.array([0, -100, 4, 2, 1, 1, 3], np.int32)
EVERYWHERE = pytest.mark.only(
    "numpy", "strict", "torch", "torch-cuda", "jax-x32", "dask", "cupy", "cupy-emulated"
)


@EVERYWHERE
def test_it_is_the_log_probability_of_the_product(backend: Backend) -> None:
    x, w, b, index = map(backend.asarray, (X, W, B, INDEX))
    got = polyce.linear_log_prob(x, w, index, linear_bias=b, chunk_size=3)
    assert backend.owns(got)
    got = backend.to_numpy(got)
    want = polyce.log_prob(X.astype(np.float64) @ W.T + B, INDEX)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-7)
    assert not np.signbit(got[1])
    options: dict[str, Any] = {"logit_scale": 2.0, "logit_softcap": 3.0, "ignore_index": 4}
    kept = np.where(INDEX < 0, 4, INDEX)
    shaped = polyce.linear_log_prob(
        backend.asarray(X.reshape(N, 1, F)), w, backend.asarray(kept.reshape(N, 1)), **options
    )
    want = polyce.log_prob(X.astype(np.float64) @ W.T, kept, **options)
    np.testing.assert_allclose(backend.to_numpy(shaped)[:, 0], want, rtol=2e-5, atol=1e-7)


@pytest.mark.only("numpy", "torch", "jax-x32")
def test_a_row_without_axes_and_16_bits(backend: Backend) -> None:
    one = polyce.linear_log_prob(*map(backend.asarray, (X[0], W, INDEX[0].reshape(()))))
    want = polyce.log_prob(X[0].astype(np.float64) @ W.T, np.array(INDEX[0]))
    np.testing.assert_allclose(backend.to_numpy(one), want, rtol=2e-5)
    half = polyce.linear_log_prob(
        *map(backend.asarray, (X.astype(np.float16), W.astype(np.float16), INDEX))
    )
    assert backend.to_numpy(half).dtype == np.float16


@pytest.mark.only("torch", "torch-cuda")
def test_gradients_on_torch(torch: Any) -> None:
    leaves = [torch.tensor(a, dtype=torch.float64).requires_grad_() for a in (X, W, B)]
    index, by = torch.tensor(INDEX), torch.randn(N, dtype=torch.float64)
    x, w, b = leaves
    fused = polyce.linear_log_prob(x, w, index, linear_bias=b, chunk_size=3)
    found = torch.autograd.grad(fused, leaves, by)
    want = torch.autograd.grad(polyce.log_prob(x @ w.T + b, index), leaves, by)
    torch.testing.assert_close(found, want, rtol=1e-11, atol=1e-12)
    assert not found[0][1].any()


@pytest.mark.only("torch")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_one_graph_on_torch(torch: Any) -> None:
    from torch_graphs import Graphs, compiled

    torch._dynamo.reset()
    x, w = (torch.tensor(a).requires_grad_() for a in (X, W))
    index, graphs = torch.tensor(INDEX), Graphs(torch)
    plain = partial(polyce.linear_log_prob, index=index, chunk_size=3)
    found, want = compiled(torch, plain, graphs)(x, w), plain(x, w)
    torch.testing.assert_close(found, want)
    gradients = (torch.autograd.grad(each.sum(), (x, w)) for each in (found, want))
    torch.testing.assert_close(*gradients)
    assert graphs.names == [["polyce.linear_cross_entropy.default"]]


@pytest.mark.only("jax-x64")
def test_gradients_on_jax() -> None:
    import jax

    arrays = [jax.numpy.asarray(a, dtype=jax.numpy.float64) for a in (X, W, B)]
    by = jax.numpy.cos(jax.numpy.arange(N))

    def fused(x: Any, w: Any, b: Any) -> Any:
        return (polyce.linear_log_prob(x, w, INDEX, linear_bias=b, chunk_size=3) * by).sum()

    def unfused(x: Any, w: Any, b: Any) -> Any:
        return (polyce.log_prob(x @ w.T + b, INDEX) * by).sum()

    found, want = (jax.jit(jax.grad(each, (0, 1, 2)))(*arrays) for each in (fused, unfused))
    for one, other in zip(found, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.only("numpy", "strict", "torch", "jax-x32")
def test_an_index_out_of_range(backend: Backend) -> None:
    x, w, index = map(backend.asarray, (X, W, np.where(INDEX == 4, C, INDEX)))
    match = r"^index must lie in 0 to 4 \(5 classes\), got 5 at position \(2,\); give rows to leave"
    with pytest.raises(IndexError, match=match):
        polyce.linear_log_prob(x, w, index, chunk_size=1)
    got = backend.to_numpy(polyce.linear_log_prob(x, w, index, validate=False))
    np.testing.assert_array_equal(np.isnan(got), INDEX == 4)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "several": (
        {"index": np.zeros((N, 2), np.int32)}, ValueError,
        "index must have one class of each row, of shape (7,), got int32 (7, 2) for input (7, 3); ",
    ),
    "floats": (
        {"index": np.zeros(N, np.float32)}, TypeError,
        "index must hold classes in an integer dtype, got float32 (7,); cast it to int64",
    ),
    "no index": ({"index": None}, TypeError, "index must be an array, got None; pass the classes"),
    "no input": ({"input": None}, TypeError, "input must be an array, got None; pass the hidden"),
    "list": ({"index": [1] * N}, TypeError, "index must be an array of an array-API library"),
    "no head": ({"linear_weight": None}, TypeError, "linear_weight must be an array, got None"),
    "head": ({"linear_weight": W.T.copy()}, ValueError, "input and linear_weight"),
    "chunk_size": ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
    "scale": ({"logit_scale": 0.0}, ValueError, "logit_scale must lie between"),
}  # fmt: skip


@pytest.mark.only("numpy", "torch", "jax-x32", "dask")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(backend: Backend, name: str) -> None:
    changed, error, message = REFUSED[name]
    given = {"input": X, "linear_weight": W, "index": INDEX, "linear_bias": None} | changed
    given = {k: backend.asarray(v) if isinstance(v, np.ndarray) else v for k, v in given.items()}
    with pytest.raises(error, match="^" + re.escape(message)):
        polyce.linear_log_prob(**given)


@pytest.mark.only("dask")
def test_an_index_without_values_is_not_looked_at(backend: Backend) -> None:
    arrays = map(backend.asarray, (X, W, INDEX))
    with pytest.raises(ValueError, match=r"^validate=True needs index's values, but this index is"):
        polyce.linear_log_prob(*arrays, validate=True)


@pytest.mark.only("numpy")
def test_explain() -> None:
    told = polyce.explain(X, W, INDEX, chunk_size=3, function=polyce.linear_log_prob)
    assert told.call == (
        "linear_log_prob on numpy / cpu: input float32 (7, 3), linear_weight (5, 3), "
        "index int32 (7,)"
    )
    assert told.chosen == "native"
    assert str(told.chunks).startswith("3 chunks of 3 rows: ")
    told = polyce.explain(X, W, INDEX, return_stats=True, function=polyce.linear_cross_entropy)
    assert told.call.endswith("stats lse, entropy, prediction, correct")
