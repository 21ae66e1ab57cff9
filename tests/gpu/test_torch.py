"""What only torch has on a GPU: in-place gradients on its graph, compiled and strict programs."""

from __future__ import annotations

from typing import Any

import pytest

import polyce

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
