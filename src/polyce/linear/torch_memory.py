"""torch's matrix products into existing memory."""

from __future__ import annotations

from typing import Any

import torch

from polyce.linear.memory import Products

# Whether torch returns products of 16 bits in 32 bits on CUDA: from 2.8 on. On ROCm the argument
# exists, but some versions refuse it. Otherwise a product is rounded to 16 bits, then added in 32.
_HAS_WIDE_PRODUCTS = torch.version.hip is None and "dtype" in torch.ops.aten.mm.overloads()


def _multiply(a: torch.Tensor, b: torch.Tensor, bias: Any, out: torch.Tensor) -> None:
    if bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


def _add_product(
    a: torch.Tensor, b: torch.Tensor, total: torch.Tensor, first: bool, scratch: None
) -> None:
    if total.dtype == a.dtype:
        if first:
            torch.mm(a, b, out=total)
        else:
            total.addmm_(a, b)
        return
    wide = {"out_dtype": total.dtype} if _HAS_WIDE_PRODUCTS and a.is_cuda else {}
    product = torch.mm(a, b, **wide)
    if first:
        total.copy_(product)
    else:
        total.add_(product)


PRODUCTS = Products(
    empty=lambda shape, dtype, like: torch.empty(shape, dtype=dtype, device=like.device),
    multiply=_multiply,
    add_product=_add_product,
    packed=lambda tensor: tensor,
    nonzero=lambda mask: torch.nonzero(mask)[:, 0],
    has_scratch=False,
)
