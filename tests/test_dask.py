"""dask: lazy, chunked along rows or classes, with a graph that grows with the number of chunks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import polyce
from polyce.testing import check_implementation, get_backend

pytestmark = pytest.mark.only("dask")


@pytest.fixture
def da() -> Any:
    import dask.array as da

    return da


CHUNKS = {"rows": (3, 8), "classes": (7, 3), "both": (2, 5), "one": (7, 8)}


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("target_chunks", [7, 2, 5])
def test_any_chunks_give_numpy_s_answer(da: Any, chunks: str, target_chunks: int) -> None:
    rng = np.random.default_rng(0)
    logits, target = rng.standard_normal((7, 8)), rng.integers(0, 8, 7)
    weight = rng.random(8)
    options = {"label_smoothing": 0.1, "ignore_index": 3}
    expected = polyce.cross_entropy_with_grad(logits, target, weight, **options)
    loss, grad = polyce.cross_entropy_with_grad(
        da.from_array(logits, chunks=CHUNKS[chunks]),
        da.from_array(target, chunks=target_chunks),
        da.from_array(weight, chunks=4),
        **options,
    )
    np.testing.assert_allclose(loss.compute(), expected[0], rtol=1e-14)
    np.testing.assert_allclose(grad.compute(), expected[1], rtol=1e-13, atol=1e-17)
    assert grad.chunks == da.from_array(logits, chunks=CHUNKS[chunks]).chunks


def test_nothing_is_computed_by_the_call(da: Any) -> None:
    def fail(block: Any) -> Any:
        raise RuntimeError("computed")

    logits = da.map_blocks(
        fail, da.zeros((4, 3), chunks=2), dtype=np.float64, meta=np.zeros((0, 0))
    )
    target = da.map_blocks(fail, da.zeros(4, chunks=2, dtype=np.int64), meta=np.zeros(0, np.int64))
    loss, grad = polyce.cross_entropy_with_grad(logits, target, label_smoothing=0.1)
    assert (loss.shape, grad.shape) == ((), (4, 3))
    with pytest.raises(RuntimeError, match="computed"):
        loss.compute()


@pytest.mark.parametrize("kind", ["index", "probability"])
def test_the_graph_is_linear_in_the_number_of_chunks(da: Any, kind: str) -> None:
    def tasks(blocks: int) -> int:
        logits = da.zeros((blocks * 4, 64), chunks=(4, 32), dtype=np.float32)
        target = da.zeros(blocks * 4, chunks=4, dtype=np.int64)
        if kind == "probability":
            target = logits
        loss, grad = polyce.cross_entropy_with_grad(logits, target)
        return len(loss.__dask_graph__()) + len(grad.__dask_graph__())

    few, some, many = tasks(8), tasks(16), tasks(32)
    # A tree reduction adds a little; a rechunk or a shuffle would add the square of the blocks.
    assert many - some <= 2.1 * (some - few)


def test_a_bad_label_gives_nan_for_its_row_alone(da: Any) -> None:
    target = da.from_array(np.array([0, 9, -1, 2]), chunks=2)
    rows = polyce.cross_entropy(da.zeros((4, 3), chunks=(2, 2)), target, reduction="none")
    assert np.isnan(rows.compute()).tolist() == [False, True, True, False]


def test_numpy_arrays_are_taken_beside_dask_ones(da: Any) -> None:
    loss = polyce.cross_entropy(
        da.zeros((4, 3), chunks=(2, 3)), np.array([0, 1, 2, -100]), np.ones(3)
    )
    assert float(loss.compute()) == pytest.approx(np.log(3), rel=1e-15)


def test_unknown_chunks_are_refused(da: Any) -> None:
    known = da.zeros((4, 3), chunks=2)
    unknown = known[known[:, 0] == 0]
    with pytest.raises(ValueError, match=r"input must have a known shape.*compute_chunk_sizes"):
        polyce.cross_entropy(unknown, da.zeros(4, dtype=np.int64))


@pytest.mark.parametrize("labels", [(0, -100, 2), (-100, -100, -100)])
def test_no_warning_when_rows_are_ignored(da: Any, labels: tuple[int, ...]) -> None:
    target = da.from_array(np.array(labels), chunks=2)
    for weight in (None, da.ones(4, chunks=2)):
        loss, grad = polyce.cross_entropy_with_grad(
            da.zeros((3, 4), chunks=2), target, weight, label_smoothing=0.1
        )
        loss.compute()
        grad.compute()


@pytest.mark.parametrize("grad", [False, True])
def test_no_warning_from_a_mean_over_nothing(da: Any, grad: bool) -> None:
    hidden, head = da.ones((3, 5), chunks=(2, 5)), da.ones((4, 5))
    target = da.full(3, -100, chunks=2)
    if grad:
        loss, (first, *_) = polyce.linear_cross_entropy_with_grad(hidden, head, target)
        assert not np.any(first.compute())
    else:
        loss = polyce.linear_cross_entropy(hidden, head, target)
    assert np.isnan(loss.compute())


@pytest.mark.slow("dask")
@pytest.mark.parametrize("name", ["dask", "dask-rows", "dask-classes"])
@pytest.mark.parametrize("group", ["special", "targets", "options", "normalizer"])
def test_no_warning_from_any_case(name: str, group: str) -> None:
    quiet = replace(
        get_backend(name),
        quiet=True,
        # Only the tasks themselves can silence NumPy where they run.
        to_numpy=lambda array: np.asarray(array.compute(scheduler="synchronous")),
    )
    check_implementation("dask", quiet, groups=[group], dtypes=["float32"], few_shapes=True)
