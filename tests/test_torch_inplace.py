"""A backward pass that writes the gradient over the logits: its effects, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

import polyce

pytestmark = pytest.mark.only("torch")

PATHS = ["native", "reference"]
BY_PATH = pytest.mark.parametrize("path", PATHS)
SHAPES: dict[str, tuple[int, ...]] = {
    "row": (70,),
    "few classes": (6, 10),
    "many classes": (6, 300),
    "image": (2, 70, 3, 2),
    "no rows": (0, 5),
    "no classes": (2, 0),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum", "label_smoothing": 0.1},
    "rows": {"reduction": "none", "logit_softcap": 3.0, "z_loss": 0.1, "return_stats": True},
    "divided": {"normalizer": 3.0, "logit_scale": 0.5},
}
OWN_GRADIENT = r"^with inplace_backward input must not hold its own gradient"
AGAIN = "modified by an inplace operation|there is one backward pass"


def inplace(*arguments: Any, **options: Any) -> Any:
    import polyce.torch

    found = polyce.torch.cross_entropy(*arguments, inplace_backward=True, **options)
    return found[0] if isinstance(found, tuple) else found


def data(torch: Any, *shape: int, kind: str = "index", dtype: str = "float32") -> tuple[Any, Any]:
    """Make a leaf, from which logits are computed, and a target."""
    shape = shape or (6, 70)
    leaf = torch.randn(shape).to(getattr(torch, dtype)).requires_grad_()
    axis = min(1, len(shape) - 1)
    if kind == "probability":
        return leaf, torch.softmax(torch.randn(shape), axis)
    rows = shape[:axis] + shape[axis + 1 :]
    if not shape[axis]:
        return leaf, torch.full(rows, -100)
    target = torch.randint(shape[axis], rows)
    target.view(-1)[:1] = -100 if target.numel() > 1 else 0
    return leaf, target


def expected(torch: Any, leaf: Any, target: Any, cotangent: Any = None, **options: Any) -> Any:
    options |= {"return_stats": False}
    loss = polyce.cross_entropy(leaf, target, **options)
    cotangent = torch.ones_like(loss) if cotangent is None else cotangent
    return torch.autograd.grad(loss, leaf, cotangent)[0]


def same_memory(one: Any, other: Any) -> bool:
    return bool(one.data_ptr() == other.data_ptr() and one.stride() == other.stride())


@BY_PATH
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_lies_where_the_logits_lay(
    torch: Any, path: str, kind: str, option: str, shape: str
) -> None:
    for dtype in ("float32", "float64", "bfloat16"):
        leaf, target = data(torch, *SHAPES[shape], kind=kind, dtype=dtype)
        options = OPTIONS[option] | {"implementation": path}
        logits = leaf * 1
        loss = inplace(logits, target, **options)
        assert torch.equal(logits, leaf)
        cotangent = torch.rand(loss.shape).to(loss.dtype)
        want = expected(torch, leaf, target, cotangent, **options)
        version = logits._version
        (grad,) = torch.autograd.grad(loss, logits, cotangent)
        assert same_memory(grad, logits)
        assert logits._version > version
        torch.testing.assert_close(grad, want, rtol=1e-6, atol=0.0, equal_nan=True)


@BY_PATH
def test_any_layout(torch: Any, path: str) -> None:
    base = torch.randn(4, 3, 5, 70)
    layouts = {
        "transposed": base[0, 0].t(),
        "step": base[0, 0, :, ::3],
        "channels last": base[:, :, :, :9].to(memory_format=torch.channels_last),
        "permuted": base.permute(1, 3, 0, 2),
        "offset": base[2, :, 1:, 7:],
        "negated": torch._neg_view(base[0, 0]),
    }
    for name, found in layouts.items():
        leaf = found.detach().clone().requires_grad_()
        _, target = data(torch, *found.shape)
        want = expected(torch, leaf, target, implementation=path)
        logits = found.detach().requires_grad_()
        (grad,) = torch.autograd.grad(inplace(logits, target, implementation=path), logits)
        assert same_memory(grad, logits), name
        torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(logits.detach(), want, rtol=1e-5, atol=1e-9)


@BY_PATH
def test_the_base_of_a_view_sees_it_in_the_views_part(torch: Any, path: str) -> None:
    leaf, target = data(torch, 6, 70)
    base = torch.cat([leaf, torch.zeros(6, 2)], 1)
    logits = base[:, :70]
    loss = inplace(logits, target, implementation=path)
    version = base._version
    (grad,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(base.detach()[:, :70], grad, rtol=0.0, atol=0.0)
    assert base.detach()[:, 70:].count_nonzero() == 0
    assert base._version > version


@BY_PATH
def test_a_leaf_shares_its_memory_with_its_gradient(torch: Any, path: str) -> None:
    leaf, target = data(torch)
    want = expected(torch, leaf, target)
    inplace(leaf, target, implementation=path).backward()
    assert same_memory(leaf.grad, leaf)
    torch.testing.assert_close(leaf.grad, want, rtol=1e-5, atol=0.0)
    with pytest.raises(ValueError, match=OWN_GRADIENT):
        inplace(leaf, target)
    with pytest.raises(ValueError, match=OWN_GRADIENT):
        inplace(leaf.view(7, 60), torch.zeros(7, dtype=torch.int64))
    leaf.grad = None
    inplace(leaf, target, implementation=path).backward()


@BY_PATH
def test_a_gradient_elsewhere_is_added_to(torch: Any, path: str) -> None:
    leaf, target = data(torch)
    want = 1 + expected(torch, leaf, target)
    leaf.grad = torch.ones_like(leaf)
    inplace(leaf, target, implementation=path).backward()
    torch.testing.assert_close(leaf.grad, want, rtol=1e-6, atol=0.0)


@BY_PATH
def test_micro_batches_accumulate_in_the_parameters(torch: Any, path: str) -> None:
    features, target = torch.randn(12, 4), torch.randint(70, (12,))
    model = torch.nn.Linear(4, 70)
    whole = torch.autograd.grad(
        torch.nn.functional.cross_entropy(model(features), target), list(model.parameters())
    )
    for rows in (slice(0, 5), slice(5, 12)):
        loss = inplace(model(features[rows]), target[rows], normalizer=12, implementation=path)
        loss.backward()
    got = [parameter.grad for parameter in model.parameters()]
    torch.testing.assert_close(got, list(whole))


HOOKS = {"none": None, "identity": (lambda tensor: tensor, lambda tensor: tensor)}


@BY_PATH
@pytest.mark.parametrize("hooks", HOOKS)
def test_a_second_backward_pass_is_refused(torch: Any, hooks: str, path: str) -> None:
    leaf, target = data(torch)
    logits = leaf * 1
    pair = HOOKS[hooks]
    if pair is None:
        loss = inplace(logits, target, implementation=path)
    else:
        with torch.autograd.graph.saved_tensors_hooks(*pair):
            loss = inplace(logits, target, implementation=path)
    want = expected(torch, leaf, target)
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert same_memory(grad, logits)
    with pytest.raises(RuntimeError, match=AGAIN):
        torch.autograd.grad(loss, logits)
    torch.testing.assert_close(grad, want, rtol=1e-5, atol=0.0)


@BY_PATH
def test_another_operation_that_saved_the_logits_notices(torch: Any, path: str) -> None:
    leaf, target = data(torch)
    logits = leaf * 1
    squares, twice = logits.square().sum(), inplace(logits, target, implementation=path)
    loss = inplace(logits, target, implementation=path)
    torch.autograd.grad(squares, logits, retain_graph=True)
    loss.backward(retain_graph=True)
    for late in (squares, twice):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            late.backward()


@BY_PATH
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_what_would_need_the_logits_again_is_refused_in_time(
    torch: Any, kind: str, path: str
) -> None:
    leaf, target = data(torch, kind=kind)
    logits = leaf * 1
    loss = inplace(logits, target, implementation=path)
    version = logits._version
    for options in (
        {"create_graph": True},
        {"grad_outputs": torch.ones(2), "is_grads_batched": True},
    ):
        with pytest.raises(RuntimeError, match=r"^with inplace_backward there is one gradient"):
            torch.autograd.grad(loss, logits, retain_graph=True, **options)
    assert logits._version == version
    assert torch.equal(logits, leaf)
    loss.backward()


@BY_PATH
def test_hooks_that_bring_back_copies(torch: Any, path: str) -> None:
    def clone(tensor: Any) -> Any:
        return tensor.clone()

    pairs = {
        "packed": (clone, lambda tensor: tensor),
        "unpacked": (lambda tensor: tensor, clone),
        "bytes": (lambda t: (t.numpy().tobytes(), t), lambda p: clone(p[1])),
    }
    for pair in pairs.values():
        leaf, target = data(torch)
        logits = leaf * 1
        with torch.autograd.graph.saved_tensors_hooks(*pair):
            loss = inplace(logits, target, implementation=path)
        want = expected(torch, leaf, target)
        (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
        # Other code may use the copy, so it is left unchanged.
        assert torch.equal(logits, leaf)
        (again,) = torch.autograd.grad(loss, logits)
        for found in (grad, again):
            torch.testing.assert_close(found, want, rtol=1e-5, atol=0.0)
    leaf, target = data(torch)
    with torch.autograd.graph.save_on_cpu():
        inplace(leaf * 1, target, implementation=path).backward()
    torch.testing.assert_close(leaf.grad, expected(torch, leaf, target), rtol=1e-5, atol=0.0)


@BY_PATH
def test_gradients_of_targets_and_weights_come_first(torch: Any, path: str) -> None:
    leaf, target = data(torch, kind="probability")
    weight = torch.rand(70).requires_grad_()
    target.requires_grad_()
    options = {"implementation": path, "label_smoothing": 0.1}
    plain = polyce.cross_entropy(leaf, target, weight, **options)
    want = torch.autograd.grad(plain, [leaf, target, weight])
    logits = leaf * 1
    loss = inplace(logits, target, weight, **options)
    got = torch.autograd.grad(loss, [logits, target, weight])
    assert same_memory(got[0], logits)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-8)


@BY_PATH
def test_nothing_is_written_where_no_gradient_of_the_logits_is_wanted(
    torch: Any, path: str
) -> None:
    leaf, target = data(torch, kind="probability")
    target.requires_grad_()
    for logits in (leaf * 1, leaf.detach().clone().requires_grad_()):
        loss = inplace(logits, target, implementation=path)
        torch.autograd.grad(loss, target, retain_graph=True)
        loss.backward(inputs=[target], retain_graph=True)
        assert torch.equal(logits, leaf)
        (grad,) = torch.autograd.grad(loss, logits)
        assert same_memory(grad, logits)
    constant = leaf.detach().clone()
    inplace(constant, target, implementation=path).backward()
    assert torch.equal(constant, leaf)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            logits = leaf * 1
            loss = inplace(logits, target, implementation=path)
        assert not loss.requires_grad
        assert torch.equal(logits, leaf)


@BY_PATH
def test_the_cotangent_may_lie_in_the_logits(torch: Any, path: str) -> None:
    leaf = torch.rand(6, 70, dtype=torch.float64).requires_grad_()
    target = torch.randint(70, (6,))
    options = {"reduction": "none", "implementation": path}
    logits = leaf * 1
    loss = inplace(logits, target, **options)
    cotangent = logits.detach()[0, :6]  # overwritten by the first row's gradient
    want = expected(torch, leaf, target, cotangent.clone(), **options)
    (grad,) = torch.autograd.grad(loss, logits, cotangent)
    torch.testing.assert_close(grad, want, rtol=1e-13, atol=0.0)


@BY_PATH
def test_rows_without_a_softmax_and_ignored_ones(torch: Any, path: str) -> None:
    rows = [[math.nan, math.inf], [0.0, 1.0], [math.inf, 0.0], [-math.inf, 0.0]]
    logits = torch.tensor(rows).requires_grad_()
    inplace(logits, torch.tensor([-100, 1, 0, 1]), reduction="sum", implementation=path).backward()
    assert logits.grad[0].tolist() == [0.0, 0.0]
    assert logits.grad[2].isnan().all()
    assert logits.grad[3].tolist() == [0.0, 0.0]


def test_logits_that_cannot_be_written_over_are_refused(torch: Any) -> None:
    leaf, target = data(torch, 6, 6)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (leaf[:1].expand(6, 6), {}, "must not overlap itself, got shape .* pass a copy"),
        (leaf.as_strided((5, 5), (2, 1)), {"target": target[:5]}, "must not overlap itself"),
        (leaf, {"weight": leaf.detach()[0]}, "share no memory .* and does with weight; pass a"),
        (leaf, {"sample_weight": leaf.detach()[:, 0]}, "and does with sample_weight; pass"),
        (leaf, {"normalizer": leaf.detach()[0, 0]}, "and does with normalizer; pass"),
        (leaf, {"target": leaf.detach()}, "and does with target; pass"),
        (leaf.to("meta"), {"target": target.to("meta")}, "input is traced; leave inplace_backward"),
    ]
    for logits, options, match in cases:
        with pytest.raises(ValueError, match=match):
            inplace(logits, **({"target": target} | options))
    with pytest.raises(ValueError, match="input is traced; leave inplace_backward out"):
        torch.func.grad(inplace)(leaf.detach(), target)
    with pytest.raises(ValueError, match="input is traced; leave inplace_backward out"):
        torch.func.vmap(inplace)(leaf.detach()[None], target[None])
    compiled = torch.compile(inplace, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(leaf, target)


def test_only_tensors_are_taken(torch: Any) -> None:
    import numpy as np

    import polyce.torch

    x, y = np.zeros((2, 3)), np.array([0, 1])
    for wrong, kind in ((x, "ndarray"), ([[0.0, 1.0]], "list"), (None, "NoneType")):
        for on in (False, True):
            with pytest.raises(TypeError, match=rf"^polyce.torch takes .* input is {kind}; conv"):
                polyce.torch.cross_entropy(wrong, torch.tensor([0, 1]), inplace_backward=on)
    with pytest.raises(TypeError, match=r"^all arrays must come from one library"):
        polyce.torch.cross_entropy(torch.zeros(2, 3), y)


def test_without_it_the_logits_stay(torch: Any) -> None:
    import polyce.torch

    leaf, target = data(torch)
    logits = leaf * 1
    loss = polyce.torch.cross_entropy(logits, target)
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(grad, expected(torch, leaf, target), rtol=0.0, atol=0.0)
    assert torch.equal(logits, leaf)
