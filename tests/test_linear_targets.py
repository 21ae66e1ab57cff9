"""Sparse targets and teachers of a linear head: derivatives, memory, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import polyce
from polyce import SparseTarget, TeacherHead, TeacherLogits
from polyce.testing.backends import Backend

N, F, C, G = 11, 4, 9, 3
RNG = np.random.default_rng(0)
HIDDEN, HEAD, BIAS, STATES, OWN_HEAD, OWN_BIAS = (
    RNG.normal(0.0, 1.0, shape).astype(np.float32)
    for shape in ((N, F), (C, F), (C,), (N, G), (C, G), (C,))
)
INDEX = RNG.integers(0, C, (N, 2)).astype(np.int32)
INDEX[3, 1] = -100
SHARES = RNG.uniform(0.1, 0.5, (N, 2)).astype(np.float32)
TEACHER = STATES @ OWN_HEAD.T + OWN_BIAS
KINDS = pytest.mark.parametrize("kind", ["sparse", "logits", "head"])


def targets(kind: str, asarray: Any) -> tuple[Any, Any]:
    """Return a target of a head, and the same for a call with all logits."""
    if kind == "sparse":
        target = SparseTarget(asarray(INDEX), asarray(SHARES))
        return target, target
    of_logits = TeacherLogits(asarray(TEACHER), 0.5)
    of_head = TeacherHead(asarray(STATES), asarray(OWN_HEAD), asarray(OWN_BIAS), 0.5)
    return (of_head if kind == "head" else of_logits), of_logits


def of_head(target: Any, hidden: Any, head: Any, bias: Any, **options: Any) -> Any:
    return polyce.linear_cross_entropy(
        hidden, head, target, linear_bias=bias, chunk_size=4, **options
    )


def of_product(target: Any, hidden: Any, head: Any, bias: Any, **options: Any) -> Any:
    return polyce.cross_entropy(hidden @ head.T + bias, target, **options)


def given(asarray: Any) -> list[Any]:
    return [asarray(array) for array in (HIDDEN, HEAD, BIAS)]


HALF = STATES.astype(np.float16)
ERRORS: dict[str, tuple[type[Exception], str, Any]] = {
    "rows": (
        ValueError,
        "of the same rows and classes .* (11, 9), got target.input float32 (2, 3) and .* (9, 3)",
        TeacherHead(STATES[:2], OWN_HEAD),
    ),
    "classes": (
        ValueError,
        "same rows and classes .* target.linear_weight float32 (5, 3)",
        TeacherHead(STATES, OWN_HEAD[:5]),
    ),
    "features": (
        ValueError,
        "target.input and target.linear_weight .* (11, 3) and (9, 2); transpose target.linear_w",
        TeacherHead(STATES, OWN_HEAD[:, :2]),
    ),
    "a flat weight": (
        ValueError, "target.linear_weight must be 2-D .* (9,)", TeacherHead(STATES, OWN_HEAD[:, 0])
    ),
    "bias": (
        ValueError,
        "target.linear_bias must be 1-D .* (5,)",
        TeacherHead(STATES, OWN_HEAD, OWN_BIAS[:5]),
    ),
    "integers": (
        TypeError, "target.input must be real .* int32 (11, 2)", TeacherHead(INDEX, OWN_HEAD)
    ),
    "dtypes": (
        TypeError,
        "and target.linear_bias .* target.input is float64 and target.linear_weight is float32",
        TeacherHead(STATES.astype(np.float64), OWN_HEAD),
    ),
    "no weight": (
        TypeError, "target.linear_weight must be an array, got None", TeacherHead(STATES, None)
    ),
    "scale": (ValueError, "target.scale .* 0", TeacherHead(STATES, OWN_HEAD, scale=0.0)),
    "an array as scale": (
        TypeError,
        "target.scale .* make the TeacherHead inside",
        TeacherHead(STATES, OWN_HEAD, scale=np.ones(())),
    ),
    "logits": (
        ValueError, "target.logits must have input's shape (11, 9)", TeacherLogits(TEACHER[:2])
    ),
    "sparse": (ValueError, "target.index .* (11, K)", SparseTarget(INDEX[:2], SHARES[:2])),
    "class": (
        IndexError, "target.index .* got 9 at position (2, 1)",
        SparseTarget(np.where(np.arange(2 * N).reshape(N, 2) == 5, 9, INDEX), SHARES),
    ),
}  # fmt: skip


def converted(backend: Backend, target: Any) -> Any:
    parts = (backend.asarray(a) if isinstance(a, np.ndarray) and a.ndim else a for a in target)
    return type(target)(*parts)


@pytest.mark.parametrize("name", ERRORS)
def test_what_is_refused(backend: Backend, looks_at_labels: bool, name: str) -> None:
    error, said, target = ERRORS[name]
    if error is IndexError and not looks_at_labels:
        pytest.skip("labels are not looked at here")
    if name == "dtypes" and "float64" not in backend.floats:
        pytest.skip("there is no other dtype as wide")
    pattern = ".*".join(map(re.escape, said.split(" .* ")))
    with pytest.raises(error, match=pattern):
        of_head(converted(backend, target), *given(backend.asarray))


def test_the_head_of_a_teacher_is_for_linear_heads(backend: Backend) -> None:
    target = targets("head", backend.asarray)[0]
    logits = backend.asarray(TEACHER)
    for function in (polyce.cross_entropy, polyce.cross_entropy_with_grad):
        with pytest.raises(TypeError, match="call linear_cross_entropy, or pass TeacherLogits"):
            function(logits, target)
    with pytest.raises(TypeError, match=r"nll_loss holds .* call linear_cross_entropy"):
        polyce.nll_loss(logits, target)


@pytest.mark.only("strict", "torch")
@pytest.mark.parametrize("stranger", ["input", "linear_weight", "linear_bias"])
def test_libraries_do_not_mix(backend: Backend, stranger: str) -> None:
    target = targets("head", backend.asarray)[0]
    plain = getattr(targets("head", np.array)[0], stranger)
    with pytest.raises(TypeError, match=rf"input is .* and target\.{stranger} is numpy;"):
        of_head(target._replace(**{stranger: plain}), *given(backend.asarray))


@pytest.mark.only("torch")
@pytest.mark.parametrize("stranger", ["input", "linear_weight", "linear_bias"])
def test_devices_do_not_mix(torch: Any, stranger: str) -> None:
    target = targets("head", torch.tensor)[0]
    away = getattr(target, stranger).to("meta")
    with pytest.raises(TypeError, match=rf"input is on cpu and target\.{stranger} on meta"):
        of_head(target._replace(**{stranger: away}), *given(torch.tensor))


@pytest.mark.only("numpy")
def test_a_chunk_of_the_teacher_counts() -> None:
    hidden, head = np.zeros((4096, 8), np.float32), np.zeros((50_000, 8), np.float32)
    states, own = np.zeros((4096, 2), np.float64), np.zeros((50_000, 2), np.float64)
    rows = []
    for target in (np.zeros(4096, np.int64), TeacherHead(states, own, scale=0.5)):
        told = polyce.explain(hidden, head, target, function=polyce.linear_cross_entropy)
        assert told.chunks is not None
        rows.append(int(re.findall(r"of (\d+) rows: 4\d MB", told.chunks)[0]))
    # Its logits take 8 bytes, the student's 4.
    assert 3 * rows[1] <= rows[0] + 3 * 16
    assert "teacher's input float64 (4096, 2), linear_weight (50000, 2), scale 0.5" in told.call
    assert told.chosen == "native"


@pytest.mark.only("numpy", "dask")
@KINDS
def test_leading_axes_are_rows(backend: Backend, kind: str) -> None:
    target, plain = targets(
        kind, lambda a: a if a.ndim == 1 or len(a) == C else a.reshape(N, 1, -1)
    )
    target = converted(backend, target)
    got = of_head(target, *given(lambda a: backend.asarray(a[:, None] if len(a) == N else a)))
    want = of_product(plain, HIDDEN[:, None], HEAD, BIAS, axis=-1)
    np.testing.assert_allclose(backend.to_numpy(got), want, rtol=1e-5)
    got = of_head(target, *given(lambda a: backend.asarray(a[:, None] if len(a) == N else a)),
                  reduction="none")  # fmt: skip
    assert backend.to_numpy(got).shape == (N, 1)


@pytest.mark.only("dask")
def test_dask_looks_at_classes_that_have_values(backend: Backend) -> None:
    target = SparseTarget(np.where(INDEX == 0, 9, INDEX), backend.asarray(SHARES))
    with pytest.raises(IndexError, match=r"target\.index must lie in 0 to 8"):
        of_head(target, *given(backend.asarray))


# torch


@pytest.mark.only("torch")
@KINDS
def test_torch_differentiates_by_the_student(torch: Any, kind: str) -> None:
    target, plain = targets(kind, torch.tensor)

    def gradients(function: Any, target: Any, reduction: str, again: bool) -> Any:
        leaves = [a.double().requires_grad_() for a in given(torch.tensor)]
        loss, stats = function(target, *leaves, reduction=reduction, return_stats="entropy")
        total = loss.sum() + (stats.entropy.sum() if reduction == "none" else 0.0)
        found = torch.autograd.grad(total, leaves, create_graph=again)
        if again:
            found = torch.autograd.grad(sum((a**2).sum() for a in found), leaves)
        return [loss.detach(), *found]

    for reduction, again in (("mean", False), ("none", False), ("sum", True)):
        got = gradients(of_head, target, reduction, again)
        torch.testing.assert_close(got, gradients(of_product, plain, reduction, again), rtol=1e-5,
                                   atol=1e-6)  # fmt: skip
    hidden, head, bias = (a.double() for a in given(torch.tensor))
    for way in (torch.func.jacrev, torch.func.jacfwd):
        pairs = ((of_head, target), (of_product, plain))
        got, want = (way(lambda w, f=f, t=t: f(t, hidden, w, bias))(head) for f, t in pairs)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.only("torch")
@KINDS
def test_in_a_compiled_graph(torch: Any, kind: str) -> None:
    target, _ = targets(kind, torch.tensor)

    def step(target: Any, hidden: Any, head: Any, bias: Any) -> Any:
        loss, stats = of_head(target, hidden, head, bias, return_stats="entropy")
        rows = of_head(target, hidden, head, bias, reduction="none")
        return loss + (rows * rows).mean() + stats.entropy.mean()

    def run(function: Any) -> list[Any]:
        leaves = [a.requires_grad_() for a in given(torch.tensor)]
        loss = function(target, *leaves)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), run(step))


@pytest.mark.only("torch")
def test_a_teacher_is_multiplied_in_autocast_s_dtype(torch: Any) -> None:
    target, _ = targets("head", torch.tensor)
    arrays = given(torch.tensor)
    wide = of_head(target, *arrays)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = of_head(target, *(a.requires_grad_() for a in arrays))
    assert loss.dtype == torch.float32
    loss.backward()
    rounded = target._replace(**{k: getattr(target, k).bfloat16() for k in target._fields[:3]})
    narrow = of_head(rounded, *(a.bfloat16() for a in given(torch.tensor)))
    torch.testing.assert_close(loss.detach().bfloat16(), narrow)
    assert loss.item() != wide.item()


@pytest.mark.only("torch")
def test_a_target_that_requires_a_gradient_is_refused(torch: Any) -> None:
    for kind, names in (
        ("head", ("input", "linear_weight", "linear_bias")),
        ("logits", ("logits",)),
        ("sparse", ("probability",)),
    ):
        target, _ = targets(kind, torch.tensor)
        for name in names:
            needing = target._replace(**{name: getattr(target, name).clone().requires_grad_()})
            match = rf"target\.{name} requires grad; pass target\.{name}\.detach\(\)"
            with pytest.raises(TypeError, match=match):
                of_head(needing, *given(torch.tensor))
            with torch.no_grad():
                of_head(needing, *given(torch.tensor))
            polyce.linear_cross_entropy_with_grad(*given(torch.tensor)[:2], needing)


@pytest.mark.only("torch")
@KINDS
def test_few_rows_of_a_wide_head_lie_class_by_class(torch: Any, kind: str) -> None:
    hidden, head = torch.randn(N, 512) / 16, torch.randn(C, 512)
    target, plain = targets(kind, torch.tensor)
    loss, (of_input, *_) = polyce.linear_cross_entropy_with_grad(hidden, head, target)
    want, grad = polyce.cross_entropy_with_grad(hidden @ head.T, plain)
    torch.testing.assert_close([loss, of_input], [want, grad @ head])


@pytest.mark.only("torch")
def test_the_module_takes_them(torch: Any) -> None:
    import polyce.torch

    criterion = polyce.torch.LinearCrossEntropyLoss(F, C, bias=True)
    head = criterion.linear
    for kind in ("sparse", "logits", "head"):
        target, plain = targets(kind, torch.tensor)
        got = criterion(torch.tensor(HIDDEN), target)
        torch.testing.assert_close(
            got, of_product(plain, torch.tensor(HIDDEN), head.weight, head.bias)
        )


# jax, which compiles each call anew


@pytest.mark.only("jax-x32")
@pytest.mark.slow("jax-x32")
@KINDS
def test_jax_differentiates_by_the_student(kind: str) -> None:
    import jax
    import jax.numpy as jnp

    target, plain = targets(kind, jnp.asarray)
    if kind == "sparse":
        # NumPy's, of a dtype that jax without 64-bit types does not have.
        target = target._replace(index=INDEX.astype(np.int64))

    def step(function: Any, target: Any) -> Any:
        def total(*arrays: Any) -> Any:
            rows = function(target, *arrays, reduction="none")
            return function(target, *arrays) + (rows * rows).mean()

        return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(*given(jnp.asarray))

    got, want = step(of_head, target), step(of_product, plain)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.only("jax-x32")
def test_jax_has_no_derivative_by_the_target() -> None:
    import jax
    import jax.numpy as jnp

    for kind, name, reduction in (
        ("head", "linear_weight", "mean"),
        ("head", "input", "none"),
        ("logits", "logits", "mean"),
        ("sparse", "probability", "none"),
    ):
        target, _ = targets(kind, jnp.asarray)

        def loss(part: Any, target: Any = target, name: str = name, how: str = reduction) -> Any:
            changed = target._replace(**{name: part})
            return of_head(changed, *given(jnp.asarray), reduction=how).sum()

        with pytest.raises(TypeError, match=rf"target\.{name} is being differentiated"):
            jax.grad(loss)(getattr(target, name))
