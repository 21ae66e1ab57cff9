"""cupy: CUDA kernels for CuPy arrays, compiled by CuPy when they are first called.

The logits are read from memory once, for the loss alone or with the gradient, which is written
once.
"""

from __future__ import annotations

import sys
from typing import Any

from polyce.arrays import find
from polyce.call.problem import Operands, Problem
from polyce.formula.parts import Part, TeacherState
from polyce.formula.stats import Stats
from polyce.implementations.contract import Implementation, OfParts

BACKENDS = frozenset({"cupy"})
DEVICES = frozenset({"cuda"})
# The kernels number classes in 32 bits, and count beyond the last one.
_MOST_CLASSES = 2**31 - 2**16


def unavailable() -> str | None:
    """Return why CuPy cannot run here, or None; look for a device only once CuPy is imported."""
    if not find.installed("cupy"):
        return "cupy is not installed (pip install cupy-cuda12x or cupy-cuda13x)"
    cupy = sys.modules.get("cupy")
    if cupy is not None and not _finds_device(cupy):
        return "CuPy finds no CUDA or ROCm device"
    return None


def _finds_device(cupy: Any) -> bool:
    try:
        return bool(cupy.cuda.is_available())
    except cupy.cuda.runtime.CUDARuntimeError:  # of CuPy 13, where the driver is missing or old
        return False


def refuses(problem: Problem) -> str | None:
    """Return what the kernels cannot read in this problem, or None."""
    if problem.classes > _MOST_CLASSES:
        return f"takes at most {_MOST_CLASSES} classes"
    return None


def cross_entropy(problem: Problem, operands: Operands) -> tuple[Any, Stats | None]:
    """Compute the loss and the stats."""
    from polyce.implementations.cupy import launch

    return launch.cross_entropy(problem, operands)


def cross_entropy_with_grad(
    problem: Problem, operands: Operands, out: Any
) -> tuple[Any, Any, Stats | None]:
    """Compute the loss, the gradient, in `out` if that is given, and the stats."""
    from polyce.implementations.cupy import launch

    return launch.cross_entropy_with_grad(problem, operands, out)


def read_part(problem: Problem, *part: Any, **more: Any) -> Part:
    """Read a part of the classes of each row."""
    from polyce.implementations.cupy import parts

    return parts.read(problem, *part, **more)


def part_gradient(problem: Problem, *part: Any, **more: Any) -> Any:
    """Compute the gradient of a part of the classes of each row, from the whole."""
    from polyce.implementations.cupy import parts

    return parts.gradient(problem, *part, **more)


def read_teacher_part(problem: Problem, teacher: Any) -> TeacherState:
    """Read a part of the classes of each of a teacher's rows."""
    from polyce.implementations.cupy import parts

    return parts.read_teacher(problem, teacher)


PATH = Implementation(
    name="cupy",
    cross_entropy=cross_entropy,
    cross_entropy_with_grad=cross_entropy_with_grad,
    backends=BACKENDS,
    devices=DEVICES,
    unavailable=unavailable,
    refuses=refuses,
    takes_grad_stats=True,
    of_parts=OfParts(read_part, part_gradient, read_teacher_part),
)
