"""native: the compiled kernels, for NumPy arrays and torch tensors on a CPU.

One reading of the logits and one writing of the gradient, whatever their strides. What a target
means, the reduction and the stats are the kernels' own as well, held to the reference's by the
tests, so that a small call is little more than one call of theirs.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from polyce import arrays
from polyce.call.problem import Operands, Problem
from polyce.formula import labels, stats, transform
from polyce.formula.stats import Stats
from polyce.implementations.contract import Implementation

BACKENDS = frozenset({"numpy", "torch"})
ISA_VARIABLE = "POLYCE_ISA"
THREADS_VARIABLE = "POLYCE_NUM_THREADS"
# More would not be meant, and each one costs memory.
MOST_THREADS = 1024
_MOST_KERNELS = 1024
# From so many classes on a backward pass is spared a reading of the logits by what a forward pass
# saves of each row. The core's own rule, here for those who ask where it does not run.
SAVED_FROM = 65
# Under torch.compile the call of an operator takes 40 to 80 µs more than what the compiler makes of
# the reference's operations; about here the kernel has made up for that (forward: 128×1000 118 and
# 116 µs, 256×1000 161 and 198; with backward 291 and 276, 341 and 443; one thread).
FEWEST_COMPILED = 2**17


# Looked up once: torch.compile traces the choice of an implementation. In a checkout the folder of
# the C++ files has the module's name, and is found, but loads nothing.
_SPEC = importlib.util.find_spec("polyce._core")
_IS_BUILT = _SPEC is not None and _SPEC.loader is not None


def unavailable() -> str | None:
    """Say that the core was not built with this install, and what that costs."""
    if _IS_BUILT:
        return None
    return (
        "the compiled core is not built, so calls on NumPy and torch CPU arrays take several times "
        "as long (where there is a C++ compiler, pip install --no-cache-dir --force-reinstall "
        "--no-deps polyce builds it)"
    )


def refuses(problem: Problem) -> str | None:
    """Say what the kernels cannot read."""
    if not (problem.is_concrete or problem.is_compiling):
        return "the arrays are no memory to read now (traced, transformed or without values)"
    if problem.target_dtype in arrays.SUB_BYTE:
        return f"labels of {problem.target_dtype} are no whole bytes"
    # The result has the byte order of what it is promoted from.
    if problem.backend == "numpy" and not (
        problem.logits_dtype.isnative and problem.result_dtype.isnative
    ):
        return "the bytes of logits or probabilities are not in this processor's order"
    return None


def is_left_to_the_compiler(problem: Problem) -> bool:
    """Tell whether torch.compile had better fuse the reference's operations than call a kernel.

    Calling it takes the time of some ten thousand logits. Where sizes are symbolic it is called.
    """
    if not problem.is_compiling:
        return False
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(math.prod(problem.shape) < FEWEST_COMPILED))


_loaded: list[ModuleType] = []


def core() -> ModuleType:
    """Give the compiled module, set as the environment asks when it is first used."""
    if not _loaded:
        _loaded.append(_set_up(importlib.import_module("polyce._core")))
    return _loaded[0]


def _set_up(module: ModuleType) -> ModuleType:
    isa, threads = os.environ.get(ISA_VARIABLE), os.environ.get(THREADS_VARIABLE)
    if isa and not module.use_isa(isa):
        raise ValueError(
            f"{ISA_VARIABLE} must be one of {', '.join(module.isas())} on this processor, got "
            f"{isa!r}; leave it out for the first of them"
        )
    if threads:
        if not threads.isdecimal() or not 1 <= int(threads) <= MOST_THREADS:
            raise ValueError(
                f"{THREADS_VARIABLE} must be a number of threads from 1 to {MOST_THREADS}, got "
                f"{threads!r}; leave it out for one on each processor"
            )
        module.set_num_threads(int(threads))
    return module


class Memory(NamedTuple):
    """How the kernels come by the memory of a library's arrays."""

    empty: Callable[..., Any]
    """(shape, dtype) -> array"""
    empty_like: Callable[[Any], Any]
    """An array laid out as another is, without gaps and overlaps."""
    in_order: Callable[[Any], Any]
    """An array with its bytes in this processor's order."""
    dense: Callable[..., Any]
    """(name, array, dtype or None) -> such an array, C-contiguous, of that dtype or of its own"""
    scalar: Callable[[Any], Any]
    """An array of no dimension as the library's own sum returns it."""
    written: Callable[[Any], object] = id
    """Says that the kernels have written an array of the caller's, where somebody keeps count."""
    on_graph: Callable[..., tuple[Any, Stats | None] | None] | None = None
    """(problem, operands) -> (loss, stats), or None where no gradient waits for the loss"""


def _in_order(array: Any) -> Any:
    """Give an array with its bytes in this processor's order, as the kernels read them."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _dense(name: str, array: Any, dtype: Any) -> Any:
    # So most arrays come; to find that out takes NumPy's own function three times as long.
    if array.flags.carray and array.dtype.isnative and (dtype is None or array.dtype == dtype):
        return array
    array = np.asarray(_in_order(array), dtype, order="C")
    return array if array.flags.aligned else array.copy()


_NUMPY = Memory(
    empty=np.empty,
    empty_like=np.empty_like,
    in_order=_in_order,
    dense=_dense,
    scalar=lambda array: array[()],
)


_memories = {"numpy": _NUMPY}


def memory(backend: str) -> Memory:
    """Give what is known of a backend's arrays."""
    if backend not in _memories:
        from polyce.implementations.native import torch as native_torch

        _memories[backend] = native_torch.MEMORY
    return _memories[backend]


def torch_kernels() -> Any:
    """Give the kernels of whole calls on torch."""
    from polyce.implementations.native import torch as native_torch

    return native_torch.KERNELS


def cross_entropy(problem: Problem, operands: Operands) -> tuple[Any, Stats | None]:
    """Compute the loss, on torch's graph where something waits for a gradient, and the stats."""
    on_graph = memory(problem.backend).on_graph
    found = None if on_graph is None else on_graph(problem, operands)
    return run(problem, operands) if found is None else found


def cross_entropy_with_grad(
    problem: Problem, operands: Operands, out: Any
) -> tuple[Any, Any, Stats | None]:
    """Give the loss, the gradient, in `out` where it is given, and the stats."""
    own = memory(problem.backend)
    grad = own.empty_like(operands.logits) if out is None else out
    loss, found = run(problem, operands, grad, fresh=out is None)
    if out is not None:
        own.written(out)
    return loss, grad, found


def run(
    problem: Problem,
    operands: Operands,
    grad: Any = None,
    *,
    fresh: bool = False,
    saved: Any = None,
    backward: bool = False,
) -> tuple[Any, Stats | None]:
    """Run the kernels; the gradient, and what a backward pass needs, are written where given."""
    own = memory(problem.backend)
    empty, in_order, dense = own.empty, own.in_order, own.dense
    logits, target, weight, sample_weight, normalizer, cotangent = operands
    by_rows = problem.options.reduction == "none"
    losses = None
    if not backward:
        losses = empty(problem.row_shape if by_rows else (), dtype=problem.result_dtype)
    found = None
    if problem.options.stats is not None:
        found = stats.unfilled(problem, lambda shape, dtype: empty(shape, dtype=dtype))
    if problem.kind == "index":
        target = dense("target", target, None)
        if not problem.row_shape and target.ndim:
            target = target.reshape(())  # one label for one row may have an axis
    else:
        target = in_order(target)
    if weight is not None:
        weight = dense("weight", weight, problem.arithmetic_dtype)
    if sample_weight is not None:
        sample_weight = dense("sample_weight", sample_weight, problem.row_dtype)
    if backward and saved is not None:
        saved = dense("what was saved of the rows", saved, None)
    by_row = by_rows and cotangent is not None and type(cotangent) is not float
    by_row = by_row and cotangent.ndim > 0
    if by_row:
        cotangent = dense("grad_output", cotangent, problem.row_dtype)
    bad_row = kernel(problem).run(
        in_order(logits),
        target,
        weight,
        sample_weight,
        0.0 if normalizer is None else normalizer,
        losses,
        found,
        saved,
        1.0 if cotangent is None else cotangent,
        by_row,
        grad,
        fresh,
        backward,
    )
    if bad_row is not None:
        raise labels.bad_label(problem, int(target.reshape((-1,))[bad_row]), bad_row)
    return losses if by_rows or backward else own.scalar(losses), found


def log_softmax(problem: Problem, logits: Any) -> Any:
    """Give log(softmax(logits)) along the class axis."""
    own = memory(problem.backend)
    result = own.empty_like(logits)
    kernel(problem).log_softmax(own.in_order(logits), result)
    return result


_kernels: dict[Problem, Any] = {}


def kernel(problem: Problem) -> Any:
    """Give what the kernels know of a problem before they see an array."""
    found = _kernels.get(problem)
    if found is None:
        if len(_kernels) >= _MOST_KERNELS:
            _kernels.clear()
        found = _kernels[problem] = _kernel(problem)
    return found


def _kernel(problem: Problem) -> Any:
    return core().Call(
        shape=problem.shape,
        axis=problem.axis,
        logits_dtype=problem.logits_dtype_name,
        target_dtype=problem.target_dtype,
        probabilities=problem.kind == "probability",
        wide=arrays.name_of(problem.arithmetic_dtype) == "float64",
        result_dtype=arrays.name_of(problem.result_dtype),
        reduction=problem.options.reduction,
        ignored=labels.ignored_as_signed(problem) if problem.kind == "index" else None,
        check_labels=problem.check_labels,
        smoothing=problem.options.label_smoothing,
        z_loss=problem.options.z_loss,
        scale=transform.scale_of(problem),
        cap=problem.options.logit_softcap or 0.0,
        normalized=problem.normalized,
    )


PATH = Implementation(
    name="native",
    cross_entropy=cross_entropy,
    cross_entropy_with_grad=cross_entropy_with_grad,
    backends=BACKENDS,
    devices=frozenset({"cpu"}),
    unavailable=unavailable,
    refuses=refuses,
    by_name_only=is_left_to_the_compiler,
    torch_kernels=torch_kernels,
    log_softmax=log_softmax,
)
