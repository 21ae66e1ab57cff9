"""The second tier: libraries that deviate from the standard in a line or two each."""

from __future__ import annotations

from typing import Any

import numpy as np

from polyce.arrays.library import Library, WithNumPyDtypes, cut_alike
from polyce.arrays.numpy import OnNumPy


class Strict(OnNumPy):
    """array-api-strict, which has devices of its own."""

    is_writable = True

    def device(self, array: Any) -> Any:
        """Return its own."""
        return array.device


class MArray(OnNumPy):
    """marray, over NumPy or array-api-strict."""

    def device(self, array: Any) -> Any:
        """Return its own."""
        return array.device

    def float_dtype(self, name: str) -> Any:
        """Return a dtype also where the namespace has NumPy's types."""
        dtype = getattr(self.xp, name)
        return np.dtype(dtype) if isinstance(dtype, type) else dtype


class MPArray(OnNumPy, WithNumPyDtypes):
    """mparray, whose numbers have as many digits as mpmath is told."""

    is_exact = True

    def adds_one_by_one(self, values: Any, axis: int) -> bool:
        """Tell that a sum does along every axis: its numbers are objects."""
        return True

    def exact(self, number: float) -> Any:
        """Return a number of mpmath's."""
        import mpmath

        return mpmath.mpf(number)


class Cubed(WithNumPyDtypes):
    """cubed, lazy and in chunks."""

    is_lazy = True
    cuts_heads = False

    def device_kind(self, array: Any) -> str:
        """Return what is true of NumPy's chunks."""
        return "cpu"

    def align(self, array: Any, logits: Any) -> Any:
        """Cut it as the logits are cut where it has their size."""
        return cut_alike(array, logits)

    def one_hot(self, labels: Any, logits: Any, axis: int, *, beside_logits: bool = True) -> Any:
        """Make masks of numbers cut as the classes are."""
        options = {"chunks": (logits.chunks[axis],), "spec": logits.spec}
        return self.classes(labels, logits, axis, **options) == labels


class Ndonnx(Library):
    """ndonnx, whose sizes may be known to a run alone."""

    is_lazy = True
    cuts_heads = False

    def has_float64(self, where: Any) -> bool:
        """Tell that it has."""
        return True

    def label_dtype(self, labels: Any) -> Any:
        """Return what numbers every axis."""
        return self.xp.int64

    def pick(self, values: Any, labels: Any, logits: Any, axis: int) -> Any:
        """Gather only from what has the logits' shape: ONNX broadcasts nothing there."""
        if values.shape == logits.shape:
            return super().pick(values, labels, logits, axis)
        return self.pick_by_mask(values, labels, logits, axis)

    def row_count(self, row_shape: tuple[Any, ...], logits: Any, axis: int, dtype: Any) -> Any:
        """Count rows when the model runs, where their number is not known."""
        if None not in row_shape:
            return super().row_count(row_shape, logits, axis, dtype)
        one_class = logits[(slice(None),) * axis + (slice(0, 1),)]
        return self.xp.sum(self.xp.ones_like(one_class, dtype=dtype))


class MLX(Library):
    """mlx, which puts all off, and adds one by one on a CPU."""

    def has_values(self, array: Any) -> bool:
        """Tell that it has; under its compile and vmap, of which nothing tells, they are not."""
        return True

    def is_at_hand(self, array: Any) -> bool:
        """Tell that none is: a look would compute, or be an error."""
        return False

    def device_kind(self, array: Any) -> str:
        """Return the default device's: arrays lie wherever they are computed with."""
        if isinstance(array, np.ndarray):
            return "cpu"
        import mlx.core

        return str(mlx.core.default_device().type.name)

    def has_float64(self, where: Any) -> bool:
        """Tell that it has not: only on a CPU, and with exp and log1p no better than float32's."""
        return False

    def label_dtype(self, labels: Any) -> Any:
        """Return what its indices are."""
        return self.xp.int32

    def argmax(self, values: Any, axis: int) -> Any:
        """Return signed numbers, so that a row may have -1, and not to be differentiated."""
        found = super().argmax(values, axis)
        return self.xp.stop_gradient(self.cast(found, self.xp.int32))

    def class_sum(self, values: Any, axis: int, dtype: Any) -> Any:
        """Sum what is widened on a CPU."""
        return self.cast(self.xp.sum(self._summable(values), axis=axis, keepdims=True), dtype)

    def total(self, values: Any) -> Any:
        """Sum what is widened on a CPU."""
        return self.cast(self.xp.sum(self._summable(values)), values.dtype)

    def _summable(self, values: Any) -> Any:
        """Widen on a CPU, where adding one by one loses 3e-4 of 35000; GPUs do not add so."""
        return self.cast(values, self.xp.float64) if self.device_kind(values) == "cpu" else values


CLASSES: dict[str, tuple[type[Library], str]] = {
    "array-api-strict": (Strict, "array_api_strict.asarray"),
    "cubed": (Cubed, "cubed.from_array, with input's spec"),
    "ndonnx": (Ndonnx, "ndonnx.asarray"),
    "mlx": (MLX, "mlx.core.array"),
    "mparray": (MPArray, "mparray.asarray"),
    "marray": (MArray, "the asarray of input's own marray namespace"),
}
"""The class of each, and how a user turns another library's array into one of it."""
