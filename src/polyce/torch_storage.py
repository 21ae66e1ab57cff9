"""torch's storages, which can be resized under their tensors, also to nothing.

torch's own operations would read and write beyond them; most do not look.
"""

from __future__ import annotations

from typing import Any

import torch


def check(**tensors: Any) -> None:
    """Refuse tensors that reach beyond their storages; what is no tensor passes."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.numel():
            continue
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        end = tensor.storage_offset() + sum((size - 1) * step for size, step in steps) + 1
        reach, held = end * tensor.itemsize, tensor.untyped_storage().nbytes()
        if reach > held:
            raise RuntimeError(
                f"{name} must lie within its storage, but its shape {tuple(tensor.shape)} and "
                f"strides reach over {reach} bytes of it and it has {held}; do not resize the "
                "storage of a tensor in use"
            )
