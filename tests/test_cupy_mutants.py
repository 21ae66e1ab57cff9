"""Each wrong kernel, plan and launch of the cupy path is caught, because of what it does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import one_of_each
from cupy_mutants import Mutant, installed, mutants

pytestmark = [
    pytest.mark.only("cupy-emulated"),
    pytest.mark.slow("cupy-emulated"),
    pytest.mark.tests_of_tests,
]
MUTANTS = mutants()


def kind(mutant: Mutant) -> tuple[str, str]:
    """Return which file is wrong and which check catches it, regardless of the check's values."""
    return mutant.edits[0][0], mutant.check.__qualname__.partition(".")[0]


def names(crashes: bool) -> list[str]:
    return [name for name in one_of_each(MUTANTS, kind) if MUTANTS[name].crashes == crashes]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    from cupy import emulation

    emulation.reset()
    yield
    emulation.reset()


@pytest.mark.parametrize("name", names(False))
def test_a_fault_is_caught(name: str) -> None:
    from cupy.emulation import EmulationError

    mutant = MUTANTS[name]
    # It must fail by a wrong answer or by undefined behaviour, not because it does not compile.
    with installed(mutant.edits), pytest.raises((AssertionError, EmulationError)):
        mutant.check()


@pytest.mark.parametrize("name", names(True))
def test_a_wrong_address_is_caught(name: str) -> None:
    program = Path(__file__).with_name("cupy_mutants.py")
    done = subprocess.run(
        [sys.executable, str(program), name],
        capture_output=True,
        check=False,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    # A wrong answer, or a signal: SIGSEGV, SIGBUS, SIGABRT.
    assert done.returncode in (1, -11, -7, -6), done.stderr
    assert done.returncode < 0 or not done.stderr


def test_nothing_is_wrong_with_copies() -> None:
    with installed():
        for check in {MUTANTS[name].check: None for name in one_of_each(MUTANTS, kind)}:
            check()


def test_a_change_that_does_not_fit_says_so() -> None:
    for file in ("classes.cu", "plan.py"):
        match = f"{file} does not say 'nothing of this' any more"
        with pytest.raises(ValueError, match=match), installed(((file, "nothing of this", ""),)):
            pass
