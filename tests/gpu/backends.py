"""Which backends run the tests of this folder, and through which array library."""

from __future__ import annotations

import pytest

# Value of --backend: the library, and whether a CPU stands in for a device.
BACKENDS = {
    "torch-cuda": ("torch", False),
    "cupy": ("cupy", False),
    "triton": ("torch", True),
    "cupy-emulated": ("cupy", True),
}
# The emulated CuPy compiles each of its kernels.
SLOW = pytest.mark.slow("cupy-emulated")
EVERY = [pytest.mark.only(*BACKENDS), SLOW]
ON_TORCH = pytest.mark.only(
    *(name for name, (library, _) in BACKENDS.items() if library == "torch")
)
REHEARSED = pytest.mark.only(*(name for name, (_, rehearses) in BACKENDS.items() if rehearses))
