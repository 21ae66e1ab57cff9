"""Rows in parts by the cupy path on emulated CuPy: the grid, and that its faults are seen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from conftest import FULL
from cupy_calls import SHARED, chosen, settings
from in_parts import cut_functions, of_parts
from polyce.testing import GROUPS, check_implementation

pytestmark = pytest.mark.only("cupy-emulated")


@pytest.fixture(autouse=True)
def emulation() -> Iterator[Any]:
    import cupy

    cupy.emulation.reset()
    yield cupy.emulation
    cupy.emulation.reset()


@pytest.mark.slow("cupy-emulated")
@pytest.mark.parametrize("group", GROUPS)
def test_grid_of_parts(group: str, emulation: Any) -> None:
    leave_out = None if FULL else chosen([group], 6)
    functions = cut_functions(of_parts("cupy"))
    with settings(**SHARED):
        print(
            check_implementation(
                None, "cupy", groups=[group], functions=functions, leave_out=leave_out
            )
        )
    assert {launch.name for launch in emulation.launches} <= {"state_of_part", "gradient_of_part"}
