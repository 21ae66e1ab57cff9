"""torch's products into memory that is there."""

from __future__ import annotations

from typing import Any

import torch

from polyce.linear.in_place import Memory


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
    # Only on these devices can torch give a product of 16 bits in 32.
    wide = {"out_dtype": total.dtype} if a.is_cuda else {}
    product = torch.mm(a, b, **wide)
    if first:
        total.copy_(product)
    else:
        total.add_(product)


MEMORY = Memory(
    empty=lambda shape, dtype, like: torch.empty(shape, dtype=dtype, device=like.device),
    multiply=_multiply,
    add_product=_add_product,
    packed=lambda tensor: tensor,
    nonzero=lambda mask: torch.nonzero(mask)[:, 0],
    has_scratch=False,
)
