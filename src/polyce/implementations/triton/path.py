"""triton: kernels for torch tensors on CUDA and ROCm, in float16, bfloat16, float32 and float64.

The logits are read once for the loss, and once more for the gradient, which is written once. With
TRITON_INTERPRET=1 Triton runs the same kernels in NumPy, slowly: then the path takes tensors on a
CPU too, if it is asked for by name.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from typing import Any

from polyce.call.problem import Operands, Problem
from polyce.formula.parts import Part, TeacherState
from polyce.formula.stats import Stats
from polyce.implementations.contract import Implementation, OfParts

BACKENDS = frozenset({"torch"})
DEVICES = frozenset({"cpu", "cuda"})
DTYPES = frozenset({"float16", "bfloat16", "float32", "float64"})
# Triton numbers classes in 32 bits, and a tile reaches beyond the last one.
_MOST_CLASSES = 2**31 - 2**16

# Looked up once: torch.compile traces the choice of an implementation.
_IS_INSTALLED = importlib.util.find_spec("triton") is not None
_HAS_COMPILER = bool(os.environ.get("CC")) or any(map(shutil.which, ("gcc", "clang", "cc")))


def interprets() -> bool:
    """Tell whether Triton runs kernels in NumPy, on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _was_imported_to_compile() -> bool:
    """Tell whether Triton was imported without TRITON_INTERPRET=1, which it reads on import."""
    standard = sys.modules.get("triton.language.standard")
    return standard is not None and type(standard.sum).__name__ == "JITFunction"


def unavailable() -> str | None:
    """Return what Triton lacks here, or None."""
    if not _IS_INSTALLED:
        return "triton is not installed (pip install triton)"
    if interprets():
        return None
    if not _HAS_COMPILER:
        return "Triton needs a C compiler to launch kernels, and none is on PATH (gcc, clang or CC)"
    torch = sys.modules.get("torch")
    if torch is not None and not torch.cuda.is_available():
        return "torch finds no CUDA or ROCm device (TRITON_INTERPRET=1 runs the kernels on a CPU)"
    return None


def refuses(problem: Problem) -> str | None:
    """Return what the kernels cannot read in this problem, or None."""
    if problem.device == "cpu" and not interprets():
        return "tensors on a CPU are taken under TRITON_INTERPRET=1 only"
    if problem.device == "cpu" and _was_imported_to_compile():
        return "TRITON_INTERPRET=1 came after Triton was imported (set it before)"
    if not (problem.is_concrete or problem.is_compiling):
        return "the arrays are no memory to read now (traced, transformed or without values)"
    if problem.is_compiling and problem.kind in ("sparse", "teacher"):
        return f"as an operator of torch.compile the kernels take no target {problem.kind}"
    if problem.classes > _MOST_CLASSES:
        return f"takes at most {_MOST_CLASSES} classes"
    return None


def is_emulated(problem: Problem) -> bool:
    """Tell whether the kernels would run in NumPy, far too slowly to be chosen unasked."""
    return problem.device == "cpu"


def torch_kernels() -> Any:
    """Return the kernels' calls on tensors without a graph."""
    from polyce.implementations.triton import calls

    return calls.KERNELS


def cross_entropy(problem: Problem, operands: Operands) -> tuple[Any, Stats | None]:
    """Compute the loss, on torch's graph if something requires a gradient, and the stats."""
    from polyce.graphs import torch_calls

    return torch_calls.cross_entropy(torch_kernels(), problem, operands)


def cross_entropy_with_grad(
    problem: Problem, operands: Operands, out: Any
) -> tuple[Any, Any, Stats | None]:
    """Compute the loss, the gradient, in `out` if that is given, and the stats."""
    from polyce.implementations.triton import calls

    return calls.cross_entropy_with_grad(problem, operands, out)


def read_part(problem: Problem, *part: Any, **more: Any) -> Part:
    """Read a part of the classes of each row."""
    from polyce.implementations.triton import parts

    return parts.read(problem, *part, **more)


def part_gradient(problem: Problem, *part: Any, **more: Any) -> Any:
    """Compute the gradient of a part of the classes of each row, from the whole."""
    from polyce.implementations.triton import parts

    return parts.gradient(problem, *part, **more)


def read_teacher_part(problem: Problem, teacher: Any) -> TeacherState:
    """Read a part of the classes of each of a teacher's rows."""
    from polyce.implementations.triton import parts

    return parts.read_teacher(problem, teacher)


PATH = Implementation(
    name="triton",
    cross_entropy=cross_entropy,
    cross_entropy_with_grad=cross_entropy_with_grad,
    backends=BACKENDS,
    devices=DEVICES,
    dtypes=DTYPES,
    unavailable=unavailable,
    refuses=refuses,
    by_name_only=is_emulated,
    torch_kernels=torch_kernels,
    takes_grad_stats=True,
    of_parts=OfParts(read_part, part_gradient, read_teacher_part),
)
