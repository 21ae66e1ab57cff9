"""The compiled kernels on memory in any order, at any strides and addresses, however far apart."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest

import polyce

pytestmark = pytest.mark.only("numpy")


@pytest.mark.same_everywhere
@pytest.mark.parametrize("classes", [1, 2, 5, 64, 70])
def test_axes_in_any_order_of_memory(classes: int) -> None:
    """Rows are gone through as they lie, and are told apart by their number."""
    rng = np.random.default_rng(classes)
    shape = (3, classes, 9, 16)
    x = rng.standard_normal(shape).astype(np.float32)
    rows = (3, 9, 16)
    target = rng.integers(0, classes, rows)
    target[0, 2] = -100
    options: dict[str, Any] = {
        "sample_weight": rng.random(rows).astype(np.float32),
        "grad_output": rng.random(rows).astype(np.float32),
        "reduction": "none",
        "return_stats": tuple(
            name for name in polyce.Stats._fields if name not in ("rank", "valid")
        ),
    }
    soft = rng.random(shape).astype(np.float32)
    for kind in (target, soft):
        want = polyce.cross_entropy_with_grad(x, kind, **options)
        total = polyce.cross_entropy(x, kind)
        for order in permutations(range(4)):
            back = np.argsort(order)
            view = np.ascontiguousarray(x.transpose(order)).transpose(back)
            other = np.ascontiguousarray(soft.transpose(order)).transpose(back)
            given = other if kind is soft else kind
            got = polyce.cross_entropy_with_grad(view, given, **options)
            out = np.empty_like(x)
            polyce.cross_entropy_with_grad(view, given, **options, out=out)
            np.testing.assert_array_equal(out, got[1])
            # Classes that lie side by side are added in another order than rows that do.
            tight = {"rtol": 0.0} if classes <= 64 else {"rtol": 2e-6, "atol": 1e-7}
            for a, b in zip((*got[:2], *got[2]), (*want[:2], *want[2]), strict=True):
                if a is not None:
                    np.testing.assert_allclose(a, b, **tight, err_msg=str(order))
            np.testing.assert_allclose(polyce.cross_entropy(view, given), total, rtol=1e-6)
            same = polyce.log_softmax(view, axis=1)
            np.testing.assert_allclose(same, polyce.log_softmax(x, axis=1), **tight)


@pytest.mark.parametrize(
    "sizes",
    [(2, 2, 2), (40, 2, 3), (3, 127, 5), (2, 128, 3), (129, 2, 2), (2, 3, 5, 7, 4), (300, 2)],
)
def test_rows_in_any_order(sizes: tuple[int, ...]) -> None:
    """A group of rows takes in many short axes, or a part of a long one."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((sizes[0], 3, *sizes[1:]), dtype=np.float32)
    target = rng.integers(0, 3, sizes)
    want = polyce.cross_entropy_with_grad(x, target, reduction="none")
    for order in permutations(range(x.ndim)):
        view = np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))
        got = polyce.cross_entropy_with_grad(
            view, target, reduction="none", out=np.empty_like(view)
        )
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=str(order))


@pytest.mark.slow("numpy")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("classes", [1, 6, 65, 70, 2100])
def test_gradients_that_go_past_the_caches(classes: int, dtype: str) -> None:
    """They have the bits of those of each image alone, in whatever order out lies."""
    size = np.dtype(dtype).itemsize
    side = int(np.sqrt((17 << 20) / (2 * classes * size))) + 1
    rng = np.random.default_rng(classes)
    x = rng.standard_normal((2, classes, side, side), dtype=np.float32).astype(dtype)
    target = rng.integers(0, classes, (2, side, side))
    want = [
        polyce.cross_entropy_with_grad(one[None], t[None], reduction="none")[1]
        for one, t in zip(x, target, strict=True)
    ]
    for order in ((0, 1, 2, 3), (0, 2, 3, 1), (0, 1, 3, 2), (2, 3, 1, 0)):
        whole = np.zeros([x.shape[a] for a in order], dtype).transpose(np.argsort(order))
        polyce.cross_entropy_with_grad(x, target, reduction="none", out=whole)
        np.testing.assert_array_equal(whole, np.concatenate(want))


@pytest.mark.same_everywhere
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_any_strides_and_addresses(dtype: str) -> None:
    """Views give the same bits as a copy in C order, whichever kernels they go through."""
    size = np.dtype(dtype).itemsize
    for rows, classes in ((5, 3), (20, 70), (3, 700)):
        rng = np.random.default_rng(rows * classes)
        logits = (4 * rng.standard_normal((rows, classes))).astype(dtype)
        labels = rng.integers(0, classes, rows)
        odd = np.zeros(logits.nbytes + 1, np.uint8)[1:].view(dtype).reshape(rows, classes)
        odd[...] = logits
        record = np.zeros(rows * classes, np.dtype([("pad", "u1"), ("x", dtype)]))
        record["x"] = logits.ravel()
        views = {
            "misaligned": odd,
            "no multiple of the itemsize": record["x"].reshape(rows, classes),
            "every other": np.repeat(logits, 2, axis=1)[:, ::2],
            "far rows": np.concatenate([logits, logits], axis=1)[:, :classes],
            "reversed": logits[::-1, ::-1].copy()[::-1, ::-1],
        }
        want = polyce.cross_entropy_with_grad(logits, labels, reduction="none")
        for name, view in views.items():
            got = polyce.cross_entropy_with_grad(view, labels, reduction="none")
            for a, b in zip(got, want, strict=True):
                np.testing.assert_array_equal(a, b, err_msg=f"{name} {size}")
            out = np.empty_like(logits)
            polyce.cross_entropy_with_grad(view, labels, reduction="none", out=out)
            np.testing.assert_array_equal(out, want[1])


def test_offsets_beyond_32_bits() -> None:
    """Memory that is never written costs nothing, so the rows can lie gigabytes apart."""
    far = 2**31 + 64
    memory = np.zeros(2 * far + 64, np.float16)
    for classes, step in ((5, 1), (100, 1), (5, 7)):
        strides = (2 * far, 2 * step)
        logits = np.lib.stride_tricks.as_strided(memory, (2, classes), strides)
        logits[...] = np.arange(2 * classes).reshape(2, classes) % 7
        labels = np.array([1, classes - 1])
        want = polyce.cross_entropy_with_grad(logits.copy(), labels, reduction="none")
        got = polyce.cross_entropy_with_grad(logits, labels, reduction="none", out=logits)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(logits, want[1])


def test_more_classes_than_32_bits_count() -> None:
    classes = 2**31 + 3
    row = np.zeros((1, classes), np.float16)  # memory that is only read costs nothing either
    row[0, -1] = 30.0
    loss = polyce.cross_entropy(row, np.array([classes - 1]), reduction="none")
    want = np.log1p((classes - 1) * np.exp(-30.0))
    np.testing.assert_allclose(loss.astype(np.float64), want, rtol=1e-3)
