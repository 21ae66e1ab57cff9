"""How a call behaves on a GPU: its path, bad labels, in-place results, repeated bits, memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import polyce

from .arrays import fitting, problem, same
from .backends import EVERY
from .cases import DTYPES, Case, Size
from .device import Device, NotHereError, Timed

pytestmark = EVERY
BY_DTYPE = pytest.mark.parametrize("name", DTYPES)


@BY_DTYPE
def test_the_path_is_chosen_by_itself(device: Device, name: str) -> None:
    if device.library == "torch" and device.rehearses:
        raise NotHereError("kernels in Triton's interpreter run when asked for by name alone")
    assert polyce.explain(*problem(device, (4, 10), name)).chosen == device.path


@BY_DTYPE
def test_the_gradient_takes_the_place_of_the_logits(device: Device, size: Size, name: str) -> None:
    logits, labels = problem(device, size.dims, name)
    want = device.loss_and_grad(logits, labels)
    out, _ = problem(device, size.dims, name)
    got = polyce.cross_entropy_with_grad(out, labels, out=out, implementation=device.path)
    assert got[1] is out
    same(device, got, want)


@BY_DTYPE
def test_a_bad_label_makes_its_row_nan_and_nothing_else(
    device: Device, size: Size, name: str
) -> None:
    logits, labels = problem(device, size.dims, name)
    want = device.loss_and_grad(logits, labels, reduction="none")
    bad = labels + 0
    bad[0], bad[2] = size.dims[1], -7
    loss, grad = device.loss_and_grad(logits, bad, reduction="none", **device.unchecked)
    alone = device.alone(logits, bad, reduction="none", **device.unchecked)
    device.synchronize()
    for result in (loss, grad, alone):
        for row in (0, 2):
            assert bool(device.xp.all(device.xp.isnan(result[row])))
    kept = device.backend.asarray(np.r_[1, 3 : size.dims[0]])
    same(device, (loss[kept], grad[kept]), (want[0][kept], want[1][kept]), "other rows")
    same(device, (alone[kept],), (want[0][kept],), "other rows, alone")
    # Shows that the device still works.
    same(device, device.loss_and_grad(logits, labels, reduction="none"), want, "afterwards")


def test_labels_are_looked_at_where_that_is_asked_for(device: Device, size: Size) -> None:
    logits, labels = problem(device, size.dims)
    device.alone(logits, labels, validate=True)
    labels[1] = size.dims[1]
    with pytest.raises(IndexError):
        device.alone(logits, labels, validate=True)


# Shapes whose rows take a few programs each, share one, or take many each; and an image.
SHAPES = ("rows", "many rows", "a long row", "an image")


@pytest.mark.parametrize("shape", SHAPES)
def test_results_repeat(device: Device, size: Size, shape: str) -> None:
    for name in size.few_dtypes:
        check_repeats(device, size, shape, name)


def check_repeats(device: Device, size: Size, shape: str, name: str) -> None:
    """Check that the same call gives the same bits again and again, between other calls."""
    dims = {
        "rows": size.dims,
        "many rows": size.many_rows[-1],
        "a long row": size.long_rows[0],
        "an image": (1, *size.images[0][1:]),
    }[shape]
    dims = fitting(device, Case(dims, name, scales=True))
    logits, labels = problem(device, dims, name)
    want, alone = device.loss_and_grad(logits, labels), device.alone(logits, labels)
    for turn in range(size.repeats - 1):
        # Memory that held something else is reused for the next results.
        device.full(dims, float(turn), name)
        same(device, device.loss_and_grad(logits, labels), want, f"run {turn + 2}")
        same(device, (device.alone(logits, labels),), (alone,), f"alone, run {turn + 2}")


@pytest.mark.parametrize("what", ["alone", "with gradient"])
def test_nothing_of_the_logits_size_is_made_but_the_gradient(
    device: Device, size: Size, what: str
) -> None:
    if device.library == "torch" and device.rehearses:
        raise NotHereError("torch counts no CPU memory")
    for name in size.few_dtypes:
        dims = fitting(device, Case((size.many_rows[-1][0], 1000), name, scales=True))
        logits, labels = problem(device, dims, name)
        function = device.alone if what == "alone" else device.loss_and_grad
        timed = Timed(lambda: None, lambda _, call=function, of=(logits, labels): call(*of))
        timed.call(timed.prepare())
        extra = device.extra_bytes(timed)
        assert extra is not None
        due = 0 if what == "alone" else logits.nbytes
        # A few numbers for each row, and a part that does not depend on the size.
        small = 48 * dims[0] + (2**13 if device.rehearses else 2**20)
        assert due <= extra <= due + small


def test_no_call_waits_for_the_device(device: Device, size: Size) -> None:
    logits, labels = problem(device, size.dims)
    weight = device.around_one(size.dims[1:], "float32", 4)
    divisor = device.full((), 3.0, "float32")
    probabilities = device.xp.exp(logits)
    probabilities = probabilities / device.xp.sum(probabilities, axis=1, keepdims=True)
    calls: tuple[tuple[Any, dict[str, Any]], ...] = (
        (labels, {}),
        (device.xp.astype(labels, device.xp.int32), {"reduction": "none"}),
        (labels, {"weight": weight, "label_smoothing": 0.1, "normalizer": 7.0}),
        (labels, {"normalizer": divisor, "z_loss": 0.1}),
        (probabilities, {"weight": weight, "logit_softcap": 5.0}),
    )
    for target, options in calls:
        for function in (device.alone, device.loss_and_grad, with_grad(device)):
            device.without_waiting(lambda f=function, t=target, o=options: f(logits, t, **o))


def with_grad(device: Device) -> Any:
    """Return polyce's function for loss and gradient, by the path under test."""

    def call(*operands: Any, **options: Any) -> Any:
        return polyce.cross_entropy_with_grad(*operands, implementation=device.path, **options)

    return call
