"""The operators that torch.compile puts into its graphs, called directly."""

from __future__ import annotations

import math
from typing import Any

import pytest

from conftest import FULL
from polyce.call.options import Options
from polyce.call.problem import describe
from polyce.implementations.native import path as native
from polyce.implementations.native import run as native_run

pytestmark = pytest.mark.only("torch")


def operator_cases(torch: Any) -> list[tuple[tuple[Any, ...], bool]]:
    """Return arguments of the first operator, and whether they have few digits."""
    from polyce.implementations.torch_ops import _CallSettings

    cases = []
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
                settings = _CallSettings(options[:-1], dtype, "native")
                sample_weight = torch.rand(5) if number % 2 else None
                normalizer = torch.tensor(3.0) if number == 2 else None
                tensors = (x, target, weight, sample_weight, normalizer)
                cases.append(((*tensors, grad, *settings.values()), dtype == torch.bfloat16))
    return cases


@pytest.mark.slow("torch")
def test_torchs_own_checks_of_operators(torch: Any) -> None:
    from polyce.implementations import torch_ops

    for arguments_, few_digits in operator_cases(torch):
        close = {"rtol": 2e-2, "atol": 2e-2} if few_digits else {}
        torch.library.opcheck(torch_ops._operator, arguments_, **close)
        found = torch_ops._operator(*arguments_)
        kept = tuple(tensor.detach() for tensor in found[6:])
        cotangent = torch.rand_like(found[0]).requires_grad_(arguments_[0].requires_grad)
        more = (cotangent, *arguments_[:5], *kept, *arguments_[6:])
        torch.library.opcheck(torch_ops._backward_operator, more, **close)


def test_operators_run_what_has_kernels(torch: Any) -> None:
    from polyce.implementations import torch_ops

    (arguments_, _), *_ = operator_cases(torch)
    with pytest.raises(ValueError, match=r"^the operators .* got 'reference'; call"):
        torch_ops._operator(*arguments_[:-1], "reference")


@pytest.mark.parametrize("classes", [1, 64, 65, 1000])
def test_what_is_kept_is_what_the_core_keeps(torch: Any, classes: int) -> None:
    x, target = torch.zeros(2, classes), torch.zeros(2, dtype=torch.int64)
    problem, operands = describe(x, target)
    kernels = native.torch_kernels()
    keeps = native_run.kernel(problem).saves_rows
    assert kernels.keeps(problem) == (keeps, False)
    _, _, kept = kernels.forward(problem, operands, True)
    assert (kept.rows is not None, kept.denominator) == (keeps, None)
    if keeps:
        assert kept.rows.shape == (math.prod(problem.row_shape), 4)
    assert kernels.forward(problem, operands, False)[2] == (None, None)
