"""Calls on torch's tensors that the core answers because one like them came before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest

import polyce
from door_calls import Ways, outcome
from door_tensors import LABELS, LOGITS, MARKS, PROBABILITIES, check_after, leaf, torch
from polyce.implementations.native import core as native

forward_ad = torch.autograd.forward_ad

pytestmark = MARKS


def with_backward(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that gives loss and gradient, of what needs one."""

    def call(logits: Any, target: Any, **given: Any) -> Any:
        loss = function(logits, target, **given)
        needing = [
            a for a in (logits, target, *given.values()) if getattr(a, "requires_grad", False)
        ]
        if not needing or not loss.requires_grad:
            return loss
        weights = torch.arange(1.0, 1 + loss.numel()).reshape(loss.shape)
        return loss, torch.autograd.grad((loss * weights).sum(), needing, allow_unused=True)

    return call


FUNCTIONS = {
    "loss": polyce.cross_entropy,
    "with_grad": polyce.cross_entropy_with_grad,
    "backward": with_backward(polyce.cross_entropy),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_call_like_one_before_is_not_described_again(function: str, ways: Ways) -> None:
    call = FUNCTIONS[function]
    logits = leaf() if function == "backward" else LOGITS
    assert ways.of(lambda: call(logits, LABELS)) == 1
    assert ways.of(lambda: call(logits, LABELS)) == 0
    assert ways.of(lambda: call(logits + 1, LABELS.flip(0))) == 0


class Own(torch.Tensor):
    """A subclass of torch's tensor."""


def resized(tensor: Any, size: int) -> Any:
    tensor.untyped_storage().resize_(size)
    return tensor


def in_inference_mode() -> Any:
    with torch.inference_mode():
        return LOGITS.clone()


LIKE_LOGITS: dict[str, Callable[[], Any]] = {
    "float32": lambda: LOGITS,
    "leaf": leaf,
    "not a leaf": lambda: leaf() * 2,
    "float64": LOGITS.double,
    "float16": LOGITS.half,
    "bfloat16 leaf": lambda: leaf(LOGITS.bfloat16()),
    "integers": LOGITS.int,
    "column by column": lambda: leaf(LOGITS).T.contiguous().T,
    "strided": lambda: LOGITS.repeat_interleave(3, 1)[:, ::3],
    "expanded": lambda: LOGITS[0].expand(6, 5),
    "more rows": lambda: torch.cat([LOGITS, LOGITS]),
    "no rows": lambda: LOGITS[:0],
    "no classes": lambda: LOGITS[:, :0],
    "one row": lambda: LOGITS[0],
    "parameter": lambda: torch.nn.Parameter(LOGITS),
    "meta": lambda: LOGITS.to("meta"),
    "negated": lambda: torch._neg_view(LOGITS),
    "imaginary": lambda: torch.complex(LOGITS, LOGITS).conj().imag,
    "sparse": LOGITS.to_sparse,
    "nested": lambda: torch.nested.nested_tensor([LOGITS[0], LOGITS[1]]),
    "mkldnn": LOGITS.to_mkldnn,
    "zeros": lambda: torch._efficientzerotensor((6, 5)),
    "resized": lambda: resized(LOGITS.clone(), 8),
    "resized to nothing": lambda: resized(LOGITS.clone(), 0),
    "part of a resized one": lambda: resized(torch.cat([LOGITS, LOGITS])[6:], 60 * 4 - 4),
    "numpy": LOGITS.numpy,
    "inference": in_inference_mode,
    "subclass": lambda: LOGITS.as_subclass(Own),
    "none": lambda: None,
}
LIKE_LABELS: dict[str, Callable[[], Any]] = {
    "int64": lambda: LABELS,
    "int32": LABELS.int,
    "uint8": LABELS.byte,
    "bool": LABELS.bool,
    "float": LABELS.float,
    "strided": lambda: LABELS.repeat_interleave(2)[::2],
    "too large": lambda: torch.where(LABELS == 1, 5, LABELS),
    "ignored": lambda: torch.where(LABELS == 1, -100, LABELS),
    "fewer": lambda: LABELS[:-1],
    "column": lambda: LABELS[:, None],
    "negated": lambda: torch._neg_view(-LABELS),
    "resized": lambda: resized(LABELS.clone(), 8),
    "probabilities": lambda: PROBABILITIES,
    "probabilities with a gradient": lambda: leaf(PROBABILITIES),
    "probabilities in float64": PROBABILITIES.double,
    "numpy": LABELS.numpy,
    "none": lambda: None,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LIKE_LOGITS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_logits_change_between_calls(function: str, name: str) -> None:
    call, other = FUNCTIONS[function], LIKE_LOGITS[name]()
    for usual in (LOGITS, leaf()):
        for reduction in ("mean", "none"):
            check_after(
                lambda: call(usual, LABELS, reduction=reduction),  # noqa: B023
                lambda: call(other, LABELS, reduction=reduction),  # noqa: B023
            )
            check_after(
                lambda: call(other, LABELS, reduction=reduction),  # noqa: B023
                lambda: call(usual, LABELS, reduction=reduction),  # noqa: B023
            )


@pytest.mark.parametrize("name", LIKE_LABELS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_target_changes_between_calls(function: str, name: str) -> None:
    call, other = FUNCTIONS[function], LIKE_LABELS[name]()
    for logits in (LOGITS, leaf()):
        for usual in (LABELS, PROBABILITIES):
            check_after(lambda: call(logits, usual), lambda: call(logits, other))  # noqa: B023
            check_after(lambda: call(logits, other), lambda: call(logits, usual))  # noqa: B023


@pytest.mark.parametrize("name", ["weight", "sample_weight"])
def test_weights_change_between_calls(name: str) -> None:
    size = 5 if name == "weight" else 6
    values = torch.arange(1.0, size + 1)
    kinds = [None, values, values.double(), leaf(values), values.repeat_interleave(2)[::2]]
    kinds += [values[:-1], values.half(), values.long(), values.numpy(), leaf(values.double())]
    for target in (LABELS, PROBABILITIES):
        for function in FUNCTIONS.values():
            for a in kinds:
                for b in kinds:
                    check_after(
                        lambda: function(leaf(), target, **{name: a}),  # noqa: B023
                        lambda: function(leaf(), target, **{name: b}),  # noqa: B023
                    )


class Functions(torch.overrides.TorchFunctionMode):
    """Sees each function of torch's."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return function(*args, **(kwargs or {}))


class Operations(torch.utils._python_dispatch.TorchDispatchMode):
    """Sees each operation of torch's."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return function(*args, **(kwargs or {}))


def autocast() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


AROUND: dict[str, tuple[Callable[[], Any], int]] = {
    # around a call, and whether it has to go the whole way
    "nothing": (contextlib.nullcontext, 0),
    "no_grad": (torch.no_grad, 0),
    "inference mode": (torch.inference_mode, 0),
    "anomaly": (torch.autograd.detect_anomaly, 0),
    "autocast": (autocast, 0),
    "function mode": (Functions, 1),
    "dispatch mode": (Operations, 1),
    "default device": (lambda: torch.device("meta"), 1),
    "forward mode": (forward_ad.dual_level, 1),
    "use": (lambda: polyce.use("reference"), 1),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", AROUND)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_on_around_a_call(dtype: str, function: str, name: str, ways: Ways) -> None:
    around, count = AROUND[name]
    if (name, dtype) == ("autocast", "bfloat16"):
        count = 1
    logits = leaf(LOGITS.to(getattr(torch, dtype)))

    def second() -> Any:
        with around():
            return FUNCTIONS[function](logits, LABELS)

    check_after(lambda: FUNCTIONS[function](logits, LABELS), second)
    check_after(second, lambda: FUNCTIONS[function](logits, LABELS))
    outcome(second)
    assert ways.of(second) == count


def test_operations_are_seen_by_those_who_look() -> None:
    seen = []

    class Seen(Operations):
        def __torch_dispatch__(self, function: Any, *more: Any, **named: Any) -> Any:
            seen.append(function)
            return super().__torch_dispatch__(function, *more, **named)

    for _ in range(3):
        polyce.cross_entropy(LOGITS, LABELS)
    with Seen():
        polyce.cross_entropy(LOGITS, LABELS)
    assert seen


@pytest.mark.filterwarnings("ignore")
def test_transforms_and_traces_after_plain_calls() -> None:
    def loss(x: Any) -> Any:
        return polyce.cross_entropy(x, LABELS)

    def by_rows(x: Any, y: Any) -> Any:
        return polyce.cross_entropy(x[None], y[None])

    def derivative(x: Any) -> Any:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            return forward_ad.unpack_dual(loss(dual)).tangent

    from torch._subclasses.fake_tensor import FakeTensorMode

    def fake(x: Any) -> Any:
        with FakeTensorMode() as mode:
            return type(
                polyce.cross_entropy(mode.from_tensor(x), mode.from_tensor(LABELS))
            ).__name__

    calls: list[Callable[[], Any]] = [
        lambda: torch.func.grad(loss)(LOGITS),
        lambda: torch.func.vmap(by_rows)(LOGITS, LABELS),
        lambda: torch.func.jvp(loss, (LOGITS,), (LOGITS,)),
        lambda: torch.func.hessian(loss)(LOGITS),
        lambda: derivative(LOGITS),
        lambda: fake(LOGITS),
        lambda: torch.fx.experimental.proxy_tensor.make_fx(loss)(LOGITS)(LOGITS + 1),
        lambda: torch.jit.trace(loss, (LOGITS,), check_trace=False)(LOGITS + 1),
        lambda: torch.compile(loss, backend="eager", fullgraph=True)(LOGITS),
        lambda: torch.export.export(Loss(), (LOGITS, LABELS)).module()(LOGITS + 1, LABELS),
    ]
    for call in calls:
        check_after(lambda: polyce.cross_entropy(LOGITS, LABELS), call)
        check_after(lambda: polyce.cross_entropy(leaf(), LABELS), call)


class Loss(torch.nn.Module):
    """A module around a loss."""

    def forward(self, x: Any, y: Any) -> Any:
        return polyce.cross_entropy(x, y)


def test_a_torch_with_other_insides_goes_the_whole_way(monkeypatch: pytest.MonkeyPatch) -> None:
    from polyce.implementations import door_torch

    monkeypatch.setitem(door_torch._WANTED, "_no_longer_there", 0)
    assert not door_torch.open_torch(native.core())
