"""What the loss of a linear head takes beside inputs and gradients: measured in fresh processes."""

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

ROWS, FEATURES, CLASSES = 1024, 64, 65536
GRADIENTS = 4 * FEATURES * (ROWS + CLASSES)
MOST = 64_000_000
PROGRAM = """
import json, numpy as np, polyce

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

x, w = np.ones(({rows}, {features}), np.float32), np.full(({classes}, {features}), 1e-3, np.float32)
t = np.arange({rows}) % 100
{prepare}
{few}  # what is loaded or started once is there now
before = peak()
kept = {call}
print(json.dumps(peak() - before))
"""


def growth(call: str, few: str, prepare: str = "") -> float:
    source = PROGRAM.format(
        rows=ROWS, features=FEATURES, classes=CLASSES, prepare=prepare, few=few, call=call
    )
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True
    )
    return float(json.loads(done.stdout))


@pytest.mark.only("numpy")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_numpy_holds_a_chunk(reduction: str) -> None:
    of = f"reduction={reduction!r}"
    with_grad = f"polyce.linear_cross_entropy_with_grad({{}}, {{}}, {{}}, {of})"
    few = with_grad.format("x[:8]", "w[:99]", "t[:8] % 9")
    assert growth(with_grad.format("x", "w", "t"), few) < GRADIENTS + MOST
    loss = f"polyce.linear_cross_entropy(x, w, t, {of})"
    assert growth(loss, f"polyce.linear_cross_entropy(x[:8], w[:99], t[:8] % 9, {of})") < MOST


@pytest.mark.only("torch")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_torch_holds_a_chunk(reduction: str) -> None:
    prepare = (
        "import torch; x, w, t = map(torch.from_numpy, (x, w, t)); "
        "few = [x[:8].clone().requires_grad_(), w[:99].clone().requires_grad_()]; "
        "x.requires_grad_(); w.requires_grad_()"
    )
    call = f"polyce.linear_cross_entropy({{}}, {{}}, reduction={reduction!r}).sum().backward()"
    few = call.format("*few", "t[:8] % 9")
    assert growth(call.format("x, w", "t"), few, prepare) < GRADIENTS + MOST
