"""The floating formats of the conformance grid, as numbers: digits, ranges and spacings.

`numpy.finfo` does not know bfloat16, so the four formats are defined here.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating format.

    Attributes
    ----------
    name : str
        NumPy's name of the dtype.
    digits : int
        Binary digits of the significand, the hidden one included.
    smallest : int
        Exponent of the smallest normal number, 2**smallest.
    largest : int
        Exponent of the largest power of two.
    """

    name: str
    digits: int
    smallest: int
    largest: int

    @property
    def unit(self) -> float:
        """Return the unit roundoff: the largest relative error of one rounding."""
        return float(2.0**-self.digits)

    @property
    def tiny(self) -> float:
        """Return the smallest normal number."""
        return float(2.0**self.smallest)

    @property
    def subnormal(self) -> float:
        """Return the spacing of the numbers around zero."""
        return float(2.0 ** (self.smallest - self.digits + 1))

    def spacing(self, values: Floats) -> Floats:
        """Return the spacing (one ulp) of this format at each finite value, 0 at others."""
        finite = np.where(np.isfinite(values), values, 0.0)
        exponents = np.maximum(np.frexp(finite)[1] - 1, self.smallest)
        return np.where(np.isfinite(values), np.ldexp(1.0, exponents - self.digits + 1), 0.0)

    def overflows(self, magnitudes: Floats) -> npt.NDArray[np.bool_]:
        """Return where a magnitude rounds to infinity."""
        if self.name == "float64":
            return np.isinf(magnitudes)
        threshold = 2.0**self.largest * (2.0 - 2.0**-self.digits)
        return np.asarray(magnitudes >= threshold)


FORMATS = {
    "float16": FloatFormat("float16", 11, -14, 15),
    "bfloat16": FloatFormat("bfloat16", 8, -126, 127),
    "float32": FloatFormat("float32", 24, -126, 127),
    "float64": FloatFormat("float64", 53, -1022, 1023),
}
FLOAT_NAMES = tuple(FORMATS)
INTEGER_NAMES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


def dtype(name: str) -> np.dtype[Any]:
    """Return NumPy's dtype of that name; bfloat16 needs ml_dtypes (ImportError without it)."""
    if name == "bfloat16":
        found: np.dtype[Any] = np.dtype(importlib.import_module("ml_dtypes").bfloat16)
        return found
    return np.dtype(name)


def missing() -> dict[str, str]:
    """Return the float dtypes that cannot be made here, each with the reason."""
    if importlib.util.find_spec("ml_dtypes") is None:
        return {"bfloat16": "ml_dtypes is not installed"}
    return {}


def is_float(array: Array) -> bool:
    """Tell whether the dtype is one of the four floating formats."""
    return array.dtype.name in FORMATS


def promote(dtypes: Iterable[np.dtype[Any]]) -> np.dtype[Any]:
    """Return the floating dtype that some floating dtypes promote to.

    float16 with bfloat16 is float32; otherwise the widest wins.
    """
    names = {item.name for item in dtypes}
    if len(names) == 1:
        return dtype(names.pop())
    return dtype("float64" if "float64" in names else "float32")
