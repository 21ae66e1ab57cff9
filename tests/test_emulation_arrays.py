"""Arrays of the emulated CuPy behave as CuPy's do, and their operations are counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import polyce

pytestmark = pytest.mark.only("cupy-emulated")

NUMBERS = np.arange(32, dtype=np.float32)


@pytest.fixture
def cupy() -> Iterator[Any]:
    import cupy

    cupy.emulation.reset()
    yield cupy
    cupy.emulation.reset()


def test_arrays_keep_numpy_out(cupy: Any) -> None:
    x = cupy.asarray(NUMBERS)
    with pytest.raises(TypeError, match="Implicit conversion to a NumPy array is not allowed"):
        np.asarray(x)
    for wrong in (lambda: x + NUMBERS, lambda: NUMBERS + x, lambda: cupy.add(x, NUMBERS)):
        with pytest.raises(TypeError, match=r"Unsupported type <class 'numpy\.ndarray'>"):
            wrong()
    assert type(np.float32(2) * x) is type(np.exp(x)) is cupy.ndarray
    assert cupy.asnumpy(x + np.float64(1)).dtype == np.float64
    assert (2.0 * x).dtype == np.float32


def test_what_waits_what_starts_kernels_and_what_takes_memory(cupy: Any) -> None:
    emulation, x = cupy.emulation, cupy.asarray(NUMBERS)
    emulation.reset()
    views = (x[3:], x.reshape(4, 8).T, x[None], x.view(np.int32), x.ravel())
    assert all(view.data.mem is x.data.mem for view in views)
    assert (emulation.other_kernels, emulation.allocations) == (0, [])
    total = x.sum()
    assert (type(total), total.shape) == (cupy.ndarray, ())
    assert (emulation.other_kernels, emulation.allocations) == (1, [4])
    cupy.exp(x, out=x)
    x += 1
    assert (emulation.other_kernels, emulation.allocations) == (3, [4])
    assert emulation.synchronizations == 0
    for wait in (float, int, bool, cupy.asnumpy, lambda array: array.item()):
        wait(total)
    cupy.cuda.Device().synchronize()
    cupy.cuda.get_current_stream().synchronize()
    assert emulation.synchronizations == 7


def test_how_arrays_lie(cupy: Any) -> None:
    a = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    assert cupy.asarray(a[:, ::2]).flags.c_contiguous
    assert cupy.asarray(a.T).flags.f_contiguous
    x = cupy.asarray(a)
    assert x.data.ptr % 256 == 0
    assert x[:, 1:].data.ptr == x.data.ptr + 16
    assert (x.T + 1).flags.c_contiguous
    swapped = x.transpose(1, 0, 2)[:, :, ::2]
    assert cupy.empty_like(swapped).strides == (8, 24, 4)
    assert swapped.astype(np.float64).strides == (16, 48, 8)
    assert swapped.copy().flags.c_contiguous
    assert cupy.empty(0).data.ptr == 0
    assert np.isnan(cupy.empty(5, np.float16).get()).all()
    assert (cupy.empty(5, np.int64).get() > 2**62).all()
    assert cupy.asarray(a.astype(">f4")).dtype == np.dtype("<f4")
    for wrong in (lambda: cupy.empty(2, ">f4"), lambda: x.astype(">f4")):
        with pytest.raises(ValueError, match="Unsupported dtype >f4 with big-endian byte-order"):
            wrong()
    with pytest.raises(TypeError):
        range(cupy.ones((), np.int64))


def test_devices_do_not_reach_each_other(cupy: Any) -> None:
    with cupy.cuda.Device(1):
        x = cupy.asarray(NUMBERS)
        assert (x + 1).device == x.device == cupy.cuda.Device(1) != cupy.cuda.Device(0)
    for reach in (lambda: x + 1, x.sum, lambda: cupy.where(x > 0, x, 0.0)):
        with pytest.raises(ValueError, match=r"resides \(1\) is different.*current device \(0\)"):
            reach()
    moved = cupy.asarray(x)
    assert moved.device.id == 0
    assert moved.tolist() == x.tolist() == NUMBERS.tolist()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_polyce_takes_it_for_cupy(cupy: Any, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    logits, target = rng.standard_normal((5, 7)).astype(dtype), np.array([0, 6, 3, -100, 2])
    x, t = cupy.asarray(logits), cupy.asarray(target)
    assert str(polyce.explain(x, t)).startswith("cross_entropy on cupy / cuda: logits ")
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "implementation": "reference"}
    loss, grad = polyce.cross_entropy_with_grad(x, t, **options)
    wanted = polyce.cross_entropy_with_grad(logits, target, **options)
    assert type(loss) is type(grad) is cupy.ndarray
    for got, expected in zip((loss, grad), wanted, strict=True):
        np.testing.assert_allclose(
            got.get().astype(np.float64),
            np.float64(expected),
            rtol=1e-2 if grad.itemsize == 2 else 1e-6,
        )
