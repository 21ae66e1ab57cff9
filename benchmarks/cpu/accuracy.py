"""Error of the row losses and of the label's gradient, in units in the last place.

`python -m benchmarks.cpu.accuracy` prints the tables of docs/accuracy.md: the native path on
each instruction set of this machine, the reference on NumPy and under jax's jit, and torch's
function, against the exact answers of polyce.testing.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import ml_dtypes
import numpy as np
import torch

import polyce
from polyce.implementations.native import core as native
from polyce.testing.dtypes import FORMATS
from polyce.testing.oracle import exact_answer

from ..tables import print_table

ROWS = 24
# How far the label's logit is ahead of all others; what is added to all logits.
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


# 16-bit results are rounded from float32 ones, so two families are enough.
FEW = ("random", "17.3 ahead")
DTYPES = {
    "float16": (np.float16, FEW),
    "bfloat16": (ml_dtypes.bfloat16, FEW),
    "float32": (np.float32, tuple(FAMILIES)),
    "float64": (np.float64, tuple(FAMILIES)),
}


def on_numpy(implementation: str, isa: str | None = None) -> Any:
    """Run polyce on NumPy arrays, by one of its implementations."""

    def run(logits: Any, labels: Any) -> tuple[Any, Any]:
        core = native.core()
        core.use_isa(isa or core.isas()[0])
        return polyce.cross_entropy_with_grad(
            logits, labels, reduction="none", implementation=implementation
        )

    return run


def polyce_under_jit(logits: Any, labels: Any) -> tuple[Any, Any]:
    """Run polyce under jax.jit, with the gradient by jax.vjp."""

    def rows(x: Any) -> Any:
        return polyce.cross_entropy(x, labels, reduction="none")

    loss, pull_back = jax.vjp(jax.jit(rows), jax.numpy.asarray(logits))
    return np.asarray(loss), np.asarray(pull_back(jax.numpy.ones_like(loss))[0])


def torch_itself(logits: Any, labels: Any) -> tuple[Any, Any]:
    """Run torch's own function."""
    dtype = getattr(torch, logits.dtype.name)
    x = torch.tensor(logits.astype(np.float64)).to(dtype).requires_grad_()
    loss = torch.nn.functional.cross_entropy(x, torch.tensor(labels), reduction="none")
    loss.sum().backward()
    return loss.detach().double().numpy(), x.grad.double().numpy()


CONTENDERS = {
    **{f"native, {isa}": on_numpy("native", isa) for isa in native.core().isas()},
    "reference": on_numpy("reference"),
    "jax, jit": polyce_under_jit,
    "torch": torch_itself,
}


def main() -> None:
    """Print a table for each dtype."""
    rng = np.random.default_rng(0)
    labels = np.zeros(ROWS, dtype=np.int64)
    for name, (dtype, families) in DTYPES.items():
        rows = list(itertools.product((10, 1000), families))
        columns: dict[str, list[str]] = {contender: [] for contender in CONTENDERS}
        for classes, family in rows:
            ahead, offset = FAMILIES[family]
            logits = rng.standard_normal((ROWS, classes))
            if ahead is not None:
                logits[:, 0] = logits[:, 1:].max(axis=1) + ahead
            logits = (logits + offset).astype(dtype)
            exact = exact_answer(logits, labels, reduction="none")
            for contender, run in CONTENDERS.items():
                with jax.enable_x64(name == "float64"):
                    loss, grad = run(logits, labels)
                pairs = ((loss, exact.loss), (grad[:, 0], exact.grad[:, 0]))
                errors = (
                    np.abs(np.asarray(got).astype(np.float64) - want) / FORMATS[name].spacing(want)
                    for got, want in pairs
                )
                columns[contender].append(" / ".join(f"{error.max():.2g}" for error in errors))
        print(f"{name}:\n")
        titles, cells = zip(*joined(columns).items(), strict=True)
        lines = [[str(n), family, *line] for (n, family), *line in zip(rows, *cells, strict=True)]
        print_table(["C", "rows", *titles], lines)


def joined(columns: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return the columns, neighbours that are the same as one."""
    found: dict[str, list[str]] = {}
    for title, cells in columns.items():
        last = next(reversed(found), None)
        if last is not None and found[last] == cells:
            del found[last]
            found[f"{last} = {title.removeprefix('native, ')}"] = cells
        else:
            found[title] = cells
    return found


if __name__ == "__main__":
    main()
