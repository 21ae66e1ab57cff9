"""Sparse targets and teachers' logits: what they mean, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import polyce
from polyce import SparseTarget, TeacherLogits
from polyce.testing.backends import Backend

X = np.array([[2.0, 0.0, -1.0, 1.0], [0.5, 0.5, 3.0, -2.0], [1.0, 4.0, 2.0, 0.0]], np.float32)
INDEX = np.array([[0, 3, 3], [2, -100, 1], [-100, -100, -100]], np.int32)
SHARES = np.array([[0.5, 0.25, 0.125], [0.75, 9.0, 0.25], [1.0, 2.0, 3.0]], np.float32)
DENSE = np.array([[0.5, 0.0, 0.0, 0.375], [0.0, 0.25, 0.75, 0.0], [0.0] * 4], np.float32)
TEACHER = np.array([[1.0, 3.0, 0.0, -1.0], [0.0, 2.0, 2.5, 1.0], [4.0, 0.0, 0.0, 1.0]], np.float32)
WEIGHT = np.array([0.5, 1.0, 2.0, 0.25], np.float32)


def sparse(backend: Backend, index: Any = INDEX, probability: Any = SHARES) -> SparseTarget:
    return SparseTarget(backend.asarray(index), backend.asarray(probability))


def teacher(backend: Backend, logits: Any = TEACHER, scale: Any = 1.0) -> TeacherLogits:
    return TeacherLogits(backend.asarray(logits), scale)


def near(backend: Backend, got: Any, want: Any) -> None:
    np.testing.assert_allclose(backend.to_numpy(got), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("kind", ["sparse", "teacher"])
def test_the_loss_is_that_of_the_probabilities_that_it_stands_for(
    backend: Backend, kind: str, reduction: str
) -> None:
    options = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.01, "logit_scale": 0.5}
    half = np.exp(TEACHER / 2) / np.exp(TEACHER / 2).sum(axis=1, keepdims=True)
    dense, target = DENSE, sparse(backend)
    if kind == "teacher":
        dense, target = half, teacher(backend, scale=0.5)
    arrays = [backend.asarray(array) for array in (X, WEIGHT)]
    loss, grad = polyce.cross_entropy_with_grad(arrays[0], target, arrays[1], **options)
    want, of_dense = polyce.cross_entropy_with_grad(X, dense, WEIGHT, **options)
    near(backend, loss, want)
    near(backend, grad, of_dense)
    near(backend, polyce.CrossEntropyLoss(arrays[1], **options)(arrays[0], target), want)


def test_a_row_of_ignored_classes_adds_nothing_but_counts(backend: Backend) -> None:
    x, target = backend.asarray(X), sparse(backend)
    rows = backend.to_numpy(polyce.cross_entropy(x, target, reduction="none"))
    assert rows[2] == 0.0
    near(backend, polyce.cross_entropy(x, target), rows.sum() / 3)


@pytest.mark.parametrize("shares", [(0.5, 1.0, -0.5), (0.5, 1.0, -0.25), (-0.25, 1.0, 0.5)])
def test_shares_of_one_class_add_up_before_they_meet_an_infinite_logit(
    backend: Backend, shares: tuple[float, ...]
) -> None:
    x = np.array([[1.0, -np.inf, 2.0, 0.5]], np.float32)
    index, share = np.array([[1, 3, 1]], np.int32), np.array([shares], np.float32)
    loss, grad = polyce.cross_entropy_with_grad(backend.asarray(x), sparse(backend, index, share))
    rest = share.sum() - 1.0
    lse = np.log(np.exp(x.astype(float)).sum())
    want = lse - 0.5 if rest == 0.0 else np.inf
    near(backend, loss, want)
    dense = np.array([[0.0, rest, 0.0, 1.0]])
    near(backend, grad, share.sum() * np.exp(x - lse) - dense)


def test_without_classes_in_the_target_the_loss_is_0(backend: Backend) -> None:
    nothing = sparse(backend, np.zeros((3, 0), np.int32), np.zeros((3, 0), np.float32))
    loss, grad = polyce.cross_entropy_with_grad(backend.asarray(X), nothing)
    assert backend.to_numpy(loss) == 0.0
    assert not backend.to_numpy(grad).any()


def test_the_divergence_is_the_loss_less_the_teacher_s_entropy(backend: Backend) -> None:
    x, target = backend.asarray(X), teacher(backend, scale=0.5)
    loss = polyce.cross_entropy(x, target, reduction="none", logit_scale=0.5)
    divergence = loss - polyce.entropy(target.logits, logit_scale=0.5)
    p, q = (np.exp(a / 2) / np.exp(a / 2).sum(axis=1, keepdims=True) for a in (TEACHER, X))
    near(backend, divergence, (p * np.log(p / q)).sum(axis=1))


ERRORS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "float index": (TypeError, "target.index .* float32 (3, 3)", {"index": SHARES}),
    "index of rows": (ValueError, "(3, K), got int32 (3,)", {"index": INDEX[:, 0]}),
    "index of other rows": (ValueError, "(3, K), got int32 (2, 3)", {"index": INDEX[:2]}),
    "one probability for all": (ValueError, "(3, 3), got (3, 1)", {"probability": SHARES[:, :1]}),
    "integer probability": (TypeError, "target.probability .* int32", {"probability": INDEX}),
    "no index": (TypeError, "target.index must be an array, got None", {"index": None}),
    "bad class": (
        IndexError,
        "got 4 at position (1, 2)",
        {"index": np.where(INDEX == 1, 4, INDEX)},
    ),
    "teacher's shape": (ValueError, "(3, 4), got (3, 3)", {"logits": TEACHER[:, :3]}),
    "teacher's dtype": (TypeError, "target.logits .* int32", {"logits": TEACHER.astype(np.int32)}),
    "teacher's scale": (ValueError, "target.scale .* 0", {"scale": 0.0}),
    "array as scale": (TypeError, "target.scale .* ndarray", {"scale": np.ones(())}),
    "weight": (ValueError, "(3,)", {"weight": WEIGHT[:3]}),
    "ignored class": (ValueError, "a teacher's logits", {"scale": 1.0, "ignore_index": 2}),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_is_refused(backend: Backend, looks_at_labels: bool, name: str) -> None:
    error, said, given = ERRORS[name]
    if error is IndexError and not looks_at_labels:
        pytest.skip("labels are not looked at here")
    parts = {
        key: value if value is None or key == "scale" else backend.asarray(value)
        for key, value in given.items()
        if key not in ("weight", "ignore_index")
    }
    target: Any = sparse(backend)
    if not parts.keys() <= set(SparseTarget._fields):
        target = teacher(backend)
    weight = backend.asarray(given["weight"]) if "weight" in given else None
    ignored = {"ignore_index": given["ignore_index"]} if "ignore_index" in given else {}
    pattern = ".*".join(map(re.escape, said.split(" .* ")))
    with pytest.raises(error, match=pattern):
        polyce.cross_entropy(backend.asarray(X), target._replace(**parts), weight, **ignored)


def test_functions_of_labels_refuse_them(backend: Backend) -> None:
    for target in (sparse(backend), teacher(backend)):
        with pytest.raises(
            TypeError, match=r"nll_loss holds .* call cross_entropy with the logits"
        ):
            polyce.nll_loss(backend.asarray(X), target)


@pytest.mark.only("torch")
def test_arrays_of_another_library_are_refused(backend: Backend) -> None:
    x = backend.asarray(X)
    with pytest.raises(TypeError, match=r"input is torch and target\.logits is numpy"):
        polyce.cross_entropy(x, TeacherLogits(TEACHER))
    with pytest.raises(TypeError, match=r"input is torch and target\.probability is numpy"):
        polyce.cross_entropy(x, SparseTarget(backend.asarray(INDEX), SHARES))


@pytest.mark.only("torch")
@pytest.mark.parametrize("in_place", [False, True])
def test_probabilities_have_the_gradient_of_dense_ones(torch: Any, in_place: bool) -> None:
    import polyce.torch

    index = torch.tensor(INDEX.astype(np.int64))
    kept = index >= 0

    def gradients(is_sparse: bool) -> Any:
        leaves = [torch.tensor(array, requires_grad=True) for array in (X, SHARES, WEIGHT)]
        x, shares, weight = leaves
        target: Any = SparseTarget(index, shares)
        if not is_sparse:
            own = torch.where(kept, shares, 0.0)
            target = torch.zeros_like(x).scatter_add(1, torch.where(kept, index, 0), own)
        loss = polyce.torch.cross_entropy(
            x * 1.0, target, weight, label_smoothing=0.1, inplace_backward=in_place
        )
        return torch.autograd.grad(loss, leaves)

    for got, want in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.only("torch")
def test_a_teacher_that_requires_a_gradient_is_refused(torch: Any) -> None:
    target = TeacherLogits(torch.tensor(TEACHER, requires_grad=True))
    with pytest.raises(TypeError, match=r"target\.logits requires grad"):
        polyce.cross_entropy(torch.tensor(X), target)
    with torch.no_grad():
        polyce.cross_entropy(torch.tensor(X), target)

    def loss(logits: Any) -> Any:
        return polyce.cross_entropy(torch.tensor(X), TeacherLogits(logits))

    with pytest.raises(TypeError, match=r"target\.logits requires grad"):
        torch.func.grad(loss)(torch.tensor(TEACHER))


@pytest.mark.only("torch")
def test_second_derivatives_forward_mode_and_vmap(torch: Any) -> None:
    f, index = torch.func, torch.tensor(INDEX[:2].astype(np.int64))
    x, shares, weight = (torch.tensor(a, dtype=torch.float64) for a in (X[:2], SHARES[:2], WEIGHT))
    kept = index >= 0

    def of_sparse(x: Any, shares: Any, weight: Any) -> Any:
        return polyce.cross_entropy(x, SparseTarget(index, shares), weight, z_loss=0.1)

    def of_dense(x: Any, shares: Any, weight: Any) -> Any:
        own = torch.where(kept, shares, 0.0)
        dense = torch.zeros_like(x).scatter_add(1, torch.where(kept, index, 0), own)
        return polyce.cross_entropy(x, dense, weight, z_loss=0.1)

    for way in (f.hessian, f.jacfwd):
        got, want = (way(loss, (0, 1, 2))(x, shares, weight) for loss in (of_sparse, of_dense))
        torch.testing.assert_close(got, want)
    by_rows = f.vmap(lambda x, i, p: polyce.cross_entropy(x, SparseTarget(i, p)))(x, index, shares)
    together = polyce.cross_entropy(x, SparseTarget(index, shares), reduction="none")
    torch.testing.assert_close(by_rows, together)


@pytest.mark.only("torch")
def test_in_a_compiled_graph(torch: Any) -> None:
    def both(x: Any, index: Any, shares: Any, teacher: Any) -> Any:
        loss, stats = polyce.cross_entropy(x, SparseTarget(index, shares), return_stats="correct")
        return loss + polyce.cross_entropy(x, TeacherLogits(teacher, 0.5)), stats.correct

    def run(function: Any) -> list[Any]:
        x, shares = (torch.tensor(a, requires_grad=True) for a in (X, SHARES))
        loss, correct = function(x, torch.tensor(INDEX.astype(np.int64)), shares, held)
        loss.backward()
        return [loss.detach(), correct, x.grad, shares.grad]

    held = torch.tensor(TEACHER)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for got, want in zip(run(compiled), run(both), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.only("jax-x32")
def test_jax_differentiates_by_probabilities_and_not_by_teachers() -> None:
    import jax
    import jax.numpy as jnp

    x, shares, weight = map(jnp.asarray, (X, SHARES, WEIGHT))
    kept = INDEX >= 0

    def of_sparse(x: Any, shares: Any, weight: Any) -> Any:
        return polyce.cross_entropy(x, SparseTarget(jnp.asarray(INDEX), shares), weight)

    def of_dense(x: Any, shares: Any, weight: Any) -> Any:
        rows = jnp.arange(3)[:, None]
        own = jnp.where(kept, shares, 0.0)
        dense = jnp.zeros((3, 4)).at[rows, jnp.where(kept, INDEX, 0)].add(own)
        return polyce.cross_entropy(x, dense, weight)

    got, want = (jax.jit(jax.grad(f, (0, 1, 2)))(x, shares, weight) for f in (of_sparse, of_dense))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    with pytest.raises(TypeError, match="no derivative with respect to a teacher's logits"):
        jax.grad(lambda t: polyce.cross_entropy(x, TeacherLogits(t)))(jnp.asarray(TEACHER))
    with pytest.raises(TypeError, match="make the TeacherLogits inside of a function"):
        jax.jit(polyce.cross_entropy)(x, TeacherLogits(jnp.asarray(TEACHER)))


@pytest.mark.only("numpy")
def test_explain_names_the_target_and_the_paths_that_serve_it(backend: Backend) -> None:
    told = polyce.explain(X, sparse(backend), label_smoothing=0.1)
    assert told.chosen == "native"
    assert "sparse target int32 (3, 3) of probability float32" in told.call
    assert not any("target" in reason for reason in told.reasons["triton"])
    told = polyce.explain(X, teacher(backend, scale=0.5))
    assert told.chosen == "native"
    assert "teacher float32 (3, 4), scale 0.5" in told.call
    assert not any("target" in reason for reason in told.reasons["triton"])
