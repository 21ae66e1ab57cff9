"""A classifier of handwritten digits, and polyce beside the losses that it replaces, run here."""

from __future__ import annotations

import importlib
import importlib.resources
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import polyce
from polyce.arrays import find

TRAINED_ON = 1200
STEPS = 300
LEARNING_RATE = 1.0
# The libraries shown, and the module that makes each one's arrays.
MODULES = {
    "numpy": "numpy",
    "torch": "torch",
    "jax": "jax.numpy",
    "dask": "dask.array",
    "cupy": "cupy",
    "array-api-strict": "array_api_strict",
}
# Rows and classes of what is timed: as many classes as a language model has words.
LARGE = (1024, 32000)


def digits() -> tuple[Any, Any]:
    """Return the 1797 images as rows of 64 pixels in [0, 1], float32, and their labels."""
    with importlib.resources.files("polyce").joinpath("data/digits.npz").open("rb") as file:
        data = np.load(file)
        images, labels = data["images"], data["labels"]
    return images.reshape(-1, 64).astype(np.float32) / 16, labels


def demo() -> None:
    """Train, compare digits, time and memory, then the loss on every array library found here."""
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
    contenders = ["polyce", "torch" if find.installed("torch") else "NumPy by hand"]
    show_digits(contenders)
    show_cost(contenders)
    compare(images @ weights + bias, labels)


def show_digits(contenders: list[str]) -> None:
    """Print what each contender makes of a row whose label is all but certain."""
    print("a confident row, logits 40, 0, 0 and label 0 in float32: the loss is 8.49670851e-18")
    for name in contenders:
        loss, _ = loss_of(name)(np.array([[40, 0, 0]], dtype=np.float32), np.array([0]))
        print(f"{name:<17} {float(loss):.8e}")
    print()


def show_cost(contenders: list[str]) -> None:
    """Print what a large loss with its gradient takes each contender, in a process of its own."""
    rows, classes = LARGE
    size = 4 * rows * classes / 1e6
    print(f"loss and gradient of {rows}x{classes} logits in float32, {size:.0f} MB")
    for name in contenders:
        code = f"from polyce import demo; demo.measure({name!r})"
        command = [sys.executable, "-W", "ignore", "-c", code]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        print(f"{name:<17} {done.stdout.strip()}")
    print()


def measure(name: str) -> None:
    """Print the time of a contender's large loss with its gradient, and the memory it takes."""
    loss = loss_of(name)
    logits = np.random.default_rng(0).standard_normal(LARGE, dtype=np.float32)
    labels = np.arange(len(logits))
    # Loads what the first call loads.
    loss(logits[:2], labels[:2])
    before = _memory("VmRSS")
    times = []
    for _ in range(3):
        start = time.perf_counter()
        loss(logits, labels)
        times.append(time.perf_counter() - start)
    most = _memory("VmHWM")
    taken = f", {most - before:.0f} MB beside the logits" if before and most else ""
    print(f"{min(times):.3f} s{taken}")


def loss_of(name: str) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Return a contender's function of logits and labels, for loss and gradient."""
    if name == "polyce":
        return polyce.cross_entropy_with_grad
    return by_torch if name == "torch" else by_hand


def by_torch(logits: Any, labels: Any) -> tuple[Any, Any]:
    """Compute loss and gradient by torch's own cross_entropy."""
    import torch

    given = torch.from_numpy(logits).requires_grad_()
    loss = torch.nn.functional.cross_entropy(given, torch.from_numpy(labels))
    loss.backward()
    return loss.detach().numpy(), given.grad


def by_hand(logits: Any, labels: Any) -> tuple[Any, Any]:
    """Compute loss and gradient as one writes them in NumPy."""
    rows = np.arange(len(labels))
    shifted = logits - np.max(logits, axis=1, keepdims=True)
    softmax = np.exp(shifted)
    total = np.sum(softmax, axis=1, keepdims=True)
    loss = np.mean(np.log(total[:, 0]) - shifted[rows, labels])
    softmax /= total
    softmax[rows, labels] -= 1.0
    softmax /= len(labels)
    return loss, softmax


def _memory(name: str) -> float | None:
    """Return what Linux says of this process's memory, in MB."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) / 1e3 for line in file if line.startswith(name))
    except (OSError, StopIteration):
        return None


def compare(logits: Any, labels: Any) -> None:
    """Print the loss and the gradient's norm on every library, and the largest difference."""
    print("the same loss over all digits, on every array library found here")
    print(f"{'library':<17} {'loss':<12} {'gradient norm':<14} implementation")
    exact_loss, exact_grad = polyce.cross_entropy_with_grad(logits.astype(np.float64), labels)
    largest = 0.0
    for name, module in MODULES.items():
        if not _usable(name):
            continue
        xp = importlib.import_module(module)
        library, given = find.of(input=xp.asarray(logits), target=xp.asarray(labels))
        chosen = polyce.explain(*given).chosen
        loss, grad = library.to_numpy(*polyce.cross_entropy_with_grad(*given))
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
