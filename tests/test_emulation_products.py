"""Matrix products of the emulated CuPy: computed, copied and refused as by CuPy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

pytestmark = pytest.mark.only("cupy-emulated")

A = np.arange(12, dtype=np.float32).reshape(3, 4)
B = np.arange(20, dtype=np.float32).reshape(4, 5)


@pytest.fixture
def cupy() -> Iterator[Any]:
    import cupy

    cupy.emulation.reset()
    yield cupy
    cupy.emulation.reset()


def test_a_product_takes_what_it_gives_and_no_more(cupy: Any) -> None:
    emulation = cupy.emulation
    a, b, vector = cupy.asarray(A), cupy.asarray(B), cupy.asarray(B[0])
    out, square = cupy.empty((3, 5), np.float32), cupy.empty((4, 4), np.float32)
    emulation.reset()
    assert cupy.matmul(a, b, out=out) is out
    assert cupy.matmul(a.T, a, out=square) is square
    made = b @ vector
    assert emulation.allocations == [4 * 4]
    assert [each[:3] for each in emulation.products] == [(3, 5, 4), (4, 4, 3), (4, 1, 5)]
    assert (emulation.other_kernels, emulation.synchronizations) == (0, 0)
    for found, wanted in ((out, A @ B), (square, A.T @ A), (made, B @ B[0])):
        assert found.tolist() == wanted.tolist()


def test_what_is_copied(cupy: Any) -> None:
    emulation = cupy.emulation
    a, b = cupy.asarray(A), cupy.asarray(B)
    wide = cupy.empty((3, 10), np.float32)
    for out, left, right, wanted, copied in (
        (wide[:, 2:7], a, b, A @ B, [60]),
        (wide[:, ::2], a, b, A @ B, [60]),
        (None, a[:, 1:], b[1:], A[:, 1:] @ B[1:], [60, 36]),
        (None, a[:, 1:].T, a, A[:, 1:].T @ A, [48, 36]),
        (None, a, b.astype(np.float64), A @ B, [120, 96]),
        (a[:, :], a[:3, :3].T, a, A[:3, :3].T @ A, [48, 36]),
    ):
        emulation.reset()
        found = cupy.matmul(left, right, out=out)
        assert found.tolist() == wanted.tolist()
        assert emulation.allocations == copied
        # A kernel for each copy of `out` or of an operand, none for the result.
        assert emulation.other_kernels == len(copied) - (out is None)
    nothing, number = cupy.empty((4, 0), np.float32), cupy.asarray(B[:, :1])
    emulation.reset()
    assert not (nothing @ nothing.T).get().any()
    assert (number.T @ number).tolist() == (B[:, :1].T @ B[:, :1]).tolist()
    assert emulation.products == []


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_sums_are_rounded_once(cupy: Any, dtype: Any) -> None:
    # 1 + 300 quarters of an ulp: sums that are rounded to 16 bits stay at 1.
    ones = np.ones((2, 301), dtype)
    others = np.full((301, 2), float(ml_dtypes.finfo(dtype).eps) / 4, dtype)
    others[0] = 1
    found = cupy.asarray(ones) @ cupy.asarray(others)
    wanted = (ones.astype(np.float64) @ others.astype(np.float64)).astype(dtype)
    assert found.dtype == dtype
    assert found.tolist() == wanted.tolist()


def test_what_is_refused(cupy: Any) -> None:
    a, b, out = cupy.asarray(A), cupy.asarray(B), cupy.empty((5, 3), np.float32)
    for wrong, error, match in (
        (lambda: cupy.matmul(a, B), TypeError, "takes arrays of cupy"),
        (lambda: cupy.matmul(a, a), ValueError, "dimension mismatch"),
        (lambda: cupy.matmul(a, a[0, 0]), ValueError, "Scalar operands are not allowed"),
        (lambda: cupy.matmul(a, b, out=out.astype(np.float64)), ValueError, "invalid shape"),
        (lambda: cupy.matmul(a, b, out=out.T.astype(np.int32)), TypeError, "Cannot cast"),
        (lambda: cupy.matmul(a[None], b), NotImplementedError, "single matrices"),
        # CuPy itself would not notice these faults.
        (lambda: cupy.matmul(a, b, out=out), cupy.emulation.EmulationError, "the size alone"),
    ):
        with pytest.raises(error, match=match):
            wrong()
    with (
        cupy.cuda.Device(1),
        pytest.raises(cupy.emulation.EmulationError, match=r"on device 0, but .* on device 1"),
    ):
        cupy.matmul(a, b)


def test_what_waits_for_a_size(cupy: Any) -> None:
    x = cupy.asarray(A)
    mask = x > 5
    cupy.emulation.reset()
    assert cupy.where(mask, x, 0.0).shape == x.shape
    x[mask[:, :1][:, 0]]
    assert cupy.emulation.synchronizations == 1
    for wait in (lambda: cupy.nonzero(mask), mask.nonzero, lambda: cupy.where(mask)):
        assert len(wait()) == 2
    x[mask] = 0.0
    assert cupy.emulation.synchronizations == 5


def test_operands_that_share_memory_are_copied(cupy: Any) -> None:
    x = cupy.asarray(B)
    cupy.emulation.reset()
    cupy.add(x, 1.0, out=x)
    cupy.add(x[:, 1:], x[:, :1], out=cupy.empty((4, 4), np.float32))
    assert cupy.emulation.allocations == [64]
    cupy.add(x[1:], x[:-1], out=x[1:])
    assert cupy.emulation.allocations == [64, 60, 60]
    assert cupy.emulation.held <= cupy.emulation.most_held


def test_a_choice_between_bfloat16_numbers_is_float32(cupy: Any) -> None:
    x = cupy.asarray(A.astype(ml_dtypes.bfloat16))
    assert cupy.where(x > 0, x, 0.0).dtype == np.float32
    assert cupy.where(x > 0, x.astype(np.float16), 0.0).dtype == np.float16
