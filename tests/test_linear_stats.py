"""Stats of a linear head and their gradients on torch, jax and dask. The grid has the numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import polyce

N, F, C = 7, 3, 5
RNG = np.random.default_rng(0)
ARRAYS = tuple(RNG.standard_normal(shape) for shape in ((N, F), (C, F), (C,)))
LABELS = np.array([0, -100, 4, 2, 1, 1, 3])
SOFT = RNG.dirichlet(np.ones(C), N)
EVERY = polyce.Stats._fields[:-1]
OF_STATS = RNG.standard_normal((2, N))
REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
TORCH = pytest.mark.only("torch", "torch-cuda")
JAX = pytest.mark.only("jax-x64")


def fused(x: Any, w: Any, b: Any, target: Any, **options: Any) -> Any:
    """Compute loss and stats by chunks of three rows, the last one of a single row."""
    return polyce.linear_cross_entropy(
        x, w, target, linear_bias=b, **{"chunk_size": 3, "return_stats": True} | options
    )


def unfused(x: Any, w: Any, b: Any, target: Any, **options: Any) -> Any:
    logits = x @ w.T if b is None else x @ w.T + b
    return polyce.cross_entropy(logits, target, axis=-1, **{"return_stats": True} | options)


BOTH = (fused, unfused)
# Which of loss, lse and entropy a gradient flows into.
FLOWS = [(True, True, True), (False, False, True), (True, True, False), (False, True, True)]


def objective(xp: Any, function: Any, flows: Any, target: Any, **options: Any) -> Any:
    """Return a number that depends on some of loss, lse and entropy, as a function of the arrays.

    Rows that do not count have nan there, which is not used.
    """

    def compute(x: Any, w: Any, b: Any) -> Any:
        loss, stats = function(x, w, b, target, **options)
        parts = [(loss * loss).sum()] if flows[0] else []
        of_rows = (stats.lse, stats.entropy)
        for values, scale, flow in zip(of_rows, OF_STATS, flows[1:], strict=True):
            if flow:
                terms = xp.asarray(scale) * values * values
                parts.append(xp.where(stats.valid, terms, 0.0).sum())
        return sum(parts)

    return compute


# torch


def leaves_of(torch: Any, dtype: str = "float64") -> list[Any]:
    return [torch.tensor(a, dtype=getattr(torch, dtype)).requires_grad_() for a in ARRAYS]


def targets_of(torch: Any) -> dict[str, Any]:
    return {"index": torch.tensor(LABELS), "probability": torch.tensor(SOFT)}


def gradients(torch: Any, function: Callable[..., Any], leaves: list[Any]) -> Any:
    found = function(*leaves)
    return found.detach(), torch.autograd.grad(found, leaves)


def close(torch: Any, got: Any, want: Any, rtol: float = 1e-11) -> None:
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol / 10, equal_nan=True)


@TORCH
@REDUCTIONS
@pytest.mark.parametrize("flows", FLOWS, ids=str)
def test_gradients_on_torch(torch: Any, reduction: str, flows: Any) -> None:
    for (kind, target), chosen in itertools.product(targets_of(torch).items(), (None, "reference")):
        options = {"reduction": reduction, "label_smoothing": 0.1, "logit_softcap": 3.0}
        if kind == "probability":
            options["sample_weight"] = torch.linspace(0.0, 2.0, N)
        leaves = leaves_of(torch)
        found = []
        for function in (partial(fused, implementation=chosen), unfused):
            compute = objective(torch, function, flows, target, **options)
            found.append(gradients(torch, compute, leaves))
        close(torch, *found)


@pytest.mark.only("triton")
def test_the_reference_takes_the_gradients_of_stats_from_triton(torch: Any) -> None:
    target, leaves = torch.tensor(LABELS), leaves_of(torch)
    functions = (partial(fused, implementation="triton", chunk_size=4), unfused)
    for flows in FLOWS[:2]:
        computes = (objective(torch, function, flows, target) for function in functions)
        close(torch, *(gradients(torch, compute, leaves) for compute in computes))


@TORCH
def test_which_stats_are_on_the_graph(torch: Any) -> None:
    for needed in itertools.product([False, True], repeat=3):
        leaves = [a.requires_grad_(need) for a, need in zip(leaves_of(torch), needed, strict=True)]
        loss, stats = fused(*leaves, torch.tensor(LABELS), return_stats=EVERY)
        assert loss.requires_grad == any(needed)
        names = [name for name, a in stats._asdict().items() if a.requires_grad]
        assert names == ["lse", "entropy"] * any(needed)
        assert stats.lse.shape == (N,)
        assert stats.lse[1].isnan()
        if any(needed):
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            alone = torch.autograd.grad(stats.lse.nansum(), wanted)
            plain = unfused(*leaves, torch.tensor(LABELS))[1].lse.nansum()
            close(torch, alone, torch.autograd.grad(plain, wanted))


@TORCH
@REDUCTIONS
def test_higher_derivatives_on_torch(torch: Any, reduction: str) -> None:
    target = torch.tensor(LABELS[:4])
    leaves = leaves_of(torch)

    def values(x: Any, w: Any, b: Any) -> Any:
        loss, stats = fused(x[:4], w, b, target, reduction=reduction)
        kept = stats.valid
        return loss, stats.lse[kept], stats.entropy[kept]

    # A gradient that was kept is rounded otherwise than one that is computed again.
    rounding = {"nondet_tol": 1e-12}
    assert torch.autograd.gradcheck(values, leaves, check_batched_grad=True, **rounding)
    assert torch.autograd.gradgradcheck(values, leaves)


@TORCH
def test_transforms_on_torch(torch: Any) -> None:
    arrays = [leaf.detach() for leaf in leaves_of(torch)]
    target = torch.tensor(LABELS)
    found = []
    for function in BOTH:
        compute = objective(torch, function, (True, True, True), target)
        found.append(
            (
                torch.func.grad(compute, (0, 1, 2))(*arrays),
                torch.func.jvp(compute, tuple(arrays), tuple(a.cos() for a in arrays)),
            )
        )
    close(torch, *found)


def products(torch: Any, call: Callable[[], Any]) -> int:
    """Count the products of 7 by 3 by 5 that torch was told to compute."""
    with torch.profiler.profile(record_shapes=True) as profile:
        call()
    terms = 0
    for event in profile.events():
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            a, b = event.input_shapes[event.name != "aten::mm" :][:2]
            terms += a[0] * a[1] * b[1]
    return round(terms / (N * F * C))


@pytest.mark.only("torch")
def test_only_gradients_into_stats_cost_products(torch: Any) -> None:
    x, w, _ = leaves_of(torch)
    target = torch.tensor(LABELS).clamp(0)

    def steps(asked: Any, reduction: str, flows: Any) -> int:
        def call() -> None:
            found = fused(x, w, None, target, return_stats=asked, reduction=reduction)
            loss, stats = found if asked else (found, None)
            total = loss.sum() if flows[0] else 0.0
            (total + stats.entropy.sum() if flows[1] else total).backward()

        return products(torch, call)

    for asked in (False, ("correct", "prediction"), True):
        assert steps(asked, "mean", (True, False)) == 3
        assert steps(asked, "none", (True, False)) == 4
    # The logits again, and both gradients of all: without a reduction, nothing was computed before.
    assert steps(True, "mean", (True, True)) == 6
    assert steps(True, "none", (True, True)) == 4
    assert steps(True, "none", (False, True)) == 4


@TORCH
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_small_gradients_in_16_bits(torch: Any, dtype: str) -> None:
    """Those of a mean over many rows, and of its entropies, would be 0 in float16."""
    rows, classes, narrow = 4096, 64, getattr(torch, dtype)
    where = "cuda" if torch.cuda.is_available() else "cpu"
    target = torch.randint(classes, (rows,), device=where)
    shapes = ((rows, F), (classes, F))
    wide = [torch.randn(s, device=where).to(narrow).double().requires_grad_() for s in shapes]
    leaves = [leaf.detach().to(narrow).requires_grad_() for leaf in wide]

    def total(x: Any, w: Any, function: Any) -> Any:
        loss, stats = function(x, w, None, target)
        return loss + 1e-3 * stats.entropy.mean()

    got = gradients(torch, partial(total, function=partial(fused, chunk_size=1000)), leaves)[1]
    want = gradients(torch, partial(total, function=unfused), wide)[1]
    for one, other in zip(got, want, strict=True):
        least = torch.finfo(narrow).smallest_normal * torch.finfo(narrow).eps
        allowed = 2 * torch.finfo(narrow).eps * float(other.abs().max()) + least
        assert float((one - other).abs().max()) <= allowed
        assert float((one != 0).double().mean()) > 0.99


@pytest.mark.only("torch")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_one_graph_on_torch(torch: Any, reduction: str) -> None:
    from torch_graphs import Graphs, compiled

    torch._dynamo.reset()
    target, leaves, graphs = torch.tensor(LABELS), leaves_of(torch), Graphs(torch)
    for flows in FLOWS[:2]:
        torch._dynamo.reset()
        functions = [
            objective(torch, function, flows, target, reduction=reduction) for function in BOTH
        ]
        found = gradients(torch, compiled(torch, functions[0], graphs), leaves)
        close(torch, found, gradients(torch, functions[1], leaves))
    assert graphs.names == [["polyce.linear_cross_entropy.default"]] * 2
    # Stats that are only looked at: the gradient kept by the forward pass serves.
    torch._dynamo.reset()
    graphs = Graphs(torch)

    def looks(x: Any, w: Any, b: Any) -> Any:
        loss, stats = fused(x, w, b, target, return_stats=("correct", "lse"), reduction="mean")
        return loss, stats.correct, stats.valid

    loss, correct, valid = compiled(torch, looks, graphs)(*leaves)
    want, stats = unfused(*leaves, target)
    close(torch, (loss, correct, valid), (want, stats.correct, stats.valid))
    close(torch, torch.autograd.grad(loss, leaves), torch.autograd.grad(want, leaves))
    assert graphs.backward == [[]]


@pytest.mark.only("torch")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_with_grad_in_a_graph_on_torch(torch: Any) -> None:
    from torch_graphs import Graphs, compiled

    torch._dynamo.reset()
    x, w, _ = (leaf.detach() for leaf in leaves_of(torch))
    target, of_stats, graphs = torch.tensor(LABELS), torch.tensor(OF_STATS), Graphs(torch)

    def both(x: Any, w: Any, of_lse: Any, of_entropy: Any) -> Any:
        return polyce.linear_cross_entropy_with_grad(
            x, w, target, chunk_size=3, return_stats=("lse", "entropy"),
            grad_stats={"lse": of_lse, "entropy": of_entropy},
        )  # fmt: skip

    found = compiled(torch, both, graphs)(x, w, *of_stats)
    close(torch, found, both(x, w, *of_stats))
    assert graphs.names == [["polyce.linear_cross_entropy.default"]]


@pytest.mark.only("torch")
def test_the_module_returns_stats(torch: Any) -> None:
    import polyce.torch

    module = polyce.torch.LinearCrossEntropyLoss(F, C, return_stats="correct", dtype=torch.float64)
    x, target = torch.tensor(ARRAYS[0]), torch.tensor(LABELS)
    loss, stats = module(x, target)
    want, expected = unfused(x, module.linear.weight, None, target, return_stats="correct")
    close(torch, loss.detach(), want.detach())
    assert stats.lse is None
    assert torch.equal(stats.correct, expected.correct)
    assert "return_stats='correct'" in repr(module)


# jax


@JAX
@pytest.mark.parametrize(
    ("reduction", "flows", "labels"),
    [("none", FLOWS[1], SOFT), ("mean", FLOWS[0], LABELS)],
    ids=["none", "mean"],
)
def test_gradients_on_jax(reduction: str, flows: Any, labels: Any) -> None:
    import jax

    arrays = [jax.numpy.asarray(a) for a in ARRAYS]
    options = {"reduction": reduction, "label_smoothing": 0.1}
    one, other = (
        jax.jit(
            jax.value_and_grad(
                objective(jax.numpy, function, flows, jax.numpy.asarray(labels), **options),
                (0, 1, 2),
            )
        )(*arrays)
        for function in BOTH
    )
    for got, want in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-12)


@JAX
def test_hessians_on_jax() -> None:
    import jax

    x, w, _ = (jax.numpy.asarray(a) for a in ARRAYS)
    tangent = jax.numpy.cos(w)

    def second(w: Any, function: Any) -> Any:
        def entropy(w: Any) -> Any:
            return function(x[:3], w, None, LABELS[[0, 2, 3]])[1].entropy.sum()

        return jax.jvp(jax.grad(entropy), (w,), (tangent,))[1]

    one, other = (jax.jit(partial(second, function=function))(w) for function in BOTH)
    for got, want in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-11)


@JAX
def test_stats_without_gradients_cost_no_second_pass_on_jax() -> None:
    import jax

    from test_linear_jax import products as multiplied

    arrays = [jax.numpy.asarray(a) for a in ARRAYS]

    def loss(*given: Any, asked: Any) -> Any:
        return fused(*given, jax.numpy.asarray(LABELS), return_stats=asked)

    for asked, most in ((("correct", "prediction"), 3), (("entropy",), 5)):
        step = jax.grad(partial(loss, asked=asked), (0, 1), has_aux=True)
        # Of the scan of a checkpoint, unused products are traced too.
        assert multiplied(jax, step, *arrays) <= most
    _, stats = jax.jit(partial(loss, asked=("correct",)))(*arrays)
    want = unfused(*ARRAYS, LABELS)[1]
    np.testing.assert_array_equal(stats.correct, want.correct)
    np.testing.assert_array_equal(stats.valid, want.valid)


# dask


@pytest.mark.only("dask")
def test_blocks_on_dask() -> None:
    import dask
    import dask.array as da

    x, w, b = ARRAYS
    given = {"reduction": "mean", "return_stats": EVERY, "grad_output": 0.5, "chunk_size": 2}
    of_lse, of_entropy = OF_STATS
    want, wanted, stats = polyce.linear_cross_entropy_with_grad(
        x, w, LABELS, linear_bias=b, grad_stats={"lse": of_lse, "entropy": of_entropy}, **given
    )
    cut = {"lse": da.from_array(of_lse, chunks=4), "entropy": of_entropy}
    lazy = [da.from_array(a, chunks=chunks) for a, chunks in ((x, (3, 2)), (w, 2), (b, 2))]
    labels = da.from_array(LABELS, chunks=2)
    loss, found, found_stats = polyce.linear_cross_entropy_with_grad(
        *lazy[:2], labels, linear_bias=lazy[2], grad_stats=cut, **given
    )
    assert {type(each) for each in (loss, *found, *found_stats)} == {da.Array}
    assert found_stats.correct.chunks == lazy[0].chunks[:1]
    for got, expected in zip(
        dask.compute(loss, *found, *found_stats), (want, *wanted, *stats), strict=True
    ):
        assert got.dtype == expected.dtype
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)
    loss, some = polyce.linear_cross_entropy(*lazy[:2], labels, return_stats="correct")
    assert [name for name, a in some._asdict().items() if a is not None] == ["correct", "valid"]
    plain = polyce.linear_cross_entropy(x, w, LABELS, return_stats="correct")[1]
    np.testing.assert_array_equal(some.correct.compute(), plain.correct)


@pytest.mark.only("dask")
def test_a_block_runs_the_best_path_for_gradients_of_stats(monkeypatch: pytest.MonkeyPatch) -> None:
    import dask.array as da

    from polyce.implementations.native import path

    seen, original = [], path.run

    def spy(own: Any, problem: Any, *others: Any, **options: Any) -> Any:
        seen.append(problem.grad_stats)
        return original(own, problem, *others, **options)

    monkeypatch.setattr(path, "run", spy)
    x, w, _ = ARRAYS
    _, found, _ = polyce.linear_cross_entropy_with_grad(
        da.from_array(x), w, LABELS, return_stats="lse", grad_stats={"lse": OF_STATS[0]}
    )
    found[0].compute(scheduler="synchronous")
    assert seen == [("lse",)]
