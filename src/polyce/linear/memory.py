"""How a library's arrays are made, and multiplied into memory that is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Products(NamedTuple):
    """How a library's arrays are made, and multiplied into memory that is there."""

    empty: Callable[..., Any]
    """(shape, dtype, like) -> array on the device of `like`"""
    multiply: Callable[..., Any]
    """(a, b, bias, out): out = a @ b, plus bias along the last axis if there is one"""
    add_product: Callable[..., Any]
    """(a, b, total, first, scratch): total = a @ b the first time, then total += a @ b"""
    packed: Callable[[Any], Any]
    """A matrix as products take it without a copy of their own."""
    nonzero: Callable[[Any], Any]
    """Numbers of the entries of a mask that are True."""
    has_scratch: bool
    """Whether `add_product` wants memory for a product of its own."""


def of_arrays(xp: Any) -> Products:
    """Return what is known of NumPy's arrays, or of CuPy's, by the library's namespace."""

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
        # BLAS takes any distance between rows, CuPy none.
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
