"""A linear head on torch's graph, against the unfused loss: the logits of F.linear, all at once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

import polyce
from conftest import FULL

pytestmark = pytest.mark.only("torch", "torch-cuda")

N, F, C = 7, 3, 5
REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
NARROW = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


def fused(x: Any, w: Any, b: Any, target: Any, **options: Any) -> Any:
    """Compute the loss by chunks of three rows, the last one of a single row."""
    return polyce.linear_cross_entropy(x, w, target, linear_bias=b, **{"chunk_size": 3} | options)


def unfused(x: Any, w: Any, b: Any, target: Any, **options: Any) -> Any:
    """Compute torch's own loss, or polyce's for what torch's does not have."""
    import torch

    options.pop("chunk_size", None)
    logits = torch.nn.functional.linear(x, w, b)
    if {"sample_weight", "normalizer", "z_loss", "logit_scale", "logit_softcap"} & options.keys():
        return polyce.cross_entropy(logits, target, axis=-1, **options)
    return torch.nn.functional.cross_entropy(logits, target, **options)


BOTH = (fused, unfused)


def leaves_of(torch: Any, rows: int, features: int, classes: int, dtype: str) -> list[Any]:
    arrays = torch.randn(rows, features), torch.randn(classes, features), torch.randn(classes)
    return [array.to(getattr(torch, dtype)).requires_grad_() for array in arrays]


def data(
    torch: Any, kind: str = "index", dtype: str = "float64", rows: int = N, *, bias: bool = True
) -> tuple[list[Any], Any]:
    """Make leaves, and a target whose second row is ignored."""
    leaves = leaves_of(torch, rows, F, C, dtype)
    target = torch.randint(C, (rows,))
    target[1:2] = -100
    if kind == "probability":
        target = torch.softmax(torch.randn(rows, C), 1).to(leaves[0].dtype)
    return leaves if bias else [*leaves[:2], None], target


def widen(arrays: list[Any], dtype: Any) -> list[Any]:
    return [array.detach().to(dtype, copy=True).requires_grad_() for array in arrays]


def of(function: Any, target: Any, **options: Any) -> Callable[..., Any]:
    """Return the loss as a function of input, weight and bias."""
    return lambda *leaves: function(*leaves, target, **options)


def answer(torch: Any, function: Callable[..., Any], leaves: Any, by: Any = None) -> list[Any]:
    """Return the loss, and the gradients of its sum for the leaves that require one."""
    loss = function(*leaves)
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    by = torch.ones_like(loss) if by is None else by
    return [loss.detach(), *torch.autograd.grad(loss, wanted, by)]


def agree(torch: Any, compute: Callable[[Any], Any], rtol: float = 1e-12) -> None:
    """Check that the fused and the unfused loss agree."""
    got, want = (compute(function) for function in BOTH)
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol / 10, equal_nan=True)


def errors(got: list[Any], want: list[Any]) -> list[float]:
    """Return the relative error of each array, in the norm."""
    pairs = zip(got, want, strict=True)
    return [float((a.double() - b).norm() / b.norm()) for a, b in pairs]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weighted": {"label_smoothing": 0.1, "weight": True},
    "sampled": {"sample_weight": True, "normalizer": 3.0, "z_loss": 0.1},
    "capped": {"logit_softcap": 2.0, "logit_scale": 0.5, "z_loss": 0.1, "weight": True},
}


def pick(torch: Any, name: str, reduction: str, rows: int = N) -> dict[str, Any]:
    options = OPTIONS[name] | {"reduction": reduction}
    for key, size in (("weight", C), ("sample_weight", rows)):
        if options.get(key):
            options[key] = torch.rand(size, dtype=torch.float64)
    if reduction != "mean":
        options.pop("normalizer", None)
    return options


CASES = list(
    itertools.product(["none", "mean", "sum"], ["index", "probability"], [False, True], OPTIONS)
)


@pytest.mark.parametrize("case", CASES if FULL else CASES[::7], ids=str)
def test_derivatives_agree_with_differences(torch: Any, case: tuple[Any, ...]) -> None:
    reduction, kind, bias, name = case
    leaves, target = data(torch, kind, rows=4, bias=bias)
    options = pick(torch, name, reduction, rows=4)

    def loss(x: Any, w: Any, b: Any = None) -> Any:
        return fused(x, w, b, target, **options)

    wanted = leaves if bias else leaves[:2]
    assert torch.autograd.gradcheck(loss, wanted, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(loss, wanted, check_batched_grad=True)


@REDUCTIONS
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_of_the_product(torch: Any, name: str, kind: str, reduction: str) -> None:
    options = pick(torch, name, reduction)
    rows = torch.randn(N, dtype=torch.float64)
    by = rows if reduction == "none" else rows[0]
    for bias, chosen in itertools.product([False, True], [None, "reference"]):
        leaves, target = data(torch, kind, bias=bias)
        got = answer(torch, of(fused, target, **options, implementation=chosen), leaves, by)
        want = answer(torch, of(unfused, target, **options), leaves, by)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@REDUCTIONS
@pytest.mark.parametrize("value", [0.0, -1.0, 2.0**16, math.inf, math.nan])
def test_any_gradient_of_the_loss(torch: Any, reduction: str, value: float) -> None:
    leaves, target = data(torch)
    expanded = torch.full((1,), value, dtype=torch.float64).expand(N)
    strided = value * torch.linspace(1, 2, 2 * N, dtype=torch.float64)[::2]
    for by in (expanded, strided) if reduction == "none" else (expanded[0],):
        got, want = (answer(torch, of(f, target, reduction=reduction), leaves, by) for f in BOTH)
        # The second row is ignored.
        assert [a[1][1].tolist() for a in (got, want)] == [[0.0] * F] * 2
        # torch subtracts infinities on the way, which gives nan.
        for found in (got, want) if value == math.inf else ():
            found[:] = [torch.where(a.isfinite(), a, 0.0) for a in found]
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("how", ["plain", "scaled", "with_grad", "autocast"])
@NARROW
def test_a_mean_over_many_rows_in_16_bits(torch: Any, dtype: str, how: str) -> None:
    """Many entries of the logits' gradient, divided by the number of rows, would be 0."""
    rows, classes, narrow = 4096, 64, getattr(torch, dtype)
    # float16 has no 2**16, so a float16 loss cannot be scaled by it.
    scale = {"plain": 1.0, "scaled": 2.0**15}.get(how, 2.0**16)
    target = torch.randint(classes, (rows,))
    leaves = leaves_of(torch, rows, F, classes, dtype)
    wide = widen(leaves, torch.float64)
    want = [a * scale for a in answer(torch, of(unfused, target), wide)[1:]]
    if how == "with_grad":
        x, w, b = leaves
        _, got = polyce.linear_cross_entropy_with_grad(
            x, w, target, linear_bias=b, grad_output=scale, chunk_size=1000
        )
    else:
        leaves = widen(leaves, torch.float32) if how == "autocast" else leaves
        with torch.autocast("cpu", dtype=narrow, enabled=how == "autocast"):
            loss = fused(*leaves, target, chunk_size=1000)
        got = torch.autograd.grad(loss * scale, leaves)
    for one, other, leaf in zip(got, want, leaves, strict=True):
        assert one.dtype == leaf.dtype
        # bfloat16 rounds the logits and their gradient; on a CPU float16 is computed in float32.
        eps = torch.finfo(narrow).eps * (2 if dtype == "bfloat16" else 1)
        least = torch.finfo(leaf.dtype).smallest_normal * torch.finfo(leaf.dtype).eps
        assert float((one - other).abs().max()) <= eps * float(other.abs().max()) + least
        assert float((one != 0).double().mean()) > 0.99


@REDUCTIONS
def test_a_graph_that_is_kept_serves_again(torch: Any, reduction: str) -> None:
    leaves, target = data(torch)
    answers = []
    for function in BOTH:
        loss = function(*leaves, target, reduction=reduction)
        found: list[Any] = []
        for factor, keep in ((1.0, True), (3.0, True), (1.0, False)):
            by = torch.full_like(loss, factor)
            found += torch.autograd.grad(loss, leaves, by, retain_graph=keep)
        # Compared at the end: results that were returned before must not change.
        answers.append(found)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(loss.sum(), leaves)
    torch.testing.assert_close(*answers, rtol=1e-12, atol=1e-13)


@REDUCTIONS
def test_gradients_add_up_in_parameters(torch: Any, reduction: str) -> None:
    answers = []
    for function in BOTH:
        torch.manual_seed(0)
        embedding = torch.nn.Embedding(C, F, dtype=torch.float64)
        layer = torch.nn.Linear(F, F, dtype=torch.float64)
        for _ in range(2):
            # The head shares its weight with the embedding.
            words = torch.randint(C, (2, N))
            hidden = layer(embedding(words[0]))
            loss = function(hidden, embedding.weight, None, words[1], reduction=reduction)
            (loss.square().sum() / 2).backward()
        answers.append([p.grad for p in (*embedding.parameters(), *layer.parameters())])
    torch.testing.assert_close(*answers, rtol=1e-12, atol=1e-13)


def test_modes_without_a_gradient(torch: Any) -> None:
    leaves, target = data(torch)
    want = unfused(*leaves, target).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            value, made = fused(*leaves, target), [leaf * 1 for leaf in leaves]
            torch.testing.assert_close(fused(*made, target), want)
        assert not value.requires_grad
        assert value.is_inference() == (mode is torch.inference_mode)
        torch.testing.assert_close(value, want)
    loss, gradients = polyce.linear_cross_entropy_with_grad(*leaves[:2], target)
    assert not any(a.requires_grad for a in (loss, *gradients[:2]))


@REDUCTIONS
@pytest.mark.parametrize("number", range(3))
def test_a_changed_tensor_is_noticed(torch: Any, number: int, reduction: str) -> None:
    leaves, target = data(torch)
    loss = fused(*leaves, target, reduction=reduction)
    with torch.no_grad():
        leaves[number].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@REDUCTIONS
def test_layouts(torch: Any, reduction: str) -> None:
    leaves, target = data(torch)
    x, w, b = (leaf.detach() for leaf in leaves)
    wide = torch.randn(2 * N, 2 * F, dtype=torch.float64)
    for *arrays, labels in (
        (wide[::2, ::2], w.t().contiguous().t(), b, torch.randint(C, (2 * N,))[::2]),
        (x.t().contiguous().t(), wide[:C, 1 : F + 1], wide[0, :C], target),
        (x[:1].expand(N, F), w[:, :1].expand(C, F), b[:1].expand(C), target[:1].expand(N)),
        (x.as_strided((N, F), (2, 3)), w.as_strided((C, F), (1, 2)), b, target),
        (x.view(N, 1, F).transpose(0, 1), w, b, target.view(1, N)),
    ):
        # The tensors themselves, and views of a leaf, which then gets the gradient.
        plain = [array.detach().requires_grad_() for array in arrays]
        bases = [torch.stack((array, array), -1).requires_grad_() for array in arrays]
        for given, views in ((plain, plain), (bases, [base[..., 1] for base in bases])):
            answers = []
            for function in BOTH:
                x, *head = views
                x = x.reshape(-1, F) if function is unfused else x
                loss = function(x, *head, labels.reshape(x.shape[:-1]), reduction=reduction)
                answers.append(torch.autograd.grad(loss.square().sum(), given, retain_graph=True))
            torch.testing.assert_close(*answers, rtol=1e-12, atol=1e-13)


def test_the_normalizer_differentiates(torch: Any) -> None:
    leaves, target = data(torch)
    frozen = [leaf.detach() for leaf in leaves]
    for dtype in (torch.float64, torch.float32):
        normalizer = torch.tensor(4.0, dtype=dtype, requires_grad=True)
        for given, wanted in (
            (leaves, [*leaves, normalizer]),
            (leaves, [normalizer]),
            (frozen, [normalizer]),
        ):
            losses = [function(*given, target, normalizer=normalizer) for function in BOTH]
            torch.testing.assert_close(*losses)
            torch.testing.assert_close(*(torch.autograd.grad(loss, wanted) for loss in losses))


@pytest.mark.parametrize("name", ["target", "weight", "sample_weight"])
def test_what_has_no_gradient_is_refused(torch: Any, name: str) -> None:
    leaves, target = data(torch, "probability")
    given = {"target": target, "weight": torch.ones(C), "sample_weight": torch.ones(N)}
    given = {key: array.double().requires_grad_(key == name) for key, array in given.items()}
    with pytest.raises(TypeError, match=rf"gradients of input, .* {name} requires grad; pass"):
        fused(*leaves, **given)
    with torch.no_grad():
        agree(torch, lambda function: function(*leaves, **given))
    assert not polyce.linear_cross_entropy_with_grad(*leaves[:2], **given)[0].requires_grad


@REDUCTIONS
def test_a_gradient_that_is_differentiated_and_several_at_once(torch: Any, reduction: str) -> None:
    leaves, target = data(torch)
    by = (torch.eye(N) if reduction == "none" else torch.tensor([1.0, 2.0])).double()

    def compute(function: Any) -> Any:
        loss = function(*leaves, target, reduction=reduction)
        many = torch.autograd.grad(loss, leaves, by, is_grads_batched=True, retain_graph=True)
        first = torch.autograd.grad(loss.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        return loss.detach(), many, [g.detach() for g in first], second

    agree(torch, compute, rtol=1e-11)


@NARROW
@REDUCTIONS
def test_autocast(torch: Any, reduction: str, dtype: str) -> None:
    (leaves, target), narrow = data(torch, dtype="float32", rows=64), getattr(torch, dtype)
    want = answer(torch, of(unfused, target, reduction=reduction), widen(leaves, torch.float64))
    found = []
    for function, around_backward in itertools.product(BOTH, (False, True)):
        with torch.autocast("cpu", dtype=narrow):
            loss = function(*leaves, target, reduction=reduction, chunk_size=20)
        with torch.autocast("cpu", dtype=narrow, enabled=around_backward):
            got = [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]
        assert {array.dtype for array in got} == {torch.float32}
        found.append(errors(got, want))
    for ours, theirs in zip(found[0], found[2], strict=True):
        assert ours < max(2 * theirs, torch.finfo(narrow).eps)
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@REDUCTIONS
def test_every_dtype(torch: Any, reduction: str, dtype: str) -> None:
    leaves, target = data(torch, dtype=dtype, rows=64)
    got = answer(torch, of(fused, target, reduction=reduction), leaves)
    assert {array.dtype for array in got} == {leaves[0].dtype}
    wide = widen(leaves, torch.float64)
    want = answer(torch, of(unfused, target, reduction=reduction), wide)
    assert max(errors(got, want)) < 2 * torch.finfo(leaves[0].dtype).eps


# What torch's own linear_cross_entropy gets wrong


@pytest.mark.parametrize("how", ["index", "index sample_weight", "probability sample_weight"])
@REDUCTIONS
def test_nothing_counts(torch: Any, reduction: str, how: str) -> None:
    kind, *weighted = how.split()
    leaves, target = data(torch, kind)
    options = {"reduction": reduction}
    if weighted:
        options["sample_weight"] = torch.zeros(N, dtype=torch.float64)
    else:
        target.fill_(-100)
    zeros = [torch.zeros_like(leaf) for leaf in leaves]
    same = partial(torch.testing.assert_close, rtol=0.0, atol=0.0)
    for name, graph in itertools.product((None, "reference"), (False, True)):
        loss = fused(*leaves, target, **options, implementation=name)
        assert loss.isnan().all() if reduction == "mean" else not loss.any()
        same(list(torch.autograd.grad(loss.sum(), leaves, create_graph=graph)), zeros)
    arrays = [leaf.detach() for leaf in leaves]
    for found in torch.func.jacrev(of(fused, target, **options), (0, 1, 2))(*arrays):
        assert not found.any()


@REDUCTIONS
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_left_out_rows_may_hold_anything(torch: Any, value: float, reduction: str) -> None:
    leaves, target = data(torch)
    clean = widen(leaves, torch.float64)
    with torch.no_grad():
        leaves[0][1], clean[0][1] = value, 0.0
    answers = []
    for function, given in ((fused, leaves), (unfused, clean)):
        loss = of(function, target, reduction=reduction)
        first = torch.autograd.grad(loss(*given).square().sum(), given, create_graph=True)
        found = [answer(torch, loss, given), list(first)]
        found.append(list(torch.autograd.grad(sum(g.square().sum() for g in first), given)))
        arrays = [leaf.detach() for leaf in given]
        for transform in (torch.func.jacrev, torch.func.jacfwd):
            found.append(list(transform(loss, (0, 1, 2))(*arrays)))
        answers.append(found)
    torch.testing.assert_close(*answers)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_number_of_rows_and_classes(torch: Any, dtype: str) -> None:
    tolerance = 1e-5 if dtype == "float32" else 0.1
    sizes = [(5, 3, classes) for classes in (1, 2, 63, 65, 129, 257)]
    sizes += [(rows, 3, 5) for rows in (0, 1, 2)] + [(1, 1, 1), (3, 0, 4), (0, 0, 1), (0, 3, 0)]
    for rows, features, classes in sizes:
        leaves = leaves_of(torch, rows, features, classes, dtype)
        target = torch.randint(max(classes, 1), (rows,))
        for reduction in ("none", "mean", "sum"):
            got = answer(torch, of(fused, target, reduction=reduction), leaves)
            exact = widen(leaves, torch.float64)
            want = answer(torch, of(unfused, target, reduction=reduction), exact)
            want = [array.to(leaves[0].dtype) for array in want]
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)
