"""The loss in torch's surroundings: graphs, hooks, modes, layouts, and the programs around it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

import polyce
from polyce.formula import rows

pytestmark = pytest.mark.only("torch")

Loss = Callable[..., Any]


def by_module(x: Any, target: Any, weight: Any = None, **options: Any) -> Any:
    import polyce.torch

    return polyce.torch.CrossEntropyLoss(weight, **options)(x, target)


WAYS: dict[str, Loss] = {
    "native": lambda *a, **o: polyce.cross_entropy(*a, **o, implementation="native"),
    "reference": lambda *a, **o: polyce.cross_entropy(*a, **o, implementation="reference"),
    "module": by_module,
}


@pytest.fixture(params=WAYS)
def loss(request: pytest.FixtureRequest) -> Loss:
    """Compute the loss in one of several ways."""
    return WAYS[request.param]


def data(torch: Any, kind: str = "index", shape: tuple[int, ...] = (6, 70)) -> tuple[Any, Any]:
    x = torch.randn(shape).requires_grad_()
    if kind == "probability":
        return x, torch.softmax(torch.randn(shape), 1)
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    target.view(-1)[1] = -100
    return x, target


KINDS = pytest.mark.parametrize("kind", ["index", "probability"])


@KINDS
def test_a_graph_that_is_kept_serves_again(torch: Any, loss: Loss, kind: str) -> None:
    x, target = data(torch, kind)
    value = loss(x, target)
    (once,) = torch.autograd.grad(value, x, retain_graph=True)
    (again,) = torch.autograd.grad(value, x)
    assert torch.equal(once, again)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(value, x)


def test_gradients_accumulate(torch: Any, loss: Loss) -> None:
    grads = []
    for function in (torch.nn.functional.cross_entropy, loss):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 70)
        for _ in range(3):
            target = torch.randint(70, (5,))
            (function(model(torch.randn(5, 4)), target) / 3).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(grads[1], grads[0])


@KINDS
@pytest.mark.parametrize("cotangent", ["expanded", "strided", "zero", "nan", "infinite"])
def test_any_cotangent_of_the_rows(torch: Any, loss: Loss, kind: str, cotangent: str) -> None:
    x, target = data(torch, kind)
    g = {
        "expanded": torch.rand(1).expand(6),
        "strided": torch.rand(12)[::2],
        "zero": torch.zeros(6),
        "nan": torch.tensor([1.0, 2.0, math.nan, 0.0, 1.0, -1.0]),
        "infinite": torch.tensor([1.0, 2.0, math.inf, 0.0, 1.0, -1.0]),
    }[cotangent]
    grads = []
    for function in (torch.nn.functional.cross_entropy, loss):
        found = torch.autograd.grad(function(x, target, reduction="none"), x, g)[0]
        if cotangent == "infinite":
            # torch computes inf - inf on the way.
            found = torch.where(torch.isfinite(found), found, 0.0)
        grads.append(found)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("way", WAYS)
def test_only_the_gradients_that_are_asked_for_are_computed(
    torch: Any, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from polyce.graphs import torch_rows
    from polyce.implementations.native import torch as native

    ran: list[str] = []

    def spy(module: Any, name: str, note: Callable[..., str]) -> None:
        function = getattr(module, name)

        def noted(*arguments: Any, **options: Any) -> Any:
            ran.append(note(*arguments, **options))
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, noted)

    spy(native, "run", lambda *_, **__: "forward")
    spy(native, "run_backward", lambda *_, **__: "logits")
    spy(rows, "backward", lambda *_: "logits")
    spy(torch_rows, "target_gradients", lambda *a: f"{a[4][0]:d}{a[4][1]:d}")
    for leaf in (True, False):
        x, target = data(torch, "probability")
        weight = torch.rand(70).requires_grad_()
        operands = {"x": x, "target": target.requires_grad_(), "weight": weight}
        if not leaf:
            operands = {key: tensor * 1 for key, tensor in operands.items()}
        for names, want in (
            (["x"], ["logits"]),
            (["target"], ["10"]),
            (["weight"], ["01"]),
            (["target", "weight"], ["11"]),
            (["x", "target"], ["10", "logits"]),
        ):
            value = WAYS[way](*operands.values())
            ran.clear()
            torch.autograd.grad(value, [operands[name] for name in names])
            assert sorted(ran) == want


def test_deterministic_algorithms(torch: Any, loss: Loss) -> None:
    x, target = data(torch, shape=(6, 70, 3))
    weight = torch.rand(70)
    answers = []
    for is_on in (False, True):
        torch.use_deterministic_algorithms(is_on)
        try:
            value = loss(x, target, weight, label_smoothing=0.1)
            answers.append((value.detach(), *torch.autograd.grad(value, x)))
        finally:
            torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(answers[1], answers[0], rtol=0.0, atol=0.0)


@KINDS
def test_hooks_for_saved_tensors(torch: Any, loss: Loss, kind: str) -> None:
    x, target = data(torch, kind)
    want = torch.autograd.grad(loss(x, target), x)
    hooks = torch.autograd.graph.saved_tensors_hooks
    for context in (
        hooks(lambda tensor: tensor, lambda tensor: tensor),
        hooks(lambda tensor: tensor.clone(), lambda tensor: tensor),
        hooks(lambda tensor: tensor, lambda tensor: tensor.clone()),
        torch.autograd.graph.save_on_cpu(),
    ):
        with context:
            value = loss(x, target)
        for keep in (True, False):
            got = torch.autograd.grad(value, x, retain_graph=keep)
            torch.testing.assert_close(got, want, rtol=0.0, atol=0.0)
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        loss(x, target)


def saved_by(torch: Any, call: Callable[[], Any]) -> list[tuple[int, ...]]:
    sizes: list[tuple[int, ...]] = []

    def pack(tensor: Any) -> Any:
        sizes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sizes


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("classes", [10, 300])
def test_what_is_saved(torch: Any, loss: Loss, classes: int, dtype: str) -> None:
    x, target = data(torch, shape=(6, classes))
    x = x.detach().to(getattr(torch, dtype)).requires_grad_()
    weight, large = torch.rand(classes), (6, classes)
    if loss is not WAYS["reference"]:
        # Four numbers of each row, if rows are long.
        want = [large, (6,), *([(6, 4)] if classes > 64 else [])]
        assert saved_by(torch, lambda: loss(x, target)) == want
        assert saved_by(torch, lambda: by_module(x, target, inplace_backward=True)) == want
    for options in ({}, {"weight": weight}, {"label_smoothing": 0.1, "reduction": "none"}):
        sizes = saved_by(torch, lambda o=options: loss(x, target, **o))
        assert sizes.count(large) == 1
        assert all(math.prod(size) <= max(24, classes) for size in sizes if size != large)
    target = torch.softmax(torch.randn(large), 1)
    assert saved_by(torch, lambda: loss(x, target)).count(large) == 2


@KINDS
def test_modes_without_a_gradient(torch: Any, loss: Loss, kind: str) -> None:
    x, target = data(torch, kind)
    want = loss(x, target).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            value = loss(x, target)
            made = x * 1
            assert loss(made, target) == want
            log_probabilities = polyce.log_softmax(x)
        assert not value.requires_grad
        assert not log_probabilities.requires_grad
        assert value == want
        assert value.is_inference() == (mode is torch.inference_mode)
    assert loss(made, target) == want


@KINDS
def test_layouts_of_the_logits(torch: Any, loss: Loss, kind: str) -> None:
    image = torch.randn(2, 7, 3, 4)
    layouts = {
        "channels last": image.contiguous(memory_format=torch.channels_last),
        "expanded rows": image[:1].expand(2, 7, 3, 4),
        "expanded classes": image[:, :1].expand(2, 7, 3, 4),
        "expanded inside": image[:, :, :, :1].expand(2, 7, 3, 4),
        "transposed": image.transpose(0, 1),
        "steps": torch.randn(4, 14, 3, 8)[::2, 1::2, :, ::2],
        "flipped": image.flip(1)[:, :, 1:],
    }
    for name, logits in layouts.items():
        _, target = data(torch, kind, tuple(logits.shape))
        answers = []
        for function in (torch.nn.functional.cross_entropy, loss):
            leaf = logits.detach().requires_grad_()
            value = function(leaf, target)
            answers.append((value.detach(), *torch.autograd.grad(value, leaf)))
        torch.testing.assert_close(answers[1], answers[0], msg=lambda text, n=name: f"{n}: {text}")
        base = image.clone().requires_grad_()
        if name == "expanded rows":
            grads = [
                torch.autograd.grad(function(base[:1].expand(2, 7, 3, 4), target), base)[0]
                for function in (torch.nn.functional.cross_entropy, loss)
            ]
            torch.testing.assert_close(grads[1], grads[0])


# Programs that people write around torch's loss, with polyce in its place.
ANYWHERE = pytest.mark.only("torch", "torch-cuda")


def train(torch: Any, cross_entropy: Callable[..., Any], options: dict[str, Any]) -> Any:
    """Fit a linear classifier to three clouds; return the losses and the parameters."""
    torch.manual_seed(1)
    labels = torch.arange(90) % 3
    features = torch.randn((90, 4)) + 2 * torch.eye(3, 4)[labels]
    labels[::10] = -100
    model = torch.nn.Linear(4, 3)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)  # the first gradient is at a tie
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = cross_entropy(model(features), labels, **options)
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    return torch.stack(losses), [parameter.detach() for parameter in model.parameters()]


@ANYWHERE
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_classifier_trains_to_the_same_parameters(
    torch: Any, weighted: bool, smoothing: float
) -> None:
    from torch.nn.functional import cross_entropy

    options = {"label_smoothing": smoothing}
    if weighted:
        options["weight"] = torch.tensor([1.0, 2.0, 0.5])
    theirs, their_parameters = train(torch, cross_entropy, options)

    from polyce import cross_entropy

    ours, our_parameters = train(torch, cross_entropy, options)
    assert ours[-1] < 0.7 * ours[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_parameters, their_parameters, rtol=1e-5, atol=1e-5)


@ANYWHERE
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_next_tokens_with_padding(torch: Any, dtype: str) -> None:
    batch, length, vocabulary, padding = 3, 7, 11, 0
    tokens = torch.randint(1, vocabulary, (batch, length))
    tokens[0, 4:] = tokens[1, 6:] = padding
    logits = torch.randn((batch, length, vocabulary)).to(getattr(torch, dtype)).requires_grad_()
    cross_entropy = torch.nn.functional.cross_entropy

    def gradient(loss: Any) -> Any:
        return loss.float(), *torch.autograd.grad(loss, logits)

    ours = gradient(
        polyce.cross_entropy(logits[:, :-1], tokens[:, 1:], axis=-1, ignore_index=padding)
    )
    flat = gradient(
        cross_entropy(
            logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=padding
        )
    )
    transposed = gradient(
        cross_entropy(logits[:, :-1].float().transpose(1, 2), tokens[:, 1:], ignore_index=padding)
    )
    rounding = {"rtol": 1e-6, "atol": 1e-7} if dtype == "float32" else {"rtol": 2**-8, "atol": 1e-7}
    torch.testing.assert_close(ours, flat, **rounding)
    torch.testing.assert_close(ours, transposed, **rounding)
    assert ours[1][:, -1].count_nonzero() == 0
    assert ours[1][0, 3:].count_nonzero() == 0


@ANYWHERE
@pytest.mark.parametrize("weighted", [False, True])
def test_micro_batches_add_up_to_the_batch(torch: Any, weighted: bool) -> None:
    features, labels = torch.randn((12, 4)).double(), torch.randint(0, 3, (12,))
    labels[:5] = -100  # so that the parts have different counts
    weight = torch.rand(3, dtype=torch.float64) if weighted else None
    model = torch.nn.Linear(4, 3).double()
    whole = torch.nn.functional.cross_entropy(model(features), labels, weight)
    expected = torch.autograd.grad(whole, list(model.parameters()))

    counted = labels[labels != -100]
    total = counted.numel() if weight is None else weight[counted].sum()
    losses = []
    for part in (slice(0, 4), slice(4, 5), slice(5, 12)):
        loss = polyce.cross_entropy(model(features[part]), labels[part], weight, normalizer=total)
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(sum(losses), whole.detach(), rtol=1e-13, atol=0.0)
    got = [parameter.grad for parameter in model.parameters()]
    torch.testing.assert_close(got, list(expected), rtol=1e-12, atol=1e-15)


@ANYWHERE
def test_distillation_trains_the_teacher_too(torch: Any) -> None:
    student, teacher = torch.randn((2, 5, 6), dtype=torch.float64).requires_grad_()
    answers = []
    for cross_entropy in (torch.nn.functional.cross_entropy, polyce.cross_entropy):
        loss = cross_entropy(student, torch.softmax(teacher, 1))
        answers.append(torch.autograd.grad(loss, (student, teacher)))
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-12, atol=1e-15)
