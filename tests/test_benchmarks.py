"""The benchmarks still run: at tiny sizes, without looking at a single time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "reference.py"


@pytest.mark.only("numpy")
@pytest.mark.parametrize("question", ["small", "large", "memory"])
def test_benchmark_runs(question: str) -> None:
    run_tiny(question)


@pytest.mark.only("dask")
@pytest.mark.parametrize("question", ["dask-cluster", "dask-tasks"])
def test_benchmark_of_dask_runs(question: str) -> None:
    run_tiny(question)


def run_tiny(question: str) -> None:
    command = [sys.executable, str(SCRIPT), "--tiny", "--only", question]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert "loss" in run.stdout
