"""Each wrong kernel is caught, because of its answers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import one_of_each

pytestmark = [pytest.mark.only("triton"), pytest.mark.tests_of_tests]


def mutants() -> dict[str, Any]:
    # Triton must not be imported here: other runs may lack it.
    from triton_mutants import MUTANTS
    from triton_mutants_parts import MUTANTS as OF_PARTS

    return MUTANTS | OF_PARTS


def names(crashes: bool) -> list[str]:
    found = mutants()
    chosen = one_of_each(found, lambda mutant: (mutant.file, mutant.check))
    return [name for name in chosen if found[name].crashes == crashes]


@pytest.fixture
def put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from polyce.implementations.triton import arguments as triton_arguments
    from polyce.implementations.triton import launch as triton_launch
    from polyce.implementations.triton import plans

    for user, name in (
        (triton_arguments, "records"),
        (triton_arguments, "kernels"),
        (triton_launch, "kernels"),
    ):
        monkeypatch.setattr(user, name, getattr(user, name))
    yield
    plans.forget()


@pytest.mark.parametrize("name", names(False))
@pytest.mark.usefixtures("put_back")
def test_a_wrong_kernel_is_caught(name: str) -> None:
    mutant = mutants()[name]
    mutant.install()
    with pytest.raises(AssertionError) as caught:
        mutant.check()
    # It must fail by a wrong answer, not because the kernel raised an error.
    assert "InterpreterError" not in str(caught.value)


@pytest.mark.parametrize("name", names(True))
def test_a_wrong_address_is_caught(name: str, tmp_path: Path) -> None:
    program = Path(__file__).with_name("triton_mutants.py")
    done = subprocess.run(
        [sys.executable, str(program), name],
        capture_output=True,
        check=False,
        # A process that a signal ends does not delete its files.
        env={**os.environ, "TMPDIR": str(tmp_path)},
        text=True,
        timeout=300,
    )
    # A wrong answer, or a signal: SIGSEGV, SIGBUS, SIGABRT.
    assert done.returncode in (1, -11, -7, -6), done.stderr
    assert done.returncode < 0 or not done.stderr


@pytest.mark.usefixtures("put_back")
def test_nothing_is_wrong_with_copies() -> None:
    from triton_checks import SLOW
    from triton_mutants import install

    install()
    for check in {mutant.check for mutant in mutants().values()} - SLOW:
        check()
