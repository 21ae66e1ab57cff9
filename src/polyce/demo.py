"""Softmax regression on handwritten digits, trained with the gradient that polyce computes."""

from __future__ import annotations

import importlib.resources
import time
from typing import Any

import numpy as np

import polyce
from polyce.arrays import find
from polyce.testing.backends import get_backend

TRAINED_ON = 1200
STEPS = 300
LEARNING_RATE = 1.0
# The backends shown, and the module that each needs.
MODULES = {
    "numpy": "numpy",
    "torch": "torch",
    "jax": "jax",
    "dask": "dask.array",
    "cupy": "cupy",
    "array-api-strict": "array_api_strict",
}


def digits() -> tuple[Any, Any]:
    """Return the 1797 images as rows of 64 pixels in [0, 1], float32, and their labels."""
    with importlib.resources.files("polyce").joinpath("data/digits.npz").open("rb") as file:
        data = np.load(file)
        images, labels = data["images"], data["labels"]
    return images.reshape(-1, 64).astype(np.float32) / 16, labels


def demo() -> None:
    """Train, then show that every array library found here computes the same loss and gradient."""
    images, labels = digits()
    train, test = slice(None, TRAINED_ON), slice(TRAINED_ON, None)
    weights = np.zeros((64, 10), dtype=np.float32)
    bias = np.zeros(10, dtype=np.float32)

    print(f"softmax regression on {len(images)} handwritten digits, {TRAINED_ON} to train on")
    print("step   loss    accuracy on the rest")
    start = time.perf_counter()
    for step in range(STEPS + 1):
        logits = images[train] @ weights + bias
        loss, grad = polyce.cross_entropy_with_grad(logits, labels[train])
        if step % (STEPS // 6) == 0:
            guesses = np.argmax(images[test] @ weights + bias, axis=1)
            print(f"{step:4d}  {loss:.4f}  {np.mean(guesses == labels[test]):.3f}")
        weights -= LEARNING_RATE * (images[train].T @ grad)
        bias -= LEARNING_RATE * grad.sum(axis=0)
    print(f"trained in {time.perf_counter() - start:.2f} s\n")
    compare(images @ weights + bias, labels)


def compare(logits: Any, labels: Any) -> None:
    """Print the loss and the gradient's norm on every library, and the largest difference."""
    print("the same loss over all digits, on every array library found here")
    print(f"{'library':<17} {'loss':<12} {'gradient norm':<14} implementation")
    exact_loss, exact_grad = polyce.cross_entropy_with_grad(logits.astype(np.float64), labels)
    largest = 0.0
    for name in MODULES:
        if not _usable(name):
            continue
        backend = get_backend(name)
        given, target = backend.asarray(logits), backend.asarray(labels)
        loss, grad = polyce.cross_entropy_with_grad(given, target)
        chosen = polyce.explain(given, target).chosen
        loss, grad = backend.to_numpy(loss), backend.to_numpy(grad)
        norm = np.linalg.norm(grad.astype(np.float64))
        print(f"{name:<17} {float(loss):<12.9f} {norm:<14.9f} {chosen}")
        largest = max(largest, abs(float(loss) - float(exact_loss)))
        largest = max(largest, float(np.max(np.abs(grad - exact_grad))))
    print(f"largest difference from float64, in the loss or a gradient entry: {largest:.1e}")


def _usable(name: str) -> bool:
    if not find.installed(MODULES[name].partition(".")[0]):
        return False
    if name == "cupy":
        import cupy

        if not cupy.is_available():
            print("cupy              (installed, but no device)")
            return False
    return True
