"""The GPU script runs from end to end without a GPU, and finds results that are wrong."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyce.testing import exact_answer

pytestmark = pytest.mark.only("triton")

FOLDER = Path(__file__).parents[1] / "benchmarks"


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "gpu.py"), *arguments]
    return subprocess.run(
        command, env=os.environ | env, capture_output=True, text=True, timeout=600, check=False
    )


def rehearse(out: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], Any]:
    done = run("--rehearse", "--out", str(out), *arguments)
    assert out.exists(), done.stderr
    return done, json.loads(out.read_text())


def statuses(rows: Any) -> dict[str, str]:
    return {row["check"]: row["status"] for row in rows}


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return rehearse(tmp_path_factory.mktemp("rehearsal") / "found.json", "--sweep")


def test_all_parts_are_rehearsed(rehearsed: Any) -> None:
    done, found = rehearsed
    wrong = [row for rows in found["parts"].values() for row in rows if row["status"] == "wrong"]
    assert wrong == []
    assert done.returncode == 0, done.stderr
    assert list(found["parts"]) == ["grid", "values", "behaviour", "processes", "times", "sweep"]

    header = found["header"]
    assert header["rehearsal"]
    assert {"date", "versions", "commit", "copy", "took_s"} < header.keys()
    for fact in ("device", "clocks and power", "clocks and power afterwards"):
        assert header[fact].keys() == {"not here"}

    compared = [row for row in found["parts"]["values"] if "rows_checked" in row]
    assert all({"loss_ulp", "loss_of_allowed", "grad_of_allowed"} < row.keys() for row in compared)
    assert {row["dtype"] for row in compared} == {"float16", "bfloat16", "float32", "float64"}
    gaps = [row["ulp_by_gap"] for row in found["parts"]["values"] if row["check"] == "exp"]
    assert [len(each) for each in gaps] == [5, 6]

    times = [row for row in found["parts"]["times"] if row["check"] == "times"]
    whats = {"forward", "backward", "forward and backward", "in-place backward"}
    for name, expected in (("polyce", whats), ("torch eager", whats), ("torch compiled", whats)):
        timed = {row["what"] for row in times if row["contender"].startswith(name)}
        assert timed == expected - ({"in-place backward"} if "torch" in name else set())
    keys = {"median_s", "p10_s", "p90_s", "moved_bytes", "gb_per_s", "of_copy", "launches"}
    assert all(keys | {"extra_bytes"} < row.keys() for row in times)
    assert any(row["best"] for row in found["parts"]["sweep"] if "best" in row)


def test_what_needs_a_device_says_so(rehearsed: Any) -> None:
    done, found = rehearsed
    reasons = {
        row["check"]: row["reason"]
        for part in ("behaviour", "processes")
        for row in found["parts"][part]
        if row["status"] == "not here"
    }
    assert reasons.keys() == {
        "polyce chooses triton by itself",
        "no call waits for the device",
        "a graph replays to the same bits",
        "another stream gives the same bits",
        "another device gives the same bits",
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
    by_path = {"triton": set(), "reference": set()}
    for row in found["parts"]["grid"]:
        if "path" in row:
            by_path[row["path"]].add(row["status"])
    assert by_path == {"triton": {"wrong"}, "reference": {"right"}}
    assert "error" in done.stdout.partition("Wrong")[2]


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
    found_there = statuses(found["parts"]["behaviour"])
    repeated = {name: status for name, status in found_there.items() if "2 times" in name}
    assert len(repeated) == 4
    assert set(repeated.values()) == {"wrong"}


def test_without_a_device_it_says_what_is_missing(torch: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    done = run(TRITON_INTERPRET="0")
    assert done.returncode == 1
    assert "finds no CUDA or ROCm device" in done.stderr
    done = run(TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert "TRITON_INTERPRET=1 runs kernels on a CPU" in done.stderr


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_its_exact_answers_are_the_oracle_s(
    monkeypatch: pytest.MonkeyPatch, kind: str, smoothing: float
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    gpu_exact = importlib.import_module("gpu_exact")
    rng = np.random.default_rng(0)
    logits = 4.0 * rng.standard_normal((12, 9))
    logits[:4, 2] += 40.0
    weight, g = rng.random(9) + 0.5, rng.random(12) + 0.5
    target = rng.integers(0, 9, 12)
    target[:6] = [2, 2, 3, 2, -100, 0]
    if kind == "probability":
        target = rng.dirichlet(np.ones(9), 12)
    want = exact_answer(
        logits, target, weight, reduction="none", label_smoothing=smoothing, grad_output=g
    )
    got = gpu_exact.exact(logits, target, g, gpu_exact.Options(weight, smoothing))
    kept = np.ones(12, bool) if kind == "probability" else target != -100
    np.testing.assert_allclose(got.loss, want.loss, rtol=1e-14, atol=0)
    np.testing.assert_allclose(got.grad, want.grad, rtol=1e-13, atol=1e-15)
    for name in ("gap", "pivot", "softmax_part", "coefficient_part"):
        np.testing.assert_allclose(
            getattr(got, name)[kept], getattr(want, name)[kept], rtol=1e-13, atol=1e-15
        )
