"""cubed: a call computes nothing, and what is computed later needs little memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import polyce

pytestmark = pytest.mark.only("cubed")

CLASSES = 1024
CHUNKS = {"rows": (64, CLASSES), "both": (256, 256)}


@pytest.fixture
def spec() -> Any:
    import cubed

    return cubed.Spec(allowed_mem="4MB", executor_name="single-threaded", intermediate_store={})


def logits_and_labels(spec: Any, rows: int, chunks: tuple[int, int]) -> tuple[Any, Any]:
    import cubed.array_api as xp

    logits = xp.zeros((rows, CLASSES), dtype=xp.float32, chunks=chunks, spec=spec)
    return logits, xp.zeros(rows, dtype=xp.int64, chunks=chunks[0], spec=spec)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_memory_does_not_grow_with_the_rows(spec: Any, chunks: str, kind: str) -> None:
    from cubed.core.array import plan

    projected = set()
    for rows in (2**14, 2**17):
        logits, target = logits_and_labels(spec, rows, CHUNKS[chunks])
        if kind == "probability":
            target = logits
        found = polyce.cross_entropy_with_grad(logits, target, label_smoothing=0.1)
        assert logits.nbytes >= 16 * spec.allowed_mem
        planned = plan(*found)
        assert not planned.exceeds_memory
        projected.add(planned.max_projected_mem)
    assert len(projected) == 1
    # A chunk is a quarter of a megabyte; several are read and written, also in compressed form.
    assert max(projected) <= 3e6


def test_more_than_memory_holds_is_computed(spec: Any) -> None:
    import cubed

    rng = np.random.default_rng(0)
    logits = rng.standard_normal((1536, CLASSES), dtype=np.float32)
    labels = rng.integers(0, CLASSES, 1536)
    labels[::5] = -100
    assert logits.nbytes > spec.allowed_mem
    given = (
        cubed.from_array(logits, chunks=(256, 256), spec=spec),
        # Chunked differently from the logits' rows.
        cubed.from_array(labels, chunks=300, spec=spec),
    )
    loss, grad = polyce.cross_entropy_with_grad(*given)
    assert grad.chunks == given[0].chunks
    loss, grad = cubed.compute(loss, grad)
    want, want_grad = polyce.cross_entropy_with_grad(logits, labels)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(grad, want_grad, rtol=1e-6, atol=1e-12)


def test_the_other_functions(spec: Any) -> None:
    import cubed

    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((5, 7)), rng.integers(0, 7, 5)
    logs = polyce.log_softmax(cubed.from_array(logits, chunks=(3, 4), spec=spec), logit_scale=0.5)
    loss = polyce.nll_loss(logs, cubed.from_array(labels, chunks=3, spec=spec))
    want = polyce.log_softmax(logits, logit_scale=0.5)
    for one, other in zip(
        cubed.compute(logs, loss), (want, polyce.nll_loss(want, labels)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-14)


def test_nothing_is_computed_by_a_call(spec: Any) -> None:
    import cubed
    import cubed.array_api as xp

    def fail(block: Any) -> Any:
        raise RuntimeError("computed")

    logits, labels = logits_and_labels(spec, 512, (256, 256))
    logits = cubed.map_blocks(fail, logits, dtype=np.float32)
    labels = cubed.map_blocks(fail, labels, dtype=np.int64)
    ones = cubed.map_blocks(fail, xp.ones(512, chunks=256, spec=spec), dtype=np.float64)
    weight = cubed.map_blocks(fail, xp.ones(CLASSES, chunks=256, spec=spec), dtype=np.float64)
    with cubed.config.set({"executor_name": "raise-if-computes"}):
        loss, grad, stats = polyce.cross_entropy_with_grad(
            logits,
            labels,
            weight,
            label_smoothing=0.1,
            sample_weight=ones,
            return_stats=polyce.Stats._fields[:-1],
        )
        polyce.cross_entropy(logits, logits)
        polyce.nll_loss(polyce.log_softmax(logits), labels, weight)
    assert (loss.shape, grad.shape) == ((), (512, CLASSES))
    assert {(512,)} == {array.shape for array in stats}
    with pytest.raises(RuntimeError, match="computed"):
        loss.compute()


def test_arrays_of_another_spec_are_cubed_s_own_error(spec: Any) -> None:
    import cubed

    logits, _ = logits_and_labels(spec, 512, (256, 256))
    labels = cubed.from_array(np.zeros(512, np.int64), spec=cubed.Spec(allowed_mem="1MB"))
    with pytest.raises(ValueError, match="same spec"):
        polyce.cross_entropy(logits, labels)
