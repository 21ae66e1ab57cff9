"""The next-character example: it learns, writes text, and measures both ways."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.only("numpy"), pytest.mark.slow("numpy")]

EXAMPLE = Path(__file__).parents[1] / "examples" / "next_character.py"


def test_script() -> None:
    command = [sys.executable, "-W", "error", str(EXAMPLE), "--steps", "40"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    training, rest = done.stdout.split("\n\n", 1)
    written, memory = rest.rsplit("\n\n", 1)

    numbers = re.findall(r"\d+\.\d+", training)
    *losses, test, without_context = map(float, numbers)
    classes = re.search(r"(\d+) different ones", training)
    assert classes is not None
    assert losses[0] == pytest.approx(np.log(int(classes[1])), abs=2e-3)
    assert losses[-1] < losses[0] - 1
    assert test < without_context
    assert len(written) >= 200

    fused, unfused = re.findall(r"  (\d+ MB|not told by this system)$", memory, re.M)
    if fused != "not told by this system":
        assert 2 * int(fused.split()[0]) < int(unfused.split()[0])


def test_both_ways_give_the_same() -> None:
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((50, 6), dtype=np.float32)
    weight = rng.standard_normal((9, 6), dtype=np.float32)
    labels = rng.integers(9, size=50)
    ways = runpy.run_path(str(EXAMPLE))["WAYS"].values()
    (fused, fused_grads), (loss, grads) = (way(hidden, weight, labels) for way in ways)
    np.testing.assert_allclose(fused, loss, rtol=1e-6)
    for found, expected in zip(fused_grads, grads, strict=False):  # None without a bias
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
