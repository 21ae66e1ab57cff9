"""The first calls of a process, with kernels still to compile and with compiled kernels."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from gpu.arrays import problem
from gpu.device import Device
from gpu.ledger import attempt

from ..measure import Row

_ROOT = Path(__file__).parents[2]
_MINUTES = 30


def first_calls(device: Device) -> Iterator[Row]:
    """Time the first calls of two processes that share compiled kernels."""
    with tempfile.TemporaryDirectory() as cache:
        for kernels in ("to compile", "compiled before"):
            yield attempt(
                f"first call, kernels {kernels}",
                functools.partial(in_a_process, device, cache),
                kernels=kernels,
            )


def in_a_process(device: Device, cache: str) -> Row:
    """Return the first calls' times of a fresh process."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--first-call", "--library", device.library]
    done = subprocess.run(
        [*command, *(["--rehearse"] if device.rehearses else [])],
        env=os.environ | {"TRITON_CACHE_DIR": cache, "CUPY_CACHE_DIR": cache},
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=60 * _MINUTES,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: {done.stderr.strip()[-2000:]}")
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def here(device: Device) -> None:
    """Time the first two calls of this process, and print the times."""
    # Starting the library and the device is not to be measured.
    logits, labels = problem(device, (8, 1000))
    float((logits * 2).sum())
    device.synchronize()
    found = {}
    for name in ("first", "second"):
        for what, function in (("forward", device.alone), ("with gradient", device.loss_and_grad)):
            start = time.perf_counter()
            function(logits, labels)
            device.synchronize()
            found[f"{name} {what}_s"] = time.perf_counter() - start
    print(json.dumps(found))
