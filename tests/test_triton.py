"""The triton path in Triton's interpreter: what it reads and writes, and what it must not."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import polyce
from conftest import FULL
from polyce.testing import GROUPS, Case, cases, check_implementation
from polyce.testing.backends import Backend
from polyce.testing.selection import representative
from triton_checks import PARTS, TILES

pytestmark = pytest.mark.only("triton")


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    from polyce.implementations.triton import layout as triton_layout
    from polyce.implementations.triton import plans

    def change(values: dict[str, int]) -> None:
        plans.forget()
        for name, value in values.items():
            monkeypatch.setattr(triton_layout, name, value)

    yield change
    plans.forget()


def chosen(
    groups: tuple[str, ...], floats: tuple[str, ...], count: int | None
) -> Callable[[Case], str]:
    """Keep only a few cases for each trait, and leave out the longest rows, which take long."""
    names = set()
    for group in groups:
        short = [
            case for case in cases([group], floats) if case.logits.size < (400 if FULL else 60)
        ]
        names |= {case.name for case in representative(short, count)}
    return lambda case: "" if case.name in names else "left out here"


@pytest.mark.parametrize("values", [TILES, PARTS], ids=["tiles", "parts"])
def test_grid_in_tiles_and_parts(
    table: Callable[..., None], values: dict[str, int], backend: Backend
) -> None:
    table(values)
    some = ("targets", "special", "accuracy", "combined")
    groups = GROUPS if FULL else some
    report = check_implementation(
        "triton",
        backend,
        groups=groups,
        # The whole grid would take an hour.
        leave_out=chosen(groups, ("float32", "float64"), None if FULL else 2),
    )
    print(report)


def test_the_grid_takes_torch_for_it() -> None:
    report = check_implementation("triton", groups=["cotangent"], dtypes=["float32"])
    assert report.backend == "torch"


def around(torch: Any, values: Any, filler: float, before: int = 5) -> tuple[Any, Any]:
    """Put a tensor's values in the middle of memory that holds something else."""
    memory = torch.full((before + values.numel() + 7,), filler, dtype=values.dtype)
    inside = memory[before : before + values.numel()].view(values.shape)
    inside.copy_(values)
    return inside, memory


def problem(torch: Any, shape: tuple[int, ...], dtype: Any, kind: str) -> tuple[Any, Any, Any, Any]:
    """Draw logits, target, class weight and sample weight."""
    rows = (shape[0], *shape[2:])
    logits = torch.randn(shape).to(dtype)
    if kind == "index":
        target = torch.randint(shape[1], rows)
        target.view(-1)[0] = -100
    else:
        target = torch.rand(shape).to(dtype)
    return logits, target, torch.rand(shape[1]) + 0.5, torch.rand(rows)


OPTIONS: dict[str, Any] = {
    "label_smoothing": 0.1,
    "z_loss": 0.01,
    "logit_softcap": 20.0,
    "return_stats": True,
}
SHAPES = [(3, 10), (2, 63), (2, 100), (2, 1001), (2, 4099), (2, 7, 5), (2, 19, 3, 4), (2, 1, 3)]


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_outside_is_read_or_written(
    torch: Any, shape: tuple[int, ...], dtype: str, kind: str
) -> None:
    x, t, w, v = problem(torch, shape, getattr(torch, dtype), kind)
    want = polyce.cross_entropy_with_grad(
        x, t, w, sample_weight=v, implementation="reference", **OPTIONS
    )
    x, _ = around(torch, x, math.nan)
    # A label read from outside the array would be out of range, and make its row nan.
    t, _ = around(torch, t, 10**6 if kind == "index" else math.nan, before=3)
    w, _ = around(torch, w, math.nan, before=1)
    v, _ = around(torch, v, math.nan, before=2)
    out, memory = around(torch, torch.zeros_like(x), math.nan, before=6)
    loss, grad, stats = polyce.cross_entropy_with_grad(
        x, t, w, sample_weight=v, implementation="triton", out=out, **OPTIONS
    )
    narrow = {"float32": 2e-6, "bfloat16": 1e-2, "float64": 1e-13}[dtype]
    torch.testing.assert_close(loss, want[0], rtol=narrow, atol=0.0)
    torch.testing.assert_close(grad, want[1], rtol=8 * narrow, atol=narrow / 5)
    torch.testing.assert_close(stats.lse, want[2].lse, rtol=2e-6, atol=0.0, equal_nan=True)
    assert torch.equal(stats.prediction, want[2].prediction)
    assert torch.equal(stats.correct, want[2].correct)
    outside = torch.ones(memory.shape, dtype=torch.bool)
    outside[6 : 6 + x.numel()] = False
    assert torch.isnan(memory[outside]).all()
    assert not torch.isnan(memory[~outside]).any()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("classes", [65, 66, 72, 1001, 1000, 4099, 8193])
def test_rows_begin_anywhere(torch: Any, classes: int, dtype: str) -> None:
    x, t, _, _ = problem(torch, (2, classes), getattr(torch, dtype), "index")
    p = torch.rand(2, classes).to(x.dtype)
    for target in (t, p):
        want = polyce.cross_entropy_with_grad(x, target, implementation="reference")
        for before in range(8) if FULL and classes < 1000 else (1, 6):
            moved, _ = around(torch, x, math.nan, before)
            also, _ = around(torch, target, 7, (3 * before) % 8)
            out, _ = around(torch, x, math.nan, (5 * before) % 8)
            for place in (None, out, moved):
                loss, grad = polyce.cross_entropy_with_grad(
                    moved, also, implementation="triton", out=place
                )
                torch.testing.assert_close(loss, want[0], rtol=2e-6, atol=0.0)
                torch.testing.assert_close(grad, want[1], rtol=2e-3, atol=1e-7)


@pytest.fixture
def huge(torch: Any) -> Callable[[int], Any]:
    """Make float16 memory of any size; the system provides its pages only when written."""
    maps = []

    def make(count: int) -> Any:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        maps.append(mmap.mmap(-1, 2 * count, flags=flags))
        return torch.frombuffer(maps[-1], dtype=torch.float16)

    return make


FAR = 2**31 + 64
STRIDES = {
    "rows": ((3, 70), (FAR, 1)),
    "short rows": ((3, 5), (FAR, 1)),
    "classes": ((2, 3, 4), (4, FAR, 1)),
    "neighbours": ((2, 3, 3), (1, 2, FAR)),
    "outer": ((3, 5, 4), (FAR, 4, 1)),
}


@pytest.mark.skipif(os.name == "nt", reason="Windows reserves what it maps")
@pytest.mark.parametrize("name", STRIDES)
def test_strides_beyond_32_bits(torch: Any, huge: Callable[[int], Any], name: str) -> None:
    shape, strides = STRIDES[name]
    count = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    x, t, _, _ = problem(torch, shape, torch.float16, "index")
    far = huge(count).as_strided(shape, strides)
    far.copy_(x)
    want = polyce.cross_entropy_with_grad(x, t, implementation="reference")
    loss, grad = polyce.cross_entropy_with_grad(far, t, implementation="triton")
    assert torch.equal(loss, want[0])
    torch.testing.assert_close(grad, want[1], rtol=2e-3, atol=1e-7)
    polyce.cross_entropy_with_grad(far, t, implementation="triton", out=far)
    assert torch.equal(far, grad)


@pytest.mark.parametrize("classes", [70, 100_000])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_same_bits_again(torch: Any, classes: int, reduction: str) -> None:
    x, t, _, _ = problem(torch, (2, classes), torch.float32, "index")
    runs = [
        polyce.cross_entropy_with_grad(x, t, reduction=reduction, implementation="triton")
        for _ in range(3)
    ]
    for loss, grad in runs[1:]:
        assert torch.equal(loss, runs[0][0])
        assert torch.equal(grad, runs[0][1])


def test_a_bad_label_is_found_before_anything_is_written(torch: Any) -> None:
    x, t = torch.zeros(3, 70), torch.tensor([0, 70, 1])
    out = torch.full_like(x, 7.0)
    with pytest.raises(
        IndexError, match=r"labels must lie in 0 to 69 .* got 70 at position \(1,\)"
    ):
        polyce.cross_entropy_with_grad(x, t, implementation="triton", out=out)
    assert torch.equal(out, torch.full_like(x, 7.0))
    loss, grad = polyce.cross_entropy_with_grad(
        x, t, implementation="triton", reduction="none", validate=False
    )
    assert torch.isnan(loss).tolist() == [False, True, False]
    assert torch.isnan(grad).all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("value", [-1, 70, 2**31, 2**40, -(2**63)])
def test_a_bad_label_reads_nothing(torch: Any, value: int) -> None:
    x, t = torch.zeros(2, 70), torch.tensor([3, value])
    weight = torch.ones(70)
    loss = polyce.cross_entropy(
        x, t, weight, implementation="triton", reduction="none", validate=False
    )
    assert torch.isnan(loss).tolist() == [False, True]


@pytest.mark.parametrize("shape", [(300, 10), (5, 70), (2, 4099), (2, 19, 10), (2, 3, 4, 5)])
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_what_is_read_and_written(
    torch: Any, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], kind: str
) -> None:
    from triton.runtime import interpreter

    x, t, _, _ = problem(torch, shape, torch.float32, kind)
    grad = torch.empty_like(x)
    counts = {"x": 0, "t": 0, "grad": 0}
    places = {"x": x, "t": t, "grad": grad}

    def count(pointers: Any, mask: Any) -> None:
        for name, tensor in places.items():
            first = tensor.data_ptr()
            end = first + tensor.numel() * tensor.element_size()
            there = (pointers.data >= first) & (pointers.data < end) & mask.data
            counts[name] += int(np.count_nonzero(there))

    builder = type(interpreter.interpreter_builder)
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", counted_load)
    monkeypatch.setattr(builder, "create_masked_store", counted_store)
    rows = x.numel() // shape[1]
    # An ignored row is not read, if a program has one row: several share cache lines. The label's
    # logit is read once more of every other row.
    ignored = shape[1] if kind == "index" and shape in ((5, 70), (2, 4099)) else 0
    read = x.numel() - ignored + (rows - 1 if kind == "index" else 0)
    polyce.cross_entropy(x, t, implementation="triton")
    assert counts["x"] == read
    if kind == "probability":
        assert counts["t"] == t.numel()
    counts.update(x=0, t=0)
    polyce.cross_entropy_with_grad(x, t, implementation="triton", out=grad)
    # Loss and gradient of labels are one pass, of rows that a program keeps.
    again = 0 if kind == "index" else x.numel()
    assert counts["x"] == read + again
    assert counts["grad"] == x.numel()


def test_what_speaks_against_it(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from polyce.implementations.triton import path as triton

    x, t = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    explained = polyce.explain(x, t)
    assert explained.reasons["triton"] == ()
    # The path could serve this, but the interpreter must not be chosen by default.
    assert explained.chosen == "native"
    assert polyce.explain(x, t, implementation="triton").chosen == "triton"
    with polyce.use("triton"):
        assert polyce.explain(x, t).chosen == "triton"
    monkeypatch.setenv("POLYCE_IMPLEMENTATION", "triton")
    assert polyce.explain(x, t).chosen == "triton"
    monkeypatch.delenv("POLYCE_IMPLEMENTATION")

    monkeypatch.setattr(triton, "_HAS_COMPILER", False)
    assert polyce.explain(x, t).reasons["triton"] == ()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "C compiler" in polyce.explain(x, t).reasons["triton"][0]
    monkeypatch.setattr(triton, "_IS_INSTALLED", False)
    assert polyce.explain(x, t).reasons["triton"] == (
        "triton is not installed (pip install triton)",
    )
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA or ROCm device" in polyce.explain(x, t).reasons["triton"][0]
    with pytest.raises(ValueError, match="cannot serve this call: torch finds no CUDA"):
        polyce.cross_entropy(x, t, implementation="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "not meta" in polyce.explain(x.to("meta"), t.to("meta")).reasons["triton"][0]


@pytest.mark.parametrize("shape", [(3, 70), (3, 10), (2, 5, 4)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_backward_gives_the_gradient(torch: Any, shape: tuple[int, ...], reduction: str) -> None:
    x, t, w, v = problem(torch, shape, torch.float64, "index")
    options = {"sample_weight": v, "label_smoothing": 0.1, "z_loss": 0.1, "reduction": reduction}
    x.requires_grad_()
    loss = polyce.cross_entropy(x, t, w, implementation="triton", **options)
    g = torch.rand(loss.shape, dtype=torch.float64)
    (grad,) = torch.autograd.grad(loss, x, g, retain_graph=True)
    (again,) = torch.autograd.grad(loss, x, g)
    _, want = polyce.cross_entropy_with_grad(
        x.detach(), t, w, grad_output=g, implementation="reference", **options
    )
    torch.testing.assert_close(grad, want, rtol=1e-12, atol=1e-16)
    assert torch.equal(grad, again)
    (first,) = torch.autograd.grad(
        polyce.cross_entropy(x, t, w, implementation="triton", **options).sum(), x
    )
    _, ones = polyce.cross_entropy_with_grad(
        x.detach(), t, w, implementation="reference", **options
    )
    torch.testing.assert_close(first, ones, rtol=1e-12, atol=1e-16)


def test_derivatives_that_kernels_lack_come_from_the_reference(torch: Any) -> None:
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    p = torch.rand(2, 5, dtype=torch.float64, requires_grad=True)
    w = torch.rand(5, dtype=torch.float64, requires_grad=True)

    def loss(x: Any, p: Any, w: Any) -> Any:
        return polyce.cross_entropy(x, p, w, implementation="triton")

    assert torch.autograd.gradcheck(loss, (x, p, w))
    assert torch.autograd.gradgradcheck(loss, (x, p, w))


def test_views_that_negate(torch: Any) -> None:
    x, t, _, _ = problem(torch, (3, 70), torch.float32, "index")
    negated = torch._neg_view(x)
    assert torch.equal(
        polyce.cross_entropy(negated, t, implementation="triton"),
        polyce.cross_entropy(-x, t, implementation="triton"),
    )


@pytest.mark.parametrize("memory_format", ["channels_last", "contiguous_format"])
def test_the_gradient_lies_as_the_logits_do(torch: Any, memory_format: str) -> None:
    x, t, _, _ = problem(torch, (2, 5, 3, 4), torch.float32, "index")
    x = x.contiguous(memory_format=getattr(torch, memory_format))
    _, grad = polyce.cross_entropy_with_grad(x, t, implementation="triton")
    assert grad.stride() == x.stride()
    odd = x.transpose(2, 3)
    _, of_odd = polyce.cross_entropy_with_grad(odd, t.mT, implementation="triton")
    torch.testing.assert_close(of_odd.transpose(2, 3), grad, rtol=1e-6, atol=1e-8)
    _, over = polyce.cross_entropy_with_grad(odd, t.mT, implementation="triton", out=odd)
    assert over is odd
    torch.testing.assert_close(x, grad, rtol=1e-6, atol=1e-8)


def test_operators(torch: Any) -> None:
    from test_torch_operators import check_operators, operator_calls

    for call in operator_calls(torch)[:: 1 if FULL else 20]:
        close = {"rtol": 1e-2, "atol": 1e-3} if call.is_narrow else {"rtol": 1e-5, "atol": 1e-7}
        check_operators(torch, call, "triton", close)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_under_compile(torch: Any, reduction: str) -> None:
    x, t, w, _ = problem(torch, (4, 70), torch.float32, "index")
    t[2] = 99

    def loss(x: Any, implementation: str | None = None) -> Any:
        return polyce.cross_entropy(
            x, t, w, reduction=reduction, validate=False, implementation=implementation
        )

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    ours, want = compiled(x, "triton"), loss(x, "reference")
    # A bad label makes its row nan if labels are not checked.
    torch.testing.assert_close(ours, want, equal_nan=True)
    assert torch.isnan(ours).any()
    g = torch.rand(want.shape)
    (grad,), (other,) = torch.autograd.grad(ours, x, g), torch.autograd.grad(want, x, g)
    torch.testing.assert_close(grad, other, equal_nan=True)


@pytest.mark.parametrize("shape", [(3, 70), (3, 10), (2, 5, 3, 4)])
def test_in_place_backward(torch: Any, shape: tuple[int, ...]) -> None:
    import polyce.torch

    x, t, _, _ = problem(torch, shape, torch.float32, "index")
    for values in (x, x.to(memory_format=torch.channels_last) if x.ndim == 4 else x.clone()):
        leaf = values.clone().requires_grad_()
        logits = leaf * 1.0
        loss = polyce.torch.cross_entropy(logits, t, inplace_backward=True, implementation="triton")
        (grad,) = torch.autograd.grad(loss, logits)
        assert grad.data_ptr() == logits.data_ptr()
        _, want = polyce.cross_entropy_with_grad(values, t, implementation="reference")
        torch.testing.assert_close(logits.detach(), want, rtol=1e-5, atol=1e-8)
