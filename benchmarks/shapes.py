"""The shapes that the CPU benchmarks measure, where each occurs, and the arrays they are run on."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Shape(NamedTuple):
    """Logits with classes along axis 1."""

    dims: tuple[int, ...]
    source: str
    channels_last: bool = False
    """Whether the classes of a pixel lie beside each other, as torch's channels_last has them."""


# By the number of classes, then images.
SHAPES = {
    "8x10": Shape((8, 10), "a tiny classifier or a tutorial's first example"),
    "64x10": Shape((64, 10), "CIFAR-10 or MNIST, the batch of most examples"),
    "128x10": Shape((128, 10), "CIFAR-10, the batch of the ResNet paper"),
    "1024x10": Shape((1024, 10), "CIFAR-10, the batch of a fast recipe"),
    "65536x10": Shape((65536, 10), "CIFAR-10 or MNIST, nearly all images in one batch"),
    "32x2": Shape((32, 2), "two classes, fine-tuning on sentences"),
    "4096x2": Shape((4096, 2), "two classes, a batch of a table"),
    "500000x2": Shape((500_000, 2), "two classes on a table of half a million rows"),
    "32x100": Shape((32, 100), "CIFAR-100, a small batch"),
    "128x100": Shape((128, 100), "CIFAR-100, the usual batch"),
    "512x100": Shape((512, 100), "CIFAR-100, a large batch"),
    "4096x100": Shape((4096, 100), "a model of characters, sixteen contexts of 256"),
    "65536x100": Shape((65536, 100), "a model of characters, 256 contexts of 256"),
    "4096x65": Shape((4096, 65), "the characters of Shakespeare's plays"),
    "4096x200": Shape((4096, 200), "Tiny ImageNet, a large batch"),
    "32x1000": Shape((32, 1000), "ImageNet-1k, a batch of 256 over eight devices"),
    "128x1000": Shape((128, 1000), "ImageNet-1k, a batch of 1024 over eight devices"),
    "256x1000": Shape((256, 1000), "ImageNet-1k, the batch of 256 of the ResNet recipes"),
    "1024x1000": Shape((1024, 1000), "ImageNet-1k, the batch of torchvision's newer recipes"),
    "4096x1000": Shape((4096, 1000), "ImageNet-1k, the batch of 4096 of the ViT recipes"),
    "16x32000": Shape((16, 32000), "the vocabulary of Llama 2, a few tokens"),
    "64x32000": Shape((64, 32000), "the vocabulary of Llama 2, a sentence or two"),
    "1024x32000": Shape((1024, 32000), "the vocabulary of Llama 2, half a context of tokens"),
    "8x128256": Shape((8, 128_256), "the vocabulary of Llama 3, a few tokens"),
    "256x128256": Shape((256, 128_256), "the vocabulary of Llama 3, a short sequence"),
    "2x21x128x128": Shape((2, 21, 128, 128), "Pascal VOC segmentation, two small crops"),
    "4x21x256x256": Shape((4, 21, 256, 256), "Pascal VOC segmentation, a batch of four crops"),
    "4x21x256x256-channels-last": Shape((4, 21, 256, 256), "the same in channels_last", True),
    "8x3x64x64": Shape((8, 3, 64, 64), "the three classes of Oxford pets, small images"),
    "16x19x64x128": Shape((16, 19, 64, 128), "Cityscapes, crops of 512x1024 at an eighth"),
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


def problem(dims: tuple[int, ...], dtype: str = "float32", channels_last: bool = False) -> Problem:
    """Make normal logits, and labels."""
    rng = np.random.default_rng(0)
    pixels = dims[2:]
    if channels_last:
        logits = np.moveaxis(normal(rng, (dims[0], *pixels, dims[1]), dtype), -1, 1)
    else:
        logits = normal(rng, dims, dtype)
    return Problem(logits, rng.integers(0, dims[1], (dims[0], *pixels)))
