"""The caller's memory that a gradient is written to: the checks of it, and the writing."""

from __future__ import annotations

from typing import Any

from polyce.arrays import dtypes, find
from polyce.call.problem import Operands, Problem


def check(problem: Problem, operands: Operands, out: Any) -> None:
    """Refuse an `out` that cannot take the gradient, before anything is written."""
    logits, library = operands.logits, problem.library
    if not library.is_writable:
        raise TypeError(
            f"out needs arrays that can be written, which those of {library.name} are not; leave "
            "it out"
        )
    find.of(input=logits, out=out)
    if not problem.is_concrete:
        raise ValueError("out needs memory that can be written now, but input is traced; leave out")
    if out.dtype != problem.logits_dtype:
        raise TypeError(
            f"out must have input's dtype {_show_dtype(problem.logits_dtype)}, got "
            f"{_show_dtype(out.dtype)}; pass empty_like(input)"
        )
    if tuple(out.shape) != problem.shape:
        raise ValueError(
            f"out must have input's shape {problem.shape}, got {tuple(out.shape)}; "
            "pass empty_like(input)"
        )
    if library.device(out) != library.device(logits):
        raise TypeError(
            f"out must lie on input's device {library.device(logits)}, got "
            f"{library.device(out)}; make it there"
        )
    if why_not := library.unwritable(out):
        raise ValueError(f"out must {why_not}")
    place = library.place(out)
    if place is None:
        return
    if place.overlaps_itself:
        raise ValueError(
            f"out must not overlap itself, got shape {place.shape} with strides of "
            f"{place.strides} bytes; pass a copy of it"
        )
    for name, operand in operands.named().items():
        if operand is None:
            continue
        there = library.place(operand)
        if there is None or not place.meets(there) or (name == "input" and there == place):
            continue
        library.check_memory({"out": out, name: operand})
        raise ValueError(
            "out may be input itself, but must share no memory with the arguments otherwise, and "
            f"does with {name}; pass a copy of it"
        )


def _show_dtype(dtype: Any) -> str:
    """Name a dtype, with its byte order if that is not this processor's."""
    name = dtypes.name_of(dtype)
    return name if getattr(dtype, "isnative", True) else f"{name} of bytes in the order {dtype.str}"


def check_inplace(problem: Problem, operands: Operands) -> None:
    """Refuse torch logits that a backward pass could not write its gradient over."""
    if not problem.is_concrete:
        raise ValueError(
            "inplace_backward needs memory that can be written, but input is traced; "
            "leave inplace_backward out"
        )
    logits, library = operands.logits, problem.library
    place = library.place(logits)
    if place is None:
        return
    if place.overlaps_itself:
        raise ValueError(
            "with inplace_backward input must not overlap itself, got shape "
            f"{place.shape} with strides of {place.strides} bytes; pass a copy of it"
        )
    for name, operand in operands.named().items():
        there = None if name == "input" else library.place(operand)
        if there is not None and place.meets(there):
            raise ValueError(
                "with inplace_backward input must share no memory with the other arguments, and "
                f"does with {name}; pass a copy of it"
            )
    # Autograd passes the gradient of a view on to the tensor that it is a view of.
    for tensor in (logits, logits._base):
        if tensor is None or not (tensor.is_leaf or tensor.retains_grad) or tensor.grad is None:
            continue
        there = None if tensor.grad.is_sparse else library.place(tensor.grad)
        if there is not None and place.meets(there):
            raise ValueError(
                "with inplace_backward input must not hold its own gradient, to which a backward "
                "pass would add what it has just written over it, and does; set its grad to None"
            )


def write(problem: Problem, grad: Any, out: Any) -> Any:
    """Copy a gradient into the caller's memory."""
    problem.library.check_memory({"out": out})
    out[...] = grad
    return out
