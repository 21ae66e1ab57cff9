"""dask: the loss of a linear head, a task for each block of rows."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import numpy as np
import pytest

import polyce
from test_dask_blocks import most_at_once, plan, tasks

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


# The references come from the unfused loss of NumPy's product.

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weighted": {"label_smoothing": 0.1, "weight": True},
    "sampled": {"sample_weight": True, "normalizer": 3.0, "z_loss": 0.1},
    "capped": {"logit_softcap": 2.0, "logit_scale": 0.5, "weight": True, "sample_weight": True},
}
CUTS: dict[str, tuple[tuple[int, ...], ...]] = {
    "one": ((6,), (4,), (F,)),
    "rows": ((1, 2, 3), (4,), (F,)),
    "axes": ((5, 1), (1, 3), (F,)),
    "every": ((2, 4), (2, 1, 1), (4, 2)),
    "empty": ((2, 0, 4), (0, 4), (F,)),
}


def product(rng: Any, kind: str = "index") -> tuple[Any, ...]:
    """Draw hidden states, head, bias and target; a few rows at one end are ignored."""
    x, w, b = (rng.standard_normal(size) for size in ((6, 4, F), (C, F), (C,)))
    target = rng.integers(0, C, (6, 4))
    target[4:, 1:] = -100
    return x, w, b, rng.dirichlet(np.ones(C), (6, 4)) if kind == "probability" else target


def textbook(x: Any, w: Any, b: Any, target: Any, **options: Any) -> list[Any]:
    loss, grad = polyce.cross_entropy_with_grad(x @ w.T + b, target, axis=-1, **options)
    flat = grad.reshape(-1, C)
    return [loss, grad @ w, flat.T @ x.reshape(-1, F), flat.sum(axis=0)]


def close(got: Any, want: Any) -> None:
    for one, other in zip(got, want, strict=True):
        assert one.shape == np.shape(other)
        np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("name", OPTIONS)
def test_any_cuts_give_the_loss_of_the_product(da: Any, name: str, kind: str, cuts: str) -> None:
    rng = np.random.default_rng(0)
    arrays = product(rng, kind)
    for reduction in ("none", "mean", "sum"):
        options = OPTIONS[name] | {"reduction": reduction}
        if reduction != "mean":
            options.pop("normalizer", None)
        extra = {"grad_output": rng.random((6, 4) if reduction == "none" else ())}
        extra |= {"weight": rng.random(C)} if options.pop("weight", False) else {}
        # Some rows have a weight of 0.
        extra |= (
            {"sample_weight": rng.integers(0, 3, (6, 4)) / 2}
            if options.pop("sample_weight", False)
            else {}
        )
        want = textbook(*arrays, **options, **extra)
        x, w, b, target = (
            da.from_array(array, chunks=chunks)
            for array, chunks in zip(arrays, (CUTS[cuts], (4, 5), 3, 3), strict=True)
        )
        cut = {key: da.from_array(array, chunks=2) for key, array in extra.items()}
        loss, found = polyce.linear_cross_entropy_with_grad(
            x, w, target, linear_bias=b, chunk_size=2, **options, **cut
        )
        assert (found[0].chunks, [a.shape for a in found[1:]]) == (x.chunks, [(C, F), (C,)])
        close(da.compute(loss, *found), want)
        cut.pop("grad_output")
        alone = polyce.linear_cross_entropy(x, w, target, linear_bias=b, **options, **cut)
        close([alone.compute()], want[:1])


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_every_result_can_be_computed_and_used_alone(da: Any, scheduler: str) -> None:
    arrays = product(np.random.default_rng(0))
    for reduction in ("none", "mean"):
        want = textbook(*arrays, reduction=reduction)
        x, w, b, target = (da.from_array(array, chunks=3) for array in arrays)
        loss, found = polyce.linear_cross_entropy_with_grad(
            x, w, target, linear_bias=b, reduction=reduction
        )
        for one, other in zip((loss, *found), want, strict=True):
            close([one.compute(scheduler=scheduler)], [other])
            total = abs(one * 2.0).sum().compute(scheduler=scheduler)
            close([total], [abs(other * 2.0).sum()])


# dask itself divides, on a thread where NumPy warns, as it does for cross_entropy.
@pytest.mark.filterwarnings("ignore:.*in scalar divide:RuntimeWarning")
def test_the_denominator_is_that_of_all_blocks(da: Any) -> None:
    """One block has no row that counts, and the others have different weights."""
    x, w, b, _ = product(np.random.default_rng(0))
    x = x[:, 0]
    target = np.array([-100, -100, 3, 1, -100, 9])
    weight = np.arange(1.0, C + 1)
    for options in ({}, {"weight": weight}, {"sample_weight": np.arange(6.0)}):
        loss, found = polyce.linear_cross_entropy_with_grad(
            da.from_array(x, chunks=(2, F)), w, target, linear_bias=b, **options
        )
        close(da.compute(loss, *found), textbook(x, w, b, target, **options))
    nothing = da.full(6, -100, chunks=2)
    loss, found = polyce.linear_cross_entropy_with_grad(
        da.from_array(x, chunks=(2, F)), w, nothing, linear_bias=b
    )
    assert np.isnan(loss.compute())
    close(da.compute(*found), [np.zeros_like(array) for array in (x, w, b)])


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_left_out_rows_may_hold_anything(da: Any, value: float) -> None:
    x, w, b, target = product(np.random.default_rng(0))
    clean = np.where(target[..., None] < 0, 0.0, x)
    spoilt = np.where(target[..., None] < 0, value, x)
    for reduction in ("none", "mean", "sum"):
        loss, found = polyce.linear_cross_entropy_with_grad(
            da.from_array(spoilt, chunks=2), w, target, linear_bias=b, reduction=reduction
        )
        close(da.compute(loss, *found), textbook(clean, w, b, target, reduction=reduction))


# dask itself divides, on a thread where NumPy warns, as it does for cross_entropy.
@pytest.mark.filterwarnings("ignore:.*in scalar divide:RuntimeWarning")
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_no_rows(da: Any, kind: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.random((*shape, F)), rng.random((C, F)), rng.random(C)]
    target = rng.random((*shape, C)) if kind == "probability" else np.zeros(shape, int)
    x, w, b, target = (da.from_array(array, chunks=2) for array in (*arrays, target))
    zeros = [np.zeros_like(array) for array in arrays]
    for reduction, want in (
        ("none", np.zeros(shape)),
        ("mean", np.float64(np.nan)),
        ("sum", np.float64(0)),
    ):
        loss, found = polyce.linear_cross_entropy_with_grad(
            x, w, target, linear_bias=b, reduction=reduction
        )
        close(da.compute(loss, *found), [want, *zeros])


# What runs, and when


def test_nothing_is_computed_by_the_call(da: Any) -> None:
    def fail(block: Any) -> Any:
        raise RuntimeError("computed")

    arrays = [da.from_array(array, chunks=3) for array in product(np.random.default_rng(0))]
    x, w, b, target = (
        da.map_blocks(fail, array, dtype=array.dtype, meta=array._meta) for array in arrays
    )
    for reduction in ("mean", "none"):
        loss, found = polyce.linear_cross_entropy_with_grad(
            x, w, target, linear_bias=b, reduction=reduction
        )
        assert [array.shape for array in found] == [x.shape, w.shape, b.shape]
        for each in (loss, *found):
            with pytest.raises(RuntimeError, match="computed"):
                each.compute()


def many(da: Any, blocks: int, **options: Any) -> Any:
    x = da.zeros((4 * blocks, F), chunks=(4, F), dtype=np.float32)
    target = da.zeros(4 * blocks, chunks=4, dtype=np.int64)
    head = da.zeros((C, F), dtype=np.float32)
    loss, found = polyce.linear_cross_entropy_with_grad(x, head, target, **options)
    return loss, *(array for array in found if array is not None)


def test_the_tasks_of_a_block_are_few(da: Any) -> None:
    # Hidden states, labels, their weights, the block itself, and one for each of its three
    # results; one to add two heads, and a few more for all blocks together.
    blocks = 32
    for reduction in ("mean", "none"):
        assert len(tasks(many(da, blocks, reduction=reduction))) <= 8 * blocks + blocks // 2
        assert (
            len(tasks(many(da, blocks, reduction=reduction, wrt="input")))
            <= 6 * blocks + blocks // 2
        )
    assert len(tasks(many(da, blocks, reduction="sum", wrt=()))) <= 3 * blocks + blocks // 2


def test_few_copies_of_the_heads_gradient_are_there_at_once(da: Any) -> None:
    loss, d_input, d_head = many(da, 64)
    # Consumed as each part arrives; if it were kept, the blocks' other results would be too.
    used = d_input.map_blocks(np.max, chunks=(1, 1), meta=np.empty((0, 0)))
    graph = plan((loss, used, d_head))
    assert most_at_once(graph, ("polyce-linear",)) <= 4


def test_the_same_bits_for_any_number_of_threads(da: Any) -> None:
    x, w, target = lazy(da, ((3,) * 10, (F,)))

    def bits(**config: Any) -> list[bytes]:
        loss, (d_x, d_w, _) = polyce.linear_cross_entropy_with_grad(x, w, target)
        return [array.tobytes() for array in da.compute(loss, d_x, d_w, **config)]

    first = bits(scheduler="synchronous")
    for workers in (1, 4, 4):
        assert bits(scheduler="threads", num_workers=workers) == first


def test_a_graph_can_be_sent_and_run_elsewhere(da: Any) -> None:
    import cloudpickle

    arrays = product(np.random.default_rng(0))
    x, w, b, target = (da.from_array(array, chunks=3) for array in arrays)
    loss, found = polyce.linear_cross_entropy_with_grad(x, w, target, linear_bias=b)
    for dump in (pickle.dumps, cloudpickle.dumps):
        sent = pickle.loads(dump((loss, *found)))
        close(
            da.compute(*sent, scheduler="processes", num_workers=1)
            if dump is pickle.dumps
            else da.compute(*sent),
            textbook(*arrays),
        )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_chunk_is_made_once_for_all_results(da: Any, reduction: str) -> None:
    made: list[tuple[int, ...]] = []

    def make(block_info: Any = None) -> Any:
        made.append(tuple(block_info[None]["chunk-location"]))
        return np.zeros(block_info[None]["chunk-shape"], np.float32)

    cuts = ((4, 4, 2), (F,))
    x = da.map_blocks(make, chunks=cuts, dtype=np.float32, meta=np.empty((0, 0), np.float32))
    loss, found = polyce.linear_cross_entropy_with_grad(
        x,
        da.zeros((C, F), dtype=np.float32),
        da.zeros(10, chunks=4, dtype=np.int64),
        linear_bias=da.zeros(C, dtype=np.float32),
        reduction=reduction,
    )
    da.compute(loss, *found)
    assert sorted(made) == list(itertools.product(*map(range, x.numblocks)))


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


def test_the_same_call_has_the_same_names_and_so_runs_once(da: Any) -> None:
    x, w, target = lazy(da)
    bias, weight = da.zeros(C, chunks=5), da.ones(C, chunks=5)

    def call(**options: Any) -> list[str]:
        loss, gradients = polyce.linear_cross_entropy_with_grad(
            x, w, target, linear_bias=bias.astype(x.dtype), weight=weight, **options
        )
        return [array.name for array in (loss, *gradients)]

    first, again, other = call(), call(), call(z_loss=0.1)
    assert first == again
    assert not set(first) & set(other)


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
