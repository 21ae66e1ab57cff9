"""A library's matrix products into existing memory, and what they need of its arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Products(NamedTuple):
    """A library's matrix products into existing memory, and what they need of its arrays."""

    empty: Callable[..., Any]
    """(shape, dtype, like) -> array on the device of `like`"""
    multiply: Callable[..., Any]
    """(a, b, bias, out): out = a @ b, plus bias along the last axis if there is one"""
    add_product: Callable[..., Any]
    """(a, b, total, first, scratch): total = a @ b the first time, then total += a @ b"""
    packed: Callable[[Any], Any]
    """A matrix in a layout that products take without copying it."""
    nonzero: Callable[[Any], Any]
    """Indices of the entries of a mask that are True."""
    has_scratch: bool
    """Whether `add_product` needs memory for the product itself."""


def of_arrays(xp: Any) -> Products:
    """Return the products of NumPy, or of CuPy, by the library's namespace."""

    def multiply(a: Any, b: Any, bias: Any, out: Any) -> None:
        xp.matmul(a, b, out=out)
        if bias is not None:
            xp.add(out, bias, out=out)

    def add_product(a: Any, b: Any, total: Any, first: bool, scratch: Any) -> None:
        if first:
            xp.matmul(a, b, out=total)
            return
        product = scratch[: total.size].reshape(total.shape)
        xp.matmul(a, b, out=product)
        xp.add(total, product, out=total)

    def packed(array: Any) -> Any:
        # BLAS takes any distance between rows, CuPy only contiguous ones.
        is_packed = xp is np and array.strides[-1] == array.itemsize
        return array if is_packed else xp.ascontiguousarray(array)

    return Products(
        empty=lambda shape, dtype, like: xp.empty(shape, dtype),
        multiply=multiply,
        add_product=add_product,
        packed=packed,
        nonzero=lambda mask: xp.nonzero(mask)[0],
        has_scratch=True,
    )
