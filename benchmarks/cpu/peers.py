"""The contenders of the CPU benchmark: polyce and what one would call instead.

Each turns a problem into a call without arguments. Forward calls return the mean loss, gradient
calls the mean loss and the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import polyce

from ..shapes import Problem
from . import by_hand

Call = Callable[[], Any]
Make = Callable[[Problem], Call]
Loss = Callable[..., Any]


class Contender(NamedTuple):
    """One way to compute it."""

    library: str
    """The module it needs."""
    make: Make
    costly: bool = False
    """Whether it takes long, to compile or to run, and so is left out of most shapes."""


def torch_arrays(problem: Problem) -> tuple[Any, Any]:
    """Return torch tensors in the same memory."""
    import torch

    logits, labels = problem
    if logits.dtype == np.float32:
        return torch.from_numpy(logits), torch.from_numpy(labels)
    return torch.from_numpy(logits.view(np.int16)).view(torch.bfloat16), torch.from_numpy(labels)


def on_numpy(function: Loss) -> Make:
    """Call a function of polyce on NumPy arrays."""
    return lambda problem: partial(function, *problem)


def into_out(problem: Problem) -> Call:
    """Write the gradient into an array that exists already."""
    gradient = np.zeros_like(problem.logits)
    return partial(polyce.cross_entropy_with_grad, *problem, out=gradient)


def polyce_loss() -> Loss:
    """Return polyce's function."""
    return polyce.cross_entropy


def reference() -> Loss:
    """Return polyce's function on its path for all libraries."""
    return partial(polyce.cross_entropy, implementation="reference")


def torch_loss() -> Loss:
    """Return torch's own function."""
    import torch

    function: Loss = torch.nn.functional.cross_entropy
    return function


def compiled(get: Callable[[], Loss]) -> Callable[[], Loss]:
    """Compile a function, all of it and for one shape alone."""

    def get_compiled() -> Loss:
        import torch

        function: Loss = torch.compile(get(), dynamic=False, fullgraph=True)
        return function

    return get_compiled


def in_place() -> Loss:
    """Return polyce's function whose backward pass writes over the logits."""
    import polyce.torch

    return partial(polyce.torch.cross_entropy, inplace_backward=True)


def on_torch(get: Callable[[], Loss]) -> Make:
    """Call a function on torch tensors that want no gradient."""
    return lambda problem: partial(get(), *torch_arrays(problem))


def through_autograd(get: Callable[[], Loss]) -> Make:
    """Call a function on torch tensors, then let torch ask it for the gradient."""

    def make(problem: Problem) -> Call:
        import torch

        function = get()
        logits, labels = torch_arrays(problem)
        leaf = logits.requires_grad_()

        def call() -> Any:
            loss = function(leaf, labels)
            return loss.detach(), *torch.autograd.grad(loss, leaf)

        return call

    return make


def over_its_own(problem: Problem) -> Call:
    """Write the gradient over logits that no other contender reads.

    Those of every call but the first are the gradient of the one before. No time depends on their
    values.
    """
    own = problem._replace(logits=problem.logits.copy(order="K"))
    return through_autograd(in_place)(own)


def jax_jit(loss: Loss, with_gradient: bool = False) -> Make:
    """Compile what is made of a loss with jax."""

    def make(problem: Problem) -> Call:
        import jax

        logits, labels = (jax.numpy.asarray(array) for array in problem)
        compiled = jax.jit(jax.value_and_grad(loss) if with_gradient else loss)
        return lambda: jax.block_until_ready(compiled(logits, labels))

    return make


# In the order in which they take turns: polyce on tensors comes after torch, whose threads spin on
# for a while and hold the processors, as they do in a training step.
FORWARD = {
    "torch eager": Contender("torch", on_torch(torch_loss)),
    "polyce torch": Contender("torch", on_torch(polyce_loss)),
    "polyce NumPy": Contender("numpy", on_numpy(polyce.cross_entropy)),
    "jax jit": Contender("jax", jax_jit(by_hand.jax_loss)),
    "polyce jax": Contender("jax", jax_jit(polyce.cross_entropy), costly=True),
    "torch compiled": Contender("torch", on_torch(compiled(torch_loss)), costly=True),
    "polyce compiled": Contender("torch", on_torch(compiled(polyce_loss)), costly=True),
    "polyce reference": Contender("torch", on_torch(reference), costly=True),
}
GRADIENT = {
    "torch eager": Contender("torch", through_autograd(torch_loss)),
    "polyce torch": Contender("torch", through_autograd(polyce_loss)),
    "polyce in place": Contender("torch", over_its_own),
    "polyce NumPy": Contender("numpy", on_numpy(polyce.cross_entropy_with_grad)),
    "polyce NumPy out=": Contender("numpy", into_out),
    "jax jit": Contender("jax", jax_jit(by_hand.jax_loss, with_gradient=True)),
    "polyce jax": Contender("jax", jax_jit(polyce.cross_entropy, with_gradient=True), costly=True),
    "torch compiled": Contender("torch", through_autograd(compiled(torch_loss)), costly=True),
    "polyce compiled": Contender("torch", through_autograd(compiled(polyce_loss)), costly=True),
    "polyce reference": Contender("torch", through_autograd(reference), costly=True),
}
WHATS = {"forward": FORWARD, "gradient": GRADIENT}
# What takes part in a process whose torch takes huge pages, under another name.
ON_HUGE_PAGES = {name: f"{name}, huge pages" for name in ("polyce torch", "torch eager")}

# One exponential of each logit, on one thread.
FLOOR = "np.exp"
# What reads, or reads and writes, each number once.
ROOFS = {"forward": "np.max", "gradient": "np.copyto"}


def bounds(what: str, problem: Problem, large: bool) -> dict[str, Call]:
    """Return NumPy's calls on one thread for what most must do, or where large all must do."""
    flat = problem.logits.ravel(order="K")
    exponents = flat.astype(np.float32, copy=False)  # NumPy has no fast loops for bfloat16
    calls: dict[str, Call] = {FLOOR: partial(np.exp, exponents, out=np.zeros_like(exponents))}
    if large:
        read = flat if flat.dtype == np.float32 else flat.view(np.int16)
        forward, gradient = partial(np.max, read), partial(np.copyto, np.zeros_like(read), read)
        calls[ROOFS[what]] = forward if what == "forward" else gradient
    return calls
