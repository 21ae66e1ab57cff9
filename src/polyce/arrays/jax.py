"""jax: traced arrays, meshes, and operations that are faster in XLA in another form."""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polyce.arrays import jax_mesh
from polyce.arrays.library import WithNumPyDtypes, along_axis


class _Jax(WithNumPyDtypes):
    takes_numpy = True
    rounds_gradients = True
    # By default, and by its settings, jax lets accelerators multiply float32 in fewer bits.
    exact_products = MappingProxyType({"precision": "highest"})

    def has_values(self, array: Any) -> bool:
        """Tell whether the array is not a tracer."""
        return not isinstance(array, jax.core.Tracer)

    def fuses(self, array: Any) -> bool:
        """Tell whether the array is traced: XLA fuses then."""
        return not self.has_values(array)

    def to_look_at(self, labels: Any) -> Any:
        """Return a NumPy array: inside a jit, jax traces even operations on known values."""
        return np.asarray(labels)

    def device_kind(self, array: Any) -> str:
        """Return the platform; new arrays are uncommitted and follow the given one."""
        if not isinstance(array, jax.Array):
            return "cpu"
        if not self.has_values(array):
            return "unknown"
        return str(next(iter(array.devices())).platform)

    def default_device_kind(self) -> str:
        """Return the default platform."""
        return str(jax.default_backend())

    def has_float64(self, where: Any) -> bool:
        """Tell whether jax_enable_x64 is set."""
        info = self.xp.__array_namespace_info__()
        return str(info.default_dtypes()["real floating"]) == "float64"

    def label_dtype(self, labels: Any) -> Any:
        """Return the indexing dtype that jax's settings allow."""
        return self.xp.__array_namespace_info__().default_dtypes()["indexing"]

    def integer(self, value: int, like: Any) -> Any:
        """Return an array: jax takes no Python integer beyond the signed range."""
        return jnp.asarray(value, dtype=like.dtype)

    def pick(self, values: Any, labels: Any, logits: Any, axis: int) -> Any:
        """Gather along the class axis, on a mesh too."""

        def take(values: Any, labels: Any) -> Any:
            return jnp.take_along_axis(values, labels, axis=axis)

        specs = map(jax_mesh.spec, (values, labels))
        rows = [one if one is not None else other for one, other in zip(*specs, strict=True)]
        rows[axis] = None
        return jax_mesh.automatically(take, jax.sharding.PartitionSpec(*rows), values, labels)

    def add_at(self, array: Any, labels: Any, values: Any, axis: int) -> Any:
        """Scatter, which adds up what has one place, on a mesh too."""

        def add(array: Any, labels: Any, values: Any) -> Any:
            places = list(jnp.indices(labels.shape, sparse=True))
            places[axis] = labels
            return array.at[tuple(places)].add(values)

        return jax_mesh.automatically(add, jax_mesh.spec(array), array, labels, values)

    def first_class(self, logits: Any, axis: int) -> Any:
        """Slice, on a mesh too."""
        rows = [one for i, one in enumerate(jax_mesh.spec(logits)) if i != axis]
        return jax_mesh.automatically(
            lambda logits: super(_Jax, self).first_class(logits, axis),
            jax.sharding.PartitionSpec(*rows),
            logits,
        )

    def argmax(self, values: Any, axis: int) -> Any:
        """Find the first class that equals the largest value.

        XLA's own argmax takes ten times as long on a CPU, and gathers sharded classes.
        """
        top = jnp.max(values, axis=axis, keepdims=True)
        classes = along_axis(jnp.arange(values.shape[axis]), axis, values.ndim)
        places = jnp.where(values == top, classes, values.shape[axis])
        first = jnp.min(places, axis=axis, keepdims=True)
        return jnp.where(top == top, first, 0)

    def row_count(self, row_shape: tuple[Any, ...], logits: Any, axis: int, dtype: Any) -> Any:
        """Count rows; in an export their number may be symbolic."""
        count = math.prod(row_shape)
        return float(count) if isinstance(count, int) else jnp.asarray(count, dtype=dtype)

    def matmul(self, a: Any, b: Any, dtype: Any, **options: Any) -> Any:
        """Multiply two matrices; XLA widens within the product."""
        return jnp.matmul(a, b, preferred_element_type=dtype, **options)


LIBRARY = _Jax("jax", jnp, "jax.numpy.asarray")
