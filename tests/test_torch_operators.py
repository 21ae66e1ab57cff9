"""The operators that torch.compile puts into its graphs, called directly."""

from __future__ import annotations

import importlib
import math
from typing import Any, NamedTuple

import pytest

from conftest import FULL
from polyce.call.options import Options
from polyce.call.problem import describe
from polyce.implementations.native import path as native
from polyce.implementations.native import run as native_run

pytestmark = pytest.mark.only("torch")


class OperatorCall(NamedTuple):
    tensors: tuple[Any, ...]
    """Logits, target, weight, sample weight, normalizer."""
    keep: bool
    options: Options
    """As the operators take them."""
    is_narrow: bool
    """Whether the numbers have few digits."""


def operator_calls(torch: Any) -> list[OperatorCall]:
    calls = []
    for kind in ("index", "probability"):
        for classes, dtype in ((10, torch.float32), (70, torch.float64), (70, torch.bfloat16)):
            for number, grad in enumerate((True, False, True, True)):
                if not FULL and dtype == torch.float32 and kind == "probability":
                    continue
                x = torch.randn(5, classes).to(dtype).requires_grad_(grad)
                target, weight = torch.randint(classes, (5,)), None
                if kind == "probability":
                    target = torch.softmax(torch.randn(5, classes), 1).to(dtype)
                    target.requires_grad_(grad and number > 1)
                if number > 1:
                    weight = torch.rand(classes).to(dtype)
                    weight.requires_grad_(grad and kind == "probability")
                options = Options(
                    axis=1,
                    reduction=("mean", "none", "mean", "sum")[number],
                    label_smoothing=(0.0, 0.1)[number // 2],
                    z_loss=(0.0, 0.1)[number // 2],
                    logit_scale=(1.0, 0.5)[number % 2],
                    logit_softcap=(None, 4.0)[number % 2],
                    stats=(None, "lse,entropy,prediction,correct", "", "correct")[number],
                )
                sample_weight = torch.rand(5) if number % 2 else None
                normalizer = torch.tensor(3.0) if number == 2 else None
                tensors = (x, target, weight, sample_weight, normalizer)
                calls.append(OperatorCall(tensors, grad, options, dtype == torch.bfloat16))
    return calls


def check_operators(torch: Any, call: OperatorCall, implementation: str, close: Any) -> None:
    """Run torch's own checks on the operators that a graph calls, and on those of whole calls."""
    importlib.import_module("polyce.implementations.torch_compiled")
    from polyce.implementations import torch_ops

    operators, given = torch.ops.polyce, call.options[:-1]
    tensors = tuple(tensor if tensor is None else tensor.detach() for tensor in call.tensors)
    problem, operands = describe(*tensors, torch_ops.options_of(tuple(given)))
    text = torch_ops.text_of(problem, implementation)
    torch.library.opcheck(operators.forward.default, (*tensors, call.keep, text), **close)
    kernels = torch_ops.kernels(implementation)
    loss, _, saved = kernels.forward(problem, operands, call.keep)
    cotangent = torch.rand_like(loss)
    backward = (cotangent, *tensors, *saved, text)
    torch.library.opcheck(operators.backward.default, backward, **close)
    both = (*tensors, cotangent, text)
    torch.library.opcheck(operators.forward_backward.default, both, **close)
    settings = (*given, None, implementation, "")
    whole = (*call.tensors, None, None)
    torch.library.opcheck(operators.cross_entropy.default, (*whole, *settings), **close)
    with_grad = (*whole, cotangent, *settings)
    torch.library.opcheck(operators.cross_entropy_with_grad.default, with_grad, **close)


@pytest.mark.slow("torch")
def test_torchs_own_checks_of_operators(torch: Any) -> None:
    for call in operator_calls(torch):
        close = {"rtol": 2e-2, "atol": 2e-2} if call.is_narrow else {}
        check_operators(torch, call, "native", close)


def test_operators_run_what_has_kernels(torch: Any) -> None:

    importlib.import_module("polyce.implementations.torch_ops")
    x, target = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    text = repr((tuple(Options(axis=1, stats=None)[:-1]), "float32", "reference"))
    with pytest.raises(ValueError, match=r"^the operators .* got 'reference'; call"):
        torch.ops.polyce.forward(x, target, None, None, None, False, text)


def test_an_operator_describes_a_call_once(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from polyce.implementations import torch_ops

    described = []

    def describe_and_count(*arguments: Any, **options: Any) -> Any:
        described.append(arguments)
        return describe(*arguments, **options)

    monkeypatch.setattr(torch_ops, "describe", describe_and_count)
    monkeypatch.setattr(torch_ops, "_known", {})
    text = repr((tuple(Options(axis=1, stats=None)[:-1]), "float32", "native"))
    for rows, count in ((5, 1), (5, 1), (6, 2), (5, 2)):
        x, target = torch.randn(rows, 3), torch.randint(3, (rows,))
        (loss,) = torch.ops.polyce.forward(x, target, None, None, None, False, text)
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(x, target))
        assert len(described) == count


@pytest.mark.parametrize("classes", [1, 64, 65, 1000])
def test_what_is_kept_is_what_the_core_keeps(torch: Any, classes: int) -> None:
    x, target = torch.zeros(2, classes), torch.zeros(2, dtype=torch.int64)
    problem, operands = describe(x, target)
    kernels = native.torch_kernels()
    keeps = native_run.kernel(problem).saves_rows
    assert kernels.keeps(problem) == (torch.float64 if keeps else None, False)
    _, _, kept = kernels.forward(problem, operands, True)
    assert (kept.rows is not None, kept.denominator) == (keeps, None)
    if keeps:
        assert kept.rows.shape == (math.prod(problem.row_shape), 4)
    assert kernels.forward(problem, operands, False)[2] == (None, None)
