"""torch: tensors of its own kinds, traced and transformed ones, and its autocast."""

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
        """Tell that plain tensors have them while nothing traces them and no vmap holds them."""
        return not (
            _is_traced()
            or not torch_memory.is_plain(array)
            or torch._C._functorch.is_functorch_wrapped_tensor(array)
        )

    def are_concrete(self, arrays: Iterable[Any]) -> bool:
        """Tell that they are not under a transform or at a level of forward mode.

        There torch wants to see operations of its own.
        """
        return super().are_concrete(arrays) and not is_transformed()

    def are_compiled(self, arrays: Iterable[Any]) -> bool:
        """Tell whether torch.compile traces these arrays.

        torch.export wants operations of torch alone, and so do transforms and forward mode.
        """
        if not torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():
            return False
        return not is_transformed() and all(
            array is None or torch_memory.is_plain(array) for array in arrays
        )

    def device(self, array: Any) -> Any:
        """Return its own."""
        return array.device

    def device_kind(self, array: Any) -> str:
        """Return its own."""
        return str(array.device.type)

    def computing(self, operands: Mapping[str, Any]) -> contextlib.AbstractContextManager[Any]:
        """Look at the tensors' storages, which torch's own operations do not."""
        self.check_memory(operands)
        return contextlib.nullcontext()

    def multiplying(self, operands: Mapping[str, Any]) -> contextlib.AbstractContextManager[Any]:
        """Keep autocast, which has been heeded, from the products."""
        self.check_memory(operands)
        return torch.autocast(operands["input"].device.type, enabled=False)

    def place(self, array: Any) -> Place | None:
        """Tell where a tensor lies."""
        if not hasattr(array, "dtype"):
            return None
        strides = tuple(step * array.itemsize for step in array.stride())
        return Place(array.data_ptr(), tuple(array.shape), strides, array.itemsize)

    def unwritable(self, out: Any) -> str | None:
        """Refuse one that is on a graph or not in memory as it is read."""
        if out.is_neg():
            return "lie in memory as it is read, got a negated view; pass a copy"
        if out.requires_grad:
            return "not require a gradient, but it does; pass out.detach()"
        return None

    def check_memory(self, arrays: Mapping[str, Any]) -> None:
        """Refuse tensors that reach beyond their storages."""
        torch_memory.check_storages(**arrays)

    # Dtypes

    def has_float64(self, where: Any) -> bool:
        """Tell that all devices have it but Apple's."""
        return bool(where.device.type != "mps")

    def label_dtype(self, labels: Any) -> Any:
        """Return what its gather takes."""
        return torch.int64

    def result_dtype(self, dtype: Any, where: Any) -> Any:
        """Widen 16 bits as torch does in its autocast."""
        if name_of(dtype) in ("float16", "bfloat16"):
            kind = where.device.type
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                return torch.float32
        return dtype

    def factor_dtype(self, dtype: Any, where: Any) -> Any:
        """Return what autocast has its products take."""
        if name_of(dtype) != "float64":
            kind = where.device.type
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                return torch.get_autocast_dtype(kind)
        return dtype

    def product_dtype(self, dtype: Any, where: Any) -> Any:
        """Keep 16 bits, for which its libraries have units of their own.

        On a CPU its float16 takes a hundred times as long as float32.
        """
        if name_of(dtype) == "float16" and where.device.type == "cpu":
            return torch.float32
        return dtype

    # Rows and classes

    def pick(self, values: Any, labels: Any, logits: Any, axis: int) -> Any:
        """Gather: the standard's function also minds negative labels, and fixes symbolic sizes."""
        shape = labels.shape[:axis] + values.shape[axis : axis + 1] + labels.shape[axis + 1 :]
        values = values if values.shape == shape else values.expand(shape)
        return torch.gather(values, axis, labels)

    def class_max(self, values: Any, axis: int) -> Any:
        """Detach: torch would split the derivative among classes that tie, to cancel it later."""
        return self.xp.max(values.detach(), axis=axis, keepdims=True)

    def class_sum(self, values: Any, axis: int, dtype: Any) -> Any:
        """Sum first: it adds in a cascade, whatever the axis, and would copy all to widen them."""
        return self.cast(self.xp.sum(values, axis=axis, keepdims=True), dtype)

    def row_count(self, row_shape: tuple[Any, ...], logits: Any, axis: int, dtype: Any) -> Any:
        """Count rows, of which an export knows the number by a name."""
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
