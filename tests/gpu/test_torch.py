"""What only torch has on a GPU: in-place gradients on its graph, compiled and strict programs."""

from __future__ import annotations

import functools
from typing import Any

import pytest

import polyce
from in_parts import Cut, of_parts
from polyce.call.options import Options
from polyce.call.problem import describe
from polyce.formula.rowgradient import NO_STATS

from .arrays import problem, same
from .backends import ON_TORCH
from .cases import DTYPES, Size
from .device import Device

pytestmark = ON_TORCH


@pytest.mark.parametrize("name", DTYPES)
def test_a_graph_s_gradient_takes_the_place_of_the_logits(
    device: Device, size: Size, name: str
) -> None:
    import polyce.torch

    logits, labels = problem(device, size.dims, name)
    want = device.loss_and_grad(logits, labels)
    leaf = logits.detach().clone().requires_grad_()
    hidden = leaf * 1.0
    loss = polyce.torch.cross_entropy(
        hidden, labels, implementation="triton", inplace_backward=True
    )
    loss.backward()
    same(device, (loss.detach(), leaf.grad), want, "the gradient")
    same(device, (loss.detach(), hidden.detach()), want, "the memory of the logits")


@pytest.mark.parametrize("name", DTYPES)
def test_classes_in_parts(device: Device, size: Size, torch: Any, name: str) -> None:
    """Two parts of the classes, as two devices would compute them, one after the other."""
    logits, labels = problem(device, size.dims, name)
    options = {"label_smoothing": 0.1, "reduction": "sum"}
    loss, grad = device.loss_and_grad(logits, labels, **options)
    described, operands = describe(logits, labels, options=Options(**options))
    middle = described.classes // 3
    spans = (slice(0, middle), slice(middle, None))
    pieces = [(operands._replace(logits=logits[:, span]), span.start) for span in spans]
    path, cut = of_parts(device.path), Cut(described, pieces, None)
    whole = cut.whole(path)
    rounding = torch.finfo(logits.dtype).eps
    close = functools.partial(torch.testing.assert_close, rtol=4 * rounding, atol=4 * rounding)
    close(whole.losses.sum().to(loss.dtype), loss)
    close(cut.gradient(path, whole, 1.0, NO_STATS), grad)


# Inductor's warning about the model's own matrix product.
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
def test_a_compiled_step(device: Device, size: Size, torch: Any) -> None:
    rows, classes = size.dims
    inputs = device.normal(device.full((rows, 16), 0.0, "float32"), 1.0, 0)
    model = torch.nn.Linear(16, classes).to(inputs.device)
    labels = device.labels((rows,), classes, "int64", 1)
    # With interpreted kernels there is nothing for inductor to compile.
    backend = "aot_eager" if device.rehearses else "inductor"

    def step(inputs: Any, labels: Any) -> Any:
        return polyce.cross_entropy(
            model(inputs), labels, label_smoothing=0.1, implementation="triton"
        )

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=backend)):
        model.zero_grad()
        loss = function(inputs, labels)
        loss.backward()
        results.append((loss.detach(), model.weight.grad.clone()))
    # The model's own product may run another kernel, which rounds differently.
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_deterministic_algorithms(device: Device, size: Size, torch: Any) -> None:
    logits, labels = problem(device, size.dims)
    want = device.loss_and_grad(logits, labels)
    # Deterministic algorithms also fill fresh memory with nans.
    torch.use_deterministic_algorithms(True)
    try:
        got = device.loss_and_grad(logits, labels)
    finally:
        torch.use_deterministic_algorithms(False)
    same(device, got, want)
