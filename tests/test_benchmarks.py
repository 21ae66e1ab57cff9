"""The benchmarks still run: at tiny sizes, without looking at a single time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.only("numpy")
@pytest.mark.parametrize("question", ["small", "large", "memory"])
def test_benchmark_runs(question: str) -> None:
    run_tiny(question)


@pytest.mark.only("dask")
@pytest.mark.parametrize("question", ["dask-cluster", "dask-tasks"])
def test_benchmark_of_dask_runs(question: str) -> None:
    run_tiny(question)


def run_tiny(question: str) -> None:
    assert "loss" in run("reference.py", "--tiny", "--only", question)


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(FOLDER / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.only("numpy")
def test_benchmark_of_the_core_runs(tmp_path: Path) -> None:
    results = str(tmp_path / "results.json")
    run("cpu.py", "run", "--tiny", "--out", results)
    assert "polyce NumPy" in run("cpu.py", "table", results)


@pytest.mark.only("torch")
def test_benchmark_of_torch_modules_runs(tmp_path: Path) -> None:
    results = str(tmp_path / "results.json")
    run("torch_modules.py", "run", "--tiny", "--out", results)
    assert "polyce in place" in run("torch_modules.py", "table", results)


@pytest.mark.only("torch")
def test_benchmark_of_linear_cross_entropy_runs(tmp_path: Path) -> None:
    results = str(tmp_path / "results.json")
    run("linear.py", "run", "--tiny", "--out", results)
    assert "polyce numpy" in run("linear.py", "table", results)
