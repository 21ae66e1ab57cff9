"""The backends of GPUs, on the CPU that takes the GPU's place: tests take the GPU's paths."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# The backend that has the libraries: the one of a GPU, and the path of its calls.
STAND_INS = {
    "triton": ("torch-cuda", "triton"),
    "cupy-emulated": ("cupy", "cupy"),
    "jax-x32": ("jax-gpu", "reference"),
}
TESTS = "gpu_give_nan or a_confident_row_keeps_its_digits"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    command += [str(Path(__file__).with_name("test_meaning.py")), "-k", TESTS]
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("TRITON_INTERPRET", "POLYCE_FEW", "POLYCE_FULL")
    }
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.tests_of_tests
@pytest.mark.slow("cupy-emulated", "jax-x32")
@pytest.mark.only(*STAND_INS)
def test_the_tests_take_the_paths_of_a_gpu(backend_name: str) -> None:
    backend, path = STAND_INS[backend_name]
    done = run(f"--backend={backend}", "--stand-in")
    assert done.returncode == 0, done.stdout + done.stderr
    # All calls of both tests; log_softmax and nll_loss have no path.
    assert f"\n{path}: 2\n" in done.stdout


@pytest.mark.tests_of_tests
@pytest.mark.only("numpy")
def test_a_stand_in_is_for_a_gpu() -> None:
    done = run("--backend=numpy", "--stand-in")
    assert done.returncode == 4
    assert "for the backends of GPUs (torch-cuda, cupy, jax-gpu), not numpy" in done.stderr
