"""`out=`: the gradient in the caller's memory, which may be the logits'."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import polyce
from error_calls import OUT, Bad, X, bad, check, floats, table
from polyce.testing.backends import Backend

pytestmark = pytest.mark.only("numpy", "torch", "strict")

LABELS = np.array([1, 0, 4])
SHAPES = [(3, 5), (3, 700), (2, 5, 4)]


def data(shape: tuple[int, ...]) -> tuple[Any, Any]:
    rng = np.random.default_rng(1)
    rows = (shape[0], *shape[2:])
    return rng.standard_normal(shape).astype(np.float32), rng.integers(0, shape[1], rows)


@pytest.mark.parametrize("name", [None, "reference"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_is_written_there(
    backend: Backend, shape: tuple[int, ...], name: str | None
) -> None:
    logits, labels = data(shape)
    options: dict[str, Any] = {"implementation": name, "label_smoothing": 0.1}
    x, t = backend.asarray(logits.copy()), backend.asarray(labels)
    loss, grad = polyce.cross_entropy_with_grad(x, t, **options)
    for out in (backend.asarray(np.ones_like(logits)), backend.asarray(logits.copy())):
        result = polyce.cross_entropy_with_grad(x, t, out=out, **options)
        assert result[1] is out
        np.testing.assert_array_equal(backend.to_numpy(result[0]), backend.to_numpy(loss))
        np.testing.assert_array_equal(backend.to_numpy(out), backend.to_numpy(grad))
    result = polyce.cross_entropy_with_grad(x, t, out=x, return_stats="lse", **options)
    assert result[1] is x
    np.testing.assert_array_equal(backend.to_numpy(result[0]), backend.to_numpy(loss))
    np.testing.assert_array_equal(backend.to_numpy(x), backend.to_numpy(grad))


@pytest.mark.only("numpy")
@pytest.mark.parametrize("name", ["native", "reference"])
def test_out_of_another_layout(name: str) -> None:
    for shape in SHAPES:
        logits, labels = data(shape)
        want = polyce.cross_entropy_with_grad(logits, labels, implementation=name)[1]
        wide = np.full((*shape[:-1], 2 * shape[-1]), 7.0, np.float32)
        for out in (np.zeros_like(logits, order="F"), wide[..., ::2], np.zeros_like(logits)[::-1]):
            polyce.cross_entropy_with_grad(logits, labels, out=out, implementation=name)
            np.testing.assert_array_equal(out, want)
        assert (wide[..., 1::2] == 7.0).all()


@table(
    bad("out dtype", "float64", out=np.zeros((3, 5)), on=OUT),
    bad("out shape", "(3, 4)", out=floats(3, 4), on=OUT),
    bad("out shape", "(15,)", out=floats(15), on=OUT),
    bad("no array", "out", "list", out=[0.0], on=OUT),
)
def test_what_out_cannot_be(backend: Backend, call: Bad, name: str) -> None:
    check(backend, call, name)


@pytest.mark.only("numpy")
def test_the_order_of_bytes_is_part_of_a_dtype() -> None:
    logits, labels = data((3, 5))
    swapped = logits.astype(logits.dtype.newbyteorder())
    came = re.escape(f"float32 of bytes in the order {swapped.dtype.str}")
    with pytest.raises(TypeError, match=f"^out must have input's dtype float32, got {came}; pass"):
        polyce.cross_entropy_with_grad(logits, labels, out=np.empty_like(swapped))
    with pytest.raises(TypeError, match=f"^out must have input's dtype {came}, got float32; pass"):
        polyce.cross_entropy_with_grad(swapped, labels, out=np.empty_like(logits))
    out = np.empty_like(swapped)
    polyce.cross_entropy_with_grad(swapped, labels, out=out)
    want = polyce.cross_entropy_with_grad(logits, labels)[1]
    np.testing.assert_allclose(out, want, rtol=1e-5)


@pytest.mark.only("numpy")
@pytest.mark.parametrize("name", ["native", "reference"])
def test_memory_that_out_cannot_be(name: str) -> None:
    memory = np.zeros(40, np.float32)
    x, p = memory[:15].reshape(3, 5), memory[20:35].reshape(3, 5)
    read_only = np.zeros((3, 5), np.float32)
    read_only.flags.writeable = False
    overlapping = np.lib.stride_tricks.as_strided(np.zeros(15, np.float32), (3, 5), (8, 4))
    zero_stride = np.lib.stride_tricks.as_strided(np.zeros(5, np.float32), (3, 5), (0, 4))
    calls = [
        (read_only, "out must be writeable, got a read-only array"),
        (zero_stride, r"out must not overlap itself, got shape \(3, 5\) with strides of \(0, 4\)"),
        (overlapping, r"out must not overlap itself, got .* strides of \(8, 4\) bytes"),
        (memory[5:20].reshape(3, 5), "must share no memory .* and does with input"),
        (x[::-1], "must share no memory .* and does with input"),
        (p, "must share no memory .* and does with target"),
        (memory[22:37].reshape(3, 5), "must share no memory .* and does with target"),
    ]
    for out, says in calls:
        with pytest.raises(ValueError, match=says):
            polyce.cross_entropy_with_grad(x, p, out=out, implementation=name)
    assert not memory.any()


@pytest.mark.only("torch")
def test_what_torch_keeps_an_eye_on(torch: Any) -> None:
    logits, labels = data((3, 5))
    x, t = torch.from_numpy(logits.copy()), torch.from_numpy(labels)
    with pytest.raises(ValueError, match="out must not require a gradient"):
        polyce.cross_entropy_with_grad(x, t, out=torch.zeros(3, 5, requires_grad=True))
    memory = torch.zeros(20)
    with pytest.raises(ValueError, match=r"share no memory .* and does with input"):
        polyce.cross_entropy_with_grad(
            memory[:15].view(3, 5), t, out=memory[5:].view(3, 5), implementation="reference"
        )
    scale = torch.ones((), requires_grad=True)
    product = scale * x  # autograd saves x for the gradient of scale
    polyce.cross_entropy_with_grad(x, t, out=x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.only("strict")
def test_a_library_that_cannot_be_written() -> None:
    """The sentence for jax, dask and lazy arrays, from a stand-in that needs no library."""
    from polyce.arrays.library import Library
    from polyce.call import outputs
    from polyce.call.problem import describe

    problem, operands = describe(X, LABELS)
    with pytest.raises(TypeError, match="out needs arrays that can be written, which those of jax"):
        outputs.check(problem._replace(library=Library("jax", np)), operands, X)
