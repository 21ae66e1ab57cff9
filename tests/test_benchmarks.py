"""The benchmarks still run, at tiny sizes; no time is checked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import FULL

ROOT = Path(__file__).parents[1]


def run(module: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    return subprocess.run(
        command,
        env=os.environ | env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def printed(module: str, *arguments: str) -> str:
    done = run(module, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow("numpy")
@pytest.mark.only("numpy")
@pytest.mark.parametrize("question", ["small", "large", "memory"])
def test_benchmark_of_the_reference_runs(question: str) -> None:
    assert "loss" in printed("cpu.reference", "--tiny", "--only", question)


@pytest.mark.slow("dask")
@pytest.mark.only("dask")
@pytest.mark.parametrize("question", ["dask-cluster", "dask-tasks"])
def test_benchmark_of_dask_runs(question: str) -> None:
    assert "loss" in printed("cpu.reference", "--tiny", "--only", question)


@pytest.mark.slow("numpy", "torch")
@pytest.mark.only("numpy", "torch")
def test_benchmark_of_the_core_runs(backend_name: str, tmp_path: Path) -> None:
    shown = run_and_print("cpu", tmp_path)
    assert "Times as long as np.exp" in shown
    rows = json.loads((tmp_path / "results.json").read_text())["times"]
    contenders = {(row["what"], row["contender"]) for row in rows}
    assert {("forward", "polyce NumPy"), ("gradient", "polyce NumPy out=")} <= contenders
    assert all({"median_s", "spread", "others", "unrest"} < row.keys() for row in rows)
    if backend_name == "torch":
        compiled = {("forward", "polyce compiled"), ("gradient", "torch compiled")}
        assert compiled | {("gradient", "polyce in place")} <= contenders
        for text in ("as fast as torch eager", "torch compiled, both", "ALLOC_ENABLE=1", " of 2 |"):
            assert text in shown


UNREST = """
import json
from benchmarks.cpu import tables
from benchmarks.cpu.__main__ import measure_until_calm

class Log:
    found = {"times": []}
    def add(self, text, times): self.found["times"] += times
    def seconds(self): return len(self.found["times"])

unrest = {"calm": [0.5], "once": [2.0, 0.7], "always": [5.0, 3.0, 4.0]}
keys = ("dtype", "threads", "what", "contender")
def time(shape):
    value = unrest[shape].pop(0)
    return [{"shape": shape, "median_s": value, "unrest": value} | dict.fromkeys(keys)]

measure_until_calm(list(unrest), time, Log(), attempts=3, limit=ROWS)
kept = tables.calmest(Log.found).items()
kept = {case[0]: row["median_s"] for case, row in kept}
print(json.dumps([kept, sum(unrest.values(), [])]))
"""


@pytest.mark.only("numpy")
@pytest.mark.parametrize(
    ("rows", "kept", "not_asked_for"),
    [
        (9, {"calm": 0.5, "once": 0.7, "always": 3.0}, []),
        (4, {"calm": 0.5, "once": 0.7, "always": 5.0}, [3.0, 4.0]),
    ],
    ids=["as often as allowed", "until time is up"],
)
def test_what_was_disturbed_is_measured_again(
    rows: int, kept: dict[str, float], not_asked_for: list[float]
) -> None:
    command = [sys.executable, "-c", UNREST.replace("ROWS", str(rows))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [kept, not_asked_for]


@pytest.mark.slow("torch")
@pytest.mark.only("torch")
def test_benchmark_of_linear_cross_entropy_runs(tmp_path: Path) -> None:
    assert "polyce numpy" in run_and_print("linear", tmp_path)


def run_and_print(module: str, folder: Path) -> str:
    results = str(folder / "results.json")
    printed(module, "run", "--tiny", "--out", results)
    return printed(module, "table", results)


LIBRARIES = {"triton": "torch", "cupy-emulated": "cupy"}
# What is timed of polyce, and of those of its peers that always run.
WHATS = {
    "torch": {
        "polyce": {"forward", "backward", "forward and backward"},
        "polyce in place": {"in-place backward"},
        "torch eager": {"forward", "backward", "forward and backward"},
        "torch compiled": {"forward", "backward", "forward and backward"},
    },
    "cupy": {
        "polyce": {"forward", "loss and gradient"},
        "polyce in place": {"loss and gradient in place"},
        "reference": {"forward", "loss and gradient"},
    },
}


@pytest.mark.slow("torch")
@pytest.mark.only("torch")
@pytest.mark.skipif(sys.platform != "linux", reason="the name of the loopback differs elsewhere")
def test_benchmark_of_classes_over_processes_runs() -> None:
    shown = printed("sharded", "--processes", "2", "--rows", "8", "--classes", "10")
    assert "polyce: " in shown
    assert "torch loss_parallel: " in shown


@pytest.mark.slow("cupy-emulated")
@pytest.mark.only(*LIBRARIES)
def test_benchmark_on_a_gpu_is_rehearsed(backend_name: str, tmp_path: Path) -> None:
    library, out = LIBRARIES[backend_name], tmp_path / "found.json"
    sweeps = FULL and library == "torch"
    command = ("gpu", "--rehearse", "--library", library, *(["--sweep"] if sweeps else []))
    assert "nothing is wrong" in printed(*command, "--out", str(out))
    found: dict[str, Any] = json.loads(out.read_text())
    sweep = ["sweep"] if sweeps else []
    assert list(found["parts"]) == ["times", "first calls", *sweep]

    header = found["header"]
    assert header["rehearsal"]
    assert {"date", "versions", "commit", "copy", "took_s"} < header.keys()
    for fact in ("device", "clocks and power", "clocks and power afterwards"):
        assert header[fact].keys() == {"not here"}

    times = [row for row in found["parts"]["times"] if row["check"] == "times"]
    timed: dict[str, set[str]] = {}
    for row in times:
        timed.setdefault(row["contender"], set()).add(row["what"])
    assert timed == WHATS[library]
    keys = {"median_s", "p10_s", "p90_s", "moved_bytes", "gb_per_s", "of_copy", "launches"}
    assert all(keys | {"extra_bytes"} < row.keys() for row in times)
    hosts = [row for row in found["parts"]["times"] if row["check"] == "host"]
    assert {row["contender"] for row in hosts if "median_s" in row} == {
        name for name in WHATS[library] if "in place" not in name
    }
    assert len([row for row in found["parts"]["first calls"] if "second forward_s" in row]) == 2
    if sweep:
        assert any(row["best"] for row in found["parts"]["sweep"] if "best" in row)
    assert "nothing is wrong" in printed("gpu", "--table", str(out))


SPOILT = """
import runpy, sys, polyce
loss = polyce.cross_entropy
polyce.cross_entropy = lambda *operands, **options: loss(*operands, **options) * 1.02
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""


@pytest.mark.slow("cupy-emulated")
@pytest.mark.only("cupy-emulated")
def test_a_wrong_loss_fails_the_benchmark_on_a_gpu() -> None:
    command = [sys.executable, "-c", SPOILT, "--rehearse", "--library", "cupy"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "polyce gives the loss" in done.stdout.partition("Wrong")[2]


@pytest.mark.only(*LIBRARIES)
def test_a_gpu_that_is_missing_ends_the_benchmark(backend_name: str) -> None:
    library = LIBRARIES[backend_name]
    if library == "torch":
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a device")
        done = run("gpu", TRITON_INTERPRET="1")
        assert done.returncode == 1
        assert "TRITON_INTERPRET=1 runs kernels on a CPU" in done.stderr
    paths = os.pathsep.join(sys.path)
    done = run("gpu", "--library", library, TRITON_INTERPRET="0", PYTHONPATH=paths)
    assert done.returncode == 1
    assert "device; --rehearse does without a device" in done.stderr


@pytest.mark.only("cupy-dispatch")
def test_benchmark_of_the_host_s_part_on_cupy_runs() -> None:
    assert "with gradient" in printed("gpu.cupy_host", "--calls", "3")


@pytest.mark.only("triton-compile")
def test_benchmark_of_the_host_s_part_on_triton_runs() -> None:
    assert "with gradient" in printed("gpu.triton_host", "--calls", "1")
