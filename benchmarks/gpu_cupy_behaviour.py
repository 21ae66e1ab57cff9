"""How the loss behaves on CuPy arrays: the same bits again, no waiting, bad labels, streams.

Most checks compare bits with a plain call's, whose values `gpu_cupy_values` compares with float64.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from typing import Any

import cupy
import gpu_cupy_arrays as arrays
import numpy as np
from gpu_cases import DTYPES, Case, Size
from gpu_checks import NotHereError, attempt, require
from gpu_cupy_arrays import problem, same
from gpu_cupy_machine import Machine
from gpu_device import Timed
from measure import Row

import polyce

alone = functools.partial(polyce.cross_entropy, implementation="cupy")
with_grad = functools.partial(polyce.cross_entropy_with_grad, implementation="cupy")


def check(machine: Machine, size: Size) -> list[Row]:
    """Run all checks; each says what is to hold."""
    classes = size.few_classes[-1]
    dims = (64, classes) if not machine.rehearses else (4, classes)
    checks: dict[str, Callable[[], Row | None]] = {
        "polyce chooses cupy by itself": chooses_cupy,
        "mean and sum are those of the rows": lambda: reduces(dims),
        "no rows give what NumPy's give": nothing,
        "in place gives the same bits": lambda: in_place(dims),
        "a bad label makes its row nan, and nothing else": lambda: bad_labels(machine, dims),
        "validate=True raises": lambda: validates(dims),
        "no call waits for the device": lambda: waits_for_nothing(machine, dims),
        "a graph replays to the same bits": lambda: graph(machine, dims),
        "another stream gives the same bits": lambda: stream(machine, dims),
        "another device gives the same bits": lambda: second_device(machine, dims),
        "nothing as large as the logits is made but the gradient": lambda: memory(machine, size),
    }
    rows = [attempt(name, each) for name, each in checks.items()]
    shapes = {
        "rows": dims,
        "many rows": size.many_rows[-1],
        "a long row": size.long_rows[0],
        "an image": (1, *size.images[0][1:]),
    }
    for name, shape in shapes.items():
        rows.append(
            attempt(
                f"{name}, {size.repeats} times: the same bits",
                functools.partial(repeated, machine, shape, size),
            )
        )
    return rows


def chooses_cupy() -> None:
    """Ask what runs where nothing is asked for by name."""
    for dtype in DTYPES:
        chosen = polyce.explain(*problem((4, 10), dtype)).chosen
        require(chosen == "cupy", f"{chosen} is chosen for {dtype}")


def reduces(dims: tuple[int, ...]) -> Row:
    """Compare the reduced losses with the rows' own, added in float64."""
    logits, labels = problem(dims)
    weight = arrays.half_to_three_halves(dims[1:2], "float32", seed=3)
    labels[::3] = -100
    rows = cupy.asnumpy(alone(logits, labels, weight, reduction="none")).astype(np.float64)
    kept = cupy.asnumpy(labels)
    weights = cupy.asnumpy(weight).astype(np.float64)[kept[kept >= 0]]
    wanted = {"sum": rows.sum(), "mean": rows.sum() / weights.sum()}
    found = {}
    for reduction, want in wanted.items():
        both = with_grad(logits, labels, weight, reduction=reduction)
        for loss in map(float, (alone(logits, labels, weight, reduction=reduction), both[0])):
            found[f"{reduction}_relative_error"] = abs(loss - want) / want
            require(abs(loss - want) <= 4 * 2.0**-24 * want, f"{reduction} is {loss}, not {want}")
    return found


def nothing() -> None:
    """Compare calls without rows, or without a row that counts, with NumPy's."""
    for (dims, ignored), reduction in (
        (each, reduction)
        for each in (((0, 10), False), ((0, 3, 2, 2), False), ((3, 10), True))
        for reduction in ("none", "sum", "mean")
    ):
        there = np.ones(dims, np.float32), np.zeros((dims[0], *dims[2:]), np.int64)
        if ignored:
            there[1][:] = -100
        wanted = polyce.cross_entropy_with_grad(*there, reduction=reduction)
        got = with_grad(*map(cupy.asarray, there), reduction=reduction)
        for here, want in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(cupy.asnumpy(here), want)


def in_place(dims: tuple[int, ...]) -> None:
    """Let the gradient take the logits' place."""
    for dtype in DTYPES:
        logits, labels = problem(dims, dtype)
        want = with_grad(logits, labels)
        got = with_grad(logits, labels, out=logits)
        require(got[1] is logits, "out= is not what is returned")
        same(got, want, dtype)


def bad_labels(machine: Machine, dims: tuple[int, ...]) -> None:
    """Pass labels that are out of range, then a plain call, which shows that the device lives."""
    kept = cupy.asarray(np.r_[1, 3 : dims[0]])
    for dtype in DTYPES:
        logits, labels = problem(dims, dtype)
        want = with_grad(logits, labels, reduction="none")
        bad = labels.copy()
        bad[0], bad[2] = dims[1], -7
        loss, grad = with_grad(logits, bad, reduction="none")
        for result in (loss, grad, alone(logits, bad, reduction="none")):
            machine.synchronize()
            for wrong in (0, 2):
                require(bool(cupy.isnan(result[wrong]).all()), f"{dtype}: row {wrong} is no nan")
        same((loss[kept], grad[kept]), (want[0][kept], want[1][kept]), f"{dtype}, other rows")
        same(with_grad(logits, labels, reduction="none"), want, f"{dtype}, afterwards")


def validates(dims: tuple[int, ...]) -> Row:
    """Ask for labels to be looked at."""
    logits, labels = problem(dims)
    alone(logits, labels, validate=True)
    labels[1] = dims[1]
    try:
        alone(logits, labels, validate=True)
    except IndexError as error:
        return {"message": str(error)}
    raise AssertionError("nothing is raised for a label out of range")


def waits_for_nothing(machine: Machine, dims: tuple[int, ...]) -> Row:
    """Call while the device is busy with something else, in kernels that were compiled before."""
    logits, labels = problem(dims)
    weight = arrays.half_to_three_halves(dims[1:2], "float32", seed=3)
    divisor = cupy.asarray(np.float32(3.0))
    probabilities = arrays.softmax(logits)
    calls: list[tuple[Any, dict[str, Any]]] = [
        (labels, {}),
        (labels.astype(np.int32), {"reduction": "none"}),
        (labels, {"weight": weight, "label_smoothing": 0.1, "normalizer": 7.0}),
        (labels, {"normalizer": divisor, "z_loss": 0.1}),
        (probabilities, {"weight": weight, "logit_softcap": 5.0}),
    ]
    for target, options in calls:
        machine.waits(functools.partial(alone, logits, target, **options))
        machine.waits(functools.partial(with_grad, logits, target, **options))
    return {"calls": 2 * len(calls)}


def graph(machine: Machine, dims: tuple[int, ...]) -> None:
    """Capture a call in a CUDA graph, and replay it on other logits."""
    machine.needs_device("CUDA graphs")
    logits, labels = problem(dims)
    others, other_labels = logits[::-1] * 1.25, labels[::-1].copy()
    want = with_grad(others, other_labels)
    machine.synchronize()
    with cupy.cuda.Stream(non_blocking=True) as side:
        # What it allocates comes back to this stream, so that the driver is asked for nothing.
        with_grad(logits, labels)
        side.synchronize()
        side.begin_capture()
        results = with_grad(logits, labels)
        captured = side.end_capture()
        logits[...] = others
        labels[...] = other_labels
        captured.launch(side)
        side.synchronize()
    same(results, want, "replayed")


def stream(machine: Machine, dims: tuple[int, ...]) -> None:
    """Run on a stream that is not the default one, right behind what makes the logits."""
    logits, labels = problem(dims)
    want = with_grad(logits, labels)
    machine.synchronize()
    side = cupy.cuda.Stream()
    with side:
        # Who started on another stream would read what is there before this has run.
        fresh = cupy.full_like(logits, float("nan"))
        with machine.busy():
            fresh[...] = logits
            results = with_grad(fresh, labels)
    side.synchronize()
    same(results, want, "on another stream")


def second_device(machine: Machine, dims: tuple[int, ...]) -> None:
    """Run on a device that is not the current one."""
    count = cupy.cuda.runtime.getDeviceCount()
    if count < 2:
        raise NotHereError(f"needs two devices, there is {count}")
    logits, labels = problem(dims)
    want = with_grad(logits, labels)
    there = cupy.cuda.Device((machine.device.id + 1) % count)
    with there:
        moved = cupy.asarray(logits), cupy.asarray(labels)
    results = with_grad(*moved)
    require(all(each.device == there for each in results), "the results are elsewhere")
    current = cupy.cuda.runtime.getDevice()
    require(current == machine.device.id, "the current device is another one now")
    there.synchronize()
    with there:
        same(results, want, "on another device")


def memory(machine: Machine, size: Size) -> Row:
    """Count what calls ask memory for."""
    found = {}
    small = 2**20 if not machine.rehearses else 2**13
    for name in size.few_dtypes:
        dims = arrays.fitting(machine, Case((size.many_rows[-1][0], 1000), name, scales=True))
        logits, labels = problem(dims, name)
        for what, function, due in (("alone", alone, 0), ("gradient", with_grad, logits.nbytes)):
            call = functools.partial(function, logits, labels)
            call()
            extra = machine.extra_bytes(Timed(lambda: None, lambda _, call=call: call()))
            found[f"{name} {what}"] = extra
            within = extra is None or extra <= due + small + logits.nbytes // 100
            require(within, f"{name}, {what}: {extra} bytes, the logits have {logits.nbytes}")
    return {"extra_bytes": found}


def repeated(machine: Machine, dims: tuple[int, ...], size: Size) -> Row:
    """Run the same call again and again, between other calls."""
    for dtype in size.few_dtypes:
        dims = arrays.fitting(machine, Case(dims, dtype, scales=True))
        logits, labels = problem(dims, dtype)
        want = with_grad(logits, labels)
        loss = alone(logits, labels)
        for turn in range(size.repeats - 1):
            # Memory that was used for something else comes back for the next results.
            cupy.full_like(logits, float(turn)).fill(1.0)
            same(with_grad(logits, labels), want, f"{dtype}, run {turn + 2}")
            same((alone(logits, labels),), (loss,), f"{dtype}, alone, run {turn + 2}")
    return {"dims": list(dims)}


def first_call(machine: Machine) -> None:
    """Time the first two calls of this process, and print it."""
    # What CuPy and the device take to start is not meant.
    logits, labels = problem((8, 1000))
    float((logits * 2).sum())
    machine.synchronize()
    found = {}
    for name in ("first", "second"):
        for what, function in (("forward", alone), ("with gradient", with_grad)):
            start = time.perf_counter()
            function(logits, labels)
            machine.synchronize()
            found[f"{name} {what}_s"] = time.perf_counter() - start
    print(json.dumps(found))
