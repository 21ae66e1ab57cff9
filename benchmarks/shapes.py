"""The shapes that the CPU benchmark measures, where each occurs, and the arrays it is run on."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np


class Shape(NamedTuple):
    """Logits with classes along axis 1."""

    dims: tuple[int, ...]
    source: str

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.dims[1]


SHAPES = {
    "8x10": Shape((8, 10), "a tiny classifier or a tutorial's first example"),
    "256x1000": Shape((256, 1000), "ImageNet-1k, the batch of 256 of the ResNet recipes"),
    "4096x1000": Shape((4096, 1000), "ImageNet-1k, the batch of 4096 of the ViT recipes"),
    "65536x10": Shape((65536, 10), "CIFAR-10 or MNIST, nearly all images in one batch"),
    "500000x2": Shape((500_000, 2), "two classes on a table of half a million rows"),
    "1024x32000": Shape((1024, 32000), "the vocabulary of Llama 2, half a context of tokens"),
    "256x128256": Shape((256, 128_256), "the vocabulary of Llama 3, a short sequence"),
    "4x21x256x256": Shape((4, 21, 256, 256), "Pascal VOC segmentation, a batch of four crops"),
}

_BLOCK = 2**20


class Problem(NamedTuple):
    """NumPy logits and labels."""

    logits: np.ndarray
    labels: np.ndarray


def element_type(dtype: str) -> Any:
    """Give NumPy's dtype of a name, bfloat16 among them."""
    if dtype == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(dtype)


def problem(dims: tuple[int, ...], dtype: str, confident: bool = False) -> Problem:
    """Make normal logits, in little more memory than they take, and labels.

    In confident rows the label is ahead of all other classes together by about 8.
    """
    rng = np.random.default_rng(0)
    logits = np.empty(dims, element_type(dtype))
    flat = logits.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        part = flat[start : start + _BLOCK]
        part[:] = rng.standard_normal(part.size, dtype=np.float32)
    labels = rng.integers(0, dims[1], (dims[0], *dims[2:]))
    if confident:
        ahead = np.full_like(labels[:, None], math.log(dims[1]) + 8.0, dtype=logits.dtype)
        np.put_along_axis(logits, labels[:, None], ahead, axis=1)
    return Problem(logits, labels)


def exact_losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Give the row losses in float64, from a formula that loses no digits to cancellation."""
    losses = np.empty(labels.shape)
    step = max(1, _BLOCK * len(logits) // logits.size)
    for start in range(0, len(logits), step):
        block = slice(start, start + step)
        rest, picked = logits[block].astype(np.float64), labels[block, None]
        label = np.take_along_axis(rest, picked, axis=1)
        # The label's class stays out of the sum, so that a loss near 0 keeps its digits.
        np.put_along_axis(rest, picked, -np.inf, axis=1)
        top = rest.max(axis=1, keepdims=True)
        total = np.exp(rest - top).sum(axis=1, keepdims=True)
        behind = top - label
        decay = np.exp(-np.abs(behind))
        excess = np.where(behind > 0, (total - 1.0) + decay, total * decay)
        losses[block] = (np.maximum(behind, 0.0) + np.log1p(excess))[:, 0]
    return losses


def ulps(got: np.ndarray, exact: np.ndarray, dtype: str) -> np.ndarray:
    """Give errors in units in the last place of the exact values."""
    digits = {"float32": 23, "bfloat16": 7}[dtype]
    spacing = np.exp2(np.floor(np.log2(np.abs(exact))) - digits)
    return np.abs(got.astype(np.float64) - exact) / spacing
