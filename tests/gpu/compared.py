"""One case computed on a device, and compared with float64 or better on a CPU."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from polyce.testing import Answer

from . import exact
from .arrays import arranged, fitting, make_confident, softmax, some_rows
from .cases import IGNORED, Case
from .device import Device


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
