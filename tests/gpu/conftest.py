"""The device under test; tests of what a machine lacks are skipped, with the reason.

Without a GPU the same tests run on a stand-in, on tiny arrays: `--backend=triton` in Triton's
interpreter, `--backend=cupy-emulated` in the CuPy of tests/emulation. Other backends leave them
out.
"""

from __future__ import annotations

from typing import Any

import pytest

from .backends import BACKENDS
from .cases import FULL, REHEARSAL, Size
from .device import Device, NotHereError, find

MEASURED = ("loss_ulp", "label_ulp", "entry_ulp", "loss_of_allowed", "grad_of_allowed")


@pytest.fixture(scope="session")
def device(backend_name: str, pytestconfig: pytest.Config) -> Device:
    """The device, through the library under test; a missing one is a failure, not a skip."""
    try:
        return find(BACKENDS[backend_name][0], rehearses(pytestconfig))
    except NotHereError as reason:
        missing = str(reason)
    pytest.fail(f"{missing}; --backend=triton and --backend=cupy-emulated do without", False)


@pytest.fixture(scope="session")
def size(device: Device) -> Size:
    """How much is compared."""
    return REHEARSAL if device.rehearses else FULL


def rehearses(config: pytest.Config) -> bool:
    """Tell whether a stand-in takes the device's place."""
    _, stands_in = BACKENDS.get(config.getoption("--backend"), ("", True))
    return stands_in or bool(config.getoption("--stand-in"))


def planned(config: pytest.Config) -> Size:
    """Return how much will be compared, before there is a device."""
    return REHEARSAL if rehearses(config) else FULL


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    try:
        return (yield)
    except NotHereError as reason:
        pytest.skip(str(reason))
    except Exception as error:
        # torch and CuPy each have an exception of this name.
        if type(error).__name__ != "OutOfMemoryError":
            raise
        pytest.skip(f"out of memory: {str(error).splitlines()[0]}")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the largest errors that a device made, by dtype."""
    if rehearses(config):
        return
    largest: dict[str, dict[str, float]] = {}
    for report in terminalreporter.getreports("passed"):
        facts = dict(report.user_properties)
        if MEASURED[0] in facts:
            row = largest.setdefault(facts["dtype"], {})
            # Where parts of a gradient cancel, errors are not counted in units.
            row |= {name: max(row.get(name, 0.0), facts.get(name, 0.0)) for name in MEASURED}
    if largest:
        terminalreporter.section(
            "largest errors, in units in the last place and of what is allowed"
        )
        for name, row in largest.items():
            terminalreporter.line(
                f"{name}: {', '.join(f'{what} {value:.2g}' for what, value in row.items())}"
            )
