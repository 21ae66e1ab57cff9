"""The tests of this folder find wrong results and missing devices."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .arrays import problem
from .backends import REHEARSED, SLOW
from .cases import DTYPES, Case, Size
from .compared import compared, results
from .device import Device, NotHereError, find
from .test_behaviour import SHAPES, check_repeats

pytestmark = [REHEARSED, SLOW, pytest.mark.tests_of_tests]

PROBABILITIES = ("probabilities", "weight", "smoothing")
CASES = [
    *(Case((5, 10), name) for name in DTYPES),
    *(Case((5, 10), name, options=PROBABILITIES) for name in DTYPES),
    Case((3, 65), "float32", layout="column-major", options=("in place",)),
    Case((1, 70001), "float32"),
]


def spoilt(device: Device, loss: Callable[[Any], Any], grad: Callable[[Any], Any]) -> Device:
    """Return a device whose losses and gradients come out changed."""

    def both(*operands: Any, **options: Any) -> Any:
        found = device.loss_and_grad(*operands, **options)
        changed = grad(found[1])
        if options.get("in_place"):
            found[1][...] = changed
            changed = found[1]
        return loss(found[0]), changed

    return dataclasses.replace(device, loss_and_grad=both)


def by_a_fiftieth(device: Device) -> Callable[[Any], Any]:
    return lambda array: device.xp.astype(array * 1.02, array.dtype)


def unchanged(array: Any) -> Any:
    return array


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_wrong_gradient_is_found(device: Device, case: Case) -> None:
    with pytest.raises(AssertionError, match="grad"):
        compared(spoilt(device, unchanged, by_a_fiftieth(device)), case, 2**18)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_wrong_loss_is_found(device: Device, case: Case) -> None:
    with pytest.raises(AssertionError, match="loss"):
        compared(spoilt(device, by_a_fiftieth(device), unchanged), case, 2**18)
    alone = dataclasses.replace(
        device, alone=lambda *a, **o: by_a_fiftieth(device)(device.alone(*a, **o))
    )
    with pytest.raises(AssertionError, match="loss"):
        compared(alone, case, 2**18)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_bit_that_differs_is_found(device: Device, size: Size, shape: str) -> None:
    turns = itertools.count()

    def next_number(loss: Any) -> Any:
        if not next(turns) % 2:
            return loss
        host = device.backend.to_numpy(loss)
        return device.backend.asarray(np.nextafter(host, np.float32(np.inf)).reshape(loss.shape))

    with pytest.raises(AssertionError, match="run 2: the loss differs"):
        check_repeats(spoilt(device, next_number, unchanged), size, shape, "float32")


def test_a_gradient_that_is_not_in_place_is_found(device: Device) -> None:
    logits, labels = problem(device, (3, 5))
    g = device.full((3,), 1.0, "float32")

    def elsewhere(*operands: Any, in_place: bool, **options: Any) -> Any:
        return device.loss_and_grad(*operands, **options)

    wrong = dataclasses.replace(device, loss_and_grad=elsewhere)
    with pytest.raises(AssertionError):
        results(wrong, Case((3, 5), "float32", options=("in place",)), logits, labels, g, {})


def test_a_host_that_waits_is_found(device: Device) -> None:
    if device.library == "torch":
        raise NotHereError("a rehearsal on a CPU has no device to wait for")
    with pytest.raises(AssertionError, match="waits"):
        device.without_waiting(lambda: float(device.full((1,), 1.0, "float32").sum()))


def test_a_missing_device_fails_with_a_reason(device: Device) -> None:
    backend = {"torch": "torch-cuda", "cupy": "cupy"}[device.library]
    if device.library == "torch":
        with pytest.raises(NotHereError, match="TRITON_INTERPRET=1 runs kernels on a CPU"):
            find("torch", False)
        if device.xp.cuda.is_available():
            pytest.skip("there is a device")
    command = [sys.executable, "-m", "pytest", "-q", f"--backend={backend}"]
    command += ["-p", "no:cacheprovider", str(Path(__file__).with_name("test_streams.py"))]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode in (1, 4), done.stderr
    without = "--backend=triton and --backend=cupy-emulated do", "--stand-in does"
    assert f"device; {without[device.library == 'torch']} without" in done.stdout + done.stderr
