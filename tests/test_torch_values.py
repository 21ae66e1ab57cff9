"""Derivatives of lse, entropy and log-probabilities on torch, against differences and paper."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import polyce
from conftest import FULL
from polyce.implementations import registry
from torch_graphs import BACKWARD, Graphs

pytestmark = pytest.mark.only("torch")

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "capped": {"logit_softcap": 2.0, "logit_scale": 0.5, "z_loss": 0.1},
}
KINDS = ("index", "probability")
PATHS = ("native", "reference")
CASES = list(itertools.product(KINDS, ("none", "mean"), OPTIONS, ("random", "zero"), PATHS))


def of_values(torch: Any, kind: str, reduction: str, option: str, path: str) -> Callable[..., Any]:
    """Return a function of logits: the sum of loss, lse and entropy of its rows, each weighed."""
    target = torch.tensor([0, -100, 3])
    if kind == "probability":
        target = torch.softmax(torch.randn((3, 4), dtype=torch.float64), 1)
    weights = torch.randn((2, 3), dtype=torch.float64)
    sampled = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    if kind == "probability":
        sampled[1] = 0.0

    def function(x: Any) -> Any:
        loss, stats = polyce.cross_entropy(
            x, target, reduction=reduction, return_stats=True, sample_weight=sampled,
            implementation=None if path == "native" else path, **OPTIONS[option],
        )  # fmt: skip
        assert not stats.prediction.requires_grad
        values = torch.stack([stats.lse, stats.entropy]) * weights
        return loss.sum() + torch.where(stats.valid, values, 0.0).sum()

    return function


@pytest.mark.parametrize("case", CASES if FULL else CASES[::5], ids="-".join)
def test_all_derivatives_agree_with_differences(torch: Any, case: tuple[str, ...]) -> None:
    kind, reduction, option, at, path = case
    function = of_values(torch, kind, reduction, option, path)
    x = torch.zeros((3, 4), dtype=torch.float64)
    if at == "random":
        x = 2 * torch.randn((3, 4), dtype=torch.float64)
    x.requires_grad_()
    assert torch.autograd.gradcheck(
        function,
        x,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )
    assert torch.autograd.gradgradcheck(
        function, x, check_fwd_over_rev=True, check_batched_grad=True
    )


@pytest.mark.parametrize("path", PATHS)
def test_only_what_is_used_has_a_gradient(
    torch: Any, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn((3, 4), dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 1, 3])
    plain = polyce.cross_entropy(x, y, implementation=path)
    (want,) = torch.autograd.grad(plain, x)
    loss, stats = polyce.cross_entropy(x, y, return_stats=True, implementation=path)
    assert stats.lse.requires_grad
    assert stats.entropy.requires_grad
    softmax = torch.softmax(x.detach(), 1)
    (got,) = torch.autograd.grad(stats.lse.sum(), x, retain_graph=True)
    torch.testing.assert_close(got, softmax)
    (got,) = torch.autograd.grad(stats.entropy.sum(), x, retain_graph=True)
    surprise = -torch.log(softmax)
    slope = surprise - (softmax * surprise).sum(1, keepdim=True)
    torch.testing.assert_close(got, softmax * slope)

    def fail(*_: Any) -> None:
        raise AssertionError("computed for a gradient that nobody wants")

    from polyce.formula import rowgradient

    monkeypatch.setattr(rowgradient, "_stats_gradient", fail)
    (got,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(got, want, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("path", PATHS)
def test_logits_without_a_gradient_give_stats_without_one(torch: Any, path: str) -> None:
    x = torch.randn((3, 4))
    target = torch.softmax(torch.randn((3, 4)), 1).requires_grad_()
    loss, stats = polyce.cross_entropy(x, target, return_stats=True, implementation=path)
    assert loss.requires_grad
    assert not stats.lse.requires_grad
    assert not stats.entropy.requires_grad


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_of_narrow_logits_are_rounded_once(torch: Any, dtype: str, path: str) -> None:
    x = (3 * torch.randn((5, 9))).to(getattr(torch, dtype)).requires_grad_()
    y = torch.arange(5)

    def total(x: Any, path: str | None) -> Any:
        loss, stats = polyce.cross_entropy(
            x, y, reduction="none", return_stats=True, implementation=path
        )
        return loss.double().sum() - 2.0 * stats.entropy.double().sum() + stats.lse.double().sum()

    (got,) = torch.autograd.grad(total(x, path), x)
    wide = x.detach().double().requires_grad_()
    softmax = torch.softmax(wide, 1)
    entropy = -(softmax * torch.log_softmax(wide, 1)).sum()
    exact = torch.nn.functional.cross_entropy(wide, y, reduction="sum") - 2.0 * entropy
    (want,) = torch.autograd.grad(exact + torch.logsumexp(wide, 1).sum(), wide)
    assert got.dtype == x.dtype
    unit = torch.finfo(x.dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=0.51 * unit + 1e-6, atol=1e-6)


def test_rows_that_do_not_count_pass_nothing_back(torch: Any) -> None:
    x = torch.randn((3, 4)).requires_grad_()
    with torch.no_grad():
        x[1] = math.nan
        x[2, 0] = math.inf
    y = torch.tensor([0, -100, 1])
    for path in PATHS:
        _, stats = polyce.cross_entropy(x, y, return_stats=True, implementation=path)
        (grad,) = torch.autograd.grad((stats.lse + stats.entropy).sum(), x)
        assert grad[0].isfinite().all()
        assert grad[1].tolist() == [0.0] * 4
        assert grad[2].isnan().all()


def test_transforms(torch: Any) -> None:
    xs = torch.randn((2, 3, 4), dtype=torch.float64)
    function = of_values(torch, "index", "none", "plain", "reference")
    single = torch.stack([torch.func.grad(function)(x) for x in xs])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(function))(xs), single)
    leaf = xs[0].clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(function(leaf), leaf)[0], single[0])
    hessian = torch.autograd.functional.hessian(function, xs[0])
    torch.testing.assert_close(torch.func.hessian(function)(xs[0]), hessian)
    tangent = torch.randn_like(xs[0])
    _, along = torch.func.jvp(function, (xs[0],), (tangent,))
    torch.testing.assert_close(along, (single[0] * tangent).sum())


def test_stats_that_are_only_looked_at_under_transforms(torch: Any) -> None:
    x, y = torch.randn((2, 3), dtype=torch.float64), torch.tensor([0, -100])

    def loss(x: Any) -> Any:
        # All of them: torch's transforms return tensors only, not None.
        return polyce.cross_entropy(x, y, return_stats=polyce.Stats._fields[:-1])

    gradient, stats = torch.func.grad(loss, has_aux=True)(x)
    plain = torch.func.grad(lambda x: polyce.cross_entropy(x, y))(x)
    torch.testing.assert_close(gradient, plain)
    _, want = loss(x)
    for name, found, expected in zip(stats._fields, stats, want, strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True, msg=name)
    _, along = torch.func.jvp(lambda x: loss(x)[1].brier, (x,), (torch.ones_like(x),))
    assert along.tolist() == [0.0, 0.0]


def test_the_stats_beside_the_target_have_no_gradient(torch: Any) -> None:
    x, y = torch.randn((300, 70), requires_grad=True), torch.arange(300) % 70

    def stats_of(x: Any) -> tuple[Any, ...]:
        _, stats = polyce.cross_entropy(x, y, return_stats=("lse", "brier", "top_probability"))
        return stats.lse, stats.brier, stats.top_probability

    module = torch.nn.Module()
    module.forward = stats_of
    exported = torch.export.export(module, (x,)).module()
    torch._dynamo.reset()
    compiled = torch.compile(stats_of, backend="aot_eager", fullgraph=True)
    for function in (stats_of, compiled, exported):
        assert [a.requires_grad for a in function(x)] == [True, False, False]


# Few logits are left to the compiler, many go to a kernel.
@pytest.mark.parametrize("name", ["policy", "values", "kernel"])
def test_compiled_calls(torch: Any, name: str) -> None:
    shape = (70, 300) if name == "kernel" else (6, 5)
    x = torch.randn(shape).requires_grad_()
    y = torch.randint(shape[1], shape[:1])

    def policy(x: Any) -> Any:
        loss, stats = polyce.cross_entropy(x, y, reduction="none", return_stats="entropy")
        return (loss - 0.1 * stats.entropy).mean()

    def values(x: Any) -> Any:
        index = torch.stack([y, torch.zeros_like(y)], 1)
        chosen = polyce.log_prob(x, index).sum() + polyce.log_prob(x, y).sum()
        return chosen + polyce.entropy(x).sum()

    function = values if name == "values" else policy
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    value, want = compiled(x), function(x)
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(torch.autograd.grad(value, x), torch.autograd.grad(want, x))


@pytest.mark.parametrize("takes", [False, True])
def test_a_kernel_in_the_graph_takes_them_if_it_can(
    torch: Any, takes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from polyce.graphs import torch_calls
    from polyce.implementations import torch_ops
    from polyce.implementations.native import torch as native

    kernels = native.KERNELS._replace(takes_grad_stats=takes)
    if takes:
        kernels = kernels._replace(backward=torch_calls.REFERENCE.backward)
    path = dataclasses.replace(registry.find("native"), torch_kernels=lambda: kernels)
    monkeypatch.setattr(registry, "TABLE", (path, *registry.TABLE))
    monkeypatch.setattr(torch_ops, "_known", {})
    x, y = torch.randn((70, 300)).requires_grad_(), torch.randint(300, (70,))

    def function(x: Any) -> Any:
        loss, stats = polyce.cross_entropy(x, y, return_stats="entropy")
        return loss - stats.entropy.mean()

    torch._dynamo.reset()
    graphs = Graphs(torch)
    value = torch.compile(function, backend=graphs, fullgraph=True)(x)
    (got,) = torch.autograd.grad(value, x)
    assert [[name for name, _ in calls] for calls in graphs.backward] == [[BACKWARD] * takes]
    torch.testing.assert_close(got, torch.autograd.grad(function(x), x)[0])


def test_compiled_calls_with_grad_stats(torch: Any) -> None:
    x, y, of_lse = torch.randn((6, 5)), torch.arange(5).repeat(2)[:6], torch.randn(6)

    def function(x: Any, of_lse: Any) -> Any:
        return polyce.cross_entropy_with_grad(x, y, return_stats="lse", grad_stats={"lse": of_lse})

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, of_lse), function(x, of_lse))


def test_exported_calls(torch: Any) -> None:
    class Policy(torch.nn.Module):
        def forward(self, x: Any, y: Any) -> Any:
            loss, stats = polyce.cross_entropy(x, y, reduction="none", return_stats="entropy")
            return loss - stats.entropy, polyce.log_prob(x, y[:, None]), polyce.entropy(x)

    x, y = torch.randn((6, 5)), torch.arange(6) % 5
    program = torch.export.export(Policy(), (x, y))
    torch.testing.assert_close(program.module()(x, y), Policy()(x, y))


@pytest.mark.parametrize("path", PATHS)
def test_a_backward_pass_in_place(torch: Any, path: str) -> None:
    y = torch.tensor([0, -100, 3])

    def gradient(**options: Any) -> Any:
        torch.manual_seed(1)
        leaf = torch.randn((3, 4)).requires_grad_()
        x = leaf * 1.0
        loss, stats = polyce.torch.cross_entropy(
            x, y, reduction="none", return_stats=True, implementation=path, **options
        )
        (loss.sum() + stats.lse[[0, 2]].sum() - 3.0 * stats.entropy[[0, 2]].sum()).backward()
        return leaf.grad, x.detach()

    want, _ = gradient()
    got, logits = gradient(inplace_backward=True)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(logits, want)


INDEX = {"one": [0, -100, 3], "several": [[0, 1, 1], [-100, -100, -100], [3, -100, 0]]}


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("name", INDEX)
def test_derivatives_of_log_prob_agree_with_differences(
    torch: Any, name: str, softcap: float | None
) -> None:
    index = torch.tensor(INDEX[name])

    def function(x: Any) -> Any:
        return polyce.log_prob(x, index, logit_softcap=softcap, logit_scale=1.5)

    for logits in (2 * torch.randn((3, 4)), torch.zeros((3, 4))):
        x = logits.double().requires_grad_()
        assert torch.autograd.gradcheck(function, x, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(function, x, check_fwd_over_rev=True)


def test_derivatives_of_the_entropy_agree_with_differences(torch: Any) -> None:
    for logits in (2 * torch.randn((3, 4)), torch.zeros((3, 4))):
        x = logits.double().requires_grad_()
        assert torch.autograd.gradcheck(
            polyce.entropy, x, check_forward_ad=True, check_batched_grad=True
        )
        assert torch.autograd.gradgradcheck(polyce.entropy, x, check_fwd_over_rev=True)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_gradients_of_several_log_probabilities_keep_their_digits(
    torch: Any, softcap: float | None
) -> None:
    from polyce.testing import exact_answer

    margins = np.array([0.0, 5.0, 20.0, 40.0])
    logits = np.random.default_rng(3).normal(0.0, 1.0, (4, 50)).astype(np.float32)
    logits[:, 7] = logits.max(1) + margins
    index = np.array([[7, 7, 2]] * 4)
    weights = np.array([[1.0, 0.5, 1e-8], [2.0, -1.0, 1e-3], [1.0, 1.0, 0.0], [1.0, 0.25, 0.0]])
    x = torch.from_numpy(logits).requires_grad_()
    values = polyce.log_prob(x, torch.from_numpy(index), logit_softcap=softcap)
    (got,) = torch.autograd.grad((values * torch.from_numpy(weights)).sum(), x)
    want = 0.0
    for k in range(3):
        given = {"grad_output": weights[:, k], "logit_softcap": softcap}
        want = want - exact_answer(logits, index[:, k], reduction="none", **given).grad
    np.testing.assert_allclose(got.numpy(), want, rtol=2e-5, atol=1e-30)


def test_no_class_has_a_gradient_of_0(torch: Any) -> None:
    x = torch.randn((3, 4), requires_grad=True)
    polyce.log_prob(x, torch.zeros((3, 0), dtype=torch.int64)).sum().backward()
    assert x.grad.tolist() == [[0.0] * 4] * 3


def test_rows_of_which_nothing_is_asked(torch: Any) -> None:
    x = torch.randn((3, 4))
    x[1] = math.nan
    x.requires_grad_()
    for index in INDEX.values():
        values = polyce.log_prob(x, torch.tensor(index))
        (grad,) = torch.autograd.grad(values.sum(), x)
        assert grad.isfinite().all()
        assert grad[1].tolist() == [0.0] * 4
