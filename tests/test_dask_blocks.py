"""dask's own implementation: what its tasks are, where they run, and what they run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import polyce
from polyce.implementations import registry
from polyce.implementations.contract import Implementation
from polyce.implementations.reference import PATH as reference

pytestmark = pytest.mark.only("dask")

SHAPE = (96, 40)
ROWS = (8, 40)
BLOCKS = 32


@pytest.fixture
def da() -> Any:
    import dask.array as da

    return da


def example(da: Any, chunks: Any, shape: tuple[int, ...] = SHAPE) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    logits = da.from_array(rng.standard_normal(shape, dtype=np.float32), chunks=chunks)
    row_shape = shape[:1] + shape[2:]
    row_chunks = logits.chunks[:1] + logits.chunks[2:]
    return logits, da.from_array(rng.integers(0, shape[1], row_shape), chunks=row_chunks)


def lazy_example(da: Any, class_chunk: int = 40) -> tuple[Any, Any]:
    logits = da.zeros((BLOCKS, 40), chunks=(1, class_chunk), dtype=np.float32)
    return logits, da.zeros(BLOCKS, chunks=1, dtype=np.int64)


class Planned(Exception):
    """Raised to carry the tasks that dask was about to run."""


def plan(results: Any) -> dict[Any, Any]:
    """Return what dask would run for all results at once; optimize() fuses each by itself."""
    import dask

    def scheduler(graph: Any, keys: Any, **options: Any) -> Any:
        raise Planned(graph.__dask_graph__())

    with pytest.raises(Planned) as found:
        dask.compute(results, scheduler=scheduler)
    return dict(found.value.args[0])


def tasks(results: Any) -> set[Any]:
    return set(plan(results))


# Which implementation is chosen


def test_the_dask_path_is_chosen_and_the_reference_could_serve(da: Any) -> None:
    logits, target = example(da, ROWS)
    told = polyce.explain(logits, target)
    assert (told.chosen, told.reasons["dask"], told.reasons["reference"]) == ("dask", (), ())
    assert "dask       yes  <- runs" in str(told)


def test_it_serves_no_other_arrays() -> None:
    told = polyce.explain(np.zeros((2, 3)), np.zeros(2, np.int64))
    assert told.reasons["dask"] == ("takes arrays of dask, not numpy",)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put a path for NumPy first in the table, and list the calls that it ran."""
    steps: list[str] = []

    def noted(step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            steps.append(step)
            return function(*args)

        return run

    row = Implementation(
        name="numpy-only",
        cross_entropy=noted("loss", reference.cross_entropy),
        cross_entropy_with_grad=noted("gradient", reference.cross_entropy_with_grad),
        backends=frozenset({"numpy"}),
    )
    monkeypatch.setattr(registry, "TABLE", (row, *registry.TABLE))
    return steps


def test_a_block_runs_the_first_path_of_the_table_for_its_chunk(da: Any, ran: list[str]) -> None:
    logits, target = example(da, (24, 40))
    polyce.cross_entropy(logits, target).compute()
    assert ran == ["loss"] * 4
    ran.clear()
    loss, grad = polyce.cross_entropy_with_grad(logits, target)
    da.compute(loss, grad)
    assert ran == ["gradient"] * 4


def test_what_forces_the_call_does_not_force_the_blocks(
    da: Any, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, target = example(da, (24, 40))
    monkeypatch.setenv("POLYCE_IMPLEMENTATION", "dask")
    with polyce.use("dask"):
        polyce.cross_entropy(logits, target).compute(scheduler="synchronous")
    assert ran == ["loss"] * 4
    ran.clear()
    polyce.cross_entropy(logits, target, implementation="reference").compute()
    assert ran == []


# How many tasks

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "label_smoothing": {"label_smoothing": 0.1},
    "weight": {"weight": np.ones(40)},
    "sample_weight": {"sample_weight": np.ones(BLOCKS)},
    "none": {"reduction": "none"},
}


@pytest.mark.parametrize("with_grad", [False, True], ids=["loss", "gradient"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_quarter_of_the_reference_s_tasks(da: Any, name: str, with_grad: bool) -> None:
    logits, labels = lazy_example(da)
    options = dict(OPTIONS[name])
    for key, chunk in (("weight", 40), ("sample_weight", 1)):
        if key in options:
            options[key] = da.from_array(options[key], chunks=chunk)
    call = polyce.cross_entropy_with_grad if with_grad else polyce.cross_entropy

    def count(implementation: str) -> int:
        return len(tasks(call(logits, labels, **options, implementation=implementation)))

    assert 4 * count("dask") <= count("reference")


def test_three_tasks_for_a_block_of_rows_and_five_with_its_gradient(da: Any) -> None:
    # The labels, their weights, the losses, and a few tasks to sum the blocks. With the gradient a
    # block has two results, and a task picks each.
    spare = BLOCKS // 2
    assert len(tasks(polyce.cross_entropy(*lazy_example(da)))) <= 3 * BLOCKS + spare
    assert len(tasks(polyce.cross_entropy_with_grad(*lazy_example(da)))) <= 5 * BLOCKS + spare


@pytest.mark.parametrize("kind", ["index", "probability"])
def test_class_chunks_take_fewer_tasks_than_the_reference(da: Any, kind: str) -> None:
    logits, target = lazy_example(da, 5)
    if kind == "probability":
        target = logits

    def count(implementation: str) -> int:
        options = {"implementation": implementation}
        return len(tasks(polyce.cross_entropy_with_grad(logits, target, **options)))

    assert 2 * count("dask") <= count("reference")


def most_at_once(graph: dict[Any, Any], names: tuple[str, ...]) -> int:
    """Count how many results of such tasks exist at once if dask's own order is kept."""
    import dask

    users = dask.core.reverse_dict({key: task.dependencies for key, task in graph.items()})
    done, held, most = set(), set(), 0
    order = dask.order.order(graph)
    for key in sorted(graph, key=order.__getitem__):
        done.add(key)
        if key[0].startswith(names):
            held.add(key)
        most = max(most, len(held))
        held -= {key for key in held if users[key] and users[key] <= done}
    return most


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("class_chunk", [40, 10])
def test_gradients_do_not_wait_for_the_losses_of_all_blocks(
    da: Any, class_chunk: int, reduction: str
) -> None:
    # A cluster keeps to the order; on one machine dask continues with what it has just computed.
    logits, labels = lazy_example(da, class_chunk)
    loss, grad = polyce.cross_entropy_with_grad(logits, labels, reduction=reduction)
    blocks = 40 // class_chunk
    for used in (grad.sum(), grad.map_blocks(np.max, chunks=(1, 1), meta=np.empty((0, 0)))):
        graph = plan((loss, used))
        assert most_at_once(graph, ("polyce-whole-rows", "polyce-part-gradient")) <= 2 * blocks


@pytest.mark.parametrize("chunks", [(24, 40), (24, 10)], ids=["rows", "classes"])
def test_a_chunk_is_made_once_for_loss_gradient_and_stats(da: Any, chunks: Any) -> None:
    made: list[tuple[int, ...]] = []

    def make(block_info: Any = None) -> Any:
        made.append(tuple(block_info[None]["chunk-location"]))
        return np.zeros(block_info[None]["chunk-shape"], np.float32)

    cuts = da.core.normalize_chunks(chunks, SHAPE)
    logits = da.map_blocks(make, chunks=cuts, dtype=np.float32, meta=np.empty((0, 0), np.float32))
    loss, grad, stats = polyce.cross_entropy_with_grad(
        logits, da.zeros(96, chunks=24, dtype=np.int64), return_stats="prediction"
    )
    da.compute(loss, grad, stats.prediction)
    assert sorted(made) == list(itertools.product(*map(range, logits.numblocks)))


def test_the_same_call_gives_the_same_names_and_so_runs_once(da: Any) -> None:
    for chunks in (ROWS, (8, 10)):
        logits, target = example(da, chunks)
        weight = da.ones(logits.shape[1], chunks=5, dtype=logits.dtype)
        one, other = (polyce.cross_entropy_with_grad(logits, target, weight) for _ in range(2))
        smoothed = polyce.cross_entropy_with_grad(logits, target, weight, label_smoothing=0.1)
        for index in range(2):
            assert one[index].name == other[index].name != smoothed[index].name


# Results

CUTS: dict[str, tuple[tuple[int, ...], ...]] = {
    "one": ((7,), (8,), (3,)),
    "rows": ((3, 3, 1), (8,), (3,)),
    "trailing": ((7,), (8,), (1, 2)),
    "classes": ((7,), (3, 4, 1), (3,)),
    "every": ((2, 5), (1, 7), (2, 1)),
    "empty": ((2, 0, 5), (0, 3, 5), (3, 0)),
}


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_every_option_gives_numpy_s_answer_for_any_cuts(da: Any, kind: str, cuts: str) -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((7, 8, 3))
    logits[1, :5], logits[2], logits[3, 2] = -math.inf, 0.0, math.nan
    target = rng.integers(5, 8, (7, 3))
    target[4] = -100
    if kind == "probability":
        target = rng.random((7, 8, 3))
        target[1, :5] = 0.0
    arrays = {
        "weight": rng.random(8),
        "sample_weight": rng.integers(0, 3, (7, 3)),
        "normalizer": np.asarray(5.0),
    }
    options: dict[str, Any] = {
        "label_smoothing": 0.1 if kind == "index" else 0.0,
        "z_loss": 0.01,
        "logit_scale": 0.5,
        "logit_softcap": 3.0,
        "return_stats": polyce.Stats._fields[: 7 if kind == "index" else 6],
    }
    logits[1, :5] = -9.0 if kind == "index" else -math.inf
    expected = polyce.cross_entropy_with_grad(logits, target, **arrays, **options)
    lazy = da.from_array(logits, chunks=CUTS[cuts])
    loss, grad, stats = polyce.cross_entropy_with_grad(
        lazy,
        da.from_array(target, chunks=4),
        **{name: da.from_array(array, chunks=2) for name, array in arrays.items()},
        **options,
        implementation="dask",
    )
    assert grad.chunks == lazy.chunks
    assert (grad.dtype, stats.prediction.dtype) == (np.float64, np.int64)
    found_loss, found_grad, found_stats = da.compute(loss, grad, stats)
    np.testing.assert_allclose(found_loss, expected[0], rtol=1e-13)
    np.testing.assert_allclose(found_grad, expected[1], rtol=1e-12, atol=1e-17)
    for found, value in zip(there(found_stats), there(expected[2]), strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-13)


def there(stats: Any) -> list[Any]:
    return [array for array in stats if array is not None]


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_result_can_be_computed_and_used_alone(
    da: Any, reduction: str, kind: str, cuts: str
) -> None:
    # Which tasks dask fuses depends on the results that are computed.
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((7, 8, 3))
    target = rng.random((7, 8, 3)) if kind == "probability" else rng.integers(0, 8, (7, 3))
    arrays = {
        "weight": rng.random(8),
        "grad_output": rng.random((7, 3)) if reduction == "none" else rng.random(()),
    }
    names = polyce.Stats._fields[: 7 if kind == "index" else 6]
    options: dict[str, Any] = {"reduction": reduction, "return_stats": names}
    expected = polyce.cross_entropy_with_grad(logits, target, **arrays, **options)
    loss, grad, stats = polyce.cross_entropy_with_grad(
        da.from_array(logits, chunks=CUTS[cuts]),
        da.from_array(target, chunks=3),
        **{name: da.from_array(array, chunks=-1) for name, array in arrays.items()},
        **options,
    )
    wanted = (*expected[:2], *there(expected[2]))
    for found, value in zip((loss, grad, *there(stats)), wanted, strict=True):
        np.testing.assert_allclose(found.compute(), value, rtol=1e-12)
        total = abs(value * 2.0).sum()
        np.testing.assert_allclose(abs(found * 2.0).sum().compute(), total, rtol=1e-12)
    sums = abs(expected[1]).sum(axis=1)
    np.testing.assert_allclose(abs(grad).sum(axis=1).compute(), sums, rtol=1e-12)


@pytest.mark.parametrize("chunks", [ROWS, (8, 10)], ids=["rows", "classes"])
def test_the_same_bits_for_any_number_of_threads(da: Any, chunks: Any) -> None:
    logits, target = example(da, chunks)
    weight = da.from_array(np.random.default_rng(1).random(40), chunks=8)

    def bits(**config: Any) -> tuple[bytes, bytes]:
        loss, grad = polyce.cross_entropy_with_grad(logits, target, weight)
        found = da.compute(loss, grad, **config)
        return found[0].tobytes(), found[1].tobytes()

    first = bits(scheduler="synchronous")
    for workers in (1, 4, 4):
        assert bits(scheduler="threads", num_workers=workers) == first


@pytest.mark.parametrize("shape", [(0, 6), (4, 0), (0, 0)])
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_no_rows_or_no_classes_in_any_chunks(da: Any, kind: str, shape: tuple[int, int]) -> None:
    chunks = tuple((0, size) if size < 6 else (2, 4) for size in shape)
    logits = da.zeros(shape, chunks=chunks, dtype=np.float32)
    target = logits if kind == "probability" else da.full(shape[0], -100, dtype=np.int64)
    weight = da.ones(shape[1])
    expected = polyce.cross_entropy_with_grad(
        *(array.compute() for array in (logits, target, weight)), reduction="sum"
    )
    loss, grad = polyce.cross_entropy_with_grad(logits, target, weight, reduction="sum")
    assert (loss.compute(), grad.chunks) == (expected[0], logits.chunks)
    np.testing.assert_array_equal(grad.compute(), expected[1], strict=True)


@pytest.mark.parametrize("chunk", [6, 4])
def test_a_single_row_without_an_axis_of_rows(da: Any, chunk: int) -> None:
    logits, target = np.arange(6.0), np.array(4)
    expected = polyce.cross_entropy_with_grad(logits, target)
    found = polyce.cross_entropy_with_grad(
        da.from_array(logits, chunks=chunk), da.from_array(target)
    )
    np.testing.assert_allclose(found[0].compute(), expected[0], rtol=1e-15)
    np.testing.assert_allclose(found[1].compute(), expected[1], rtol=1e-14)


def test_no_warning_comes_out_of_a_thread(da: Any) -> None:
    logits = np.full((4, 6), -math.inf, np.float32)
    logits[0, 0] = math.inf
    for chunks in ((2, 6), (2, 2)):
        lazy = da.from_array(logits, chunks=chunks)
        rows = polyce.cross_entropy(lazy, da.zeros(4, chunks=2, dtype=int), reduction="none")
        assert np.isnan(rows.compute(scheduler="threads", num_workers=2)).all()


def test_numpy_labels_are_checked_by_the_call(da: Any) -> None:
    with pytest.raises(IndexError, match=r"labels must lie in 0 to 2 .* got 3 at position \(1,\)"):
        polyce.cross_entropy(da.zeros((2, 3), chunks=1), np.array([0, 3]))


def test_a_cluster_gives_the_same_bits(da: Any) -> None:
    from distributed import Client, LocalCluster

    lazy: list[Any] = []
    for chunks in (ROWS, (8, 10)):
        logits, target = example(da, chunks)
        lazy += polyce.cross_entropy_with_grad(logits, target, label_smoothing=0.1)
    expected = da.compute(*lazy, scheduler="synchronous")
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        found = client.gather(client.compute(lazy))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def test_blocks_run_what_a_call_on_one_would(da: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []

    choose = registry._unforced

    def spy(problem: Any, preferred: Any) -> Implementation:
        found = choose(problem, preferred)
        if problem.backend == "numpy":
            chosen.append(found.name)
        return found

    monkeypatch.setattr(registry, "_unforced", spy)
    logits, target = example(da, ROWS)
    polyce.cross_entropy(logits, target, return_stats="correct")[0].compute(scheduler="sync")
    block = polyce.explain(np.zeros(ROWS, np.float32), np.zeros(ROWS[:1], np.int64))
    assert set(chosen) == {block.chosen}
