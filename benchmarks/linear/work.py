"""The work of the linear benchmark's processes: make, call, time, measure memory.

Each contender turns a problem into a call without arguments. Forward calls return the mean loss,
gradient calls the mean loss and the gradients of input and weight. Contenders that only serve as a
comparison of times return nothing.
"""

from __future__ import annotations

import functools
import gc
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import polyce

from .. import measure, shapes
from ..cpu.peers import Call, torch_arrays
from ..workers import TOLERANCE, begin

Loss = Callable[[Any, Any, Any], Any]
Dims = tuple[int, int, int]

THREADS = 2
LIBRARIES = ("torch", "numpy", "jax")
# Tokens, features and classes of a call that loads a library and leaves hardly any memory behind.
SMALL = (16, 64, 1000)


class Problem(NamedTuple):
    """NumPy arrays in the order of the arguments."""

    input: np.ndarray
    linear_weight: np.ndarray
    target: np.ndarray


Make = Callable[[Problem, str], Call]


class Contender(NamedTuple):
    """One way to compute it."""

    library: str
    """The module it needs, and whose process it runs in."""
    make: Make
    compiles: bool = False
    """Whether its first call of a size compiles it."""
    has_loss: bool = True
    """Whether it returns a loss, and takes memory for one."""
    sums_as_given: bool = False
    """Whether its sums are in the dtype of the arrays, which loses digits in 16 bits."""


def problem(dims: Dims, dtype: str) -> Problem:
    """Make normal input, a weight that gives logits of variance 1, and labels."""
    tokens, features, classes = dims
    rng = np.random.default_rng(0)
    return Problem(
        shapes.normal(rng, (tokens, features), dtype),
        shapes.normal(rng, (classes, features), dtype, features**-0.5),
        rng.integers(0, classes, tokens),
    )


def on_torch(loss: Callable[[], Loss]) -> Make:
    """Call a loss on torch tensors, and its backward() for the gradient."""

    def make(problem: Problem, what: str) -> Call:
        function = loss()
        inputs, labels = torch_arrays(shapes.Problem(problem.input, problem.target))
        weight, _ = torch_arrays(shapes.Problem(problem.linear_weight, problem.target))
        if what == "forward":
            return lambda: function(inputs, weight, labels)
        leaves = (inputs.requires_grad_(), weight.requires_grad_())

        def call() -> Any:
            loss = function(*leaves, labels)
            loss.backward()
            gradients = [leaf.grad for leaf in leaves]
            # Otherwise the gradients would stay until the next call and be added to.
            for leaf in leaves:
                leaf.grad = None
            return loss.detach(), *gradients

        return call

    return make


def torch_loss() -> Loss:
    """Return what one would write in torch: all logits, then the loss."""
    import torch

    functional = torch.nn.functional

    def loss(input: Any, weight: Any, labels: Any) -> Any:
        return functional.cross_entropy(functional.linear(input, weight), labels)

    return loss


def torch_compiled() -> Loss:
    """Compile torch_loss, for these sizes only."""
    import torch

    # Graphs compiled for other sizes would count towards torch's limit of recompilations.
    torch.compiler.reset()
    return torch.compile(torch_loss(), dynamic=False, fullgraph=True)


def torch_chunked() -> Loss:
    """Return torch's own function with the options that make it work in chunks."""
    import torch

    options = torch.nn.LinearCrossEntropyOptions()
    return functools.partial(torch.nn.functional.linear_cross_entropy, options=options)


def polyce_numpy(problem: Problem, what: str) -> Call:
    """Call polyce on NumPy arrays."""
    if what == "forward":
        return lambda: polyce.linear_cross_entropy(*problem)

    def call() -> Any:
        loss, (d_input, d_weight, _) = polyce.linear_cross_entropy_with_grad(*problem)
        return loss, d_input, d_weight

    return call


def numpy_unfused(problem: Problem, what: str) -> Call:
    """Make all logits in NumPy, let polyce turn them into their gradient, and multiply back.

    All of it is in float32, for which NumPy has fast products.
    """

    def call() -> Any:
        kind = problem.input.dtype
        inputs, weight = (array.astype(np.float32, copy=False) for array in problem[:2])
        logits = inputs @ weight.T
        if what == "forward":
            return polyce.cross_entropy(logits, problem.target)
        loss, gradient = polyce.cross_entropy_with_grad(logits, problem.target, out=logits)
        products = (gradient @ weight, gradient.T @ inputs)
        return loss, *(product.astype(kind, copy=False) for product in products)

    return call


def numpy_products(problem: Problem, what: str) -> Call:
    """Only multiply, in float32, each product at once and into existing memory."""
    inputs, weight = (array.astype(np.float32, copy=False) for array in problem[:2])
    logits = np.zeros((len(inputs), len(weight)), np.float32)
    d_input, d_weight = np.zeros_like(inputs), np.zeros_like(weight)

    def call() -> None:
        np.matmul(inputs, weight.T, out=logits)
        if what == "gradient":
            np.matmul(logits, weight, out=d_input)
            np.matmul(logits.T, inputs, out=d_weight)

    return call


def on_jax(loss: Loss) -> Make:
    """Compile a loss, or loss and gradients, with jax."""

    def make(problem: Problem, what: str) -> Call:
        import jax

        arrays = [jax.numpy.asarray(array) for array in problem]
        if what == "forward":
            forward = jax.jit(loss)
            return lambda: jax.block_until_ready(forward(*arrays))
        both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))

        def call() -> Any:
            value, gradients = jax.block_until_ready(both(*arrays))
            return value, *gradients

        return call

    return make


def jax_loss(input: Any, weight: Any, labels: Any) -> Any:
    """Return what one would write in jax: all logits, in float32, then the loss."""
    import jax

    logits = jax.numpy.matmul(input, weight.T, preferred_element_type=np.float32)
    logp = jax.nn.log_softmax(logits, axis=1)
    return -jax.numpy.take_along_axis(logp, labels[:, None], axis=1).mean()


PRODUCTS = "numpy products"
# In each library, the contenders are compared with the first one.
CONTENDERS = {
    "torch": Contender("torch", on_torch(torch_loss)),
    "torch compiled": Contender("torch", on_torch(torch_compiled), compiles=True),
    "torch chunked": Contender("torch", on_torch(torch_chunked), sums_as_given=True),
    "polyce torch": Contender("torch", on_torch(lambda: polyce.linear_cross_entropy)),
    "numpy unfused": Contender("numpy", numpy_unfused),
    PRODUCTS: Contender("numpy", numpy_products, has_loss=False),
    "polyce numpy": Contender("numpy", polyce_numpy),
    "jax": Contender("jax", on_jax(jax_loss), compiles=True),
    "polyce jax": Contender("jax", on_jax(polyce.linear_cross_entropy), compiles=True),
}


@functools.lru_cache(maxsize=1)
def calls(library: str, dims: Dims, dtype: str, what: str) -> dict[str, Call]:
    """Make the contenders of a case, and keep them for all of its turns."""
    made = problem(dims, dtype)
    return {
        name: contender.make(made, what)
        for name, contender in CONTENDERS.items()
        if contender.library == library
    }


def prepare(library: str, dims: Dims, dtype: str, what: str) -> dict[str, float]:
    """Call the contenders of a case once, compare their gradients, and return the losses."""
    # Otherwise the last case's memory would stay until this one's is made.
    calls.cache_clear()
    gc.collect()
    losses: dict[str, float] = {}
    expected: list[np.ndarray] = []
    for name, call in calls(library, dims, dtype, what).items():
        answer = call()
        loses_digits = CONTENDERS[name].sums_as_given and dtype == "bfloat16"
        if not CONTENDERS[name].has_loss or loses_digits:
            continue
        losses[name] = measure.loss_of(answer)
        if what == "gradient":
            gradients = [on_numpy(array) for array in answer[1:]]
            expected = expected or gradients
            for ours, theirs in zip(gradients, expected, strict=True):
                error = off(ours, theirs)
                if not error <= TOLERANCE[dtype]:
                    raise RuntimeError(f"{dims} {dtype}: the gradients differ by {error} ({name})")
        # Freed before the next contender is called.
        del answer
    return losses


def on_numpy(array: Any) -> np.ndarray:
    """Return a library's array as NumPy's, in float32."""
    if hasattr(array, "detach"):
        return np.asarray(array.detach().float())
    return np.asarray(array).astype(np.float32, copy=False)


def off(got: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest error, relative to the largest entry."""
    if got.shape != expected.shape:
        return math.nan
    return float(np.max(np.abs(got - expected)) / np.max(np.abs(expected)))


def turn(number: int, library: str, dims: Dims, dtype: str, what: str) -> dict[str, float]:
    """Time one call of each contender, starting with another one in each turn."""
    made = list(calls(library, dims, dtype, what).items())
    first = number % len(made)
    time.sleep(0.1)  # the other process's threads keep spinning for a while
    gc.disable()
    try:
        return {name: measure.sample(call) for name, call in made[first:] + made[:first]}
    finally:
        gc.enable()


def grow(
    threads: int, dims: Dims, dtype: str, what: str, contender: str
) -> dict[str, float] | None:
    """Measure by how much this process grows at most during a call."""
    begin(threads)
    measured = CONTENDERS[contender]
    made = problem(dims, dtype)
    call = measured.make(made, what)
    # Imports and compilation are not to be measured, so there is a call before. It is small if
    # nothing compiles: malloc or a library might keep memory of a large one and reuse it.
    (call if measured.compiles else measured.make(problem(SMALL, dtype), what))()
    grown = measure.settled_growth(call)
    gradients = made.input.nbytes + made.linear_weight.nbytes if what == "gradient" else 0
    return grown and grown | {"gradients": gradients}
