"""Losses on torch's graph, and memory for gradients, after calls that the core has kept."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import polyce
from door_calls import Ways, outcome, whole_way
from door_tensors import LABELS, LOGITS, MARKS, RNG, check_after, leaf, same, torch
from polyce.graphs import torch_calls

forward_ad = torch.autograd.forward_ad

pytestmark = MARKS


def resized(tensor: Any, size: int) -> Any:
    tensor.untyped_storage().resize_(size)
    return tensor


def test_a_graph_of_the_gradient_and_many_gradients(ways: Ways) -> None:
    def derivatives() -> Any:
        x = leaf(LOGITS.double())
        loss = polyce.cross_entropy(x, LABELS, reduction="none")
        (first,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        loss = polyce.cross_entropy(x, LABELS, reduction="none")
        (batched,) = torch.autograd.grad(loss, x, torch.eye(6).double(), is_grads_batched=True)
        return first.detach(), second, batched

    expected = whole_way(derivatives)
    for _ in range(2):
        for found, value in zip(derivatives(), expected, strict=True):
            torch.testing.assert_close(found, value)
    assert ways.of(derivatives) == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_backward_pass_is_answered_too(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = LOGITS.to(getattr(torch, dtype))

    def derivative() -> Any:
        x = leaf(logits)
        (polyce.cross_entropy(x, LABELS) * 3).backward()
        return x.grad

    expected = whole_way(derivative)
    derivative()
    monkeypatch.setattr(torch_calls, "gradients", None)
    assert torch.equal(derivative(), expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("classes", [5, 80])
def test_the_gradient_of_the_loss(classes: int, reduction: str, ways: Ways) -> None:
    logits = torch.from_numpy(RNG.standard_normal((6, classes)).astype(np.float32))
    shape = (6,) if reduction == "none" else ()
    numbers = torch.arange(1.0, 7.0)
    cotangents = [torch.full(shape, 3.0), torch.full(shape, 3.0).double().float()]
    if reduction == "none":
        cotangents += [numbers, torch.ones(()).expand(6), numbers.repeat(2)[::2]]

    def derivative(cotangent: Any) -> Any:
        x = leaf(logits)
        polyce.cross_entropy(x, LABELS, reduction=reduction).backward(cotangent)
        return x.grad

    for cotangent in cotangents:
        expected = whole_way(lambda: derivative(cotangent))  # noqa: B023
        for _ in range(2):
            torch.testing.assert_close(derivative(cotangent), expected, rtol=1e-6, atol=1e-7)
        assert ways.of(lambda: derivative(cotangent)) == 0  # noqa: B023


def test_graphs_that_are_kept_and_tensors_that_change() -> None:
    def loss(x: Any) -> Any:
        return polyce.cross_entropy(x, LABELS)

    def twice(keep: bool) -> Any:
        x = leaf()
        found = loss(x)
        found.backward(retain_graph=keep)
        found.backward()
        return x.grad

    def changed() -> Any:
        x = leaf() * 1
        found = loss(x)
        x.add_(1)
        found.backward()

    def shrunk() -> Any:
        x = leaf()
        found = loss(x)
        x.untyped_storage().resize_(8)
        found.backward()

    def hooked(change: Callable[[Any], Any]) -> Any:
        x = leaf()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, change):
            found = loss(x)
        found.backward()
        return x.grad

    calls: list[Callable[[], Any]] = [lambda: twice(True), lambda: twice(False), changed, shrunk]
    for change in (
        *(lambda t: t, lambda t: t.clone(), lambda t: t.detach().numpy(), lambda t: t.double()),
        *(lambda t: t[:1], lambda t: t.repeat_interleave(2, 0)[::2], lambda t: t.to("meta")),
    ):
        calls.append(lambda change=change: hooked(change))
    for call in calls:
        expected = whole_way(call)
        for _ in range(2):
            outcome(lambda: loss(leaf()))
            found = outcome(call)
            assert same(found, expected), (found, expected)


def test_the_gradient_goes_over_the_logits(ways: Ways) -> None:
    from polyce.torch import cross_entropy

    def given(make: Callable[[Any], Any], **more: Any) -> Any:
        x = leaf()
        logits = make(x)
        loss = cross_entropy(logits, LABELS, inplace_backward=True, **more)
        loss.backward()
        assert outcome(loss.backward)[0] is RuntimeError
        return x.grad, logits.detach(), logits._version

    for make in (lambda x: x * 1, lambda x: x, lambda x: (x * 1).view(3, 2, 5).view(6, 5)):
        expected = whole_way(lambda: given(make))  # noqa: B023
        for _ in range(2):
            assert same(given(make), expected)
        assert ways.of(lambda: given(make)) == 0  # noqa: B023
        weight = torch.ones(5)
        for refused in (
            lambda x: x.expand(6, 5),
            lambda x: x[:1].expand(6, 5),
            lambda x: x.as_strided((6, 5), (4, 1)),
        ):
            check_after(lambda: given(make), lambda: given(refused))  # noqa: B023
        check_after(lambda: given(make, weight=weight), lambda: given(make))  # noqa: B023

    x = leaf()
    cross_entropy(x, LABELS, inplace_backward=True).backward()
    with pytest.raises(ValueError, match="hold its own gradient"):
        cross_entropy(x, LABELS, inplace_backward=True)


def test_memory_for_the_gradient(ways: Ways) -> None:
    def call(out: Any, logits: Any = LOGITS, **given: Any) -> Any:
        before = getattr(out, "_version", None)
        loss, grad = polyce.cross_entropy_with_grad(logits, LABELS, out=out, **given)
        assert grad is out
        return loss, grad.detach().clone(), out._version - before

    memory = torch.zeros(12, 10)
    makers: list[Callable[[], Any]] = [
        lambda: torch.empty(6, 5),
        lambda: torch.empty(5, 6).T,
        lambda: memory[::2, ::2],
        lambda: torch.empty(6, 5, dtype=torch.float64),
        lambda: torch.empty(5, 5),
        lambda: torch.empty(5).expand(6, 5),
        lambda: memory.as_strided((6, 5), (4, 1)),
        leaf,
        lambda: torch._neg_view(torch.empty(6, 5)),
        lambda: resized(torch.empty(6, 5), 8),
        lambda: torch.empty(6, 5, device="meta"),
        lambda: np.empty((6, 5), np.float32),
    ]
    for make in makers:
        check_after(lambda: call(torch.empty(6, 5)), lambda: call(make()))  # noqa: B023
    assert ways.of(lambda: call(torch.empty(6, 5))) == 0
    logits = LOGITS.clone()
    assert ways.of(lambda: call(logits, logits)) == 0
    weight = memory[0, :5]
    check_after(lambda: call(memory[6:, :5]), lambda: call(memory[:6, :5], weight=weight))


def test_no_tensor_is_held() -> None:
    def call() -> list[Any]:
        held: list[Any] = []
        for _ in range(3):
            tensors = leaf(), LABELS.clone(), torch.ones(5), torch.ones(6).double()
            logits, labels, weight, sample_weight = tensors
            given = {"weight": weight, "sample_weight": sample_weight}
            loss = polyce.cross_entropy(logits, labels, **given)
            loss.backward()
            results = polyce.cross_entropy_with_grad(logits, labels, **given)
            held += [weakref.ref(tensor) for tensor in (*tensors, loss, *results)]
        return held

    held = call()
    gc.collect()
    assert not [ref for ref in held if ref() is not None]
