"""The cases of `gpu_cases` on CuPy arrays, compared with float64 on a CPU.

The loss comes by two ways: alone, and beside the gradient.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import cupy
import gpu_cupy_arrays as arrays
import gpu_exact
import numpy as np
from gpu_cases import IGNORED, Case, Size, beyond_32_bits, cases
from gpu_checks import attempt, require
from gpu_cupy_machine import Machine
from measure import Row

import polyce
from polyce.testing.dtypes import dtype


def check(machine: Machine, size: Size) -> list[Row]:
    """Compare all cases, then the functions that hardware computes in its own way."""
    every = itertools.chain(cases(size), beyond_32_bits())
    rows = [
        attempt(case.name, functools.partial(compared, machine, case, size), dtype=case.dtype)
        for case in every
    ]
    for name in ("float32", "float64"):
        for what, measured in gpu_exact.FUNCTIONS.items():
            run = functools.partial(of_rows, name)
            compute = functools.partial(measured, run, name, machine.rehearses, "cupy")
            rows.append(attempt(what, compute, dtype=name))
    return rows


def compared(machine: Machine, case: Case, size: Size) -> Row:
    """Run a case and compare the rows that are to be checked."""
    dims = arrays.fitting(machine, case)
    logits = arrays.fill(arrays.arranged(dims, case), 3.0)
    rows = cupy.moveaxis(logits, 1, -1)
    shape, classes = rows.shape[:-1], dims[1]
    checked = size.checked // (4 if case.dtype == "float64" else 1)
    where = arrays.some_rows(math.prod(shape), max(2, checked // classes))
    places = tuple(map(cupy.asarray, np.unravel_index(where, shape)))
    options, arguments = asked_for(case, classes)
    if "probabilities" in case.options:
        target = arrays.softmax(arrays.fill(cupy.empty_like(logits), 1.0, seed=4))
        seen_target = cupy.moveaxis(target, 1, -1)[places].astype(np.float64)
    else:
        target = arrays.labels(shape, classes, case.target)
        if "ignore" in case.options:
            target[tuple(index[::5] for index in places)] = IGNORED
        seen_target = target[places]
        arrays.make_confident(rows, places, seen_target)
    # What reaches the oracle is what the call got.
    wide = np.longdouble if case.dtype == "float64" else np.float64
    seen = cupy.asnumpy(rows[places].astype(np.float64)).astype(wide)
    told = cupy.asnumpy(seen_target)
    told = told.astype(wide if told.dtype.kind == "f" else np.int64)
    g = arrays.half_to_three_halves(shape, case.dtype, seed=6)
    answer = gpu_exact.exact(seen, told, cupy.asnumpy(g[places].astype(np.float64)), options)
    alone, losses, grad = call(case, logits, target, g, arguments)
    machine.synchronize()
    for each, due in ((alone, shape), (losses, shape), (grad, dims)):
        require(each.shape == due, f"the shape is {each.shape}, not {due}")
        require(bool(cupy.isfinite(each).all()), "results are not finite")
    entries = cupy.asnumpy(cupy.moveaxis(grad, 1, -1)[places])
    found = judged(answer, (cupy.asnumpy(alone[places]), cupy.asnumpy(losses[places])), entries)
    if {"probabilities", "smoothing"} & set(case.options):
        # Two parts of an entry may cancel, and then its units are too small to count errors in.
        del found["label_ulp"], found["entry_ulp"]
    return found | {"rows": math.prod(shape), "rows_checked": len(where)}


def judged(answer: Any, losses: tuple[np.ndarray, ...], grad: np.ndarray) -> Row:
    """Give the largest errors of the losses of both ways, and those of the gradient."""
    one, other = (gpu_exact.judged(answer, each, grad, grad.dtype.name, "cupy") for each in losses)
    largest = {name: max(one[name], other[name]) for name in ("loss_ulp", "loss_of_allowed")}
    return one | other | largest


def call(
    case: Case, logits: Any, target: Any, g: Any, arguments: dict[str, Any]
) -> tuple[Any, Any, Any]:
    """Give the row losses alone, and again with the gradient."""
    arguments = arguments | {"reduction": "none", "implementation": "cupy"}
    alone = polyce.cross_entropy(logits, target, **arguments)
    out = logits if "in place" in case.options else None
    losses, grad = polyce.cross_entropy_with_grad(
        logits, target, grad_output=g, out=out, **arguments
    )
    require(out is None or grad is out, "the gradient is not in the logits' memory")
    return alone, losses, grad


def asked_for(case: Case, classes: int) -> tuple[gpu_exact.Options, dict[str, Any]]:
    """Give the options, for the oracle and as arguments."""
    options = gpu_exact.Options(
        smoothing=0.1 if "smoothing" in case.options else 0.0, ignore_index=IGNORED
    )
    arguments: dict[str, Any] = {"label_smoothing": options.smoothing}
    if "weight" in case.options:
        weight = arrays.half_to_three_halves((classes,), case.dtype, seed=8)
        arguments["weight"] = weight
        options = options._replace(weight=cupy.asnumpy(weight.astype(np.float64)))
    return options, arguments


def of_rows(name: str, logits: np.ndarray, labels: np.ndarray) -> tuple[Any, Any, Any]:
    """Give what a call gets of logits, the losses, and the gradient for cotangents of 1."""
    x = cupy.asarray(logits.astype(dtype(name)))
    g = cupy.ones(len(logits), x.dtype)
    _, losses, grad = call(Case(logits.shape, name), x, cupy.asarray(labels), g, {})
    return tuple(map(cupy.asnumpy, (x, losses, grad)))
