"""What the tests of the door on torch's tensors share: tensors, and when results are the same."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

import door_calls

torch = pytest.importorskip("torch")

MARKS = [
    *door_calls.MARKS,
    pytest.mark.only("torch"),
    pytest.mark.skipif(
        not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="this torch is too old"
    ),
]

RNG = np.random.default_rng(21)
LOGITS = torch.from_numpy(RNG.standard_normal((6, 5)).astype(np.float32))
LABELS = torch.tensor([0, 4, 2, 2, 1, 3])
PROBABILITIES = torch.full((6, 5), 0.2)


def leaf(tensor: Any = LOGITS) -> Any:
    return tensor.detach().clone().requires_grad_()


def same(a: Any, b: Any) -> bool:
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    if not isinstance(a, torch.Tensor):
        return bool(a == b)
    return (
        type(a) is type(b)
        and a.dtype == b.dtype
        and a.shape == b.shape
        and a.device == b.device
        and a.stride() == b.stride()
        and a.requires_grad == b.requires_grad
        and a.is_leaf == b.is_leaf
        and a.is_inference() == b.is_inference()
        and (a.is_meta or torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)))
    )


check_after = functools.partial(door_calls.check_after, same)
