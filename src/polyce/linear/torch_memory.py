"""torch's matrix products into existing memory."""

from __future__ import annotations

from typing import Any

import torch

from polyce.linear.memory import Products

# What torch computes of 16-bit matrices in 32 bits on CUDA. On ROCm the arguments exist, but some
# versions refuse them.
_IS_WIDE_ON_CUDA = torch.version.hip is None
# Products, from 2.8 on. Without them a product is rounded to 16 bits, then added in 32.
_HAS_WIDE_PRODUCTS = _IS_WIDE_ON_CUDA and "dtype_out" in torch.ops.aten.mm.overloads()
# Products added to a sum: the operator of 2.8 and 2.9 refuses a sum of 32 bits.
_HAS_WIDE_SUMS = (
    _IS_WIDE_ON_CUDA
    and "dtype_out" in torch.ops.aten.addmm.overloads()
    and torch.__version__ >= (2, 11)
)


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
    if wide and first:
        torch.mm(a, b, **wide, out=total)
    elif wide and _HAS_WIDE_SUMS:
        # One kernel, which reads and writes the sums once and makes no array of the product.
        torch.addmm(total, a, b, **wide, out=total)
    elif first:
        total.copy_(torch.mm(a, b))
    else:
        total.add_(torch.mm(a, b, **wide))


PRODUCTS = Products(
    empty=lambda shape, dtype, like: torch.empty(shape, dtype=dtype, device=like.device),
    multiply=_multiply,
    add_product=_add_product,
    packed=lambda tensor: tensor,
    nonzero=lambda mask: torch.nonzero(mask)[:, 0],
    has_scratch=False,
)
