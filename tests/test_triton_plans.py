"""Launches of the triton path that are kept for calls like an earlier one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import polyce

COMPILED = pytest.mark.only("triton-compile")
INTERPRETED = pytest.mark.only("triton")


@pytest.fixture
def launched() -> Iterator[list[Any]]:
    from recorder import record

    recorder = record("sm_90")
    yield recorder.launched
    recorder.launched.clear()


def told(launches: list[Any]) -> list[Any]:
    """Return launches with the addresses of their arrays, those of one kind under one number."""
    from polyce.implementations.triton import kernels

    found = []
    for launch in launches:
        names = getattr(kernels, launch.name).arg_names
        given = dict(zip(names, launch.arguments, strict=True))
        numbers = {name: value for name, value in given.items() if not name.endswith("_ptr")}
        found.append((launch.name, launch.grid, launch.warps, launch.hash, numbers))
    return found


def arrays(launches: list[Any]) -> list[dict[str, Any]]:
    """Return the arrays of a call's launches by argument, without those that are absent."""
    from polyce.implementations.triton import kernels

    found: list[dict[str, Any]] = []
    for launch in launches:
        names = getattr(kernels, launch.name).arg_names
        given = zip(names, launch.arguments, strict=True)
        found.append({n: a for n, a in given if n.endswith("_ptr") and a is not None})
    # In launches that are laid out, the logits stand in the places of absent arrays.
    logits = found[0]["x_ptr"].data_ptr()
    return [
        {n: a for n, a in given.items() if n == "x_ptr" or a.data_ptr() != logits}
        for given in found
    ]


def of_kinds(torch: Any) -> dict[str, tuple[list[Any], dict[str, Any]]]:
    """Return arrays and options of calls, each of another kind than all before it."""
    memory = torch.zeros(3 * 1001 + 8)
    x, odd = memory[: 3 * 1000].view(3, 1000), memory[: 3 * 1001].view(3, 1001)
    t, weight, v = torch.zeros(3, dtype=torch.int64), torch.ones(1000), torch.ones(3)
    rows = {"reduction": "none"}
    return {
        "plain": ([x, t], {}),
        "a row for each target": ([x, t], rows),
        "begins elsewhere": ([memory[1:3001].view(3, 1000), t], {}),
        "begins on a boundary again": ([memory[4:3004].view(3, 1000), t], rows),
        "other strides": ([odd[:, :1000], t], {}),
        "other classes": ([odd, t], {}),
        "column-major": ([torch.zeros(1000, 3).T, t], {}),
        "other labels": ([x, t.to(torch.int32)], {}),
        "labels in steps": ([x, torch.zeros(6, dtype=torch.int64)[::2]], {}),
        "weights": ([x, t, weight], {}),
        "wide weights": ([x, t, weight.double()], {}),
        "weights that begin elsewhere": ([x, t, torch.ones(1001)[1:]], {}),
        "sample weights": ([x, t], {"sample_weight": v}),
        "narrow sample weights": ([x, t], {"sample_weight": v.half()}),
        "a number divides": ([x, t], {"normalizer": 3.0}),
        "an array divides": ([x, t], {"normalizer": torch.ones(())}),
        "stats": ([x, t], {"return_stats": True}),
        "few long rows": ([torch.zeros(2, 70_000), t[:2]], {}),
        "probabilities": ([x, torch.ones(3, 1000)], {"return_stats": "brier"}),
        "entries": ([x, polyce.SparseTarget(t[:, None], torch.ones(3, 1))], {}),
        "teacher": ([x, polyce.TeacherLogits(x + 1, 0.5)], {}),
    }


@COMPILED
def test_a_call_like_an_earlier_one_launches_the_same(torch: Any, launched: list[Any]) -> None:
    from polyce.implementations.triton import plans
    from recorder import call

    kinds = of_kinds(torch)
    first = {}
    for name, (given, options) in kinds.items():
        plans.forget()
        call(*given, **options)
        first[name] = told(launched), arrays(launched)
        launched.clear()
    plans.forget()
    # All plans are there at once, when each call comes again.
    for turn in range(2):
        for name, (given, options) in kinds.items():
            call(*given, **options)
            want, places = first[name]
            assert told(launched) == want, name
            for got, before in zip(arrays(launched), places, strict=True):
                assert got.keys() == before.keys(), name
                for argument, array in got.items():
                    other = before[argument]
                    assert (array.shape, array.stride()) == (other.shape, other.stride())
                    assert array.dtype in (other.dtype, torch.bool)
                    # What the kernels were compiled for.
                    assert array.data_ptr() % 16 == other.data_ptr() % 16
            if turn:
                # What a call brings is read where it is.
                assert arrays(launched)[0]["x_ptr"].data_ptr() == given[0].data_ptr()
            launched.clear()


# Rows that a program keeps, rows too long for that, and some that are so by their layout.
@COMPILED
@pytest.mark.parametrize("shape", [(3, 100), (3, 9000), (3, 40, 6)])
def test_loss_and_gradient_of_a_kept_call_lay_nothing_out(
    torch: Any, launched: list[Any], monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    from polyce.implementations.triton import arguments
    from recorder import call_both

    x, t = torch.zeros(shape), torch.zeros((shape[0], *shape[2:]), dtype=torch.int64)
    call_both(x, t)
    count = len(launched)
    monkeypatch.setattr(arguments, "call", lambda *_, **__: pytest.fail("it was laid out again"))
    call_both(x + 1, t + 1)
    assert len(launched) == 2 * count


@COMPILED
def test_a_kept_call_lays_nothing_out(
    torch: Any, launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from polyce.implementations.triton import arguments
    from recorder import call

    x, t = torch.zeros(3, 100), torch.zeros(3, dtype=torch.int64)
    call(x, t)
    count = len(launched)
    monkeypatch.setattr(arguments, "call", lambda *_: pytest.fail("it was laid out again"))
    call(x + 1, t + 1)
    assert len(launched) == 2 * count


@INTERPRETED
def test_a_kept_call_reads_its_own_arrays(torch: Any) -> None:
    options = {"implementation": "triton", "label_smoothing": 0.1}
    for number in range(3):
        x, t, weight = torch.randn(4, 70), torch.randint(70, (4,)), torch.rand(70)
        divisor = float(number + 1)
        want = polyce.cross_entropy_with_grad(
            x, t, weight, normalizer=divisor, grad_output=divisor, label_smoothing=0.1,
            implementation="reference",
        )  # fmt: skip
        got = polyce.cross_entropy_with_grad(
            x, t, weight, normalizer=divisor, grad_output=divisor, **options
        )
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
        leaf = x.clone().requires_grad_()
        loss = polyce.cross_entropy(leaf, t, weight, normalizer=divisor, **options)
        (loss * divisor).backward()
        torch.testing.assert_close(leaf.grad, want[1], rtol=1e-5, atol=1e-7)


@INTERPRETED
def test_labels_are_looked_at_each_time(torch: Any) -> None:
    x, t = torch.randn(4, 7), torch.zeros(4, dtype=torch.int64)
    for label, bad in ((6, False), (7, True), (0, False), (9, True)):
        t[2] = label
        if bad:
            with pytest.raises(IndexError, match=f"got {label} at position"):
                polyce.cross_entropy(x, t, implementation="triton", validate=True)
        else:
            polyce.cross_entropy(x, t, implementation="triton", validate=True)


@INTERPRETED
def test_memory_that_is_gone_is_not_read_by_a_kept_call(torch: Any) -> None:
    x, t = torch.randn(4, 7), torch.zeros(4, dtype=torch.int64)
    options = {"implementation": "triton", "validate": False}
    polyce.cross_entropy(x, t, **options)
    x.untyped_storage().resize_(4 * 27)
    with pytest.raises(RuntimeError, match="input must lie within its storage"):
        polyce.cross_entropy(x, t, **options)
    x = torch.randn(4, 7, requires_grad=True)
    first, second = (polyce.cross_entropy(x, t, **options) for _ in range(2))
    first.backward()
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="must lie within its storage"):
        second.backward()


@INTERPRETED
def test_tensors_of_other_shapes_are_refused_by_a_kept_backward_pass(torch: Any) -> None:
    x, t, weight = torch.randn(4, 7, requires_grad=True), torch.zeros(4).long(), torch.ones(7)
    options = {"implementation": "triton", "validate": False}
    polyce.cross_entropy(x, t, weight, **options).backward()
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensor, lambda tensor: tensor[:6] if tensor.shape == (7,) else tensor
    )
    with hooks:
        loss = polyce.cross_entropy(x, t, weight, **options)
    with pytest.raises(RuntimeError, match=r"must come back as torch.float32 of shape \(7,\)"):
        loss.backward()
