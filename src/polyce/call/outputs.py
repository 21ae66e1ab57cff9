"""Memory of the caller's that the gradient is written to: what it may be, and the writing."""

from __future__ import annotations

from typing import Any, NamedTuple

from polyce import arrays, libraries
from polyce.call.problem import Operands, Problem

# Libraries whose arrays can be written in place.
WRITABLE = ("numpy", "torch", "cupy", "array-api-strict")


class Place(NamedTuple):
    """Where an array lies."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In bytes."""
    itemsize: int

    @property
    def extent(self) -> tuple[int, int]:
        """The addresses from the first byte to behind the last one."""
        steps = [(size - 1) * step for size, step in zip(self.shape, self.strides, strict=True)]
        first = self.address + sum(step for step in steps if step < 0)
        last = self.address + sum(step for step in steps if step > 0)
        return first, last + self.itemsize

    @property
    def overlaps_itself(self) -> bool:
        """Whether two entries may share memory: each stride should reach over what is within it."""
        reach = self.itemsize
        for step, size in sorted(
            (abs(step), size) for step, size in zip(self.strides, self.shape, strict=True)
        ):
            if size > 1:
                if step < reach:
                    return True
                reach = step * (size - 1) + reach
        return False

    def meets(self, other: Place) -> bool:
        """Tell whether two arrays lie in a common stretch of memory."""
        if 0 in self.shape or 0 in other.shape:
            return False
        (first, last), (there, end) = self.extent, other.extent
        return first < end and there < last


def _place(array: Any, backend: str) -> Place | None:
    """Tell where an array lies; None for what is no array and where the library does not say."""
    if not hasattr(array, "dtype"):
        return None
    if backend == "numpy":
        address = array.__array_interface__["data"][0]
        return Place(address, array.shape, array.strides, array.itemsize)
    if backend == "torch":
        strides = tuple(step * array.itemsize for step in array.stride())
        return Place(array.data_ptr(), tuple(array.shape), strides, array.itemsize)
    if backend == "cupy":
        return Place(array.data.ptr, array.shape, array.strides, array.itemsize)
    return None


def check(problem: Problem, operands: Operands, out: Any) -> None:
    """Refuse what cannot take the gradient, before anything is written."""
    logits, backend = operands.logits, problem.backend
    if backend not in WRITABLE:
        raise TypeError(
            f"out needs arrays that can be written, which those of {backend} are not; leave it out"
        )
    libraries.of(input=logits, out=out)
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
    if arrays.device(out, backend) != arrays.device(logits, backend):
        raise TypeError(
            f"out must lie on input's device {arrays.device(logits, backend)}, got "
            f"{arrays.device(out, backend)}; make it there"
        )
    if backend == "numpy" and not out.flags.writeable:
        raise ValueError("out must be writeable, got a read-only array; pass a copy of it")
    if backend == "torch" and out.is_neg():
        raise ValueError("out must lie in memory as it is read, got a negated view; pass a copy")
    if backend == "torch" and out.requires_grad:
        raise ValueError("out must not require a gradient, but it does; pass out.detach()")
    place = _place(out, backend)
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
        there = _place(operand, backend)
        if there is None or not place.meets(there) or (name == "input" and there == place):
            continue
        if backend == "torch":
            _check_storages(out=out, **{name: operand})
        raise ValueError(
            "out may be input itself, but must share no memory with the arguments otherwise, and "
            f"does with {name}; pass a copy of it"
        )


def _show_dtype(dtype: Any) -> str:
    """Name a dtype, with the order of its bytes where that is not this processor's."""
    name = arrays.name_of(dtype)
    return name if getattr(dtype, "isnative", True) else f"{name} of bytes in the order {dtype.str}"


def check_inplace(problem: Problem, operands: Operands) -> None:
    """Refuse torch logits that a backward pass could not write its gradient over."""
    if not problem.is_concrete:
        raise ValueError(
            "inplace_backward needs memory that can be written, but input is traced; "
            "leave inplace_backward out"
        )
    logits = operands.logits
    place = _place(logits, "torch")
    if place is None:
        return
    if place.overlaps_itself:
        raise ValueError(
            "with inplace_backward input must not overlap itself, got shape "
            f"{place.shape} with strides of {place.strides} bytes; pass a copy of it"
        )
    for name, operand in operands.named().items():
        there = None if name == "input" else _place(operand, "torch")
        if there is not None and place.meets(there):
            raise ValueError(
                "with inplace_backward input must share no memory with the other arguments, and "
                f"does with {name}; pass a copy of it"
            )
    # Of a view, autograd hands the gradient on to what it is a view of.
    for tensor in (logits, logits._base):
        if tensor is None or not (tensor.is_leaf or tensor.retains_grad) or tensor.grad is None:
            continue
        there = None if tensor.grad.is_sparse else _place(tensor.grad, "torch")
        if there is not None and place.meets(there):
            raise ValueError(
                "with inplace_backward input must not hold its own gradient, to which a backward "
                "pass would add what it has just written over it, and does; set its grad to None"
            )


def write(problem: Problem, grad: Any, out: Any) -> Any:
    """Copy a gradient into the caller's memory."""
    if problem.backend == "torch":
        _check_storages(out=out)
        return out.copy_(grad)
    out[...] = grad
    return out


def _check_storages(**tensors: Any) -> None:
    from polyce import torch_checks

    torch_checks.check_storages(**tensors)
