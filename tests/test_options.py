"""The options beyond torch's, checked by what they are equivalent to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import polyce
from polyce.testing.backends import Backend

# jax compiles nearly every call anew.
pytestmark = pytest.mark.slow("jax-x32")

ROWS, CLASSES = 6, 5
RNG = np.random.default_rng(0)
X = RNG.normal(0.0, 2.0, (ROWS, CLASSES)).astype(np.float32)
T = np.array([1, 0, -100, 4, 2, 2], np.int32)
P = RNG.dirichlet(np.ones(CLASSES), ROWS).astype(np.float32)
W = RNG.uniform(0.5, 2.0, CLASSES).astype(np.float32)
V = np.array([1.0, 2.0, 5.0, 0.0, 0.5, 3.0], np.float32)
NAMES = polyce.Stats._fields[:-1]
BESIDE = ("top_probability", "brier")
TARGETS = pytest.mark.parametrize("target", [T, P], ids=["index", "probability"])


def with_grad(backend: Backend, *args: Any, **options: Any) -> list[Any]:
    options = {
        key: backend.asarray(value.copy()) if isinstance(value, np.ndarray) else value
        for key, value in options.items()
    }
    found = polyce.cross_entropy_with_grad(*(backend.asarray(a.copy()) for a in args), **options)
    return [backend.to_numpy(array) for array in found[:2]] + list(found[2:])


def same(found: Any, want: Any, rtol: float = 1e-6) -> None:
    np.testing.assert_allclose(found, want, rtol=rtol, atol=1e-7)


@TARGETS
def test_a_sample_weight_of_two_counts_a_row_twice(backend: Backend, target: Any) -> None:
    twice = [0, 1, 1, 2, 3, 4, 5]
    weight = np.array([1, 2, 1, 1, 1, 1], np.int32)
    for reduction in ("sum", "mean"):
        loss, grad = with_grad(backend, X, target, W, sample_weight=weight, reduction=reduction)
        want, rows = with_grad(backend, X[twice], target[twice], W, reduction=reduction)
        same(loss, want)
        same(grad, np.stack([rows[0], rows[1] + rows[2], *rows[3:]]))


@TARGETS
def test_a_sample_weight_of_zero_leaves_a_row_out(backend: Backend, target: Any) -> None:
    logits = X.copy()
    logits[3] = [np.nan, np.inf, 0.0, -np.inf, 1.0]
    loss, grad = with_grad(backend, logits, target, sample_weight=V)
    kept = np.array([0, 1, 2, 4, 5])
    want, rows = with_grad(backend, X[kept], target[kept], sample_weight=V[kept])
    same(loss, want)
    same(grad[kept], rows)
    assert (grad[3] == 0).all()


@TARGETS
def test_micro_batches_add_up_to_the_batch(backend: Backend, target: Any) -> None:
    counted = V * (target != -100 if target.ndim == 1 else 1)
    total = float((counted * (W[np.maximum(target, 0)] if target.ndim == 1 else 1)).sum())
    loss, grad = with_grad(backend, X, target, W, sample_weight=V)
    for normalizer in (total, np.array(total, np.float32)):
        parts = [
            with_grad(backend, X[i], target[i], W, sample_weight=V[i], normalizer=normalizer)
            for i in (slice(0, 2), slice(2, 6))
        ]
        same(sum(part[0] for part in parts), loss)
        same(np.concatenate([part[1] for part in parts]), grad)


@pytest.mark.parametrize(
    "normalizer", [0, 0.0, np.zeros((), np.float32)], ids=["int", "float", "array"]
)
def test_a_normalizer_of_zero_divides_as_division_does(backend: Backend, normalizer: Any) -> None:
    loss, grad = with_grad(backend, X, T, normalizer=normalizer)
    assert loss == np.inf
    assert np.isinf(grad[[0, 1, 3, 4, 5]]).all()
    assert (grad[2] == 0).all()
    nothing, grad = with_grad(backend, X, np.full_like(T, -100), normalizer=normalizer)
    assert np.isnan(nothing)
    assert (grad == 0).all()


@TARGETS
def test_a_scale_multiplies_the_logits(backend: Backend, target: Any) -> None:
    loss, grad = with_grad(backend, X, target, logit_scale=0.5, reduction="none")
    want, of_scaled = with_grad(backend, X * np.float32(0.5), target, reduction="none")
    same(loss, want)
    same(grad, of_scaled * np.float32(0.5))
    found = polyce.log_softmax(backend.asarray(X), logit_scale=0.5)
    same(
        backend.to_numpy(found),
        backend.to_numpy(polyce.log_softmax(backend.asarray(X / 2))),
    )


@TARGETS
def test_a_softcap_squeezes_the_logits_after_the_scale(backend: Backend, target: Any) -> None:
    scaled = np.tanh(1.5 * X.astype(np.float64) / 4.0)
    loss, grad = with_grad(backend, X, target, logit_scale=1.5, logit_softcap=4.0, reduction="none")
    capped = (4.0 * scaled).astype(np.float32)
    want, of_capped = with_grad(backend, capped, target, reduction="none")
    same(loss, want, rtol=4e-6)
    np.testing.assert_allclose(grad, of_capped * 1.5 * (1 - scaled**2), rtol=4e-6, atol=1e-6)


@TARGETS
def test_a_z_loss_adds_the_squared_lse(backend: Backend, target: Any) -> None:
    plain, _ = with_grad(backend, X, target, W, reduction="none")
    more, _, stats = with_grad(
        backend, X, target, W, z_loss=0.25, reduction="none", return_stats="lse"
    )
    lse = np.nan_to_num(backend.to_numpy(stats.lse))
    weight = np.where(target >= 0, W[np.maximum(target, 0)], 0.0) if target.ndim == 1 else 1.0
    same(more - plain, 0.25 * weight * lse**2, rtol=1e-5)


def test_masked_logits_stay_out_under_every_option(backend: Backend) -> None:
    masked = np.concatenate([X, np.full((ROWS, 2), -np.inf, np.float32)], axis=1)
    options = {"z_loss": 0.1, "logit_scale": 0.7, "logit_softcap": 3.0, "return_stats": NAMES}
    loss, grad, stats = with_grad(backend, masked, T, **options)
    want, rows, of_rows = with_grad(backend, X, T, **options)
    same(loss, want)
    same(grad[:, :CLASSES], rows)
    assert (grad[:, CLASSES:] == 0).all()
    for found, expected in zip(stats, of_rows, strict=True):
        same(backend.to_numpy(found), backend.to_numpy(expected))


def test_stats_hold_what_was_asked_for(backend: Backend) -> None:
    logits, target = backend.asarray(X), backend.asarray(T)
    loss, stats = polyce.cross_entropy(logits, target, return_stats=("correct", "entropy"))
    same(backend.to_numpy(loss), backend.to_numpy(polyce.cross_entropy(logits, target)))
    assert isinstance(stats, polyce.Stats)
    assert stats.lse is None
    assert stats.prediction is None
    assert backend.to_numpy(stats.valid).tolist() == (T >= 0).tolist()
    want = (np.argmax(X, axis=1) == T) & (T >= 0)
    assert backend.to_numpy(stats.correct).tolist() == want.tolist()
    assert backend.owns(stats.entropy)
    _, valid_alone = polyce.cross_entropy(logits, target, return_stats=())
    assert valid_alone[:-1] == (None,) * 7
    _, usual = polyce.cross_entropy(logits, target, return_stats=True)
    there = [name for name, array in usual._asdict().items() if array is not None]
    assert there == ["lse", "entropy", "prediction", "correct", "valid"]


def test_the_rank_tells_top_k_accuracy(backend: Backend) -> None:
    logits, target = backend.asarray(X), backend.asarray(T)
    for beside in ((), ("entropy",)):
        _, stats = polyce.cross_entropy(logits, target, return_stats=("rank", *beside))
        rank = backend.to_numpy(stats.rank)
        for k in range(1, CLASSES + 1):
            best = np.argsort(-X, axis=1)[:, :k]
            want = (best == T[:, None]).any(1)
            assert ((rank >= 0) & (rank < k)).tolist() == want.tolist()


@TARGETS
def test_the_brier_score_is_of_the_target_as_given(backend: Backend, target: Any) -> None:
    """Without smoothing and class weights, and of the transformed logits."""
    softmax = np.exp(0.5 * X.astype(np.float64))
    softmax /= softmax.sum(1, keepdims=True)
    wanted = target if target.ndim == 2 else target[:, None] == np.arange(CLASSES)
    want = ((softmax - wanted) ** 2).sum(1)
    *_, stats = with_grad(
        backend, X, target, W, label_smoothing=0.2, logit_scale=0.5, return_stats=BESIDE
    )
    valid = backend.to_numpy(stats.valid)
    same(backend.to_numpy(stats.brier), np.where(valid, want, np.nan), rtol=1e-6)
    top = np.where(valid, softmax.max(1), np.nan)
    same(backend.to_numpy(stats.top_probability), top, rtol=1e-6)


def test_probabilities_have_no_rank(backend: Backend) -> None:
    target = backend.asarray(np.full(X.shape, 1 / CLASSES, np.float32))
    message = (
        r"^return_stats has 'rank' for class indices only, got a target of class probabilities; "
        "leave the name out$"
    )
    with pytest.raises(ValueError, match=message):
        polyce.cross_entropy(backend.asarray(X), target, return_stats=("lse", "rank"))


def test_stats_are_the_same_for_every_reduction_and_axis(backend: Backend) -> None:
    logits = RNG.normal(0.0, 2.0, (2, 5, 3)).astype(np.float32)
    labels = RNG.integers(0, 5, (2, 3)).astype(np.int32)
    seen = []
    for axis, reduction in ((1, "mean"), (-1, "none"), (0, "sum")):
        moved = backend.asarray(np.ascontiguousarray(np.moveaxis(logits, 1, axis)))
        _, stats = polyce.cross_entropy(
            moved, backend.asarray(labels), axis=axis, reduction=reduction, return_stats=NAMES
        )
        seen.append([backend.to_numpy(array) for array in stats])
        assert seen[-1][2].shape == labels.shape
    for found in seen[1:]:
        for got, want in zip(found, seen[0], strict=True):
            same(got, want)


def test_the_objects_take_the_options(backend: Backend) -> None:
    logits, target, v = (backend.asarray(array.copy()) for array in (X, T, V))
    options: dict[str, Any] = {"z_loss": 0.1, "logit_scale": 0.5, "logit_softcap": 9.0}
    want = polyce.cross_entropy(logits, target, sample_weight=v, normalizer=3.0, **options)
    criterion = polyce.CrossEntropyLoss(**options, return_stats="correct")
    loss, stats = criterion(logits, target, sample_weight=v, normalizer=3.0)
    same(backend.to_numpy(loss), backend.to_numpy(want))
    assert stats.correct is not None
    log_probabilities = polyce.log_softmax(logits)
    nll = polyce.NLLLoss()(log_probabilities, target, sample_weight=v, normalizer=3.0)
    plain = polyce.cross_entropy(logits, target, sample_weight=v, normalizer=3.0)
    same(backend.to_numpy(nll), backend.to_numpy(plain), rtol=1e-5)


def test_explain_names_the_options(backend: Backend) -> None:
    found = polyce.explain(
        backend.asarray(X),
        backend.asarray(T),
        sample_weight=backend.asarray(V),
        z_loss=1e-4,
        logit_softcap=30,
        return_stats="lse",
    )
    assert found.call.endswith(
        "target int32 (6,), sample_weight float32, z_loss 0.0001, logit_softcap 30, stats lse"
    )
