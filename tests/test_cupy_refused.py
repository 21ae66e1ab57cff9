"""The cupy path on emulated CuPy: what it refuses, and on which device and stream it works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import cupy_calls as calls
import polyce
from cupy_calls import draw, expected, on_device, settings
from polyce.testing.dtypes import dtype

pytestmark = pytest.mark.only("cupy-emulated")


@pytest.fixture(autouse=True)
def cupy() -> Iterator[Any]:
    import cupy

    cupy.emulation.reset()
    yield cupy
    cupy.emulation.reset()


@pytest.fixture
def started(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Any]]:
    """Note the device and the stream that are current at each launch."""
    seen: list[tuple[int, Any]] = []
    launch = cupy.RawKernel.__call__

    def noted(self: Any, *args: Any, **options: Any) -> None:
        seen.append((cupy.cuda.device.get_device_id(), cupy.cuda.get_current_stream()))
        # A stream passed to the launch would not be the caller's current one.
        assert options == {}
        launch(self, *args, **options)

    monkeypatch.setattr(cupy.RawKernel, "__call__", noted)
    return seen


@pytest.mark.parametrize("values", [{}, calls.SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_a_call_runs_on_the_device_of_its_arrays(
    cupy: Any, started: list[tuple[int, Any]], values: dict[str, int], kind: str
) -> None:
    given = draw((3, 70), "float32", kind)
    with cupy.cuda.Device(1):
        x, t, w, v = on_device(*given)
        v = v.astype(np.int32) + 1
    given = given._replace(sample_weight=v.get())
    wanted = expected(given, return_stats=True)
    # On one device first, so that nothing cached for it may be used on the other.
    here = on_device(*given)
    with settings(**values):
        for device in (0, 1):
            arrays = (x, t, w, v) if device else here
            options = {"sample_weight": arrays[3], "return_stats": True}
            for out in (None, cupy.empty_like(here[0]) if not device else arrays[0]):
                del started[:]
                found = polyce.cross_entropy_with_grad(*arrays[:3], out=out, **options)
                assert started
                assert {at for at, _ in started} == {device}
                assert cupy.cuda.runtime.getDevice() == 0
                results = [each for each in (*found[:2], *found[2]) if each is not None]
                assert {each.data.device_id for each in results} == {device}
                calls.agree(found, wanted)
    del started[:]
    with cupy.cuda.Device(1):
        loss = polyce.cross_entropy(*here[:3], sample_weight=here[3])
        assert cupy.cuda.runtime.getDevice() == 1
    assert {at for at, _ in started} == {0}
    calls.close(loss, wanted[0], 1e-6)


def test_empty_calls_stay_on_the_device_of_their_arrays(cupy: Any) -> None:
    with cupy.cuda.Device(1):
        x, t = cupy.empty((0, 5), np.float32), cupy.empty((0,), np.int64)
    loss, grad = polyce.cross_entropy_with_grad(x, t, reduction="sum")
    assert {loss.device.id, grad.device.id, polyce.cross_entropy(x, t).device.id} == {1}


def test_an_error_leaves_the_device_as_it_was(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    with cupy.cuda.Device(1):
        x, t = cupy.zeros((2, 5), np.float32), cupy.asarray(np.array([0, 5]))
    with pytest.raises(IndexError):
        polyce.cross_entropy(x, t, validate=True)
    assert cupy.cuda.runtime.getDevice() == 0
    monkeypatch.setattr(cupy.RawKernel, "__call__", fail)
    with pytest.raises(MemoryError):
        polyce.cross_entropy(x, t)
    assert cupy.cuda.runtime.getDevice() == 0


def test_all_goes_to_the_current_stream(cupy: Any, started: list[tuple[int, Any]]) -> None:
    given = draw((3, 70), "float32", "index")
    x, t = on_device(*given[:2])
    with cupy.cuda.Stream() as stream:
        polyce.cross_entropy_with_grad(x, t)
        polyce.cross_entropy(x, t)
        with settings(**calls.SPLIT):
            polyce.cross_entropy_with_grad(x, t)
    assert [each for _, each in started] == [stream] * 6
    del started[:]
    polyce.cross_entropy(x, t)
    assert {each for _, each in started} == {cupy.cuda.Stream.null}


def test_arrays_of_two_devices(cupy: Any) -> None:
    given = draw((3, 5), "float32", "index")
    x, t, w, v = on_device(*given)
    with cupy.cuda.Device(1):
        there = dict(zip(("target", "weight", "sample_weight"), on_device(*given[1:]), strict=True))
        there["normalizer"] = there["grad_output"] = cupy.ones((), np.float32)
        out = cupy.empty((3, 5), np.float32)
    arguments = {"target": t, "weight": w, "sample_weight": v}
    for name, array in there.items():
        match = f"input is on <CUDA Device 0> and {name} on <CUDA Device 1>; move {name} first"
        with pytest.raises(TypeError, match=match):
            polyce.cross_entropy_with_grad(x, **(arguments | {name: array}))
    with pytest.raises(TypeError, match="out must lie on input's device <CUDA Device 0>, got"):
        polyce.cross_entropy_with_grad(x, **arguments, out=out)
    assert cupy.emulation.launches == []


def test_out_that_cannot_take_the_gradient(cupy: Any) -> None:
    x, t, w, _ = on_device(*draw((3, 8), "float32", "index"))
    memory = cupy.zeros(64, np.float32)
    inner = memory[:24].reshape(3, 8)
    cases: list[tuple[Any, Any, type[Exception], str]] = [
        (x, cupy.zeros((3, 8), np.float64), TypeError, "input's dtype float32, got float64"),
        (x, cupy.zeros((3, 9), np.float32), ValueError, "input's shape"),
        (x, np.zeros((3, 8), np.float32), TypeError, "numpy"),
        (inner, memory[1:25].reshape(3, 8), ValueError, "and does with input"),
        (inner, memory[8:32].reshape(3, 8), ValueError, "and does with input"),
        (x, cupy.broadcast_to(memory[:8], (3, 8)), ValueError, "must not overlap itself"),
    ]
    for logits, out, error, match in cases:
        before = logits.get()
        with pytest.raises(error, match=match):
            polyce.cross_entropy_with_grad(logits, t, w, out=out)
        assert np.array_equal(logits.get(), before)
    p = cupy.ones((3, 8), np.float32)
    with pytest.raises(ValueError, match="and does with target"):
        polyce.cross_entropy_with_grad(x, p, out=p)
    assert cupy.emulation.launches == []


@pytest.mark.parametrize(
    "name", ["input", "target", "probabilities", "weight", "sample_weight", "normalizer", "out"]
)
def test_another_byte_order(cupy: Any, name: str) -> None:
    # CuPy makes no such array, but allows such a view.
    given = draw((3, 8), "float32", "probability" if name == "probabilities" else "index")
    arguments = dict(
        zip(("input", "target", "weight", "sample_weight"), on_device(*given), strict=True)
    )
    arguments["normalizer"] = cupy.ones((), np.float32)
    arguments["out"] = cupy.zeros((3, 8), np.float32)
    turned = "target" if name == "probabilities" else name
    arguments[turned] = arguments[turned].view(arguments[turned].dtype.newbyteorder(">"))
    match = "dtype" if name == "out" else "byte"
    with pytest.raises(TypeError, match=match):
        polyce.cross_entropy_with_grad(**arguments)
    if name != "out":
        del arguments["out"]
        with pytest.raises(TypeError, match=match):
            polyce.cross_entropy(**arguments)
    assert cupy.emulation.launches == []


def between(values: np.ndarray) -> Any:
    """Put an array at an address that is off by half an element."""
    import cupy

    size = values.itemsize
    memory = cupy.asarray(np.zeros(values.nbytes + size, np.uint8))
    return cupy.ndarray(values.shape, values.dtype, memory.data + size // 2)


@pytest.mark.parametrize("name", calls.DTYPES)
def test_addresses_between_numbers(cupy: Any, name: str) -> None:
    given = draw((3, 8), name, "probability")
    size = dtype(name).itemsize
    x, t, w, v = on_device(*given)
    labels = on_device(np.zeros(3, np.int64))[0]
    wrong, out = between(given.logits), between(given.logits)
    weight, sample, one = (between(np.ones(shape, dtype(name))) for shape in ((8,), (3,), ()))
    match = f"must lie at multiples of their item size, got items of {size} bytes"
    for arguments in (
        {"input": wrong, "target": t},
        {"input": x, "target": wrong},
        {"input": x, "target": t, "out": out},
        {"input": x, "target": labels, "weight": weight, "sample_weight": v},
        {"input": x, "target": labels, "weight": w, "sample_weight": sample},
        {"input": x, "target": labels, "normalizer": one},
        {"input": x, "target": labels, "grad_output": one},
    ):
        with pytest.raises(ValueError, match=match):
            polyce.cross_entropy_with_grad(**arguments)
    with pytest.raises(ValueError, match="got items of 8 bytes"):
        polyce.cross_entropy(x, between(np.zeros(3, np.int64)))
    assert not out.get().astype(bool).any()
    assert cupy.emulation.launches == []


def test_strides_between_numbers(cupy: Any) -> None:
    memory = cupy.zeros(100, np.uint8)
    x = cupy.ndarray((3, 5), np.float32, memory.data, (22, 4))
    with pytest.raises(ValueError, match=r"strides of \(22, 4\) bytes"):
        polyce.cross_entropy(x, cupy.zeros(3, np.int64))
    # An axis of length 1 has no stride.
    polyce.cross_entropy(x[:1], cupy.zeros(1, np.int64))


OTHERS: dict[str, Callable[[], Any]] = {
    "target": lambda: np.zeros(3, np.int64),
    "weight": lambda: np.ones(8, np.float32),
    "sample_weight": lambda: np.ones(3),
    "normalizer": lambda: np.array(2.0),
    "grad_output": lambda: np.array(2.0),
}


@pytest.mark.parametrize("name", OTHERS)
def test_arrays_of_numpy_among_them(cupy: Any, name: str) -> None:
    x, t = cupy.zeros((3, 8), np.float32), cupy.zeros(3, np.int64)
    arguments = {"target": t} | {name: OTHERS[name]()}
    with pytest.raises(TypeError, match=rf"input is cupy and {name} is numpy.*cupy\.asarray"):
        polyce.cross_entropy_with_grad(x, **arguments)


def test_more_classes_than_are_numbered(cupy: Any) -> None:
    memory = cupy.zeros(1, np.float16)
    x = cupy.ndarray((1, 2**31 - 2**16 + 1), np.float16, memory.data, (2, 0))
    t = cupy.zeros(1, np.int64)
    assert polyce.explain(x[:, :-1], t).chosen == "cupy"
    (reason,) = polyce.explain(x, t).reasons["cupy"]
    assert reason == f"takes at most {2**31 - 2**16} classes"
