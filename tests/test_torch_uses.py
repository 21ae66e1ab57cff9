"""polyce in the place of torch's loss: the programs that people write around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import polyce

pytestmark = pytest.mark.only("torch", "torch-cuda")


def train(torch: Any, cross_entropy: Callable[..., Any], options: dict[str, Any]) -> Any:
    """Fit a linear classifier to three clouds; give the losses and the parameters."""
    torch.manual_seed(1)
    labels = torch.arange(90) % 3
    features = torch.randn((90, 4)) + 2 * torch.eye(3, 4)[labels]
    labels[::10] = -100
    model = torch.nn.Linear(4, 3)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)  # the first gradient is that of a tie
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = cross_entropy(model(features), labels, **options)
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    return torch.stack(losses), [parameter.detach() for parameter in model.parameters()]


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


@pytest.mark.parametrize("weighted", [False, True])
def test_micro_batches_add_up_to_the_batch(torch: Any, weighted: bool) -> None:
    features, labels = torch.randn((12, 4)).double(), torch.randint(0, 3, (12,))
    labels[:5] = -100  # so that the parts count differently
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


def test_distillation_trains_the_teacher_too(torch: Any) -> None:
    student, teacher = torch.randn((2, 5, 6), dtype=torch.float64).requires_grad_()
    answers = []
    for cross_entropy in (torch.nn.functional.cross_entropy, polyce.cross_entropy):
        loss = cross_entropy(student, torch.softmax(teacher, 1))
        answers.append(torch.autograd.grad(loss, (student, teacher)))
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-12, atol=1e-15)
