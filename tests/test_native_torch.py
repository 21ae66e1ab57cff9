"""The native path under torch: its gradients, what it leaves to the reference, other processes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import polyce
from polyce.formula import rows

pytestmark = pytest.mark.only("torch")


def data(torch: Any, rows: int = 6, classes: int = 300) -> tuple[Any, Any]:
    x = torch.randn(rows, classes, dtype=torch.float64).requires_grad_()
    return x, torch.randint(classes, (rows,))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", [(6, 300), (6, 10), (2, 70, 5), (2, 300, 3, 4)])
def test_backward_gives_the_gradient(torch: Any, reduction: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, dtype=torch.float64).requires_grad_()
    rows = (shape[0], *shape[2:])
    t = torch.randint(shape[1], rows)
    t.view(-1)[0] = -100
    weight = torch.rand(shape[1], dtype=torch.float64)
    sample = torch.rand(*rows)
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "logit_scale": 0.7, "sample_weight": sample}
    loss = polyce.cross_entropy(x, t, weight, reduction=reduction, **options)
    g = torch.rand(loss.shape, dtype=torch.float64)
    (grad,) = torch.autograd.grad(loss, x, g, retain_graph=True)
    (again,) = torch.autograd.grad(loss, x, g)
    want = polyce.cross_entropy_with_grad(
        x.detach(), t, weight, reduction=reduction, grad_output=g, implementation="reference",
        **options,
    )  # fmt: skip
    torch.testing.assert_close(loss.detach(), want[0], rtol=1e-14, atol=0.0)
    torch.testing.assert_close(grad, want[1], rtol=1e-13, atol=1e-16)
    assert torch.equal(grad, again)


@pytest.mark.parametrize("classes", [10, 70, 5000])
@pytest.mark.parametrize("kind", ["sparse", "teacher"])
def test_backward_of_sparse_targets_and_teachers(torch: Any, kind: str, classes: int) -> None:
    x = torch.randn(6, classes, dtype=torch.float64).requires_grad_()
    index, shares = torch.randint(classes, (6, 3)), torch.rand(6, 3, dtype=torch.float64)
    index[:, 1], index[0, 0], index[1, 2] = index[:, 0], x[0].argmax(), -100
    target: Any = polyce.SparseTarget(index, shares)
    if kind == "teacher":
        target = polyce.TeacherLogits(torch.randn(6, classes, dtype=torch.float64), 0.7)
    weight = torch.rand(classes, dtype=torch.float64)
    for options in ({}, {"label_smoothing": 0.1, "weight": weight}, {"logit_softcap": 3.0}):
        (grad,) = torch.autograd.grad(polyce.cross_entropy(x, target, **options), x)
        want = polyce.cross_entropy_with_grad(
            x.detach(), target, implementation="reference", **options
        )[1]
        torch.testing.assert_close(grad, want, rtol=1e-13, atol=1e-16)


def test_what_will_be_differentiated_again_goes_by_the_reference(
    torch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    gradient = rows.differentiable_gradient

    def noted(*arguments: Any) -> Any:
        ran.append("reference")
        return gradient(*arguments)

    monkeypatch.setattr(rows, "differentiable_gradient", noted)
    x, t = data(torch)
    polyce.cross_entropy(x, t).backward()
    assert ran == []
    torch.autograd.grad(polyce.cross_entropy(x, t), x, create_graph=True)
    assert ran == ["reference"]
    assert torch.autograd.gradgradcheck(lambda x: polyce.cross_entropy(x, t % 5), x[:, :5] * 1.0)


def test_changed_logits_are_noticed(torch: Any) -> None:
    x, t = data(torch)
    x = x * 1.0
    loss = polyce.cross_entropy(x, t)
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_views_that_negate(torch: Any) -> None:
    x, t = data(torch)
    x = x.detach()
    negated = torch._neg_view(x)
    assert torch.equal(polyce.cross_entropy(negated, t), polyce.cross_entropy(-x, t))
    with pytest.raises(ValueError, match=r"^out must lie in memory as it is read"):
        polyce.cross_entropy_with_grad(x, t, out=negated)


class InWorker:
    """A dataset whose items are losses."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        import torch

        x, t = torch.zeros(300, 1000), torch.zeros(300, dtype=torch.int64)
        return polyce.cross_entropy(x, t)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_a_forked_worker_of_a_data_loader_calls_it(torch: Any) -> None:
    InWorker()[0]  # the threads exist before the fork
    loader = torch.utils.data.DataLoader(
        InWorker(), 4, num_workers=2, multiprocessing_context="fork"
    )
    losses = torch.cat(list(loader))
    np.testing.assert_allclose(losses.numpy(), np.log(1000.0), rtol=1e-6)


def test_helpers_flush_as_the_caller_does(torch: Any) -> None:
    # Far from the largest logit, where exponentials are subnormal.
    x, t = torch.randn(1000, 2000) * 30, torch.randint(2000, (1000,))

    def bits() -> bytes:
        loss, grad = polyce.cross_entropy_with_grad(x, t)
        return loss.numpy().tobytes() + grad.numpy().tobytes()

    before = polyce.get_num_threads()
    polyce.set_num_threads(4)
    bits()  # a thread inherits the floating-point mode of the one that starts it
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormal numbers")
    try:
        polyce.set_num_threads(1)
        alone = bits()
        polyce.set_num_threads(4)
        found = {bits() for _ in range(30)}
    finally:
        torch.set_flush_denormal(False)
        polyce.set_num_threads(before)
    assert found == {alone}


@pytest.mark.slow("torch")
def test_torch_without_the_exchange_interface() -> None:
    # As before torch 2.10: the core calls the tensors' own methods.
    code = """
import torch, polyce
del torch.Tensor.__dlpack_c_exchange_api__
assert not hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
    x = torch.randn(7, 100, dtype=dtype).T[:50].requires_grad_()
    t, w = torch.randint(7, (50,)), torch.rand(7, dtype=dtype)
    loss = polyce.cross_entropy(x, t, w, sample_weight=torch.ones(50))
    want = torch.nn.functional.cross_entropy(x.double(), t, w.double())
    torch.testing.assert_close(loss, want.to(dtype))
    got, = torch.autograd.grad(loss, x)
    torch.testing.assert_close(got, *torch.autograd.grad(want, x))
x.detach().untyped_storage().resize_(0)
try:
    polyce.cross_entropy(x.detach(), t)
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("input must lie within its storage"), done.stdout
