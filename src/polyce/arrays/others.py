"""The second tier: libraries that each deviate from the standard in a line or two."""

from __future__ import annotations

from typing import Any

import numpy as np

from polyce.arrays.library import Library, WithNumPyDtypes, cut_alike
from polyce.arrays.numpy import OnNumPy


class Strict(OnNumPy):
    """array-api-strict, which has devices of its own."""

    is_writable = True

    def device(self, array: Any) -> Any:
        """Return the array's device."""
        return array.device


class MArray(OnNumPy):
    """marray, over NumPy or array-api-strict."""

    def device(self, array: Any) -> Any:
        """Return the array's device."""
        return array.device

    def float_dtype(self, name: str) -> Any:
        """Return a dtype even where the namespace holds NumPy's scalar types."""
        dtype = getattr(self.xp, name)
        return np.dtype(dtype) if isinstance(dtype, type) else dtype

    def to_numpy(self, *arrays: Any) -> list[Any]:
        """Return the data, of which none is masked."""
        return [np.asarray(array.data) for array in arrays]


class MPArray(OnNumPy, WithNumPyDtypes):
    """mparray, whose numbers have as many digits as mpmath is set to."""

    is_exact = True

    def adds_one_by_one(self, values: Any, axis: int) -> bool:
        """Return True: a sum of objects adds one by one along every axis."""
        return True

    def exact(self, number: float) -> Any:
        """Return an mpmath number."""
        import mpmath

        return mpmath.mpf(number)

    def to_numpy(self, *arrays: Any) -> list[Any]:
        """Round to the dtype that an array is named after."""
        return [np.asarray(array._data, array.dtype) for array in arrays]


class Cubed(WithNumPyDtypes):
    """cubed, lazy and in chunks."""

    is_lazy = True
    cuts_heads = False

    def device_kind(self, array: Any) -> str:
        """Return "cpu", which is true of NumPy chunks."""
        return "cpu"

    def align(self, array: Any, logits: Any) -> Any:
        """Rechunk along every axis on which the array has the logits' size."""
        return cut_alike(array, logits)

    def one_hot(self, labels: Any, logits: Any, axis: int, *, beside_logits: bool = True) -> Any:
        """Make masks cut as the classes are."""
        options = {"chunks": (logits.chunks[axis],), "spec": logits.spec}
        return self.classes(labels, logits, axis, **options) == labels

    def to_numpy(self, *arrays: Any) -> list[Any]:
        """Compute them together."""
        import cubed

        return [np.asarray(array) for array in cubed.compute(*arrays)]


class Ndonnx(Library):
    """ndonnx, whose sizes may only be known when the model runs."""

    is_lazy = True
    cuts_heads = False

    def has_float64(self, where: Any) -> bool:
        """Return True."""
        return True

    def label_dtype(self, labels: Any) -> Any:
        """Return int64, which can number every axis."""
        return self.xp.int64

    def pick(self, values: Any, labels: Any, logits: Any, axis: int) -> Any:
        """Gather only from arrays of the logits' shape: ONNX's gather does not broadcast."""
        if values.shape == logits.shape:
            return super().pick(values, labels, logits, axis)
        return self.pick_by_mask(values, labels, logits, axis)

    def row_count(self, row_shape: tuple[Any, ...], logits: Any, axis: int, dtype: Any) -> Any:
        """Count rows when the model runs, if their number is unknown before."""
        if None not in row_shape:
            return super().row_count(row_shape, logits, axis, dtype)
        one_class = logits[(slice(None),) * axis + (slice(0, 1),)]
        return self.xp.sum(self.xp.ones_like(one_class, dtype=dtype))

    def to_numpy(self, *arrays: Any) -> list[Any]:
        """Return the values of constants."""
        return [array.unwrap_numpy() for array in arrays]


class MLX(Library):
    """mlx, which is lazy, and adds one by one on a CPU."""

    def has_values(self, array: Any) -> bool:
        """Return True; not so under mlx's compile and vmap, which cannot be detected."""
        return True

    def is_at_hand(self, array: Any) -> bool:
        """Return False: reading values would compute, or raise."""
        return False

    def device_kind(self, array: Any) -> str:
        """Return the default device's kind: arrays have no device until they are computed with."""
        if isinstance(array, np.ndarray):
            return "cpu"
        import mlx.core

        return str(mlx.core.default_device().type.name)

    def has_float64(self, where: Any) -> bool:
        """Return False: it is for CPUs only, with exp and log1p no better than float32's."""
        return False

    def label_dtype(self, labels: Any) -> Any:
        """Return int32, the dtype of mlx's indices."""
        return self.xp.int32

    def argmax(self, values: Any, axis: int) -> Any:
        """Return signed numbers, so that a row may have -1, without a derivative."""
        found = super().argmax(values, axis)
        return self.xp.stop_gradient(self.cast(found, self.xp.int32))

    def class_sum(self, values: Any, axis: int, dtype: Any) -> Any:
        """Sum, widened on a CPU."""
        return self.cast(self.xp.sum(self._summable(values), axis=axis, keepdims=True), dtype)

    def total(self, values: Any) -> Any:
        """Sum, widened on a CPU."""
        return self.cast(self.xp.sum(self._summable(values)), values.dtype)

    def _summable(self, values: Any) -> Any:
        """Widen on a CPU, where one-by-one sums of 35000 are off by 3e-4; on GPUs they are not."""
        return self.cast(values, self.xp.float64) if self.device_kind(values) == "cpu" else values


CLASSES: dict[str, tuple[type[Library], str]] = {
    "array-api-strict": (Strict, "array_api_strict.asarray"),
    "cubed": (Cubed, "cubed.from_array, with input's spec"),
    "ndonnx": (Ndonnx, "ndonnx.asarray"),
    "mlx": (MLX, "mlx.core.array"),
    "mparray": (MPArray, "mparray.asarray"),
    "marray": (MArray, "the asarray of input's own marray namespace"),
}
"""The class of each library, and how a user converts another library's array to it."""
