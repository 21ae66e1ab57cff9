"""torch: plain, traced and transformed tensors, and autocast."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import array_api_compat.torch as xp
import torch
from torch.autograd import forward_ad

from polyce.arrays import torch_memory
from polyce.arrays.dtypes import name_of
from polyce.arrays.library import Library, Place


class _Torch(Library):
    is_writable = True
    stored_only = ("uint16", "uint32", "uint64")

    # Values and devices

    def has_values(self, array: Any) -> bool:
        """Tell whether this is a plain tensor that is not traced and not inside a vmap."""
        return not (
            _is_traced()
            or not torch_memory.is_plain(array)
            or torch._C._functorch.is_functorch_wrapped_tensor(array)
        )

    def are_concrete(self, arrays: Iterable[Any]) -> bool:
        """Tell whether all are memory, outside of transforms and forward mode.

        Those need torch operations.
        """
        return super().are_concrete(arrays) and not is_transformed()

    def are_compiled(self, arrays: Iterable[Any]) -> bool:
        """Tell whether torch.compile traces these arrays.

        Not so for torch.export, transforms and forward mode, which need torch operations.
        """
        if not torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():
            return False
        return not is_transformed() and all(
            array is None or torch_memory.is_plain(array) for array in arrays
        )

    def device(self, array: Any) -> Any:
        """Return the tensor's device."""
        return array.device

    def device_kind(self, array: Any) -> str:
        """Return the device's type."""
        return str(array.device.type)

    def computing(self, operands: Mapping[str, Any]) -> contextlib.AbstractContextManager[Any]:
        """Check the tensors' storages, which torch's own operations do not."""
        self.check_memory(operands)
        return contextlib.nullcontext()

    def multiplying(self, operands: Mapping[str, Any]) -> contextlib.AbstractContextManager[Any]:
        """Keep autocast, which has been heeded, from the products."""
        self.check_memory(operands)
        return torch.autocast(operands["input"].device.type, enabled=False)

    def place(self, array: Any) -> Place | None:
        """Return where a tensor lies."""
        if not hasattr(array, "dtype"):
            return None
        strides = tuple(step * array.itemsize for step in array.stride())
        return Place(array.data_ptr(), tuple(array.shape), strides, array.itemsize)

    def unwritable(self, out: Any) -> str | None:
        """Refuse a tensor that requires a gradient, or whose memory holds other values."""
        if out.is_neg():
            return "lie in memory as it is read, got a negated view; pass a copy"
        if out.requires_grad:
            return "not require a gradient, but it does; pass out.detach()"
        return None

    def check_memory(self, arrays: Mapping[str, Any]) -> None:
        """Refuse tensors that reach beyond their storages."""
        torch_memory.check_storages(**arrays)

    # Dtypes

    def to_numpy(self, *arrays: Any) -> list[Any]:
        """Detach the tensors and bring them to the CPU."""
        return [array.detach().cpu().numpy() for array in arrays]

    def has_float64(self, where: Any) -> bool:
        """Tell whether the device is not Apple's, the only one without it."""
        return bool(where.device.type != "mps")

    def label_dtype(self, labels: Any) -> Any:
        """Return int64, which torch's gather takes."""
        return torch.int64

    def result_dtype(self, dtype: Any, where: Any) -> Any:
        """Widen 16 bits under autocast, as torch does."""
        if name_of(dtype) in ("float16", "bfloat16"):
            kind = where.device.type
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                return torch.float32
        return dtype

    def factor_dtype(self, dtype: Any, where: Any) -> Any:
        """Return the dtype that autocast prescribes for products."""
        if name_of(dtype) != "float64":
            kind = where.device.type
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                return torch.get_autocast_dtype(kind)
        return dtype

    def product_dtype(self, dtype: Any, where: Any) -> Any:
        """Keep 16 bits, for which there is hardware; except float16 on a CPU.

        There torch takes a hundred times as long for it as for float32.
        """
        if name_of(dtype) == "float16" and where.device.type == "cpu":
            return torch.float32
        return dtype

    # Rows and classes

    def pick(self, values: Any, labels: Any, logits: Any, axis: int) -> Any:
        """Gather; the standard's function also handles negative labels and fixes symbolic sizes."""
        shape = labels.shape[:axis] + values.shape[axis : axis + 1] + labels.shape[axis + 1 :]
        values = values if values.shape == shape else values.expand(shape)
        return torch.gather(values, axis, labels)

    def add_at(self, array: Any, labels: Any, values: Any, axis: int) -> Any:
        """Scatter, which adds up what has one place."""
        return torch.scatter_add(array, axis, labels, values)

    def class_max(self, values: Any, axis: int) -> Any:
        """Return the largest value, detached: its derivative, split among ties, would cancel."""
        return self.xp.max(values.detach(), axis=axis, keepdims=True)

    def class_sum(self, values: Any, axis: int, dtype: Any) -> Any:
        """Sum before widening, which would copy all values: torch adds in a cascade on any axis."""
        return self.cast(self.xp.sum(values, axis=axis, keepdims=True), dtype)

    def row_count(self, row_shape: tuple[Any, ...], logits: Any, axis: int, dtype: Any) -> Any:
        """Count rows; in an export their number may be symbolic."""
        count = math.prod(row_shape)
        return float(count) if isinstance(count, int) else torch.sym_float(count)


def is_transformed() -> bool:
    """Tell whether a torch.func transform or a level of forward mode is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _is_traced() -> bool:
    return bool(
        torch.compiler.is_compiling()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)  # make_fx
        or torch.jit.is_tracing()
    )


LIBRARY = _Torch("torch", xp, "torch.as_tensor")
