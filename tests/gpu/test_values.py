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
from polyce.testing import Answer

from . import exact
from .arrays import (
    arranged,
    case_problem,
    exact_mean,
    fitting,
    make_confident,
    problem,
    same,
    softmax,
    some_rows,
    wide_rows,
    without_rows,
)
from .backends import EVERY
from .cases import IGNORED, Case, Size, beyond_32_bits, cases, large_cases, small_set
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


def compared(device: Device, case: Case, checked: int) -> exact.Row:
    """Check this many logits of a case, and return the largest errors."""
    xp, to_numpy = device.xp, device.backend.to_numpy
    dims = fitting(device, case)
    logits = device.normal(arranged(device, dims, case), 3.0, 0)
    rows = xp.moveaxis(logits, 1, -1)
    shape, classes = tuple(rows.shape[:-1]), dims[1]
    checked //= 4 if case.dtype == "float64" else 1
    where = some_rows(math.prod(shape), max(2, checked // classes))
    places = tuple(map(device.backend.asarray, np.unravel_index(where, shape)))
    options, arguments = asked_for(device, case, classes)
    if "probabilities" in case.options:
        target = softmax(device, device.normal(xp.empty_like(logits), 1.0, 2))
        chosen = xp.moveaxis(target, 1, -1)[places]
    else:
        target = device.labels(shape, classes, case.target, 1)
        if "ignore" in case.options:
            target[tuple(index[::5] for index in places)] = options.ignore_index
        chosen = target[places]
        make_confident(device, rows, places, chosen)
    # The oracle gets the same rounded numbers as the call.
    wide = np.longdouble if case.dtype == "float64" else np.float64
    told = to_numpy(chosen)
    told = told.astype(np.int64 if told.dtype.kind == "i" else np.float64)
    g = device.around_one(shape, case.dtype, 3)
    answer = exact.exact(
        to_numpy(rows[places]).astype(np.float64).astype(wide),
        told.astype(wide) if told.dtype.kind == "f" else told,
        to_numpy(g[places]).astype(np.float64),
        options,
    )
    alone, losses, grad = results(device, case, logits, target, g, arguments)
    entries = to_numpy(xp.moveaxis(grad, 1, -1)[places])
    both = to_numpy(alone[places]), to_numpy(losses[places])
    found = judged(device, answer, both, entries, case.dtype)
    if {"probabilities", "smoothing"} & set(case.options):
        # Two parts of an entry may cancel, and its units are then too small to count errors in.
        del found["label_ulp"], found["entry_ulp"]
    return found | {"dtype": case.dtype, "rows": math.prod(shape), "rows_checked": len(where)}


def asked_for(device: Device, case: Case, classes: int) -> tuple[exact.Options, dict[str, Any]]:
    """Return the options, for the oracle and as arguments."""
    options = exact.Options(
        smoothing=0.1 if "smoothing" in case.options else 0.0, ignore_index=IGNORED
    )
    arguments: dict[str, Any] = {"label_smoothing": options.smoothing}
    if "weight" in case.options:
        weight = device.around_one((classes,), case.dtype, 4)
        arguments["weight"] = weight
        options = options._replace(weight=device.backend.to_numpy(weight).astype(np.float64))
    return options, arguments


def results(
    device: Device, case: Case, logits: Any, target: Any, g: Any, arguments: dict[str, Any]
) -> tuple[Any, Any, Any]:
    """Return the row losses alone, and again with the gradient."""
    alone = device.alone(logits, target, reduction="none", **arguments)
    in_place = "in place" in case.options
    losses, grad = device.loss_and_grad(
        logits, target, grad_output=g, in_place=in_place, reduction="none", **arguments
    )
    device.synchronize()
    assert (device.address(grad) == device.address(logits)) == in_place
    for each, shape in ((alone, g.shape), (losses, g.shape), (grad, logits.shape)):
        assert each.shape == shape
        assert bool(device.xp.all(device.xp.isfinite(each)))
    return alone, losses, grad


def judged(
    device: Device, answer: Answer, losses: tuple[Any, Any], grad: np.ndarray, name: str
) -> exact.Row:
    """Check the losses computed in both ways and the gradient, and return the largest errors."""
    one, other = (exact.judged(answer, each, grad, name, device.library) for each in losses)
    largest = {name: max(one[name], other[name]) for name in ("loss_ulp", "loss_of_allowed")}
    return one | largest


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
