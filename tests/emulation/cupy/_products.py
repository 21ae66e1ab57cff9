"""Matrix products, which CuPy leaves to cuBLAS, as cupy/_core/_routines_linalg.pyx calls it.

- cuBLAS writes into `out` if it is in C order, has the operands' common dtype and shares no memory
  with an operand; otherwise the product gets memory of its own and is copied to `out`.
- An operand in neither C nor Fortran order, such as a block of a matrix's columns, is copied, since
  CuPy does not tell cuBLAS about gaps between rows. One of another dtype is converted.
- If `out` has the operands' dtype, its size is checked but not its shape.
- The arrays' devices are not checked: cuBLAS's handle is that of the current device.
- 16-bit products are summed in float32 and rounded once. CuPy 13 does not know bfloat16.
- If there is nothing to sum, `out` is filled with zeros. A result of a single number is a reduction
  by kernels of CuPy's own.
"""

from __future__ import annotations

import numpy as np

from . import emulation
from ._ndarray import ndarray
from .cuda import device


def matmul(a: ndarray, b: ndarray, /, *, out: ndarray | None = None) -> ndarray:
    """Multiply two matrices, or a matrix and a vector."""
    operands = (a, b) if out is None else (a, b, out)
    for array in operands:
        if not isinstance(array, ndarray):
            raise TypeError(f"matmul takes arrays of cupy, got {type(array)}")
        _check_device(array)
    if min(a.ndim, b.ndim) == 0:
        raise ValueError("Scalar operands are not allowed, use '*' instead")
    if max(a.ndim, b.ndim) > 2:
        raise NotImplementedError("the emulated CuPy multiplies single matrices alone")
    dtype = np.promote_types(a.dtype, b.dtype)
    shape = (*a.shape[:-1], *b.shape[1:])
    if a.shape[-1] != b.shape[0]:
        raise ValueError("Axis dimension mismatch")
    if out is None:
        out = ndarray(shape, dtype)
    else:
        _check_out(out, shape, a, b)
    direct = out.flags.c_contiguous and out.dtype == dtype
    if direct and not any(np.may_share_memory(out._array, one._array) for one in (a, b)):
        _multiply(a, b, out)
        return out
    product = ndarray(shape, dtype)
    _multiply(a, b, product)
    out[...] = product
    return out


def _check_device(array: ndarray) -> None:
    here, there = device.get_device_id(), array._memory.device_id
    if here != there:
        raise emulation.EmulationError(
            f"matmul: an array lies on device {there}, but cuBLAS would run on device {here}; "
            "enter `with array.device`"
        )


def _check_out(out: ndarray, shape: tuple[int, ...], a: ndarray, b: ndarray) -> None:
    if out.shape != shape:
        text = f"Output operand 0 has invalid shape {out.shape} expected {shape}"
        if {a.dtype, b.dtype} == {out.dtype}:
            raise emulation.EmulationError(f"{text}, of which CuPy sees the size alone")
        raise ValueError(text)
    dtype = np.promote_types(a.dtype, b.dtype)
    if not np.can_cast(dtype, out.dtype, "same_kind"):
        raise TypeError(f"Cannot cast out dtype from {dtype} to {out.dtype}")


def _multiply(a: ndarray, b: ndarray, out: ndarray) -> None:
    if not a.size or not b.size:
        out.fill(0)
        return
    m, k, n = (a.shape[0] if a.ndim > 1 else 1), a.shape[-1], (b.shape[1] if b.ndim > 1 else 1)
    if m == n == 1:
        # The products, and their sum.
        ndarray((k,), out.dtype)
        emulation.other_kernels += 2
    else:
        a, b = (one.astype(out.dtype, copy=False) for one in (a, b))
        a, b = (one if one.flags.forc else one.copy() for one in (a, b))
        emulation.products.append(emulation.Product(m, n, k, out.dtype.name))
    raw = (a._array, b._array)
    if out.itemsize == 2 and out.dtype.kind not in "iu":
        raw = tuple(one.astype(np.float32) for one in raw)
    with np.errstate(all="ignore"):
        out._array[...] = np.matmul(*raw)
