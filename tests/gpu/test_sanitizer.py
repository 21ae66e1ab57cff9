"""compute-sanitizer watches every kernel, in a separate process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .backends import EVERY
from .device import UNPOOLED, Device, NotHereError
from .ledger import Ledger

pytestmark = EVERY

ROOT = Path(__file__).parents[2]
MINUTES = 30


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_every_kernel_under_a_checker(device: Device, backend_name: str, tool: str) -> None:
    if device.rehearses:
        raise NotHereError("a rehearsal on a CPU has no memory for compute-sanitizer to watch")
    command = [
        sanitizer(),
        "--tool",
        tool,
        "--error-exitcode",
        "86",
        sys.executable,
        "-m",
        "pytest",
    ]
    # In a run of a few minutes there is time for one case of each layout.
    few = " and bfloat16 and not weight and not place" if Ledger.of_this_process() else ""
    command += [f"--backend={backend_name}", "-p", "no:cacheprovider", "-k", f"every_kernel{few}"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("test_values.py"))],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", UNPOOLED: "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60 * MINUTES,
        check=False,
    )
    told = f"exit status {done.returncode}: {(done.stdout + done.stderr).strip()[-2000:]}"
    if "SUMMARY" not in done.stdout + done.stderr:
        raise NotHereError(f"compute-sanitizer does not work here: {told}")
    assert done.returncode == 0, told


def sanitizer() -> str:
    """Return the path of compute-sanitizer."""
    roots = (os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH"))
    folders = [str(Path(root) / "bin") for root in roots if root]
    path = os.pathsep.join([os.environ.get("PATH", ""), *folders])
    command = shutil.which("compute-sanitizer", path=path)
    if command is None:
        raise NotHereError("compute-sanitizer is neither on PATH nor in CUDA_HOME")
    return command
