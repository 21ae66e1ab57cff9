"""The conformance grid catches implementations that are wrong."""

from __future__ import annotations

import re
from typing import Any

import pytest

from mutants import MUTANTS, OPTION_MUTANTS, Mutant
from polyce.testing import Case, check_implementation

pytestmark = [pytest.mark.only("numpy"), pytest.mark.tests_of_tests]


def fewer(case: Case) -> str:
    """Leave out cases whose exact answers take long and that catch no mutant."""
    apart = "/apart/" in case.name and case.logits.dtype == "float64"
    long = "/1000/" in case.name or "/32000/smoothing" in case.name
    return "takes long" if long and not apart else ""


@pytest.mark.parametrize("name", MUTANTS | OPTION_MUTANTS)
def test_a_wrong_implementation_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = (MUTANTS | OPTION_MUTANTS)[name]
    mutant.install(monkeypatch)
    with pytest.raises(AssertionError, match=r"^mutant on numpy: \d+ of \d+ cases fail") as caught:
        check_implementation(
            "mutant", groups=[mutant.group], dtypes=[mutant.dtype], leave_out=fewer
        )
    failures = str(caught.value).splitlines()[1:]
    assert all(line.startswith((f"  {mutant.group}/", "  ... and ")) for line in failures)
    # It must fail by a wrong answer, not because the mutant raised an error.
    assert not any(re.search(r"/float\d\d: \w+(Error|Warning)", line) for line in failures)
    assert ("the call changed its argument" in failures[0]) == (name == "argument-changed")


def test_nothing_is_wrong_with_the_mutant_without_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    Mutant("").install(monkeypatch)
    groups = ["options", "shapes", "layouts", "targets", "cotangent"]
    report = check_implementation("mutant", groups=groups, dtypes=["float32"])
    assert list(report.ran) == groups


def test_an_exception_is_a_failure_of_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise NotImplementedError("not today")

    Mutant("", losses=fail).install(monkeypatch)
    message = (
        r"(?s)56 of 56 cases fail\n  cotangent/.*: NotImplementedError: not today\n.* and 36 m"
    )
    with pytest.raises(AssertionError, match=message):
        check_implementation("mutant", groups=["cotangent"], dtypes=["float32"])
