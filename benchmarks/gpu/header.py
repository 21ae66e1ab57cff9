"""What times on a GPU depend on: the device, its clocks and power, versions."""

from __future__ import annotations

import datetime
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu.device import Device, NotHereError

from ..measure import environment, versions

PACKAGES = ("triton", "liger-kernel", "quack-kernels")
NVIDIA = (
    *("name", "driver_version", "pstate", "clocks.sm", "clocks.max.sm", "clocks.mem"),
    *("clocks.max.mem", "power.limit", "power.max_limit", "power.draw", "temperature.gpu"),
)


def header(device: Device) -> dict[str, Any]:
    """Return all of it; what cannot be found here says why."""
    found = environment()
    found["versions"] |= versions(*PACKAGES) | device.versions()
    return found | {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "rehearsal": device.rehearses,
        "device": told(device.facts),
        "clocks and power": told(lambda: power(device)),
        "library": device.library,
        "commit": told(commit),
    }


def told(tell: Callable[[], Any]) -> Any:
    """Return what a function finds, or why that cannot be found here."""
    try:
        return tell()
    except NotHereError as reason:
        return {"not here": str(reason)}


def power(device: Device) -> dict[str, Any]:
    """Ask the driver's own tool, before the run and after it, when a busy device is slower."""
    selector = device.selector()
    if device.is_rocm:
        shown = ("--showclocks", "--showpower", "--showmaxpower", "--showdriverversion")
        return {"rocm-smi": run("rocm-smi", *shown)}
    query = f"--query-gpu={','.join(NVIDIA)}"
    line = run("nvidia-smi", query, "--format=csv,noheader", *selector).splitlines()[0]
    return dict(zip(NVIDIA, map(str.strip, line.split(",")), strict=True))


def commit() -> str:
    """Return the commit of the checkout, with a mark if files have changed."""
    folder = Path(__file__).parent
    found = run("git", "-C", str(folder), "rev-parse", "HEAD").strip()
    changed = run("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return found + (" with changes" if changed.strip() else "")


def run(command: str, *arguments: str) -> str:
    """Return what a program prints."""
    path = shutil.which(command)
    if path is None:
        raise NotHereError(f"{command} is not on PATH")
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotHereError(f"{command} failed: {(done.stdout + done.stderr).strip()[-300:]}")
    return done.stdout
