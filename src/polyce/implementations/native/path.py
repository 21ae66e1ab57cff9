"""native: the compiled kernels, for NumPy arrays and torch tensors on a CPU.

The logits are read once and the gradient is written once, whatever their strides. The kernels also
interpret the target, reduce and fill the stats, so that a small call is little more than one call
of a kernel; the tests hold them to the reference.
"""

from __future__ import annotations

import math
from typing import Any

from polyce.arrays import dtypes
from polyce.call.problem import Operands, Problem
from polyce.formula.parts import Part, TeacherState
from polyce.formula.stats import Stats
from polyce.implementations.contract import Implementation, OfParts
from polyce.implementations.native import parts
from polyce.implementations.native.core import unavailable
from polyce.implementations.native.run import NUMPY, ArrayAccess, kernel, run

BACKENDS = frozenset({"numpy", "torch"})
# In a graph of torch.compile, calling an operator costs more than calling the fused reference; from
# about this many logits on the kernel makes up for it (one thread, busy machine, µs, operator and
# reference: forward 512×10 80 and 86, 128×100 141 and 107, 32×1000 109 and 125; with backward 270
# and 255, 457 and 357, 303 and 310).
FEWEST_COMPILED = 2**14


def refuses(problem: Problem) -> str | None:
    """Return what the kernels cannot read in this problem, or None."""
    if not (problem.is_concrete or problem.is_compiling):
        return "the arrays are no memory to read now (traced, transformed or without values)"
    if problem.is_compiling and problem.kind in ("sparse", "teacher"):
        return f"as an operator of torch.compile the kernels take no target {problem.kind}"
    if problem.target_dtype in dtypes.SUB_BYTE:
        return f"labels of {problem.target_dtype} are no whole bytes"
    # The result has the byte order of the dtypes that it is promoted from.
    given = (problem.logits_dtype, problem.result_dtype)
    if not all(getattr(dtype, "isnative", True) for dtype in given):
        return "the bytes of logits or probabilities are not in this processor's order"
    return None


def is_left_to_the_compiler(problem: Problem) -> bool:
    """Tell whether torch.compile should fuse the reference's operations instead.

    Calling a kernel takes the time of some ten thousand logits. With symbolic sizes it is called.
    """
    if not problem.is_compiling:
        return False
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(math.prod(problem.shape) < FEWEST_COMPILED))


_accesses = {"numpy": NUMPY}


def access(backend: str) -> ArrayAccess:
    """Return the access to a backend's arrays."""
    if backend not in _accesses:
        from polyce.implementations.native import torch as native_torch

        _accesses[backend] = native_torch.TORCH
    return _accesses[backend]


def torch_kernels() -> Any:
    """Return the kernels of whole calls on torch."""
    from polyce.implementations.native import torch as native_torch

    return native_torch.KERNELS


def cross_entropy(problem: Problem, operands: Operands) -> tuple[Any, Stats | None]:
    """Compute the loss, on torch's graph if something requires a gradient, and the stats."""
    own = access(problem.backend)
    found = None if own.on_graph is None else own.on_graph(problem, operands)
    return run(own, problem, operands) if found is None else found


def cross_entropy_with_grad(
    problem: Problem, operands: Operands, out: Any
) -> tuple[Any, Any, Stats | None]:
    """Compute the loss, the gradient, in `out` if that is given, and the stats."""
    own = access(problem.backend)
    grad = own.empty_like(operands.logits) if out is None else out
    loss, found = run(own, problem, operands, grad, fresh=out is None)
    if out is not None:
        own.written(out)
    return loss, grad, found


def log_softmax(problem: Problem, logits: Any) -> Any:
    """Compute log(softmax(logits)) along the class axis."""
    own = access(problem.backend)
    result = own.empty_like(logits)
    kernel(problem).log_softmax(own.in_order(logits), result)
    return result


def read_part(problem: Problem, *part: Any, **more: Any) -> Part:
    """Read a part of the classes of each row."""
    return parts.read(access(problem.backend), problem, *part, **more)


def part_gradient(problem: Problem, *part: Any, **more: Any) -> Any:
    """Compute the gradient of a part of the classes of each row, from the whole."""
    return parts.gradient(access(problem.backend), problem, *part, **more)


def read_teacher_part(problem: Problem, teacher: Any) -> TeacherState:
    """Read a part of the classes of each of a teacher's rows."""
    return parts.read_teacher(access(problem.backend), problem, teacher)


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
    takes_grad_stats=True,
    of_parts=OfParts(read_part, part_gradient, read_teacher_part),
    log_softmax=log_softmax,
)


def lacks_only_the_core(problem: Problem) -> bool:
    """Tell whether this path would serve a problem if its core had been built."""
    return PATH.reasons(problem) == (unavailable(),)
