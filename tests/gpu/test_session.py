"""The run on a GPU within a number of seconds: its budget, crashes, and rehearsals of its parts."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from . import report
from .device import NotHereError
from .ledger import CUT_OFF, NO_TIME, NOT_HERE, RIGHT, WRONG
from .session import ROOT, Part, run

TOY = """
import os, sys, time
from gpu.ledger import Ledger, Step

def rows():
    yield {"check": "times", "status": "right", "contender": "polyce", "median_s": 1e-6}
    yield {"check": "times", "status": "right", "contender": "a peer", "median_s": 2e-6}
    os.abort()

steps = {
    "first": [
        Step("stands", 0.0, lambda: None),
        Step("fails", 0.0, lambda: 1 / 0),
        Step("crashes behind two rows", 0.0, rows),
        Step("exits", 0.0, lambda: os._exit(3)),
        Step("is too long", 1e3, lambda: None),
        *(Step(f"sleeps {i}", 0.0, lambda: time.sleep(0.1)) for i in range(99)),
    ],
    "second": [Step("stands", 0.0, lambda: None), Step("hangs", 0.0, lambda: time.sleep(99))],
}
sys.exit(Ledger.of_this_process().run(steps[sys.argv[1]]))
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The rows of a run whose parts crash, and take longer than there is time."""
    out = tmp_path_factory.mktemp("toy")
    script = out / "toy.py"
    script.write_text(TOY)
    names = ("first", "second", "third")
    commands = {name: (str(script), name) for name in names[:2]} | {"third": ("-c", "1 / 0")}
    parts = {name: Part(1.0, command, command) for name, command in commands.items()}
    start = time.perf_counter()
    found = run(out, 4.0, names, rehearse=True, wheels=None, parts=parts)
    # A process may take a second longer to write its last rows.
    assert time.perf_counter() - start < 4.0 + 3 * 1.5
    for name, ledger in found.items():
        lines = (out / f"{name}.jsonl").read_text().splitlines()
        assert ledger.rows() == [row for row in map(json.loads, lines) if row["status"] != "begun"]
    return {name: ledger.rows() for name, ledger in found.items()}


def on_numpy(test: Any) -> Any:
    return pytest.mark.tests_of_tests(pytest.mark.only("numpy")(test))


@on_numpy
def test_what_was_measured_until_the_time_was_up_is_there(toy: Any) -> None:
    outcomes = {row["step"]: row["status"] for row in toy["first"] if "ends" in row}
    assert outcomes["stands"] == RIGHT
    assert outcomes["is too long"] == NO_TIME
    slept = [status for step, status in outcomes.items() if step.startswith("sleeps")]
    count = slept.count(RIGHT)
    assert 0 < count < 99
    assert slept == [RIGHT] * count + [NO_TIME] * (99 - count)
    assert {row["step"]: row["status"] for row in toy["second"]} == {
        "stands": RIGHT,
        "hangs": CUT_OFF,
    }


@on_numpy
def test_a_crash_costs_its_own_row_alone(toy: Any) -> None:
    told = {row["step"]: row for row in toy["first"] if "ends" in row}
    for step, reason in {
        "fails": "ZeroDivisionError",
        "crashes behind two rows": "the process ended with signal 6",
        "exits": "the process ended with exit status 3",
    }.items():
        assert told[step]["status"] == WRONG
        assert reason in told[step]["wrong"]
    assert len([row for row in toy["first"] if row.get("check") == "times"]) == 2
    (row,) = toy["third"]
    assert row["status"] == WRONG
    assert "the part did not start (exit status 1)" in row["wrong"]
    assert "ZeroDivisionError" in row["wrong"]


@on_numpy
def test_the_table_has_few_lines_and_a_verdict(toy: Any) -> None:
    lines = report.table(toy, 4.0)
    assert lines[-1].startswith("WRONG: 4 of ")
    assert "did not fit into 4 s" in lines[-1]
    assert any("1 µs, a peer 2" in line for line in lines)
    many = [{"step": f"{i}", "status": WRONG, "wrong": f"{i}", "ends": True} for i in range(99)]
    every = {f"part {i}": [*many, *toy["first"]] for i in range(13)}
    assert len(report.table(every, 4.0)) <= report.MOST_LINES


def started(out: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    command = [sys.executable, "-m", "tests.gpu", "--out", str(out), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    rows = {
        path.stem: list(map(json.loads, path.read_text().splitlines()))
        for path in out.glob("*.jsonl")
    }
    assert done.stdout == (out / "table.md").read_text(), done.stderr
    return done, rows


@pytest.mark.only("numpy", "torch")
def test_without_a_device_each_part_says_what_is_missing(backend_name: str, tmp_path: Path) -> None:
    parts = ("smoke", "cupy-smoke", "jax-heads")
    done, rows = started(tmp_path, "--seconds", "60", *(f"--part={name}" for name in parts))
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("NOTHING RAN: 3 steps are not for this machine")
    for name in parts:
        (row,) = rows[name]
        assert row["status"] == NOT_HERE
        assert "is not installed" in row["reason"] or "finds no" in row["reason"]


# Parts by the session that has their libraries.
REHEARSED = {
    "triton": ("compile", "smoke", "times", "behaviour", "heads", "sanitizer"),
    "cupy-emulated": ("cupy-smoke", "cupy-times", "cupy-heads"),
    "jax-x32": ("jax-heads", "jax-times"),
}


@pytest.mark.slow
@pytest.mark.only(*REHEARSED)
def test_every_part_is_rehearsed(backend_name: str, tmp_path: Path) -> None:
    parts = REHEARSED[backend_name]
    seconds = 6.0 * len(parts)
    given = [f"--seconds={seconds}", *(f"--part={name}" for name in parts), "--rehearse"]
    done, rows = started(tmp_path, *given)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1].startswith("RIGHT: ")
    outcomes = {row["status"] for name in parts for row in rows[name] if "ends" in row}
    assert outcomes <= {RIGHT, NOT_HERE, NO_TIME, CUT_OFF}
    assert all(rows[name] for name in parts)


@pytest.mark.only("torch")
def test_a_driver_that_is_too_old_is_said(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from . import on_torch

    def warns() -> bool:
        warnings.warn("The NVIDIA driver on your system is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", warns)
    with pytest.raises(NotHereError, match="finds no CUDA or ROCm device: The NVIDIA driver on"):
        on_torch.device()
