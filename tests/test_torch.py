"""torch: polyce against torch's own loss, and polyce's gradient on torch's graph."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

import polyce

pytestmark = pytest.mark.only("torch", "torch-cuda")

SHAPES = {"row": (5,), "rows": (4, 5), "line": (3, 5, 2), "image": (2, 5, 2, 3)}
PRODUCT = list(
    itertools.product(
        SHAPES,
        ["index", "probability"],
        ["none", "mean", "sum"],
        [0.0, 0.1, 1.0],
        [False, True],
        [-100, 2],
    )
)


def problem(torch: Any, shape: tuple[int, ...], kind: str, dtype: Any) -> tuple[Any, Any]:
    logits = (3 * torch.randn(shape, dtype=torch.float64)).to(dtype).requires_grad_()
    axis = min(1, len(shape) - 1)
    if kind == "probability":
        return logits, torch.softmax(torch.randn(shape, dtype=torch.float64), axis).to(dtype)
    return logits, torch.randint(0, 5, shape[:axis] + shape[axis + 1 :])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_agrees_with_torch_on_the_whole_option_product(torch: Any, shape: str, dtype: str) -> None:
    tolerance = {"float32": 2e-6, "float64": 1e-13}[dtype]
    count = 0
    for name, kind, reduction, smoothing, weighted, ignore_index in PRODUCT:
        if name != shape or (kind == "probability" and ignore_index >= 0):
            continue
        logits, target = problem(torch, SHAPES[shape], kind, getattr(torch, dtype))
        options = {
            "weight": torch.rand(5, dtype=logits.dtype) + 0.5 if weighted else None,
            "reduction": reduction,
            "label_smoothing": smoothing,
            "ignore_index": ignore_index,
        }
        cotangent = torch.rand(())
        answers = []
        for function in (torch.nn.functional.cross_entropy, polyce.cross_entropy):
            loss = function(logits, target, **options)
            (grad,) = torch.autograd.grad((loss * cotangent).sum(), logits)
            answers.append((loss.detach(), grad))
        (loss, grad), (our_loss, our_grad) = answers
        close = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
        torch.testing.assert_close(our_loss, loss, **close)
        torch.testing.assert_close(our_grad, grad, **close)
        count += 1
    assert count == 3 * 3 * 2 * (2 + 1)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_nll_loss_and_log_softmax_agree_with_torch(
    torch: Any, reduction: str, weighted: bool
) -> None:
    functional = torch.nn.functional
    for shape in SHAPES.values():
        logits, target = problem(torch, shape, "index", torch.float64)
        target = target.clone()
        target.view(-1)[:1] = -100
        weight = torch.rand(5, dtype=torch.float64) if weighted else None
        axis = min(1, len(shape) - 1)
        theirs = functional.nll_loss(
            functional.log_softmax(logits, axis), target, weight, reduction=reduction
        )
        ours = polyce.nll_loss(polyce.log_softmax(logits), target, weight, reduction=reduction)
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13, equal_nan=True)
        expected = torch.autograd.grad(theirs.sum(), logits)
        got = torch.autograd.grad(ours.sum(), logits)
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13, equal_nan=True)


def test_a_tie_between_two_classes_has_the_exact_gradient(torch: Any) -> None:
    logits = torch.zeros((3, 2), requires_grad=True)
    polyce.cross_entropy(logits, torch.tensor([0, 1, 1]), reduction="sum").backward()
    assert logits.grad.tolist() == [[-0.5, 0.5], [0.5, -0.5], [0.5, -0.5]]


def test_confident_rows_keep_loss_and_gradient_where_torch_has_zero(torch: Any) -> None:
    logits = torch.tensor([[40.25, 0.0]], requires_grad=True)
    target = torch.tensor([0])
    assert torch.nn.functional.cross_entropy(logits, target) == 0
    loss = polyce.cross_entropy(logits, target)
    loss.backward()
    exact = math.log1p(math.exp(-40.25))
    assert loss.item() == pytest.approx(exact, rel=2e-7)
    assert logits.grad[0, 0].item() == pytest.approx(-math.exp(-40.25), rel=2e-7)


def test_ignored_rows_have_gradient_zero_whatever_they_hold(torch: Any) -> None:
    for reduction, target in itertools.product(["none", "mean", "sum"], [[-100, -100], [-100, 1]]):
        logits = torch.tensor([[math.nan, math.inf], [0.0, 1.0]], requires_grad=True)
        polyce.cross_entropy(logits, torch.tensor(target), reduction=reduction).sum().backward()
        assert logits.grad[0].tolist() == [0.0, 0.0]


def test_half_gradient_is_rounded_once(torch: Any) -> None:
    logits = torch.randn((3, 7), dtype=torch.float16)
    target = torch.tensor([0, 3, 6])
    exact = logits.double().requires_grad_()
    polyce.cross_entropy(exact, target).backward()
    logits.requires_grad_()
    polyce.cross_entropy(logits, target).backward()
    torch.testing.assert_close(logits.grad, exact.grad.half(), rtol=2**-10, atol=0)


def test_with_grad_carries_no_graph(torch: Any) -> None:
    logits = torch.zeros((2, 3), requires_grad=True)
    loss, grad = polyce.cross_entropy_with_grad(logits, torch.tensor([0, 1]))
    assert not loss.requires_grad
    assert not grad.requires_grad


def gradient_of(torch: Any, loss: Any, logits: Any, target: Any) -> Any:
    return torch.autograd.grad(loss(logits, target), logits)[0]


def test_logits_that_are_no_leaf_and_hooks(torch: Any) -> None:
    leaf = torch.randn((4, 5), dtype=torch.float64, requires_grad=True)
    logits = leaf * 2
    logits.retain_grad()
    seen: list[Any] = []
    logits.register_hook(lambda gradient: seen.append(gradient) or 10 * gradient)
    target = torch.tensor([0, 4, -100, 2])
    polyce.cross_entropy(logits, target).backward()
    same = logits.detach().requires_grad_()
    expected = gradient_of(torch, torch.nn.functional.cross_entropy, same, target)
    torch.testing.assert_close(seen, [expected])
    torch.testing.assert_close(logits.grad, 10 * expected)
    torch.testing.assert_close(leaf.grad, 20 * expected)


@pytest.mark.parametrize("name", ["input", "target", "weight"])
def test_changed_operands_are_noticed(torch: Any, name: str) -> None:
    leaves = {
        "input": torch.randn((2, 3), requires_grad=True),
        "target": torch.rand((2, 3), requires_grad=True),
        "weight": torch.rand(3, requires_grad=True),
    }
    arrays = {key: array * 1 for key, array in leaves.items()}
    loss = polyce.cross_entropy(**arrays)
    arrays[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.only("torch")
def test_calls_on_a_gpu_are_recognised_by_device_and_autocast(
    torch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    from polyce.arrays import plain

    with FakeTensorMode():
        first, second = (torch.empty(2, 3, device=f"cuda:{number}") for number in range(2))
    # Tensors without memory stand in for those of a GPU.
    probes = plain._probes_of(torch)._replace(tensor=FakeTensor)
    monkeypatch.setattr(plain, "_probes", [probes])
    keys = {plain.plain_key(first), plain.plain_key(second), plain.plain_key(first.to("cpu"))}
    assert len(keys) == 3
    assert None not in keys
    monkeypatch.setattr(plain, "_probes", [probes._replace(autocast=lambda kind: kind == "cuda")])
    assert plain.plain_key(first) is None
    assert plain.plain_key(first.to("cpu")) is not None
