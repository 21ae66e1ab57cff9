"""torch's gradients, of all orders and operands, against differences, torch and paper."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest

import polyce
from conftest import FULL
from hessians import ROWS, hessian

pytestmark = pytest.mark.only("torch", "torch-cuda")

SHAPES = {"row": (4,), "rows": (3, 4), "line": (2, 3, 2)}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sampled": {"sample_weight": True},
    "penalised": {"z_loss": 0.1, "sample_weight": True, "normalizer": 3.0},
    "scaled": {"logit_scale": 2.5, "z_loss": 0.1},
    "capped": {"logit_softcap": 2.0, "logit_scale": 0.5, "z_loss": 0.1},
}
PRODUCT = list(
    itertools.product(
        SHAPES,
        ["index", "probability"],
        ["none", "mean", "sum"],
        [0.0, 0.1],
        [False, True],
        OPTIONS,
    )
)
# A step coprime to the length of every axis of the product reaches all of their values.
SELECTION = PRODUCT if FULL else PRODUCT[::23]


def name_of(case: tuple[Any, ...]) -> str:
    return "-".join(str(value) for value in case)


@pytest.mark.parametrize("zero", [False, True], ids=["random", "zero"])
@pytest.mark.parametrize("case", SELECTION, ids=name_of)
def test_all_derivatives_agree_with_differences(
    torch: Any, case: tuple[Any, ...], zero: bool
) -> None:
    name, kind, reduction, smoothing, weighted, option = case
    shape, options = SHAPES[name], dict(OPTIONS[option])
    axis = min(1, len(shape) - 1)
    row_shape = shape[:axis] + shape[axis + 1 :]
    if options.get("sample_weight"):
        options["sample_weight"] = torch.rand(row_shape, dtype=torch.float64)
    if reduction != "mean":
        options.pop("normalizer", None)
    options |= {"reduction": reduction, "label_smoothing": smoothing}
    logits = 0.0 if zero else 2 * torch.randn(shape, dtype=torch.float64)
    inputs = [(torch.zeros(shape, dtype=torch.float64) + logits).requires_grad_()]
    weight = torch.rand(shape[axis], dtype=torch.float64) + 0.5 if weighted else None

    loss: Callable[..., Any]
    if kind == "probability":
        target = torch.softmax(torch.randn(shape, dtype=torch.float64), axis)
        inputs += [a.requires_grad_() for a in (target, weight) if a is not None]

        def loss(*arrays: Any) -> Any:
            return polyce.cross_entropy(*arrays, **options)

    else:
        target = torch.randint(0, shape[axis], row_shape)
        if target.ndim:
            target.view(-1)[0] = -100

        def loss(x: Any) -> Any:
            return polyce.cross_entropy(x, target, weight, **options)

    assert torch.autograd.gradcheck(
        loss,
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )
    assert torch.autograd.gradgradcheck(
        loss, inputs, check_fwd_over_rev=True, check_batched_grad=True
    )


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_all_derivatives_of_log_softmax_agree_with_differences(
    torch: Any, softcap: float | None
) -> None:
    def function(x: Any) -> Any:
        return polyce.log_softmax(x, logit_scale=1.5, logit_softcap=softcap)

    for shape in SHAPES.values():
        for logits in (torch.randn(shape), torch.zeros(shape)):
            x = logits.double().requires_grad_()
            assert torch.autograd.gradcheck(
                function, x, check_forward_ad=True, check_batched_grad=True
            )
            assert torch.autograd.gradgradcheck(function, x, check_fwd_over_rev=True)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("classes", [2, 4])
def test_ties_are_right_to_the_last_digit(
    torch: Any, classes: int, kind: str, softcap: float | None
) -> None:
    # At logits of 0 a softcap has slope 1 and no curvature.
    share = 1.0 / classes
    one_hot = torch.eye(classes, dtype=torch.float64)[1]
    target = torch.tensor(1) if kind == "index" else one_hot

    def loss(x: Any) -> Any:
        return polyce.cross_entropy(x, target, logit_softcap=softcap)

    logits = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    gradient = share - one_hot
    hessian = share * torch.eye(classes, dtype=torch.float64) - share * share
    exact = {"rtol": 0.0, "atol": 0.0}

    (got,) = torch.autograd.grad(loss(logits), logits)
    torch.testing.assert_close(got, gradient, **exact)
    torch.testing.assert_close(torch.func.grad(loss)(logits.detach()), gradient, **exact)
    torch.testing.assert_close(torch.func.jacfwd(loss)(logits.detach()), gradient, **exact)
    for second in (
        torch.func.hessian(loss),
        torch.func.jacrev(torch.func.jacrev(loss)),
        torch.func.jacrev(torch.func.jacfwd(loss)),
        torch.func.jacfwd(torch.func.jacfwd(loss)),
        lambda x: torch.autograd.functional.hessian(loss, x),
    ):
        torch.testing.assert_close(second(logits.detach()), hessian, **exact)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_probabilities_and_class_weights_agree_with_torch(
    torch: Any, shape: str, smoothing: float, reduction: str
) -> None:
    axis = min(1, len(SHAPES[shape]) - 1)
    arrays = [
        torch.randn(SHAPES[shape], dtype=torch.float64),
        # Not normalised, and with zeros, which both torch and polyce accept.
        torch.relu(torch.randn(SHAPES[shape], dtype=torch.float64)),
        torch.rand(SHAPES[shape][axis], dtype=torch.float64),
    ]
    for needed in itertools.product([False, True], repeat=3):
        if not any(needed):
            continue
        inputs = [a.clone().requires_grad_(need) for a, need in zip(arrays, needed, strict=True)]
        wanted = [a for a in inputs if a.requires_grad]
        answers = []
        for function in (torch.nn.functional.cross_entropy, polyce.cross_entropy):
            loss = function(*inputs, reduction=reduction, label_smoothing=smoothing)
            answers.append(torch.autograd.grad(loss.pow(2).sum(), wanted))
        torch.testing.assert_close(answers[1], answers[0], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_gradients_come_in_the_dtype_of_each_operand(torch: Any, dtype: str) -> None:
    logits = torch.randn((3, 4), dtype=getattr(torch, dtype), requires_grad=True)
    target = torch.rand((3, 4), dtype=torch.float64, requires_grad=True)
    weight = torch.rand(4, dtype=torch.float32, requires_grad=True)
    polyce.cross_entropy(logits, target, weight).backward()
    for array in (logits, target, weight):
        assert array.grad.dtype == array.dtype
    expected = [a.detach().double().requires_grad_() for a in (logits, target, weight)]
    torch.nn.functional.cross_entropy(*expected).backward()
    for array, exact in zip((logits, target, weight), expected, strict=True):
        torch.testing.assert_close(array.grad, exact.grad.to(array.dtype))


def test_a_class_that_takes_no_part(torch: Any) -> None:
    logits = torch.tensor([[0.0, -math.inf, 1.0]], requires_grad=True)
    target = torch.tensor([[0.5, 0.0, 0.5]], requires_grad=True)
    weight = torch.ones(3, requires_grad=True)
    polyce.cross_entropy(logits, target, weight).backward()
    lse = math.log1p(math.e)
    assert logits.grad.isfinite().all()
    # As in torch: moving probability there has infinite cost.
    torch.testing.assert_close(target.grad, torch.tensor([[lse, math.inf, lse - 1]]))
    # torch gives nan for the second class: 0 times infinity.
    torch.testing.assert_close(weight.grad, torch.tensor([lse / 2, 0.0, (lse - 1) / 2]))
    _, tangent = torch.func.jvp(
        lambda p: polyce.cross_entropy(logits.detach(), p),
        (target.detach(),),
        (torch.tensor([[1.0, 0.0, -1.0]]),),
    )
    torch.testing.assert_close(tangent, torch.tensor(1.0))


def test_rows_that_do_not_count_give_their_target_no_gradient(torch: Any) -> None:
    logits = torch.tensor([[math.nan, math.inf], [0.0, 1.0]], requires_grad=True)
    target = torch.full((2, 2), 0.5, requires_grad=True)
    weight = torch.ones(2, requires_grad=True)
    arrays = (logits, target, weight)
    loss = polyce.cross_entropy(*arrays, sample_weight=torch.tensor([0.0, 2.0]), reduction="sum")
    lse = math.log1p(math.e)
    gradients = torch.autograd.grad(loss, arrays, create_graph=True)
    assert gradients[0][0].tolist() == [0.0, 0.0]
    torch.testing.assert_close(
        gradients[1:],
        (
            torch.tensor([[0.0, 0.0], [2 * lse, 2 * lse - 2]]),
            torch.tensor([lse, lse - 1]),
        ),
    )
    second = torch.autograd.grad(sum(g.square().sum() for g in gradients), arrays)
    assert all(g.isfinite().all() for g in second)
    assert second[0][0].tolist() == [0.0, 0.0]


def test_a_frozen_target_costs_nothing(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from polyce.graphs import torch_rows

    def fail(*_: Any) -> None:
        raise AssertionError("computed for a gradient that nobody wants")

    monkeypatch.setattr(torch_rows, "_gaps", fail)
    logits = torch.randn((3, 4), requires_grad=True)
    polyce.cross_entropy(logits, torch.rand((3, 4)), torch.rand(4)).backward()
    monkeypatch.undo()
    monkeypatch.setattr(torch_rows.rows, "backward", fail)
    target = torch.rand((3, 4), requires_grad=True)
    polyce.cross_entropy(logits.detach(), target).backward()
    assert target.grad.isfinite().all()


@pytest.mark.parametrize("function", ["cross_entropy", "nll_loss"])
def test_a_weight_of_class_indices_that_requires_grad_is_refused(torch: Any, function: str) -> None:
    loss = getattr(polyce, function)
    weight = torch.ones(3, requires_grad=True)
    arguments = (torch.zeros((2, 3)), torch.tensor([0, 1]), weight)
    with pytest.raises(TypeError, match=r"weight requires grad .* pass weight\.detach\(\)"):
        loss(*arguments)
    with torch.no_grad():
        loss(*arguments)


@pytest.mark.parametrize("function", ["cross_entropy", "nll_loss"])
def test_a_sample_weight_that_requires_grad_is_refused(torch: Any, function: str) -> None:
    loss = getattr(polyce, function)
    weight = torch.ones(2, requires_grad=True)
    with pytest.raises(TypeError, match=r"^sample_weight .* multiply the losses of"):
        loss(torch.zeros((2, 3)), torch.tensor([0, 1]), sample_weight=weight)


@pytest.mark.parametrize("name", ["weight", "sample_weight"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_transforms_refuse_the_same_gradients(torch: Any, name: str, smoothing: float) -> None:
    logits, target = torch.zeros((2, 3)), torch.tensor([0, 1])
    array = torch.ones(3 if name == "weight" else 2)

    def loss(w: Any) -> Any:
        return polyce.cross_entropy(logits, target, label_smoothing=smoothing, **{name: w})

    def batched(w: Any) -> Any:
        return torch.func.vmap(loss)(w.expand(2, *w.shape)).sum()

    for function in (loss, batched):
        with pytest.raises(TypeError, match=rf"^{name} has"):
            torch.func.grad(function)(array)
        with pytest.raises(TypeError, match=rf"^{name} has"):
            torch.func.jvp(function, (array,), (array,))


def test_the_normalizer_differentiates(torch: Any) -> None:
    logits, target = torch.zeros((2, 3)), torch.tensor([0, 1])
    normalizer = torch.tensor(4.0, requires_grad=True)
    polyce.cross_entropy(logits, target, normalizer=normalizer).backward()
    torch.testing.assert_close(normalizer.grad, torch.tensor(-2 * math.log(3) / 16))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 3), (2, 3, 0)])
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_nothing_has_derivatives_of_every_order(
    torch: Any, kind: str, shape: tuple[int, ...]
) -> None:
    operands = [torch.zeros(shape), torch.zeros(shape), torch.ones(shape[1])]
    if kind == "index":
        labels = torch.full(shape[:1] + shape[2:], -100)

        def loss(x: Any) -> Any:
            return polyce.cross_entropy(x, labels, reduction="sum")

        operands = operands[:1]
    else:

        def loss(*arrays: Any) -> Any:
            return polyce.cross_entropy(*arrays, reduction="sum")

    numbers = tuple(range(len(operands)))
    leaves = [array.requires_grad_() for array in operands]
    gradients = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    torch.autograd.grad(sum(g.sum() for g in gradients), leaves, allow_unused=True)
    operands = [array.detach() for array in operands]
    zeros = tuple(torch.zeros_like(array) for array in operands)
    torch.testing.assert_close(gradients, zeros)
    torch.testing.assert_close(torch.func.grad(loss, numbers)(*operands), zeros)
    expected = (torch.tensor(0.0), torch.tensor(0.0))
    torch.testing.assert_close(torch.func.jvp(loss, tuple(operands), zeros), expected)
    torch.testing.assert_close(
        torch.func.vmap(loss)(*(torch.stack((array, array)) for array in operands)), torch.zeros(2)
    )


@pytest.mark.parametrize(
    "path", [pytest.param("native", marks=pytest.mark.only("torch")), "reference"]
)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_second_derivatives_of_confident_rows(
    torch: Any, row: tuple[float, ...], path: str
) -> None:
    want = torch.as_tensor(hessian(row))
    x = torch.tensor(row, dtype=torch.float64)
    uniform = torch.full(x.shape, 1 / len(row), dtype=torch.float64)
    targets = [*map(torch.tensor, range(len(row))), uniform]
    for target, smoothing in itertools.product(targets, (0.0, 0.1)):

        def loss(x: Any, target: Any = target, smoothing: float = smoothing) -> Any:
            return polyce.cross_entropy(x, target, label_smoothing=smoothing, implementation=path)

        for found in (
            torch.autograd.functional.hessian(loss, x),
            *((torch.func.hessian(loss)(x),) if path == "reference" else ()),
        ):
            torch.testing.assert_close(found, want, rtol=1e-14, atol=0.0)
