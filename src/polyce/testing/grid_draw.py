"""Random arrays for the cases of the conformance grid, the same ones in every run."""

from __future__ import annotations

import numpy as np

from .dtypes import Array, dtype

ROWS, CLASSES = 5, 7
IGNORED = 3
"""The class that is ignored in every case that ignores an existing class."""
REDUCTIONS = ("none", "sum", "mean")


def draw_logits(seed: int, shape: tuple[int, ...], name: str, spread: float = 2.0) -> Array:
    """Return random logits."""
    drawn = np.random.default_rng(seed).normal(0.0, spread, shape)
    return np.asarray(drawn).astype(dtype(name))


def draw_labels(seed: int, shape: tuple[int, ...], classes: int) -> Array:
    """Return random labels, all ignored (-100) if there is no class to choose."""
    if classes == 0:
        return np.full(shape, -100, dtype=np.int64)
    return np.asarray(np.random.default_rng(seed).integers(0, classes, shape), dtype=np.int64)


def draw_probabilities(seed: int, shape: tuple[int, ...], name: str, axis: int) -> Array:
    """Return random probabilities that sum to about 1 along the axis, some of them 0."""
    drawn = np.random.default_rng(seed).exponential(1.0, shape)
    drawn = np.where(drawn > 2.0, 0.0, drawn)
    total = drawn.sum(axis=axis, keepdims=True)
    return np.asarray(drawn / np.where(total == 0, 1.0, total)).astype(dtype(name))


def draw_weight(seed: int, classes: int, name: str, *, zeros: bool = False) -> Array:
    """Return positive class weights; with zeros, every third one is 0."""
    drawn = np.random.default_rng(seed).uniform(0.2, 2.0, classes)
    if zeros:
        drawn[::3] = 0.0
    return drawn.astype(dtype(name))


SHAPES: tuple[tuple[str, tuple[int, ...], int | None], ...] = (
    ("C", (6,), None),
    ("1-C", (1,), None),
    ("1x1", (1, 1), None),
    ("one-class", (5, 1), None),
    ("odd", (3, 33), None),
    ("3-D", (2, 7, 3), None),
    ("4-D", (2, 7, 3, 2), None),
    ("5-D", (2, 3, 2, 1, 2), None),
    ("no-rows", (0, 7), None),
    ("no-positions", (2, 7, 0), None),
    ("no-classes", (3, 0), None),
    ("no-classes-3-D", (2, 0, 3), None),
    ("axis-0", (7, 2, 3), 0),
    ("axis-minus-1", (2, 3, 7), -1),
    ("axis-2", (2, 3, 7), 2),
    ("axis-minus-3", (2, 7, 3, 2), -3),
)
"""Name, shape of the logits, and the axis argument."""
