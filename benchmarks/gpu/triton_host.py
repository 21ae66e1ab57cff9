"""Time what the host does for a call on torch tensors by Triton's kernels, without the launches.

python -m benchmarks.gpu.triton_host [--calls N]

The kernels are compiled for a GPU and their launches replaced by nothing; polyce is told that
tensors on the CPU lie on a GPU. What is left is polyce's part, Triton's, and torch's allocations.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ..measure import sample
from ..tables import show

TARGETS = {"loss": 20e-6, "backward": 20e-6, "with gradient": 35e-6}
# The best of many short samples: other processes disturb long ones.
_ROUNDS = 100


def main() -> None:
    """Print the times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=100, metavar="N", help="calls in a row")
    arguments = parser.parse_args()
    import torch
    import triton

    launch_nothing()
    rows = []
    for name, call in calls(torch).items():
        call()
        taken = min(sample(call, arguments.calls) for _ in range(_ROUNDS))
        row: dict[str, Any] = {"call": name, "best_s": taken}
        if name in TARGETS:
            row |= {"target_s": TARGETS[name], "met": taken <= TARGETS[name]}
        rows.append(row)
    print(f"torch {torch.__version__}, triton {triton.__version__}, calls on 8x10, no launches\n")
    show(rows)


def launch_nothing() -> None:
    """Make calls on a CPU's tensors go to Triton's kernels, which are compiled and not launched."""
    import torch

    from on_devices import pose_as
    from polyce.arrays.torch import LIBRARY
    from recorder import record

    recorder = record("sm_90")

    def launcher(source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *arguments: None

    recorder.launcher_cls = launcher
    torch.cuda.is_available = lambda: True
    pose_as(LIBRARY, "cuda")


def calls(torch: Any) -> dict[str, Callable[[], Any]]:
    """Return the calls, by name."""
    import polyce

    logits, labels = torch.zeros(8, 10), torch.zeros(8, dtype=torch.int64)
    long = torch.zeros(8, 32000)
    leaf = torch.zeros(8, 10, requires_grad=True)
    weight = torch.ones(10)
    loss = polyce.cross_entropy(leaf, labels)

    def backward() -> Any:
        return torch.autograd.grad(loss, leaf, retain_graph=True)

    return {
        "loss": lambda: polyce.cross_entropy(logits, labels),
        "backward": backward,
        "with gradient": lambda: polyce.cross_entropy_with_grad(logits, labels),
        # Too long to be kept between the sums and the gradient.
        "with gradient, 32000 classes": lambda: polyce.cross_entropy_with_grad(long, labels),
        "losses of rows": lambda: polyce.cross_entropy(logits, labels, reduction="none"),
        "with weights": lambda: polyce.cross_entropy(logits, labels, weight),
        "loss on a graph": lambda: polyce.cross_entropy(leaf, labels),
    }


if __name__ == "__main__":
    main()
