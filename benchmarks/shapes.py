"""The shapes that the CPU benchmarks measure, where each occurs, and the arrays they are run on."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Shape(NamedTuple):
    """Logits with classes along axis 1."""

    dims: tuple[int, ...]
    source: str


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
    """Return NumPy's dtype of a name, which may be bfloat16."""
    if dtype == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(dtype)


def normal(
    rng: np.random.Generator, dims: tuple[int, ...], dtype: str, scale: float = 1.0
) -> np.ndarray:
    """Draw normal numbers, with little memory beside the result."""
    array = np.empty(dims, element_type(dtype))
    flat = array.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        part = flat[start : start + _BLOCK]
        part[:] = scale * rng.standard_normal(part.size, dtype=np.float32)
    return array


def problem(dims: tuple[int, ...], dtype: str = "float32") -> Problem:
    """Draw normal logits, and labels."""
    rng = np.random.default_rng(0)
    logits = normal(rng, dims, dtype)
    return Problem(logits, rng.integers(0, dims[1], (dims[0], *dims[2:])))
