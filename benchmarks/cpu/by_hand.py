"""Losses written by hand, which polyce is measured against, for NumPy, jax and dask.

None of these checks arguments, ignores rows, or handles infinite logits. The `exact` ones keep as
many digits as polyce: the label's class stays out of the sums, and the scalars of a row are
float64. The `simple` ones are what one would write first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def lazy_problem(shape: tuple[int, int], chunks: tuple[int, int]) -> tuple[Any, Any]:
    """Return a dask array of random float32 logits, made when they are needed, and labels."""
    import dask.array as da

    def block(block_info: Any = None) -> np.ndarray:
        where = block_info[None]
        rng = np.random.default_rng(where["chunk-location"])
        return rng.standard_normal(where["chunk-shape"], dtype=np.float32)

    cuts = da.core.normalize_chunks(chunks, shape)
    logits = da.map_blocks(block, chunks=cuts, dtype=np.float32, meta=np.empty((0, 0), np.float32))
    labels = np.random.default_rng(0).integers(0, shape[1], shape[0])
    return logits, da.from_array(labels, chunks=chunks[0])


def simple_loss(logits: np.ndarray, labels: np.ndarray) -> Any:
    """Compute the mean loss as log-sum-exp minus the label's logit."""
    top = logits.max(axis=1, keepdims=True)
    lse = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
    return (lse - logits[np.arange(len(labels)), labels]).mean()


def simple_loss_and_gradient(logits: np.ndarray, labels: np.ndarray) -> tuple[Any, np.ndarray]:
    """Compute the mean loss, and its gradient as softmax minus one-hot."""
    rows = np.arange(len(labels))
    shifted = logits - logits.max(axis=1, keepdims=True)
    grad = np.exp(shifted)
    sums = grad.sum(axis=1, keepdims=True)
    loss = (np.log(sums[:, 0]) - shifted[rows, labels]).mean()
    grad /= sums
    grad[rows, labels] -= 1
    grad /= len(labels)
    return loss, grad


def exact_loss(logits: np.ndarray, labels: np.ndarray, together: int | None = None) -> Any:
    """Compute the mean loss with polyce's digits, in one array."""
    together = together or len(labels)
    scratch = np.empty((together, logits.shape[1]), logits.dtype)
    losses = np.empty(len(labels))
    for start in range(0, len(labels), together):
        block = slice(start, start + together)
        part = logits[block]
        losses[block] = _exact_rows(part, labels[block], scratch[: len(part)])[0]
    return np.float32(losses.mean())


def exact_loss_and_gradient(
    logits: np.ndarray, labels: np.ndarray, together: int | None = None
) -> tuple[Any, np.ndarray]:
    """Compute the mean loss and gradient with polyce's digits; one array becomes the gradient."""
    together = together or len(labels)
    grad = np.empty_like(logits)
    losses = np.empty(len(labels))
    for start in range(0, len(labels), together):
        block = slice(start, start + together)
        losses[block] = _exact_gradient(logits[block], labels[block], grad[block], len(labels))
    return np.float32(losses.mean()), grad


def in_blocks(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function take a few rows at a time, so that they stay in the cache."""

    def call(logits: np.ndarray, labels: np.ndarray) -> Any:
        return function(logits, labels, max(1, 2**18 // (logits.shape[1] * logits.itemsize)))

    return call


def _exact_rows(logits: np.ndarray, labels: np.ndarray, out: np.ndarray) -> tuple[Any, Any]:
    """Return the losses and what the gradient needs; `out` becomes exp(logits - rest_max)."""
    rows = np.arange(len(labels))
    np.copyto(out, logits)
    out[rows, labels] = -np.inf
    rest_max = out.max(axis=1)
    out -= rest_max[:, None]
    np.exp(out, out=out)
    rest_sum = out.sum(axis=1, dtype=np.float64)
    delta = rest_max.astype(np.float64) - logits[rows, labels]
    below = delta <= 0
    decay = np.exp(-np.abs(delta))
    excess = np.where(below, rest_sum * decay, (rest_sum - 1.0) + decay)
    losses = np.maximum(delta, 0.0) + np.log1p(excess)
    factor = np.where(below, decay, 1.0) / (1.0 + excess)
    return losses, (rest_sum, factor)


def _exact_gradient(logits: np.ndarray, labels: np.ndarray, out: np.ndarray, divisor: int) -> Any:
    losses, (rest_sum, factor) = _exact_rows(logits, labels, out)
    factor /= divisor
    out *= factor.astype(out.dtype)[:, None]
    out[np.arange(len(labels)), labels] = -(rest_sum * factor)
    return losses


LOSSES = {"exact": exact_loss, "exact, blocks": in_blocks(exact_loss), "simple": simple_loss}
LOSSES_AND_GRADIENTS = {
    "exact": exact_loss_and_gradient,
    "exact, blocks": in_blocks(exact_loss_and_gradient),
    "simple": simple_loss_and_gradient,
}


def jax_loss(logits: Any, labels: Any) -> Any:
    """Compute the mean loss as optax does, in case optax is missing."""
    import jax
    import jax.numpy as jnp

    picked = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return (jax.nn.logsumexp(logits, axis=1) - picked).mean()


def dask_loss(logits: Any, labels: Any) -> Any:
    """Compute the mean loss of a dask array, with the label's logit through a mask."""
    import dask.array as da

    top = logits.max(axis=1, keepdims=True)
    lse = da.log(da.exp(logits - top).sum(axis=1)) + top[:, 0]
    classes = da.arange(logits.shape[1], chunks=(logits.chunks[1],))
    picked = da.where(classes[None, :] == labels[:, None], logits, 0.0).sum(axis=1)
    return (lse - picked).mean()
