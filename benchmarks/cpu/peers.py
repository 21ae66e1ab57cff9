"""The contenders of the CPU benchmark: polyce and what one would call instead.

Each turns a problem into a call without arguments. Forward calls return the mean loss, gradient
calls the mean loss and the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

import polyce

from ..shapes import Problem
from . import by_hand

Call = Callable[[], Any]


class Contender(NamedTuple):
    """One way to compute it."""

    library: str
    """The module it needs."""
    make: Callable[[Problem], Call]
    slow: bool = False
    """Whether it is timed in one visit only, since it would take most of the time."""


def torch_arrays(problem: Problem) -> tuple[Any, Any]:
    """Return torch tensors in the same memory."""
    import torch

    logits, labels = problem
    if logits.dtype == np.float32:
        return torch.from_numpy(logits), torch.from_numpy(labels)
    return torch.from_numpy(logits.view(np.int16)).view(torch.bfloat16), torch.from_numpy(labels)


def on_numpy(function: Callable[..., Any], **options: Any) -> Callable[[Problem], Call]:
    """Call a function of polyce on NumPy arrays."""
    return lambda problem: lambda: function(*problem, **options)


def into_out(problem: Problem) -> Call:
    """Write the gradient into an array that exists already."""
    gradient = np.zeros_like(problem.logits)
    return lambda: polyce.cross_entropy_with_grad(*problem, out=gradient)


def on_torch(function: Callable[..., Any], **options: Any) -> Callable[[Problem], Call]:
    """Call a function on torch tensors that do not require a gradient."""

    def make(problem: Problem) -> Call:
        logits, labels = torch_arrays(problem)
        return lambda: function(logits, labels, **options)

    return make


def through_autograd(function: Callable[..., Any]) -> Callable[[Problem], Call]:
    """Call a function on torch tensors, then compute the gradient by torch's autograd."""

    def make(problem: Problem) -> Call:
        import torch

        logits, labels = torch_arrays(problem)
        leaf = logits.requires_grad_()

        def call() -> Any:
            loss = function(leaf, labels)
            return loss.detach(), *torch.autograd.grad(loss, leaf)

        return call

    return make


def torch_eager(*arguments: Any, **options: Any) -> Any:
    """Call torch's own function."""
    import torch

    return torch.nn.functional.cross_entropy(*arguments, **options)


def torch_compiled(
    wrap: Callable[..., Callable[[Problem], Call]], **options: Any
) -> Callable[[Problem], Call]:
    """Make another contender with torch's own function, compiled for this shape only."""

    def make(problem: Problem) -> Call:
        import torch

        # Graphs compiled for other shapes would count towards torch's limit of recompilations.
        torch.compiler.reset()
        return wrap(torch.compile(torch.nn.functional.cross_entropy, dynamic=False), **options)(
            problem
        )

    return make


def jax_jit(transform: Callable[[Any, Any], Any]) -> Callable[[Problem], Call]:
    """Compile a loss, written as in optax, with jax."""

    def make(problem: Problem) -> Call:
        import jax

        logits, labels = (jax.numpy.asarray(array) for array in problem)
        compiled = jax.jit(transform(jax, by_hand.jax_loss))
        return lambda: jax.block_until_ready(compiled(logits, labels))

    return make


def scipy_loss(problem: Problem) -> Call:
    """Compute the mean loss by scipy.special.log_softmax."""
    import scipy.special

    logits, labels = problem
    picked = labels[:, None]

    def call() -> Any:
        logp = scipy.special.log_softmax(logits, axis=1)
        return -np.take_along_axis(logp, picked, axis=1).mean()

    return call


FORWARD = {
    "polyce NumPy": Contender("numpy", on_numpy(polyce.cross_entropy)),
    "polyce torch": Contender("torch", on_torch(polyce.cross_entropy)),
    "polyce reference": Contender(
        "numpy", on_numpy(polyce.cross_entropy, implementation="reference"), slow=True
    ),
    "torch eager": Contender("torch", on_torch(torch_eager)),
    "torch compiled": Contender("torch", torch_compiled(on_torch)),
    "jax jit": Contender("jax", jax_jit(lambda _, loss: loss)),
    "scipy": Contender("scipy", scipy_loss, slow=True),
}
GRADIENT = {
    "polyce NumPy": Contender("numpy", on_numpy(polyce.cross_entropy_with_grad)),
    "polyce NumPy out=": Contender("numpy", into_out),
    "polyce torch": Contender("torch", through_autograd(polyce.cross_entropy)),
    "polyce reference": Contender(
        "numpy", on_numpy(polyce.cross_entropy_with_grad, implementation="reference"), slow=True
    ),
    "torch eager": Contender("torch", through_autograd(torch_eager)),
    "torch compiled": Contender("torch", torch_compiled(through_autograd)),
    "jax jit": Contender("jax", jax_jit(lambda jax, loss: jax.value_and_grad(loss))),
}
WHATS = {"forward": FORWARD, "gradient": GRADIENT}
# Calls that read, or read and write, each number once: by NumPy, and in pieces by all threads.
ROOFS = {
    "forward": ("np.max", "np.max, all threads"),
    "gradient": ("np.copyto", "np.copyto, all threads"),
}


def roofs(what: str, problem: Problem, threads: int) -> dict[str, Call]:
    """Return calls that only read and write the memory that any implementation must."""
    flat = problem.logits.reshape(-1)
    if flat.dtype != np.float32:
        # NumPy has no vectorised maximum of bfloat16.
        flat = flat.view(np.int16)
    if what == "forward":
        inputs: list[list[np.ndarray]] = [[flat]]
        work: Callable[..., Any] = np.max
    else:
        inputs = [[np.zeros_like(flat), flat]]
        work = np.copyto
    alone, together = ROOFS[what]
    calls: dict[str, Call] = {alone: lambda: work(*inputs[0])}
    if threads > 1:
        pieces = [np.array_split(array, threads) for array in inputs[0]]
        pool = ThreadPoolExecutor(threads)
        calls[together] = lambda: list(pool.map(work, *pieces))
    return calls
