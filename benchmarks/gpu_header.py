"""What the numbers of the GPU script depend on: the device, its clocks and power, versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_checks import NotHereError
from gpu_device import Device

import polyce

PACKAGES = ("torch", "triton", "numpy", "ml_dtypes", "liger-kernel", "quack-kernels")
NVIDIA = (
    *("name", "driver_version", "pstate", "clocks.sm", "clocks.max.sm", "clocks.mem"),
    *("clocks.max.mem", "power.limit", "power.max_limit", "power.draw", "temperature.gpu"),
)


def header(machine: Device) -> dict[str, Any]:
    """Give all of it; what cannot be told here says why."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "rehearsal": machine.rehearses,
        "device": told(lambda: device(machine)),
        "clocks and power": told(lambda: power(machine)),
        "library": machine.library,
        "versions": versions() | machine.versions(),
        "commit": told(commit),
        "system": f"{platform.system()} {platform.machine()}",
    }


def told(tell: Callable[[], Any]) -> Any:
    """Give a fact, or why it is not here."""
    try:
        return tell()
    except NotHereError as reason:
        return {"not here": str(reason)}


def device(machine: Device) -> dict[str, Any]:
    """Describe the device."""
    machine.needs_device("device to describe")
    return machine.describe()


def power(machine: Device) -> dict[str, Any]:
    """Ask the driver's own tool; again after the run, where a busy device is slower."""
    machine.needs_device("clocks")
    if machine.is_rocm:
        text = run(
            "rocm-smi", "--showclocks", "--showpower", "--showmaxpower", "--showdriverversion"
        )
        return {"rocm-smi": text}
    query = f"--query-gpu={','.join(NVIDIA)}"
    line = run("nvidia-smi", query, "--format=csv,noheader", *machine.selector()).splitlines()[0]
    return dict(zip(NVIDIA, map(str.strip, line.split(",")), strict=True))


def versions() -> dict[str, str]:
    """Give the versions of what takes part."""
    found = {"python": platform.python_version(), "polyce": polyce.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str:
    """Give the commit of the checkout, marked where it has changes."""
    folder = Path(__file__).parent
    found = run("git", "-C", str(folder), "rev-parse", "HEAD").strip()
    changed = run("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return found + (" with changes" if changed.strip() else "")


def run(command: str, *arguments: str) -> str:
    """Give what a program prints."""
    path = shutil.which(command)
    if path is None:
        raise NotHereError(f"{command} is not on PATH")
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotHereError(f"{command} failed: {(done.stdout + done.stderr).strip()[-300:]}")
    return done.stdout
