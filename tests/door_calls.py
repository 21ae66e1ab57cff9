"""Calls after other calls, for the tests of the door: never another answer than by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import polyce
from polyce.implementations.native import core as native

Call = Callable[[], Any]

MARKS = [
    pytest.mark.usefixtures("empty_door"),
    pytest.mark.skipif(native.unavailable() is not None, reason="the core is not built"),
]


class Ways:
    """Counts the calls that go the whole way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *modules: Any) -> None:
        self.count = 0
        inner = polyce.functional.describe

        def describe(*args: Any, **options: Any) -> Any:
            self.count += 1
            return inner(*args, **options)

        for module in (polyce.functional, *modules):
            monkeypatch.setattr(module, "describe", describe)

    def of(self, call: Call) -> int:
        """Count them while something is called."""
        before = self.count
        outcome(call)
        return self.count - before


def forget() -> None:
    """Empty the door's table."""
    native.core().forget()


def outcome(call: Call) -> Any:
    """Return what a call returns, or the kind and text of its error."""
    try:
        return call()
    except (TypeError, ValueError, IndexError, RuntimeError, NotImplementedError) as error:
        return type(error), str(error).split("\n")[0]  # torch adds where it was raised


def whole_way(call: Call) -> Any:
    """Return the outcome of a call that none like it comes before."""
    forget()
    return outcome(call)


def check_after(same: Callable[[Any, Any], bool], first: Call, second: Call) -> None:
    """Check that a call has the same outcome after another one as it has by itself."""
    expected = whole_way(second)
    forget()
    for _ in range(2):
        outcome(first)
    for _ in range(2):
        found = outcome(second)
        assert same(found, expected), (found, expected)
