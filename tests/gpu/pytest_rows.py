"""pytest's plugin for a run on a GPU: a row for each test, and none begins for which time lacks.

Where there are many tests, they come in a random order, always the same, so that those for which
there is time are of every kind.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from .device import is_lost
from .ledger import AGAIN, NO_TIME, NOT_HERE, RIGHT, WRONG, Ledger

_ledger = Ledger.of_this_process()
_SHOWN = 1500
_MANY = 100
# The outcome of the test that runs.
_now: dict[str, Any] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    known = set() if _ledger is None else _ledger.known()
    items[:] = [item for item in items if item.nodeid not in known]
    if len(items) > _MANY:
        random.Random(0).shuffle(items)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    if _ledger is None:
        return (yield)
    _ledger.begin(item.nodeid)
    _now.clear()
    _now.update(status=RIGHT, took_s=0.0)
    try:
        return (yield)
    finally:
        _ledger.end(item.nodeid, dict(_now))
        if _now["status"] == WRONG and is_lost():
            pytest.exit("the device is lost", returncode=AGAIN)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    if _ledger is not None and (reason := _ledger.lack(0.0)):
        _now.update(status=NO_TIME, reason=reason)
        pytest.skip(reason)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _now["took_s"] = _now.get("took_s", 0.0) + report.duration
    if report.failed:
        _now.update(status=WRONG, wrong=report.longreprtext[-_SHOWN:])
    elif report.skipped and isinstance(report.longrepr, tuple) and _now["status"] == RIGHT:
        _now.update(status=NOT_HERE, reason=report.longrepr[2].removeprefix("Skipped: "))
    elif report.when == "call":
        _now.update(dict(report.user_properties))
