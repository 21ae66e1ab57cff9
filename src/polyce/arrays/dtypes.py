"""Dtypes by the names that the array API standard has for them."""

from __future__ import annotations

from typing import Any

import numpy as np

FLOATS = ("float16", "bfloat16", "float32", "float64")
# In jax, and in NumPy with ml_dtypes.
SUB_BYTE = {"int2": (-2, 1), "int4": (-8, 7), "uint2": (0, 3), "uint4": (0, 15)}
INTEGERS = {
    "int8": (-(2**7), 2**7 - 1),
    "int16": (-(2**15), 2**15 - 1),
    "int32": (-(2**31), 2**31 - 1),
    "int64": (-(2**63), 2**63 - 1),
    "uint8": (0, 2**8 - 1),
    "uint16": (0, 2**16 - 1),
    "uint32": (0, 2**32 - 1),
    "uint64": (0, 2**64 - 1),
    **SUB_BYTE,
}

# A dict, as NumPy builds a dtype's name each time it is asked for.
NUMPY_DTYPES = {
    name: np.dtype(name)
    for name in (*FLOATS, *INTEGERS)
    if name != "bfloat16" and name not in SUB_BYTE
}
_NUMPY_NAMES = {dtype: name for name, dtype in NUMPY_DTYPES.items()}


def dtype_name(array: Any) -> str:
    """Return the standard's name of an array's dtype, bfloat16 of any library included."""
    return name_of(array.dtype)


def name_of(dtype: Any) -> str:
    """Return the standard's name of a dtype."""
    if isinstance(dtype, np.dtype):
        return _NUMPY_NAMES.get(dtype) or dtype.name
    name = getattr(dtype, "name", None)
    return name if isinstance(name, str) else str(dtype).rpartition(".")[2]


def holds_integers(array: Any) -> bool:
    """Tell whether an array holds integers that can be computed with."""
    name = dtype_name(array)
    # torch has names for integers below a byte, but no operations on them.
    return name in INTEGERS and (name not in SUB_BYTE or isinstance(array.dtype, np.dtype))
