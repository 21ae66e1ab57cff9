"""Tensors without values: torch.compile, torch.export, make_fx, fake and meta tensors; autocast."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest

import polyce
from conftest import FULL

pytestmark = [
    pytest.mark.only("torch", "torch-cuda"),
    # torch's tracer instantiates a Function for every custom one; other warnings are about polyce.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

# aot_eager traces everything that the others do; inductor compiles C++ for minutes.
COMPILERS = ["eager", "aot_eager", "inductor"] if FULL else ["aot_eager"]
# All but the rank, which probabilities do not have.
STATS = polyce.Stats._fields[:6]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1, "reduction": "sum"},
    "rows": {"reduction": "none", "logit_scale": 2.0},
    "all": {"z_loss": 0.1, "logit_softcap": 4.0, "normalizer": 5.0, "return_stats": STATS},
}


@pytest.fixture(autouse=True)
def fresh_compiler(torch: Any) -> None:
    torch._dynamo.reset()


def arguments(torch: Any, kind: str, rows: int = 4) -> dict[str, Any]:
    found = {
        "input": 2 * torch.randn((rows, 5), dtype=torch.float64),
        "target": torch.tensor([0, -100, 4, 2][:rows]),
        "weight": torch.rand(5, dtype=torch.float64),
        "sample_weight": torch.rand(rows, dtype=torch.float64),
    }
    if kind == "probability":
        found["target"] = torch.softmax(torch.randn((rows, 5), dtype=torch.float64), 1)
    return found


def loss_and_gradients(torch: Any, function: Callable[..., Any], arrays: dict[str, Any]) -> Any:
    """Return what the function returns, and the gradients that there are."""
    names = ["input"]
    if arrays["target"].is_floating_point():
        names += ["target", "weight"]
    arrays = {name: array.clone().requires_grad_(name in names) for name, array in arrays.items()}
    found = function(**arrays)
    loss = found[0] if isinstance(found, tuple) else found
    gradients = torch.autograd.grad(loss.sum(), [arrays[name] for name in names])
    if isinstance(found, tuple):
        lse, entropy, *others = (array for array in found[1] if array is not None)
        assert not any(array.requires_grad for array in others)
        found = (loss, lse, entropy, *others)
    return found, gradients


@pytest.mark.slow("torch")
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("option", OPTIONS if FULL else ["smoothed", "all"])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiles_into_one_graph_without_a_warning(
    torch: Any, compiler: str, option: str, kind: str
) -> None:
    def loss(**arrays: Any) -> Any:
        return polyce.cross_entropy(**arrays, **OPTIONS[option])

    arrays = arguments(torch, kind)
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    got = loss_and_gradients(torch, compiled, arrays)
    expected = loss_and_gradients(torch, loss, arrays)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-14, equal_nan=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**arrays), loss(**arrays), equal_nan=True)


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_one_graph_serves_every_number_of_rows(torch: Any, compiler: str, kind: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend(compiler)

    def loss(**arrays: Any) -> Any:
        return polyce.cross_entropy(**arrays, label_smoothing=0.1)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for rows in (4, 3, 2):
        arrays = arguments(torch, kind, rows)
        torch.testing.assert_close(
            loss_and_gradients(torch, compiled, arrays), loss_and_gradients(torch, loss, arrays)
        )
        counts.append(counter.frame_count)
    # torch may start over within the first call, but later calls must not recompile.
    assert counts == [counts[0]] * 3


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_derivatives_are_right_at_ties_and_on_confident_rows(
    torch: Any, compiler: str
) -> None:
    compiled = torch.compile(polyce.cross_entropy, fullgraph=True, backend=compiler)
    logits = torch.tensor([[0.0, 0.0], [40.25, 0.0]], requires_grad=True)
    losses = compiled(logits, torch.tensor([1, 0]), reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    small = math.exp(-40.25)
    exact = torch.tensor([[0.5, -0.5], [-small, small]])
    torch.testing.assert_close(gradient, exact, rtol=2e-7, atol=0.0)
    torch.testing.assert_close(losses, torch.tensor([math.log(2), small]), rtol=2e-7, atol=0.0)


def test_the_other_functions_compile_into_one_graph(torch: Any) -> None:
    arrays = arguments(torch, "index")
    for function in (
        polyce.cross_entropy_with_grad,
        polyce.nll_loss,
        polyce.CrossEntropyLoss(arrays.pop("weight"), logit_softcap=3.0),
    ):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**arrays), function(**arrays))
    x = arrays["input"].requires_grad_()
    compiled = torch.compile(polyce.log_softmax, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x)[:, 0].sum(), x)
    torch.testing.assert_close(got, torch.autograd.grad(polyce.log_softmax(x)[:, 0].sum(), x))


def test_compiled_calls_do_not_look_at_labels(torch: Any) -> None:
    compiled = torch.compile(polyce.cross_entropy, fullgraph=True, backend="aot_eager")
    losses = compiled(torch.zeros((3, 2)), torch.tensor([0, 2, -1]), reduction="none")
    assert losses.isnan().tolist() == [False, True, True]


COMPILED_TRANSFORMS = ["grad", "per sample", "jacfwd"]


@pytest.mark.slow("torch")
@pytest.mark.parametrize(
    "name", [*COMPILED_TRANSFORMS, *(["jacrev", "hessian", "vmap"] if FULL else [])]
)
def test_compiled_transforms(torch: Any, name: str) -> None:
    f = torch.func
    transformed = {
        "grad": f.grad(polyce.cross_entropy),
        "jacrev": f.jacrev(polyce.cross_entropy),
        "jacfwd": f.jacfwd(polyce.cross_entropy),
        "hessian": f.hessian(polyce.cross_entropy),
        "vmap": f.vmap(polyce.cross_entropy),
        "per sample": f.vmap(f.grad(polyce.cross_entropy)),
    }[name]
    compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
    for kind in ("index", "probability"):
        arrays = arguments(torch, kind)
        # A class of probability 0, and a tie.
        target = torch.relu(arrays["target"] - 0.2) if kind == "probability" else arrays["target"]
        for x in (arrays["input"], torch.zeros((4, 5), dtype=torch.float64)):
            expected = transformed(x, target)
            # The mean over nothing but an ignored row is nan.
            torch.testing.assert_close(
                compiled(x, target), expected, rtol=1e-13, atol=1e-15, equal_nan=True
            )


class Classifier:
    """Makes a module of a linear layer and the loss, once torch can be imported."""

    def __new__(cls, torch: Any, **options: Any) -> Any:
        class Module(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = torch.nn.Linear(3, 5)

            def forward(self, features: Any, target: Any) -> Any:
                return polyce.cross_entropy(self.linear(features), target, **options)

        return Module()


@pytest.mark.slow("torch")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("option", OPTIONS if FULL else ["all"])
def test_exports_with_any_number_of_rows(torch: Any, option: str, kind: str, strict: bool) -> None:
    module = Classifier(torch, **OPTIONS[option])
    rows = torch.export.Dim("rows")

    def inputs(count: int) -> tuple[Any, Any]:
        target = arguments(torch, kind, count)["target"]
        return torch.randn((count, 3)), target.float() if kind == "probability" else target

    program = torch.export.export(
        module, inputs(4), dynamic_shapes=({0: rows}, {0: rows}), strict=strict
    )
    for count in (4, 3, 2):
        arrays = inputs(count)
        answers = []
        for function in (program.module(), module):
            found = function(*arrays)
            loss = found[0] if isinstance(found, tuple) else found
            gradients = torch.autograd.grad(loss.sum(), list(function.parameters()))
            answers.append((found, gradients))
        torch.testing.assert_close(answers[0], answers[1], equal_nan=True)


@pytest.mark.slow("torch")
@pytest.mark.parametrize("strict", [False, True])
def test_exported_gradients_are_right_where_a_formula_goes_wrong(torch: Any, strict: bool) -> None:
    class Loss(torch.nn.Module):
        def forward(self, x: Any, y: Any) -> Any:
            return polyce.cross_entropy(x, y, reduction="sum")

    infinity, nan = math.inf, math.nan
    for rows, labels in (
        ([[0.0, 0.0], [0.0, 0.0]], [0, 1]),
        ([[40.25, 0.0, 1.0]], [0]),
        ([[1.0, -infinity, 2.0], [-infinity, -infinity, 0.0]], [0, 2]),
        ([[nan, infinity], [0.0, 0.0]], [-100, 1]),
        ([[0.0], [1.0]], [0, 0]),
        ([[1.0, -0.5, 2.0]], [[0.25, 0.0, 0.75]]),
    ):
        x, y = torch.tensor(rows, requires_grad=True), torch.tensor(labels)
        wanted = [x, y.requires_grad_()] if y.is_floating_point() else [x]
        exported = torch.export.export(Loss(), (x, y), strict=strict).module()
        got = torch.autograd.grad(exported(x, y), wanted)
        expected = torch.autograd.grad(polyce.cross_entropy(x, y, reduction="sum"), wanted)
        torch.testing.assert_close(got, expected, rtol=3e-7, atol=0.0)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_make_fx(torch: Any, kind: str, mode: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def loss_and_gradient(x: Any, y: Any) -> Any:
        x = x.detach().requires_grad_()
        loss = polyce.cross_entropy(x, y)
        return loss, torch.autograd.grad(loss, x)

    arrays = arguments(torch, kind)
    first, second = arrays["input"], arrays["target"]
    if kind == "index":
        # Traced without an ignored row, it must still ignore one later.
        second = second.clamp(0)
    graph = make_fx(loss_and_gradient, tracing_mode=mode)(first, second)
    arrays = arguments(torch, kind)
    first, second = arrays["input"], arrays["target"]
    torch.testing.assert_close(graph(first, second), loss_and_gradient(first, second))


def test_jit_trace_keeps_the_labels_open(torch: Any) -> None:
    x, y = torch.randn((4, 5)), torch.tensor([0, -100, 4, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated and makes sizes constants
        traced = torch.jit.trace(polyce.cross_entropy, (x, y.clamp(0)))
    torch.testing.assert_close(traced(x, y), polyce.cross_entropy(x, y))


@pytest.mark.parametrize("where", ["meta", "fake"])
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("option", OPTIONS)
def test_shapes_and_dtypes_without_values(torch: Any, option: str, kind: str, where: str) -> None:
    from torch._subclasses import FakeTensorMode

    options = OPTIONS[option]
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        arrays = arguments(torch, kind)
        arrays["input"] = arrays["input"].to(dtype)
        expected = loss_and_gradients(
            torch, lambda **given: polyce.cross_entropy(**given, **options), arrays
        )
        mode = FakeTensorMode()
        convert = mode.from_tensor if where == "fake" else lambda array: array.to("meta")
        empty = {name: convert(array) for name, array in arrays.items()}
        with mode if where == "fake" else contextlib.nullcontext():
            got = loss_and_gradients(
                torch, lambda **given: polyce.cross_entropy(**given, **options), empty
            )
        facts = [
            [(tuple(a.shape), a.dtype) for a in torch.utils._pytree.tree_leaves(answer)]
            for answer in (got, expected)
        ]
        assert facts[0] == facts[1]
        with pytest.raises(ValueError, match="validate=True needs target's values"):
            polyce.cross_entropy(
                empty["input"], convert(torch.zeros(4, dtype=torch.int64)), validate=True
            )


def test_meta_tensors_give_shape_and_dtype(torch: Any) -> None:
    logits = torch.zeros((2, 3), device="meta", dtype=torch.bfloat16)
    labels = torch.zeros(2, dtype=torch.int64, device="meta")
    loss, grad = polyce.cross_entropy_with_grad(logits, labels, reduction="none")
    assert (loss.shape, loss.dtype) == ((2,), torch.bfloat16)
    assert (grad.shape, grad.dtype) == ((2, 3), torch.bfloat16)


@pytest.mark.parametrize("wide", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("mode", ["float16", "bfloat16"])
def test_autocast_gives_the_dtypes_that_torch_gives(
    torch: Any, mode: str, dtype: str, wide: str
) -> None:
    x = torch.randn((3, 5)).to(getattr(torch, dtype)).requires_grad_()
    p = torch.softmax(torch.randn((3, 5)), 1).to(getattr(torch, wide)).requires_grad_()
    w = torch.rand(5).to(p.dtype).requires_grad_()
    y = torch.tensor([0, 4, -100])
    calls: list[tuple[str, tuple[Any, ...], tuple[Any, ...]]] = [
        ("cross_entropy", (x, y), (x,)),
        ("cross_entropy", (x, y, w.detach().to(x.dtype)), (x,)),
        ("cross_entropy", (x, p), (x, p)),
        ("cross_entropy", (x, p, w), (x, p, w)),
        ("nll_loss", (x, y), (x,)),
        ("log_softmax", (x, 1), (x,)),
    ]
    for name, given, wanted in calls:
        answers = []
        for library in (torch.nn.functional, polyce):
            with torch.autocast("cpu", dtype=getattr(torch, mode)):
                loss = getattr(library, name)(*given)
            gradients = torch.autograd.grad(loss.double().square().sum(), wanted)
            answers.append((loss.detach(), *gradients))
        assert [a.dtype for a in answers[1]] == [a.dtype for a in answers[0]], name
        torch.testing.assert_close(answers[1], answers[0], rtol=2e-2, atol=2e-2)


def test_autocast_leaves_the_gradient_of_with_grad_in_inputs_dtype(torch: Any) -> None:
    x, y = torch.randn((3, 5)).bfloat16(), torch.tensor([0, 4, 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, gradient = polyce.cross_entropy_with_grad(x, y)
        compiled = torch.compile(polyce.cross_entropy, fullgraph=True, backend="aot_eager")
        assert compiled(x, y).dtype == torch.float32
        assert polyce.cross_entropy(x.to("meta"), y.to("meta")).dtype == torch.bfloat16
    assert (loss.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
    exact = polyce.cross_entropy(x.double(), y).float()
    torch.testing.assert_close(loss, exact, rtol=2e-7, atol=0.0)
    assert polyce.cross_entropy(x, y).dtype == torch.bfloat16
