"""What the GPU script does in processes of their own: compute-sanitizer, and a first call."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_cases import Case, Size
from gpu_checks import NotHereError, attempt, require
from gpu_device import Device
from measure import Row

TOOLS = ("memcheck", "racecheck", "initcheck")
DONE = "all right"
SCRIPT = Path(__file__).with_name("gpu.py")
# Makes CuPy's machine ask the driver for each array's memory.
UNPOOLED = "POLYCE_GPU_UNPOOLED"
_MINUTES = 30


def small_set(machine: Device, size: Size, compared: Callable[[Device, Case, Size], Row]) -> None:
    """Go through every kernel and every way to lay a program out, for the sanitizer to watch."""
    many = size._replace(checked=2**16)
    for dtype in ("bfloat16", "float32"):
        for dims, layout in (
            ((5, 7), "plain"),  # rows that share a program
            ((3, 1000), "plain"),  # 16-byte loads from the start
            ((3, 1001), "misaligned"),  # 16-byte loads after the first classes
            ((150, 33), "column-major"),  # neighbouring rows
            ((1, 70001), "plain"),  # a row for several programs
        ):
            for options in ((), ("probabilities", "weight", "smoothing"), ("in place",)):
                found = compared(machine, Case(dims, dtype, "int64", layout, options), many)
                require("wrong" not in found, str(found.get("wrong")))
    print(DONE)


def check(machine: Device) -> list[Row]:
    """Run the small set in a process of its own, as it is and under each of the tools."""
    rows = [attempt("the small set, alone", lambda: _alone(machine))]
    rows += [
        attempt(f"compute-sanitizer {tool}", functools.partial(_sanitized, machine, tool))
        for tool in TOOLS
    ]
    return rows


def _alone(machine: Device) -> Row:
    done = _run(machine, "--small-set")
    require(done.returncode == 0 and DONE in done.stdout, _tail(done))
    return {}


def _sanitized(machine: Device, tool: str) -> Row:
    command = _sanitizer()
    machine.needs_device("memory for compute-sanitizer to watch")
    # Else pieces of large blocks are handed out, which the tool takes for one.
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", UNPOOLED: "1"}
    before = [command, "--tool", tool, "--error-exitcode", "86"]
    done = _run(machine, "--small-set", before=before, variables=variables)
    if "SUMMARY" not in done.stdout + done.stderr:
        raise NotHereError(f"compute-sanitizer does not work here: {_tail(done)}")
    require(done.returncode == 0 and DONE in done.stdout, _tail(done))
    return {"summary": [line for line in done.stdout.splitlines() if "SUMMARY" in line]}


def _sanitizer() -> str:
    roots = (os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH"))
    folders = [str(Path(root) / "bin") for root in roots if root]
    path = os.pathsep.join([os.environ.get("PATH", ""), *folders])
    command = shutil.which("compute-sanitizer", path=path)
    if command is None:
        raise NotHereError("compute-sanitizer is neither on PATH nor in CUDA_HOME")
    return command


def first_calls(machine: Device) -> list[Row]:
    """Time the first calls of a process, with kernels to compile and without."""
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for kernels in ("to compile", "compiled before"):
            facts = attempt(f"first call, kernels {kernels}", lambda: _first_call(machine, cache))
            rows.append(facts | {"kernels": kernels})
    return rows


def _first_call(machine: Device, cache: str) -> Row:
    variables = {"TRITON_CACHE_DIR": cache, "CUPY_CACHE_DIR": cache}
    done = _run(machine, "--first-call", variables=variables)
    require(done.returncode == 0, _tail(done))
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def _run(
    machine: Device, what: str, before: Any = (), variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [*before, sys.executable, str(SCRIPT), what, "--library", machine.library]
    if machine.rehearses:
        command.append("--rehearse")
    try:
        return subprocess.run(
            command,
            env=os.environ | (variables or {}),
            capture_output=True,
            text=True,
            timeout=60 * _MINUTES,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NotHereError(f"it took more than {_MINUTES} minutes") from None


def _tail(done: subprocess.CompletedProcess[str]) -> str:
    return f"exit status {done.returncode}: {(done.stdout + done.stderr).strip()[-2000:]}"
