"""The backends whose arrays are on a GPU: how a run begins there, and which path each test takes.

With --stand-in a CPU takes the GPU's place: polyce is told that its arrays lie on a GPU. So torch's
calls go to Triton's kernels, in the interpreter, CuPy's to its own, on the emulator, and jax's to
the reference, and nobody looks at their labels unasked.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# By the value of --backend, the one whose tests run there too; None for none.
DEVICES = {"torch-cuda": None, "cupy": None, "jax-gpu": "jax-x32"}
PROPERTY = "paths"
# The paths of the test that runs.
_taken: set[str] = set()


def begin(name: str, stand_in: bool) -> None:
    """Make arrays be drawn on the device under test, and record which paths calls take."""
    if name == "torch-cuda":
        _begin_torch(stand_in)
    elif name == "cupy" and stand_in:
        sys.path.insert(0, str(Path(__file__).with_name("emulation")))
    elif name == "jax-gpu":
        _begin_jax(stand_in)
    from polyce.implementations import registry

    registry.TABLE = tuple(map(_recorded, registry.TABLE))


def _begin_torch(stand_in: bool) -> None:
    if stand_in:
        os.environ["TRITON_INTERPRET"] = "1"
        from polyce.arrays.torch import LIBRARY

        pose_as(LIBRARY, "cuda")
        return
    import torch

    if not torch.cuda.is_available():
        raise pytest.UsageError(
            f"torch {torch.__version__} finds no CUDA or ROCm device; --stand-in does without"
        )
    # Tests draw with torch's own functions.
    torch.set_default_device("cuda")


def _begin_jax(stand_in: bool) -> None:
    import jax

    if stand_in:
        from polyce.arrays.jax import LIBRARY

        pose_as(LIBRARY, "gpu")
    elif jax.default_backend() == "cpu":
        raise pytest.UsageError(f"jax {jax.__version__} finds no GPU; --stand-in does without")


def pose_as(library: Any, kind: str) -> None:
    """Tell polyce that a library's arrays on a CPU lie on another kind of device."""
    real = library.device_kind

    def device_kind(array: Any) -> str:
        found = real(array)
        return kind if found == "cpu" and not isinstance(array, np.ndarray) else found

    library.device_kind = device_kind


def _recorded(path: Any) -> Any:
    """Return a path that records its calls."""

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            _taken.add(path.name)
            return function(*arguments)

        return call

    return dataclasses.replace(
        path,
        cross_entropy=recorded(path.cross_entropy),
        cross_entropy_with_grad=recorded(path.cross_entropy_with_grad),
    )


def begin_test() -> None:
    """Forget the paths of the test before."""
    _taken.clear()


def end_test(item: pytest.Item) -> None:
    """Say with a test's results which paths it took."""
    item.user_properties.append((PROPERTY, " ".join(sorted(_taken))))


def summarize(reporter: Any) -> None:
    """Print how many tests took which paths."""
    reports = [*reporter.getreports("passed"), *reporter.getreports("failed")]
    found = (dict(report.user_properties).get(PROPERTY) for report in reports)
    count = Counter(paths or "no path" for paths in found if paths is not None)
    told = ", ".join(f"{paths}: {number}" for paths, number in sorted(count.items()))
    reporter.section("tests by the paths that they took")
    reporter.line(told or "none ran")
