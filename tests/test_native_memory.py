"""The memory that the compiled path takes beside its arguments, measured in fresh processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.only("numpy", "torch"),
    pytest.mark.same_everywhere,
    pytest.mark.skipif(
        not Path("/proc/self/status").exists(), reason="this system does not tell of peak memory"
    ),
]

MEBIBYTE = 2**20
LOGITS = 32 * MEBIBYTE
PROGRAM = """
import json, numpy as np, polyce

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

x, t = np.ones((1024, 8192), np.float32), np.zeros(1024, np.int64)
{prepare}
{call}  # what is loaded or started once is there now
x, t = {whole}
before = peak()
kept = {call}
print(json.dumps(peak() - before))
"""
NUMPY = {"prepare": "whole = x, t; x, t = x[:32].copy(), t[:32]", "whole": "whole"}
TORCH = {
    "prepare": "import torch, polyce.torch; whole = torch.from_numpy(x), torch.from_numpy(t); "
    "x, t = whole[0][:32].clone(), whole[1][:32]",
    "whole": "whole[0].requires_grad_(GRAD), whole[1]",
}


def growth(call: str, backend: str, grad: bool = False) -> float:
    parts = NUMPY if backend == "numpy" else TORCH
    parts = {key: text.replace("GRAD", str(grad)) for key, text in parts.items()}
    command = [sys.executable, "-c", PROGRAM.format(call=call, **parts)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout))


@pytest.mark.slow("torch")
@pytest.mark.parametrize(
    ("call", "arrays"),
    [
        ("polyce.cross_entropy(x, t)", 0),
        ("polyce.cross_entropy(x, t, label_smoothing=0.1)", 0),
        ("polyce.cross_entropy_with_grad(x, t)", 1),
        ("polyce.cross_entropy_with_grad(x, t, out=x)", 0),
        ("polyce.cross_entropy_with_grad(x, polyce.SparseTarget(t[:, None], x[:, :1]))", 1),
        ("polyce.cross_entropy(x, polyce.TeacherLogits(x, 0.5))", 0),
        ("polyce.log_softmax(x)", 1),
    ],
)
def test_nothing_of_the_logits_size_but_the_gradient(
    call: str, arrays: int, backend_name: str
) -> None:
    assert growth(call, backend_name) < arrays * LOGITS + MEBIBYTE


@pytest.mark.slow("torch")
@pytest.mark.only("torch")
def test_the_gradient_of_a_sparse_target_gathers() -> None:
    shares = "torch.ones(len(t), 1).requires_grad_()"
    call = f"polyce.cross_entropy(x, polyce.SparseTarget(t[:, None], {shares})).backward()"
    assert growth(call, "torch") < 2 * MEBIBYTE


@pytest.mark.slow("torch")
@pytest.mark.only("torch")
@pytest.mark.parametrize(("options", "arrays"), [("", 1), (", inplace_backward=True", 0)])
@pytest.mark.parametrize("function", ["cross_entropy", "CrossEntropyLoss"])
def test_backward_makes_the_gradient_alone(function: str, options: str, arrays: int) -> None:
    loss = f"polyce.torch.cross_entropy(x, t{options})"
    if function == "CrossEntropyLoss":
        loss = f"polyce.torch.CrossEntropyLoss({options.removeprefix(', ')})(x, t)"
    call = f"{loss}.backward() if x.requires_grad else polyce.cross_entropy(x, t)"
    grown = growth(call, "torch", grad=True)
    assert (arrays - 0.1) * LOGITS < grown + 4 * MEBIBYTE
    assert grown < arrays * LOGITS + 2 * MEBIBYTE
