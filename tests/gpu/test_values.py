"""Values on a GPU, compared with float64 or better on a CPU.

The loss is computed in two ways: alone, and together with the gradient.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import polyce

from . import exact
from .arrays import case_problem, exact_mean, problem, same, wide_rows, without_rows
from .backends import EVERY
from .cases import IGNORED, Case, Size, beyond_32_bits, cases, large_cases, small_set
from .compared import compared, results
from .conftest import planned
from .device import Device

pytestmark = EVERY


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    size = planned(metafunc.config)
    every = {
        "test_values": itertools.chain(cases(size), beyond_32_bits()),
        "test_values_of_every_kernel": small_set(),
        "test_large": large_cases(size),
    }
    found = every.get(metafunc.function.__name__)
    if found is not None:
        metafunc.parametrize("case", [pytest.param(case, id=case.name) for case in found])


def test_values(device: Device, size: Size, case: Case, record_property: Any) -> None:
    for name, value in compared(device, case, size.checked).items():
        record_property(name, value)


def test_values_of_every_kernel(device: Device, case: Case) -> None:
    # A few cases, the same on every device: test_sanitizer runs them under a memory checker.
    compared(device, case, 2**16)


@pytest.mark.parametrize("name", ["float32", "float64"])
@pytest.mark.parametrize("function", [exact.exponentials, exact.logarithms])
def test_functions_of_the_hardware(
    device: Device, name: str, function: Callable[..., exact.Row], record_property: Any
) -> None:
    found = function(
        functools.partial(of_rows, device, name), name, device.rehearses, device.library
    )
    if function is exact.exponentials:
        # From 0 down to where results are no longer normal.
        assert len(found["ulp_by_gap"]) == {"float32": 5, "float64": 6}[name]
    for what, value in (found | {"dtype": name}).items():
        record_property(what, value)


def of_rows(device: Device, name: str, logits: np.ndarray, labels: np.ndarray) -> tuple[Any, ...]:
    """Return the logits that a call gets, its losses, and its gradient for cotangents of 1."""
    given = device.backend.asarray(logits.astype(name))
    target = device.backend.asarray(labels)
    g = device.full((len(labels),), 1.0, name)
    _, *found = results(device, Case(logits.shape, name), given, target, g, {})
    return tuple(map(device.backend.to_numpy, (given, *found)))


def test_large(device: Device, case: Case) -> None:
    """Check a mean over all rows, and the gradient of the first and the last ones."""
    logits, target = case_problem(device, case)
    want = exact_mean(device, logits, target)
    loss, grad = device.loss_and_grad(logits, target)
    for got in (loss, device.alone(logits, target)):
        allowed = {"float32": 1e-4}.get(case.dtype, 5e-3)
        assert abs(float(got) - want) <= allowed * want
    count = math.prod(target.shape)
    few, least = max(1, 2**22 // math.prod(logits.shape[1:])), 1e-4 / count
    # A float16 this small is subnormal.
    allowed = {"float32": 2e-5, "bfloat16": 1.01 * 2.0**-8, "float16": 1.01}[case.dtype]
    for part in (slice(0, few), slice(-few, None)):
        entries = wide_rows(device, logits[part], target[part])[1] / count
        got = device.xp.astype(grad[part], device.xp.float64)
        size = device.xp.abs(entries)
        error = device.xp.abs(got - entries) / device.xp.where(size > least, size, least)
        assert float(device.xp.max(error)) <= allowed


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_reductions_are_those_of_the_rows(device: Device, size: Size, reduction: str) -> None:
    to_numpy = device.backend.to_numpy
    logits, labels = problem(device, size.dims)
    weight = device.around_one(size.dims[1:], "float32", 4)
    labels[::3] = IGNORED
    rows = to_numpy(device.alone(logits, labels, weight, reduction="none")).astype(np.float64)
    kept = to_numpy(labels)
    weights = to_numpy(weight).astype(np.float64)[kept[kept >= 0]]
    want = rows.sum() / (weights.sum() if reduction == "mean" else 1.0)
    loss, _ = device.loss_and_grad(logits, labels, weight, reduction=reduction)
    for got in (loss, device.alone(logits, labels, weight, reduction=reduction)):
        assert abs(float(got) - want) <= 4 * 2.0**-24 * want


@pytest.mark.parametrize(("dims", "ignored", "reduction"), without_rows())
def test_without_rows(device: Device, dims: tuple[int, ...], ignored: bool, reduction: str) -> None:
    host = np.ones(dims, np.float32), np.full((dims[0], *dims[2:]), IGNORED if ignored else 0)
    want = polyce.cross_entropy_with_grad(*host, reduction=reduction)
    given = tuple(map(device.backend.asarray, host))
    got = device.loss_and_grad(*given, reduction=reduction)
    for here, there in zip(got, want, strict=True):
        np.testing.assert_array_equal(device.backend.to_numpy(here), there)
    same(device, (device.alone(*given, reduction=reduction),), got)
