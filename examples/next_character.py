"""Train a small model of the next character on Python's own help texts, with NumPy alone.

The last characters are looked up, two by two, in a table of embeddings, and a linear head turns
what is found there into logits. At the end the script measures what the head takes of memory.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

import polyce

PAIRS = 4  # which overlap: five characters in all
SIZE = 16  # of a pair's embedding
FEATURES = PAIRS * SIZE
BATCH = 2048


def read() -> tuple[Any, Any]:
    """Give the characters that occur, sorted, and the text as places among them."""
    text = "\n".join(topics[key] for key in sorted(topics))
    return np.unique(list(text), return_inverse=True)


def contexts_of(codes: Any, classes: int) -> Any:
    """Give each pair of characters a number, and each place the numbers of the last pairs."""
    return np.lib.stride_tricks.sliding_window_view(classes * codes[:-1] + codes[1:], PAIRS)


def embed(table: Any, contexts: Any) -> Any:
    """Give the embeddings of each context side by side, which is what the head takes."""
    return table[contexts].reshape(len(contexts), FEATURES)


def train(contexts: Any, targets: Any, classes: int, steps: int, rng: np.random.Generator) -> Any:
    """Give table, weight and bias after so many steps of Adam, and print the loss on the way."""
    table = rng.normal(0.0, 0.1, (classes**2, SIZE)).astype(np.float32)
    weight = np.zeros((classes, FEATURES), dtype=np.float32)
    bias = np.zeros(classes, dtype=np.float32)
    moments = [(p, np.zeros_like(p), np.zeros_like(p)) for p in (table, weight, bias)]
    for step in range(1, steps + 1):
        rows = rng.integers(len(targets), size=BATCH)
        loss, (d_hidden, d_weight, d_bias) = polyce.linear_cross_entropy_with_grad(
            embed(table, contexts[rows]), weight, targets[rows], linear_bias=bias
        )
        d_table = np.zeros_like(table)
        # A pair that a batch holds often gets a sum; `d_table[...] +=` would keep the last alone.
        np.add.at(d_table, contexts[rows], d_hidden.reshape(BATCH, PAIRS, SIZE))
        rate = 0.02 * (1 - step / (steps + 1))
        for (p, mean, square), grad in zip(moments, (d_table, d_weight, d_bias), strict=True):
            mean[:] = 0.9 * mean + 0.1 * grad
            square[:] = 0.99 * square + 0.01 * grad**2
            scale = np.sqrt(square / (1 - 0.99**step)) + 1e-8
            p[:] -= rate * mean / (1 - 0.9**step) / scale
        if step % max(1, steps // 8) == 0 or step == 1:
            print(f"{step:5d}  {loss:.3f}")
    return table, weight, bias


def write(codes: Any, length: int, table: Any, weight: Any, bias: Any, rng: Any) -> Any:
    """Continue a text, each character drawn from what the model expects."""
    for _ in range(length):
        hidden = embed(table, contexts_of(codes[-PAIRS - 1 :], len(bias)))
        logits = (hidden @ weight.T + bias)[0]
        # The largest of logits and Gumbel noise is a draw from their softmax; with less noise it is
        # a likelier one.
        codes = np.append(codes, np.argmax(logits + 0.6 * rng.gumbel(size=len(bias))))
    return codes


def all_logits_at_once(hidden: Any, weight: Any, targets: Any) -> Any:
    """Give what `polyce.linear_cross_entropy_with_grad` gives, the usual way."""
    logits = hidden @ weight.T
    loss, grad = polyce.cross_entropy_with_grad(logits, targets)
    return loss, (grad @ weight, grad.T @ hidden)


WAYS = {call.__name__: call for call in (polyce.linear_cross_entropy_with_grad, all_logits_at_once)}


def growth(way: str) -> str:
    """Tell by how much this process grows at most in one pass over the whole text."""
    characters, codes = read()
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((len(codes), FEATURES), dtype=np.float32)
    weight = rng.standard_normal((len(characters), FEATURES), dtype=np.float32)
    WAYS[way](hidden[:64], weight, codes[:64])  # loads and starts what is needed once
    before = memory("VmRSS")
    WAYS[way](hidden, weight, codes)
    peak = memory("VmHWM")
    return f"{(peak - before) / 1e6:.0f} MB" if before and peak else "not told by this system"


def memory(name: str) -> int:
    """Give the bytes that Linux says this process takes, 0 elsewhere."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def main(arguments: list[str] | None = None) -> None:
    """Train, write, and measure both ways to the gradients, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600, help="of training")
    parser.add_argument("--growth", choices=WAYS, help="measure this and no more")
    options = parser.parse_args(arguments)
    if options.growth:
        print(growth(options.growth))
        return

    rng = np.random.default_rng(0)
    characters, codes = read()
    classes = len(characters)
    contexts, targets = contexts_of(codes, classes)[:-1], codes[PAIRS + 1 :]
    cut = len(codes) * 9 // 10
    print(f"{len(codes)} characters, {classes} different ones; the last tenth is kept for a test")
    print(" step  loss in nats per character")
    table, weight, bias = train(contexts[:cut], targets[:cut], classes, options.steps, rng)
    hidden = embed(table, contexts[cut:])
    loss = polyce.linear_cross_entropy(hidden, weight, targets[cut:], linear_bias=bias)
    shares = np.unique(targets[cut:], return_counts=True)[1] / len(hidden)
    entropy = -np.sum(shares * np.log(shares))
    print(f" test  {loss:.3f}; a model that sees no context loses at least {entropy:.3f}\n")
    print("".join(characters[write(codes[: PAIRS + 1], 200, table, weight, bias, rng)]) + "\n")

    print(f"peak memory of loss and gradients for all {len(codes)} characters at once")
    for way in WAYS:
        command = [sys.executable, __file__, "--growth", way]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        print(f"{way:<30}  {done.stdout.strip()}")


if __name__ == "__main__":
    main()
