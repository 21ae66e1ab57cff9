"""torch.func and forward mode give the same results as for torch's own loss."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest

import polyce
from conftest import FULL

pytestmark = pytest.mark.only("torch", "torch-cuda")

Loss = Callable[..., Any]
# Transforms of a loss of (logits, target); the arrays are those of `Arrays` below.
TRANSFORMS: dict[str, Callable[[Any, Loss, Any], Any]] = {
    "grad": lambda f, loss, a: f.grad(loss)(a.x, a.y),
    "vjp": lambda f, loss, a: f.vjp(lambda x: loss(x, a.y), a.x)[1](a.x.sum()),
    "jvp": lambda f, loss, a: f.jvp(lambda x: loss(x, a.y), (a.x,), (a.v,)),
    "hessian": lambda f, loss, a: f.hessian(loss)(a.x, a.y),
    "jacrev": lambda f, loss, a: f.jacrev(loss)(a.x, a.y),
    "jacfwd": lambda f, loss, a: f.jacfwd(loss)(a.x, a.y),
    "jacrev of jacrev": lambda f, loss, a: f.jacrev(f.jacrev(loss))(a.x, a.y),
    "jacrev of jacfwd": lambda f, loss, a: f.jacrev(f.jacfwd(loss))(a.x, a.y),
    # torch drops the inner tangents of most custom functions here.
    "jacfwd of jacfwd": lambda f, loss, a: f.jacfwd(f.jacfwd(loss))(a.x, a.y),
    "third": lambda f, loss, a: f.jacfwd(f.hessian(loss))(a.x, a.y),
    "vmap": lambda f, loss, a: f.vmap(loss)(a.xs, a.ys),
    "vmap of logits": lambda f, loss, a: f.vmap(loss, (0, None))(a.xs, a.y),
    "vmap of targets": lambda f, loss, a: f.vmap(loss, (None, 0))(a.x, a.ys),
    "vmap along the last": lambda f, loss, a: f.vmap(loss, (-1, 0))(a.xs.movedim(0, -1), a.ys),
    "vmap of vmap": lambda f, loss, a: f.vmap(f.vmap(loss, (0, None)), (None, 0))(a.xs, a.ys),
    "vmap of grad": lambda f, loss, a: f.vmap(f.grad(loss))(a.xs, a.ys),
    "vmap of hessian": lambda f, loss, a: f.vmap(f.hessian(loss))(a.xs, a.ys),
    "vmap of jvp": lambda f, loss, a: f.vmap(
        lambda x, y: f.jvp(lambda x: loss(x, y), (x,), (a.v,))
    )(a.xs, a.ys),
    "grad of vmap": lambda f, loss, a: f.grad(lambda x: f.vmap(loss)(x, a.ys).square().sum())(a.xs),
    "jvp of vmap": lambda f, loss, a: f.jvp(
        lambda x: f.vmap(loss)(x, a.ys), (a.xs,), (a.xs.cos(),)
    ),
    "linearize": lambda f, loss, a: f.linearize(lambda x: loss(x, a.y), a.x)[1](a.v),
}


class Arrays:
    def __init__(self, torch: Any, kind: str) -> None:
        self.x, self.v = torch.randn((2, 3, 4), dtype=torch.float64)
        self.xs = torch.randn((2, 3, 4), dtype=torch.float64)
        if kind == "probability":
            self.ys = torch.softmax(torch.randn((2, 3, 4), dtype=torch.float64), -1)
        else:
            self.ys = torch.tensor([[0, 3, -100], [2, -100, 1]])
        self.y = self.ys[0]


def agree(torch: Any, compute: Callable[[Loss], Any]) -> None:
    expected = compute(torch.nn.functional.cross_entropy)
    torch.testing.assert_close(
        compute(polyce.cross_entropy), expected, rtol=1e-12, atol=1e-13, equal_nan=True
    )


# linearize warns of any function, torch's own loss included.
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
@pytest.mark.parametrize("weighted", [False, True] if FULL else [True])
@pytest.mark.parametrize("reduction", ["mean", "sum"] if FULL else ["mean"])
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_agree_with_torch(
    torch: Any, name: str, kind: str, reduction: str, weighted: bool
) -> None:
    arrays = Arrays(torch, kind)
    weight = torch.rand(4, dtype=torch.float64) if weighted else None

    def compute(function: Loss) -> Any:
        def loss(x: Any, y: Any) -> Any:
            return function(x, y, weight, reduction=reduction)

        return TRANSFORMS[name](torch.func, loss, arrays)

    agree(torch, compute)


def test_all_operands_together(torch: Any) -> None:
    arrays = Arrays(torch, "probability")
    weight = torch.rand(4, dtype=torch.float64)
    operands = (arrays.x, arrays.y, weight)
    tangents = (arrays.v, arrays.ys[1], weight.cos())
    for smoothing in (0.0, 0.1):

        def compute(function: Loss, smoothing: float = smoothing) -> Any:
            f, numbers = torch.func, (0, 1, 2)

            def loss(x: Any, p: Any, w: Any) -> Any:
                return function(x, p, w, label_smoothing=smoothing)

            def batched(x: Any, p: Any, w: Any) -> Any:
                return f.vmap(loss, (0, None, None))(x, p, w).square().sum()

            return (
                f.grad(loss, numbers)(*operands),
                f.jvp(loss, operands, tangents),
                f.hessian(loss, numbers)(*operands),
                f.jacrev(f.jacrev(loss, numbers), numbers)(*operands),
                f.jacfwd(f.jacfwd(loss, numbers), numbers)(*operands),
                f.grad(batched, numbers)(arrays.xs, arrays.y, weight),
                f.vmap(f.grad(loss, numbers), (None, 0, 0))(
                    arrays.x, arrays.ys, torch.stack((weight, 2 * weight))
                ),
            )

        agree(torch, compute)


def test_batched_class_weights(torch: Any) -> None:
    arrays = Arrays(torch, "index")
    weights = torch.rand((2, 4), dtype=torch.float64)
    for dims in ((0, 0, 0), (None, None, 0), (0, None, 0)):
        inputs = [
            batched if dim == 0 else batched[0]
            for batched, dim in zip((arrays.xs, arrays.ys, weights), dims, strict=True)
        ]

        def compute(function: Loss, inputs: Any = inputs, dims: Any = dims) -> Any:
            return (
                torch.func.vmap(function, dims)(*inputs),
                torch.func.vmap(torch.func.grad(function), dims)(*inputs),
            )

        agree(torch, compute)


def test_per_sample_gradients_of_single_rows(torch: Any) -> None:
    arrays = Arrays(torch, "index")
    agree(torch, lambda loss: torch.func.vmap(torch.func.grad(loss))(arrays.x, arrays.y))


def test_the_new_options_under_transforms(torch: Any) -> None:
    # Compared with the rows one by one, through the rule of plain calls.
    xs = torch.randn((3, 2, 4), dtype=torch.float64)
    ys, weights = torch.tensor([[0, -100], [1, 2], [3, 0]]), torch.rand((3, 2), dtype=torch.float64)
    normalizers = torch.tensor([1.0, 2.0, 3.0])

    def loss(x: Any, y: Any, v: Any, d: Any) -> Any:
        return polyce.cross_entropy(
            x,
            y,
            sample_weight=v,
            normalizer=d,
            z_loss=0.1,
            logit_scale=2.0,
            logit_softcap=3.0,
            label_smoothing=0.1,
        )

    got = torch.func.vmap(torch.func.grad(loss))(xs, ys, weights, normalizers)
    expected = []
    for x, y, v, d in zip(xs, ys, weights, normalizers, strict=True):
        x.requires_grad_()
        expected.append(torch.autograd.grad(loss(x, y, v, d), x)[0])
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-12, atol=1e-14)


def test_dual_tensors(torch: Any) -> None:
    from torch.autograd import forward_ad

    arrays = Arrays(torch, "probability")

    def compute(function: Loss) -> Any:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(arrays.x, arrays.v)
            target = forward_ad.make_dual(arrays.y, arrays.v)
            return [
                tuple(forward_ad.unpack_dual(loss))
                for loss in (
                    function(dual, arrays.y),
                    function(dual, target, reduction="none"),
                    function(arrays.x, target),
                    function(dual, torch.tensor([0, -100, 1])),
                )
            ]

    agree(torch, compute)
    with torch.no_grad():
        agree(torch, compute)


def test_forward_over_reverse_and_reverse_over_forward(torch: Any) -> None:
    from torch.autograd import forward_ad

    arrays = Arrays(torch, "index")
    x = arrays.x.clone().requires_grad_()
    hessian = torch.func.hessian(polyce.cross_entropy)(arrays.x, arrays.y)
    expected = torch.tensordot(hessian, arrays.v, 2)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, arrays.v)
        loss = polyce.cross_entropy(dual, arrays.y)
        (gradient,) = torch.autograd.grad(loss, dual, create_graph=True)
        torch.testing.assert_close(forward_ad.unpack_dual(gradient).tangent, expected)
        tangent = forward_ad.unpack_dual(loss).tangent
        torch.testing.assert_close(torch.autograd.grad(tangent, x)[0], expected)


def test_reverse_mode_set_up_before_and_run_under_a_transform(torch: Any) -> None:
    arrays = Arrays(torch, "index")
    x = arrays.x.clone().requires_grad_()
    rows = polyce.cross_entropy(x, arrays.y, reduction="none")
    identity = torch.eye(3, dtype=torch.float64)
    (jacobian,) = torch.autograd.grad(rows, x, identity, is_grads_batched=True)
    expected = torch.func.jacrev(lambda x: polyce.cross_entropy(x, arrays.y, reduction="none"))
    torch.testing.assert_close(jacobian, expected(arrays.x))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_logits_are_rounded_once(torch: Any, dtype: str) -> None:
    x = torch.randn((3, 7)).to(getattr(torch, dtype))
    y, v = torch.tensor([0, 3, 6]), torch.randn((3, 7)).to(x.dtype)
    exact = torch.func.grad(polyce.cross_entropy)(x.double(), y)
    gradient = torch.func.grad(polyce.cross_entropy)(x, y)
    torch.testing.assert_close(gradient, exact.to(x.dtype), rtol=1e-7, atol=0)
    _, tangent = torch.func.jvp(lambda x: polyce.cross_entropy(x, y), (x,), (v,))
    torch.testing.assert_close(tangent, (exact * v).sum().to(x.dtype), rtol=1e-7, atol=0)


def test_log_softmax_under_transforms(torch: Any) -> None:
    arrays = Arrays(torch, "index")
    f = torch.func
    for compute in (
        lambda function: f.jacrev(function)(arrays.x),
        lambda function: f.jacfwd(function)(arrays.x),
        lambda function: f.jacfwd(f.jacfwd(function))(arrays.x),
        lambda function: f.jacrev(f.jacfwd(function))(arrays.x),
        lambda function: f.vmap(function)(arrays.xs),
        lambda function: f.vmap(f.vmap(function))(arrays.xs),
        lambda function: f.vmap(f.jacrev(function), 1)(arrays.xs),
        lambda function: f.jvp(f.vmap(function), (arrays.xs,), (arrays.xs,)),
    ):
        expected = compute(lambda x: torch.log_softmax(x, min(1, x.ndim - 1)))
        torch.testing.assert_close(compute(polyce.log_softmax), expected, rtol=1e-12, atol=1e-14)


def test_nll_loss_under_transforms(torch: Any) -> None:
    arrays = Arrays(torch, "index")
    weight = torch.rand(4, dtype=torch.float64)
    f = torch.func
    for compute in (
        lambda function: f.grad(function)(arrays.x, arrays.y, weight),
        lambda function: f.jacfwd(function)(arrays.x, arrays.y, weight),
        lambda function: f.vmap(f.grad(function), (0, 0, None))(arrays.xs, arrays.ys, weight),
    ):
        expected = compute(torch.nn.functional.nll_loss)
        torch.testing.assert_close(compute(polyce.nll_loss), expected, rtol=1e-12, atol=1e-14)


def test_labels_that_have_no_values_are_not_checked(torch: Any) -> None:
    logits, labels = torch.zeros((3, 4)), torch.tensor([0, 4, 3])
    losses = torch.func.vmap(polyce.cross_entropy)(logits, labels)
    assert losses.isnan().tolist() == [False, True, False]
    gradients = torch.func.vmap(torch.func.grad(polyce.cross_entropy))(logits, labels)
    assert gradients.isnan().all(1).tolist() == [False, True, False]
    with pytest.raises(ValueError, match="validate=True needs target's values"):
        torch.func.vmap(lambda x, y: polyce.cross_entropy(x, y, validate=True))(logits, labels)
    with pytest.raises(IndexError, match=r"labels must lie in 0 to 3 .* got 4"):
        torch.func.grad(lambda x: polyce.cross_entropy(x, labels))(logits)


def test_a_kernel_is_never_asked_under_a_transform(
    torch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from polyce.graphs import torch_calls
    from polyce.implementations import registry
    from polyce.implementations.native import path as native

    called: list[str] = []
    right = torch_calls.REFERENCE

    def forward(*arguments: Any) -> Any:
        called.append("forward")
        return right.forward(*arguments)

    def backward(problem: Any, *arguments: Any) -> Any:
        called.append("backward")
        assert problem.options.stats is None  # nothing reads the labels from here
        return right.backward(problem, *arguments)

    kernels = right._replace(forward=forward, backward=backward)
    path = dataclasses.replace(
        native.PATH,
        name="kernel",
        cross_entropy=functools.partial(torch_calls.cross_entropy, kernels),
    )
    monkeypatch.setattr(registry, "TABLE", (path, *registry.TABLE))
    arrays = Arrays(torch, "index")
    torch.func.vmap(torch.func.grad(polyce.cross_entropy))(arrays.xs, arrays.ys)
    torch.func.jacfwd(polyce.cross_entropy)(arrays.x, arrays.y)
    assert called == []

    x = arrays.x.clone().requires_grad_()
    loss, _ = polyce.cross_entropy(x, arrays.y, return_stats=True)
    torch.autograd.grad(loss, x, retain_graph=True)
    assert called == ["forward", "backward"]
    # Several gradients at once.
    ones = torch.ones(2, dtype=torch.float64)
    torch.autograd.grad(loss, x, ones, is_grads_batched=True, retain_graph=True)
    # A gradient that will be differentiated again.
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.autograd.grad(gradient.sum(), x)
    assert called == ["forward", "backward"]


def test_masked_classes(torch: Any) -> None:
    x = torch.tensor([[0.5, -math.inf, 1.0], [-math.inf, 2.0, -math.inf]], dtype=torch.float64)
    y = torch.tensor([2, 1])
    agree(torch, lambda loss: torch.func.hessian(loss)(x, y))
    agree(torch, lambda loss: torch.func.jacfwd(torch.func.jacfwd(loss))(x, y))


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
def test_a_bad_label_that_is_not_checked_gives_derivatives_of_nan(torch: Any, name: str) -> None:
    labels = torch.tensor([0, 7, -100])

    def losses(x: Any, reduction: str = "none") -> Any:
        return getattr(polyce, name)(x, labels, reduction=reduction, validate=False)

    def total(x: Any) -> Any:
        return losses(x, "mean")

    x = torch.randn(3, 4, requires_grad=True)
    (eager,) = torch.autograd.grad(total(x), x)
    x = x.detach()
    by_rows = torch.vmap(torch.func.grad(getattr(polyce, name)))(x, labels)
    for grad in (eager, torch.func.grad(total)(x), by_rows):
        assert grad.isnan().all(1).tolist() == [False, True, False]
        assert grad.isnan().any(1).tolist() == [False, True, False]
    _, along = torch.func.jvp(losses, (x,), (torch.ones_like(x),))
    assert along.isnan().tolist() == [False, True, False]
    with torch.no_grad():
        assert losses(x).isnan().tolist() == [False, True, False]


def test_a_compiled_bad_label_gives_a_gradient_of_nan(torch: Any) -> None:
    labels = torch.tensor([0, 7, -100])
    x = torch.randn(3, 4, requires_grad=True)
    compiled = torch.compile(polyce.nll_loss, backend="aot_eager", fullgraph=True)
    compiled(x, labels).backward()
    assert x.grad.isnan().tolist() == [[False] * 4, [True] * 4, [False] * 4]
