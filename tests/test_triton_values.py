"""Values of the triton path that need precision, and how a backward pass uses saved rows."""

from __future__ import annotations

import math
from typing import Any

import pytest

import polyce
from triton_checks import sure_teachers

pytestmark = pytest.mark.only("triton")


@pytest.mark.parametrize(("dtype", "digits"), [("float16", 11), ("bfloat16", 8)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_a_loss_in_16_bits_is_rounded_once(
    torch: Any, dtype: str, digits: int, reduction: str
) -> None:
    x, t = torch.zeros(1, 2), torch.tensor([0])
    exact = polyce.cross_entropy(x, t, reduction="sum", implementation="triton").double()
    # Above the middle of two numbers by less than float32 can resolve.
    wanted = 1.0 + 2.0**-digits + 2.0**-30
    more = {"normalizer": 1.0} if reduction == "mean" else {}
    for sign in (1.0, -1.0):
        loss = polyce.cross_entropy(
            x.to(getattr(torch, dtype)),
            t,
            sample_weight=(sign * wanted / exact).reshape(1),
            reduction=reduction,
            implementation="triton",
            **more,
        )
        assert loss.item() == sign * (1.0 + 2.0 ** (1 - digits))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e300, 1e-300, 0.0, 1.0])
def test_a_loss_in_16_bits_that_needs_no_care(torch: Any, value: float) -> None:
    x, t = torch.zeros(1, 2, dtype=torch.bfloat16), torch.tensor([0])
    exact = polyce.cross_entropy(x.float(), t, reduction="sum", implementation="triton").double()
    weight = torch.tensor([value], dtype=torch.float64)
    loss = polyce.cross_entropy(
        x, t, sample_weight=weight, reduction="sum", implementation="triton"
    )
    want = (exact * weight[0]).to(torch.bfloat16)
    torch.testing.assert_close(loss, want, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("asked", ["entropy", "prediction"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("change", ["plain", "scale", "softcap"])
def test_stats_leave_the_gradient_alone(
    torch: Any, asked: Any, smoothing: float, change: str
) -> None:
    options: dict[str, Any] = {"label_smoothing": smoothing, "z_loss": 0.01, "reduction": "sum"}
    options |= {"plain": {}, "scale": {"logit_scale": 0.7}, "softcap": {"logit_softcap": 5.0}}[
        change
    ]
    for shape in ((6, 9), (3, 70), (2, 5, 3)):
        x = 3.0 * torch.randn(shape, dtype=torch.float64)
        t = torch.randint(shape[1], (shape[0], *shape[2:]))
        # The likeliest class of one row, and a masked class of another.
        t[0] = x[0].argmax(0)
        x[1].scatter_(0, t[1][None], -math.inf)
        w = torch.rand(shape[1], dtype=torch.float64)
        options["implementation"] = "triton"
        want = polyce.cross_entropy_with_grad(x, t, w, **options)
        loss, grad, _ = polyce.cross_entropy_with_grad(x, t, w, return_stats=asked, **options)
        torch.testing.assert_close(loss, want[0], rtol=1e-14, atol=0.0)
        torch.testing.assert_close(grad, want[1], rtol=1e-13, atol=1e-17)


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("garbage", [-1, 70, 2**31 - 1, -(2**31)])
def test_a_saved_pivot_is_no_address(torch: Any, kind: str, garbage: int) -> None:
    from polyce.call.options import Options
    from polyce.call.problem import describe
    from polyce.implementations.triton import calls as triton_torch

    x = torch.randn(3, 70)
    t = torch.randint(70, (3,)) if kind == "index" else torch.rand(3, 70)
    problem, operands = describe(x, t, options=Options(reduction="sum"))
    _, _, saved = triton_torch.forward(problem, operands, keep=True)
    want = triton_torch.backward(problem, operands, saved, None)
    saved.rows.view(torch.int32)[:, 3] = garbage
    memory = torch.full((5 * 70,), 7.0)
    out = memory[70:280].view(3, 70)
    got = triton_torch.backward(problem, operands, saved, out)
    # A label is read from the target; with probabilities only the likeliest class's entry is wrong.
    assert int((got != want).sum()) <= (0 if kind == "index" else 3)
    assert torch.equal(memory[:70], torch.full((70,), 7.0))
    assert torch.equal(memory[280:], torch.full((70,), 7.0))


def test_float32_rows_beside_a_teacher_are_within_4_ulp() -> None:
    sure_teachers()


@pytest.mark.parametrize("shape", [(6, 10), (3, 70), (2, 5, 3)])
@pytest.mark.parametrize("kind", ["sparse", "teacher"])
def test_backward_of_other_targets(torch: Any, kind: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64).requires_grad_()
    index = torch.randint(shape[1], (shape[0], 3, *shape[2:]))
    shares = torch.rand(index.shape, dtype=torch.float64).requires_grad_()
    index[:, 1], index[0, 0], index[1, 2] = index[:, 0], x[0].argmax(0), -100
    target: Any = polyce.SparseTarget(index, shares)
    if kind == "teacher":
        target = polyce.TeacherLogits(torch.randn(shape), 0.7)
    inputs = (x, shares) if kind == "sparse" else (x,)
    weight = torch.rand(shape[1], dtype=torch.float64)
    for options in ({}, {"label_smoothing": 0.1, "weight": weight, "return_stats": True}):
        grads = []
        for name in ("triton", "reference"):
            got = polyce.cross_entropy(x, target, implementation=name, **options)
            loss = got[0] + (got[1].entropy * got[1].lse).sum() if options else got
            grads.append(torch.autograd.grad(loss, inputs))
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-16)
