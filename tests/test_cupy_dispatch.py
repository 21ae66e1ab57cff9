"""CuPy without a device: real CuPy arrays over memory nobody may read reach the right decisions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import polyce
from polyce import arrays, problem, registry

pytestmark = pytest.mark.only("cupy-dispatch")


@pytest.fixture
def shell() -> Any:
    """Make a CuPy array of any shape without allocating."""
    import cupy

    def make(shape: tuple[int, ...], dtype: Any) -> Any:
        memory = cupy.cuda.UnownedMemory(0x1000, 1 << 20, None, device_id=0)
        return cupy.ndarray(shape, dtype, memptr=cupy.cuda.MemoryPointer(memory, 0))

    return make


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_facts_of_a_call(shell: Any, dtype: str) -> None:
    facts, operands = problem.describe(shell((4, 5, 2), dtype), shell((4, 2), np.int16))
    assert facts.backend == "cupy"
    assert facts.device == "cuda"
    assert (facts.kind, facts.axis, facts.row_shape) == ("index", 1, (4, 2))
    assert facts.result_dtype == np.dtype(dtype)
    assert facts.arithmetic_dtype == np.dtype("float64" if dtype == "float64" else "float32")
    assert facts.row_dtype == np.dtype("float64")
    assert not facts.check_labels
    assert type(operands.logits).__module__.startswith("cupy")
    assert facts.xp.__name__ == "array_api_compat.cupy"


def test_validate_true_checks_on_the_device(shell: Any) -> None:
    facts, _ = problem.describe(shell((4, 5), np.float32), shell((4,), np.int64), validate=True)
    assert facts.check_labels


def test_explain_names_library_and_device(shell: Any) -> None:
    text = str(polyce.explain(shell((4, 5), np.float32), shell((4,), np.int64)))
    first, *rows = text.splitlines()
    assert first == "cross_entropy on cupy / cuda: logits float32 (4, 5), target int64 (4,)"
    assert rows[-1] == "  reference  yes  <- runs"


def test_the_reference_is_chosen(shell: Any) -> None:
    facts, _ = problem.describe(shell((4, 5), np.float32), shell((4, 5), np.float16))
    assert facts.kind == "probability"
    assert registry.select(facts).name == "reference"


@pytest.mark.parametrize(
    ("input", "target", "error", "match"),
    [
        (((4, 5), "f4"), ((3,), "i8"), ValueError, r"shape \(4,\).*got int64 \(3,\)"),
        (((4, 5), "f4"), ((4,), "f4"), TypeError, "must be an integer dtype, got float32"),
        (((4, 5), "i4"), ((4,), "i8"), TypeError, r"real floating point.*got int32 \(4, 5\)"),
        (((), "f4"), ((), "i8"), ValueError, "at least one axis"),
    ],
    ids=["size", "float-labels", "integer-logits", "no-axis"],
)
def test_errors_are_raised_before_the_device_is_needed(
    shell: Any, input: Any, target: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        polyce.cross_entropy(shell(*input), shell(*target))


def test_numpy_companions_are_refused_with_the_way_to_convert(shell: Any) -> None:
    with pytest.raises(TypeError, match=r"input is cupy and target is numpy.*cupy\.asarray"):
        polyce.cross_entropy(shell((4, 5), np.float32), np.zeros(4, np.int64))


def test_every_function_that_is_called_exists_in_cupy_s_namespace() -> None:
    import array_api_compat.cupy as xp

    called = {
        name
        for file in Path(polyce.__file__).parent.glob("*.py")
        for name in re.findall(r"\bxp\.([a-z_0-9]+)\(", file.read_text(encoding="utf-8"))
    }
    assert {"take_along_axis", "log1p", "where"} <= called
    called -= {"gather", "stop_gradient"}  # of torch and of mlx, called for these alone
    assert [name for name in sorted(called) if not hasattr(xp, name)] == []


def test_python_m_polyce_shows_cupy() -> None:
    from polyce.explain import versions

    assert arrays.installed("cupy")
    (line,) = (line for line in versions().splitlines() if line.startswith("cupy"))
    assert line.split()[1][0].isdigit()
