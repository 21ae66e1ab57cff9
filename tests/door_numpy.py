"""What the tests of the door on NumPy's arrays share: arrays, and when results are the same."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

import door_calls
import polyce

MARKS = [*door_calls.MARKS, pytest.mark.only("numpy")]

RNG = np.random.default_rng(20)
LOGITS = RNG.standard_normal((6, 5)).astype(np.float32)
LABELS = np.array([0, 4, 2, 2, 1, 3])
PROBABILITIES = np.full((6, 5), 0.2, np.float32)
FUNCTIONS = {"loss": polyce.cross_entropy, "with_grad": polyce.cross_entropy_with_grad}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
    if a is None or isinstance(a, (type, str)):
        return bool(a == b)
    if type(a) is not type(b):
        return False
    return bool(a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b, equal_nan=True))


check_after = functools.partial(door_calls.check_after, same)
