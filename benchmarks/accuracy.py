"""Error of the row losses and of the label's gradient, in units in the last place.

`python benchmarks/accuracy.py` prints the table of docs/accuracy.md: polyce on NumPy, torch and
jax, and torch's own function, against the exact answers of polyce.testing.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import torch

import polyce
from polyce.testing.oracle import exact_answer

ROWS = 24
# What the label's logit is ahead of all others by, what is added to all logits.
FAMILIES = {
    "random": (None, 0.0),
    "5.3 ahead": (5.3, 0.0),
    "17.3 ahead": (17.3, 0.0),
    "30.7 ahead": (30.7, 0.0),
    "70.3 ahead": (70.3, 0.0),
    "9.6 behind": (-9.6, 0.0),
    "random + 1e4": (None, 1e4),
    "8.2 ahead - 3e4": (8.2, -3e4),
}


def polyce_on(convert: Any, back: Any = np.asarray) -> Any:
    """Run polyce on the arrays of a library."""

    def run(logits: Any, labels: Any) -> tuple[Any, Any]:
        loss, grad = polyce.cross_entropy_with_grad(
            convert(logits), convert(labels), reduction="none"
        )
        return back(loss), back(grad)

    return run


def polyce_under_jit(logits: Any, labels: Any) -> tuple[Any, Any]:
    """Run polyce under jax.jit, with the gradient by jax.vjp."""

    def rows(x: Any) -> Any:
        return polyce.cross_entropy(x, labels, reduction="none")

    loss, pull_back = jax.vjp(jax.jit(rows), jax.numpy.asarray(logits))
    return np.asarray(loss), np.asarray(pull_back(jax.numpy.ones_like(loss))[0])


def torch_itself(logits: Any, labels: Any) -> tuple[Any, Any]:
    """Run torch's own function."""
    x = torch.tensor(logits, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(x, torch.tensor(labels), reduction="none")
    loss.sum().backward()
    return loss.detach().numpy(), x.grad.numpy()


CONTENDERS = {
    "polyce on NumPy": polyce_on(np.asarray),
    "polyce on torch": polyce_on(torch.as_tensor),
    "polyce on jax, jit": polyce_under_jit,
    "torch": torch_itself,
}


def ulps(got: Any, exact: Any, dtype: Any) -> float:
    """Give the largest error in units in the last place of the exact values."""
    spacing = np.spacing(np.abs(exact).astype(dtype)).astype(np.float64)
    return float(np.max(np.abs(got.astype(np.float64) - exact) / spacing))


def main() -> None:
    """Print the table."""
    rng = np.random.default_rng(0)
    print("| dtype | C | rows |", " | ".join(CONTENDERS), "|")
    print("|---" * (3 + len(CONTENDERS)), "|", sep="")
    labels = np.zeros(ROWS, dtype=np.int64)
    for dtype in (np.float32, np.float64):
        for classes in (10, 1000):
            for family, (ahead, offset) in FAMILIES.items():
                logits = rng.standard_normal((ROWS, classes))
                if ahead is not None:
                    logits[:, 0] = logits[:, 1:].max(axis=1) + ahead
                logits = (logits + offset).astype(dtype)
                exact = exact_answer(logits, labels, reduction="none")
                cells = []
                for run in CONTENDERS.values():
                    with jax.enable_x64(dtype is np.float64):
                        loss, grad = run(logits, labels)
                    loss_error = ulps(loss, exact.loss, dtype)
                    grad_error = ulps(grad[:, 0], exact.grad[:, 0], dtype)
                    cells.append(f"{loss_error:.2g} / {grad_error:.2g}")
                print(f"| {dtype.__name__} | {classes} | {family} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
