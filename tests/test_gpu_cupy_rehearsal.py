"""The GPU script's part for CuPy runs from end to end without a GPU, and finds wrong results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.only("cupy-emulated")

FOLDER = Path(__file__).parents[1] / "benchmarks"
COMMAND = [sys.executable, str(FOLDER / "gpu.py"), "--library", "cupy"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def rehearse(out: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], Any]:
    done = run("--rehearse", "--out", str(out), *arguments)
    assert out.exists(), done.stderr
    return done, json.loads(out.read_text())


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return rehearse(tmp_path_factory.mktemp("rehearsal") / "found.json")


def test_all_parts_are_rehearsed(rehearsed: Any) -> None:
    done, found = rehearsed
    wrong = [row for rows in found["parts"].values() for row in rows if row["status"] == "wrong"]
    assert wrong == []
    assert done.returncode == 0, done.stderr
    assert list(found["parts"]) == ["grid", "values", "behaviour", "processes", "times"]

    header = found["header"]
    assert header["rehearsal"]
    assert header["library"] == "cupy"
    assert "emulated" in header["versions"]["cupy"]
    for fact in ("device", "clocks and power", "clocks and power afterwards"):
        assert header[fact].keys() == {"not here"}

    paths = {row["path"] for row in found["parts"]["grid"] if "path" in row}
    assert paths == {"cupy", "reference"}
    compared = [row for row in found["parts"]["values"] if "rows_checked" in row]
    assert all({"loss_ulp", "loss_of_allowed", "grad_of_allowed"} < row.keys() for row in compared)
    assert {row["dtype"] for row in compared} == {"float16", "bfloat16", "float32", "float64"}
    gaps = [row["ulp_by_gap"] for row in found["parts"]["values"] if row["check"] == "exp"]
    assert [len(each) for each in gaps] == [5, 6]

    times = [row for row in found["parts"]["times"] if row["check"] == "times"]
    timed = {(row["contender"], row["what"]) for row in times}
    assert timed == {
        ("polyce", "forward"),
        ("polyce", "loss and gradient"),
        ("polyce in place", "loss and gradient in place"),
        ("reference", "forward"),
        ("reference", "loss and gradient"),
    }
    keys = {"median_s", "p10_s", "p90_s", "moved_bytes", "gb_per_s", "of_copy", "launches"}
    assert all(keys | {"extra_bytes"} < row.keys() for row in times)


def test_what_needs_a_device_says_so(rehearsed: Any) -> None:
    done, found = rehearsed
    reasons = {
        row["check"]: row["reason"]
        for part in ("behaviour", "processes")
        for row in found["parts"][part]
        if row["status"] == "not here"
    }
    assert reasons.keys() == {
        "a graph replays to the same bits",
        "compute-sanitizer memcheck",
        "compute-sanitizer racecheck",
        "compute-sanitizer initcheck",
    }
    assert all(reason in done.stdout for reason in reasons.values())
    large = [row for row in found["parts"]["values"] if "GB" in row.get("reason", "")]
    assert len(large) == 4


def test_a_wrong_loss_is_found(tmp_path: Path) -> None:
    done, found = rehearse(tmp_path / "found.json", "--spoil", "loss", "--only", "grid")
    assert done.returncode == 1
    by_path: dict[str, set[str]] = {"cupy": set(), "reference": set()}
    for row in found["parts"]["grid"]:
        if "path" in row:
            by_path[row["path"]].add(row["status"])
    assert by_path == {"cupy": {"wrong"}, "reference": {"right"}}


def test_a_wrong_gradient_is_found(tmp_path: Path) -> None:
    done, found = rehearse(tmp_path / "found.json", "--spoil", "gradient", "--only", "values")
    assert done.returncode == 1
    compared = [row for row in found["parts"]["values"] if "rows_checked" in row]
    # With one class there is no gradient to spoil.
    assert {row["status"] for row in compared if "x1," not in row["check"]} == {"wrong"}
    assert {row["status"] for row in compared if "x1," in row["check"]} == {"right"}
    assert all(row["loss_of_allowed"] <= 1.0 for row in compared)


def test_results_that_differ_in_a_bit_are_found(tmp_path: Path) -> None:
    done, found = rehearse(tmp_path / "found.json", "--spoil", "bits", "--only", "behaviour")
    assert done.returncode == 1
    repeated = [row for row in found["parts"]["behaviour"] if "2 times" in row["check"]]
    assert len(repeated) == 4
    assert {row["status"] for row in repeated} == {"wrong"}


def test_a_call_that_waits_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    import cupy
    from gpu_cupy_machine import Rehearsal

    with pytest.raises(AssertionError, match="waits"):
        Rehearsal().waits(lambda: float(cupy.ones(1).sum()))


def test_without_a_device_it_says_what_is_missing() -> None:
    path = os.pathsep.join(sys.path)
    command = [*COMMAND, "--only", "times"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "finds no device" in done.stderr
