"""jax arrays on a mesh of explicit axes, and what is left to the compiler there.

On such a mesh jax must be told how a result is sharded wherever that does not follow from the
operands. On a mesh of automatic axes the compiler finds out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def spec(array: Any) -> Any:
    """Return which mesh axes each axis of an array is sharded over."""
    return jax.typeof(array).sharding.spec


def automatically(function: Callable[..., Any], specs: Any, *given: Any) -> Any:
    """Call a function with the mesh's explicit axes made automatic; `specs` shard the results."""
    shardings = [jax.typeof(array).sharding for array in jax.tree.leaves(given)]
    spread = [s for s in shardings if any(part is not None for part in s.spec)]
    if not spread:
        return function(*given)
    mesh = spread[0].mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    out = jax.tree.map(
        lambda one: NamedSharding(mesh, one), specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
    return jax.sharding.auto_axes(function, axes=axes, out_sharding=out)(*given)
