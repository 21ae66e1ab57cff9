"""torch.compile with kernels as operators: what is in the graph, and that the loss is the same."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

import polyce
from conftest import FULL
from polyce.implementations import registry
from polyce.implementations.native import path as native
from torch_graphs import BOTH, FORWARD, Graphs, answers, arguments, by_name, compiled

pytestmark = [
    pytest.mark.only("torch"),
    # torch's tracer instantiates a Function for every custom one; other warnings are about polyce.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

# aot_eager traces everything that the others do; inductor also builds code for each graph.
COMPILERS = ["eager", "aot_eager", "inductor"] if FULL else ["aot_eager"]


@pytest.fixture(autouse=True)
def fresh_compiler(torch: Any) -> None:
    torch._dynamo.reset()


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rows": {"reduction": "none", "logit_scale": 2.0, "return_stats": True},
    "sum": {"reduction": "sum", "label_smoothing": 0.1, "return_stats": ("correct", "lse")},
    "mean": {"z_loss": 0.1, "logit_softcap": 4.0, "return_stats": ()},
    "number": {"normalizer": 5, "ignore_index": -1},
    "tensor": {"normalizer": 5.0},
}


@pytest.mark.slow("torch")
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("compiler", COMPILERS)
def test_kernels_in_the_graph_give_what_they_give_outside(
    torch: Any, compiler: str, option: str, kind: str
) -> None:
    for classes in (10, 70):
        torch._dynamo.reset()
        arrays = arguments(torch, kind, classes)
        if option == "number":
            arrays["target"] = torch.where(arrays["target"] < 0, -1, arrays["target"])
        if option == "plain":
            arrays = {key: arrays[key] for key in ("input", "target")}
        options = dict(OPTIONS[option])
        if option == "tensor":
            arrays["normalizer"] = torch.tensor(options.pop("normalizer"), dtype=torch.float64)

        def function(options: Any = options, **arrays: Any) -> Any:
            return by_name(**arrays, **options)

        graphs = Graphs(torch, compiler)
        got = answers(torch, compiled(torch, function, graphs), arrays)
        # For 0-d tensors torch may make the graph twice.
        assert {tuple(names) for names in graphs.names} == {(FORWARD,)}
        want = answers(torch, function, arrays)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14, equal_nan=True)


def test_the_default_compiler(torch: Any) -> None:
    arrays = arguments(torch, "index", 300, "float32")
    got = answers(torch, torch.compile(by_name, fullgraph=True), arrays)
    want = answers(torch, by_name, arrays)
    torch.testing.assert_close(got, want, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_every_dtype(torch: Any, kind: str, dtype: str) -> None:
    arrays = arguments(torch, kind, 300, dtype)
    graphs = Graphs(torch)
    got = answers(torch, compiled(torch, by_name, graphs), arrays)
    want = answers(torch, by_name, arrays)
    assert graphs.names == [[FORWARD]]
    assert got[0].dtype == want[0].dtype
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shape", [(70,), (2, 70, 3), (0, 5), (2, 70, 0)])
def test_every_shape(torch: Any, shape: tuple[int, ...]) -> None:
    axis = min(1, len(shape) - 1)
    x = torch.randn(shape, dtype=torch.float64)
    arrays = {"input": x, "target": torch.randint(5, shape[:axis] + shape[axis + 1 :])}
    got = answers(torch, compiled(torch, by_name, Graphs(torch)), arrays)
    want = answers(torch, by_name, arrays)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0.0, equal_nan=True)
    arrays = {"input": x.movedim(axis, -1).contiguous().movedim(-1, axis)} | {
        "target": arrays["target"]
    }
    got = answers(torch, compiled(torch, by_name, Graphs(torch)), arrays)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0.0, equal_nan=True)


# Small problems


@pytest.fixture
def left_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        dataclasses.replace(row, by_name_only=native.is_left_to_the_compiler)
        if row.name == "native"
        else row
        for row in registry.TABLE
    ]
    monkeypatch.setattr(registry, "TABLE", tuple(rows))


@pytest.mark.usefixtures("left_to_the_compiler")
def test_few_logits_are_left_to_the_compiler(torch: Any) -> None:
    few, many = torch.randn(8, 10), torch.randn(native.FEWEST_COMPILED // 1024, 1024)
    for logits, function, names in (
        (few, polyce.cross_entropy, []),
        (few, by_name, [FORWARD]),
        (many[:-1], polyce.cross_entropy, []),
        (many, polyce.cross_entropy, [FORWARD]),
        (many, polyce.cross_entropy_with_grad, [BOTH]),
        (few, polyce.cross_entropy_with_grad, []),
    ):
        graphs = Graphs(torch)
        target = torch.randint(10, logits.shape[:1])
        got = compiled(torch, function, graphs, dynamic=False)(logits, target)
        assert graphs.names == [names]
        torch.testing.assert_close(got, function(logits, target))
        torch._dynamo.reset()


@pytest.mark.usefixtures("left_to_the_compiler")
@pytest.mark.parametrize("how", ["marked", "dynamic", "learned"])
def test_one_graph_serves_every_number_of_rows(torch: Any, how: str) -> None:
    graphs = Graphs(torch)
    function = compiled(torch, polyce.cross_entropy, graphs, dynamic=how == "dynamic" or None)
    counts = []
    for rows in (300, 200, 7, 1000, 12):
        x = torch.randn(rows, 1000, requires_grad=True)
        target = torch.randint(1000, (rows,))
        if how == "marked":
            for tensor in (x, target):
                torch._dynamo.mark_dynamic(tensor, 0)
        loss = function(x, target)
        want = polyce.cross_entropy(x, target)
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(want, x))
        counts.append(len(graphs.calls))
    # The second size shows torch that sizes change; later ones must not recompile.
    assert counts[1:] == [counts[1]] * 4
    assert graphs.names[-1] == [FORWARD]


@pytest.mark.usefixtures("left_to_the_compiler")
def test_one_graph_serves_every_number_of_classes(torch: Any) -> None:
    graphs = Graphs(torch)
    function = compiled(torch, polyce.cross_entropy, graphs, dynamic=True)
    counts = []
    for classes in (300, 200, 1000, 70, 10, 20):
        x = torch.randn(5, classes, requires_grad=True)
        target = torch.randint(classes, (5,))
        loss, want = function(x, target), polyce.cross_entropy(x, target)
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(want, x))
        counts.append(len(graphs.calls))
    # What is saved for each row depends on whether there are more than 64 classes.
    assert counts[:4] == [counts[0]] * 4
    assert counts[4:] == [counts[0] + 1] * 2


def test_a_new_normalizer_is_no_new_graph(torch: Any) -> None:
    graphs = Graphs(torch)

    def function(x: Any, target: Any, total: float) -> Any:
        return by_name(x, target, normalizer=total)

    compile_ = compiled(torch, function, graphs)
    x, target = torch.randn(4, 70), torch.randint(70, (4,))
    for total in (2.0, 3.5, 4.5, 7.25, 11.0):
        torch.testing.assert_close(compile_(x, target, total), function(x, target, total))
    # The second value shows torch that a number changes.
    assert len(graphs.calls) <= 2


# What torch guards


def guards_of(torch: Any, function: Any, *arguments: Any) -> list[str]:
    found: list[str] = []

    def keep_all(guards: Any) -> list[bool]:
        found.extend(f"{guard.name} {guard.guard_type}" for guard in guards)
        return [True] * len(guards)

    torch._dynamo.reset()
    options = {"guard_filter_fn": keep_all}
    torch.compile(function, fullgraph=True, backend="aot_eager", options=options)(*arguments)
    return found


@pytest.mark.parametrize("rows", [8, 4096])
def test_torch_guards_little_of_the_python_before_the_operator(torch: Any, rows: int) -> None:
    """Each guard is checked at every call."""
    x, target = torch.randn(rows, 10, requires_grad=True), torch.randint(10, (rows,))
    found = guards_of(torch, polyce.cross_entropy, x, target)
    assert len(found) <= 80, "\n".join(found)
    for name in ("call_dot_problem", "call_dot_checks", "arrays_dot_find", "formula", "graphs"):
        assert not any(f"polyce_dot_{name}" in guard for guard in found)


@pytest.mark.slow("torch")
@pytest.mark.parametrize("fullgraph", [False, True])
def test_errors_are_those_of_a_plain_call(torch: Any, fullgraph: bool) -> None:
    x, target = torch.randn(4, 5), torch.randint(5, (4,))
    calls: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
        ((x, target[:3]), {}, ValueError, "target must hold class indices of shape"),
        ((x, target), {"label_smoothing": 2.0}, ValueError, "label_smoothing must lie between"),
        ((x, target), {"logit_softcap": True}, TypeError, "logit_softcap must be a real number"),
        ((x, target), {"ignore_index": True}, TypeError, "ignore_index must be an integer"),
        ((x, target), {"normalizer": True}, TypeError, "normalizer must be a real number"),
        ((x, target), {"validate": True}, ValueError, "validate=True needs target's values"),
        ((x, target), {"implementation": "fast"}, ValueError, "implementation must be one of"),
        ((x, None), {}, TypeError, "target must be an array, got None"),
    ]
    for arrays, options, error, match in calls:
        torch._dynamo.reset()
        function = torch.compile(polyce.cross_entropy, backend="aot_eager", fullgraph=fullgraph)
        with pytest.raises(torch._dynamo.exc.Unsupported if fullgraph else error, match=match):
            function(*arrays, **options)


# Without a gradient, modules, autocast, other functions


def test_only_what_will_be_differentiated_keeps_rows(torch: Any) -> None:
    x, target = torch.randn(4, 70), torch.randint(70, (4,))
    leaf = x.clone().requires_grad_()
    keeps = []
    for logits, mode in (
        (x, torch.enable_grad),
        (leaf, torch.no_grad),
        (leaf, torch.inference_mode),
        (leaf, torch.enable_grad),
    ):
        torch._dynamo.reset()
        graphs = Graphs(torch)
        with mode():
            loss = compiled(torch, by_name, graphs)(logits, target)
        torch.testing.assert_close(loss.detach(), by_name(x, target), rtol=0.0, atol=0.0)
        keeps.append(graphs.calls[0][0][1][5])
    assert keeps == [False, False, False, True]


@pytest.mark.parametrize("name", ["CrossEntropyLoss", "NLLLoss"])
def test_modules(torch: Any, name: str) -> None:
    import polyce.torch

    class Model(torch.nn.Module):
        def __init__(self, criterion: Any) -> None:
            super().__init__()
            self.linear, self.criterion = torch.nn.Linear(4, 70), criterion

        def forward(self, features: Any, target: Any) -> Any:
            logits = self.linear(features)
            if name == "NLLLoss":
                logits = torch.log_softmax(logits, 1)
            return self.criterion(logits, target)

    options = {"implementation": "native"} if name == "CrossEntropyLoss" else {}
    model = Model(getattr(polyce.torch, name)(torch.rand(70), **options))
    features, target = torch.randn(6, 4), torch.randint(70, (6,))
    graphs = Graphs(torch)
    whole = compiled(torch, model, graphs)
    for mode in (model.train, model.eval):
        mode()
        got, want = whole(features, target), model(features, target)
        torch.testing.assert_close(got, want)
        parameters = list(model.parameters())
        torch.testing.assert_close(
            torch.autograd.grad(got, parameters), torch.autograd.grad(want, parameters)
        )
    alone = torch.compile(model.criterion, fullgraph=True, backend="aot_eager")
    logits = torch.log_softmax(torch.randn(6, 70), 1)
    torch.testing.assert_close(alone(logits, target), model.criterion(logits, target))
    assert {tuple(names) for names in graphs.names} == ({(FORWARD,)} if options else {()})


@pytest.mark.parametrize("where", ["inside", "around the call", "around backward"])
def test_autocast(torch: Any, where: str) -> None:
    weight = torch.randn(300, 4, requires_grad=True)
    features, target = torch.randn(6, 4), torch.randint(300, (6,))

    def function(weight: Any) -> Any:
        logits = torch.nn.functional.linear(features, weight)
        return by_name(logits, target)

    def inside(weight: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return function(weight)

    compile_ = compiled(torch, inside if where == "inside" else function, Graphs(torch))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=where == "around the call"):
        loss = compile_(weight)
    want = function(weight) if where == "around backward" else inside(weight)
    assert loss.dtype == want.dtype == torch.float32
    torch.testing.assert_close(loss, want)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=where == "around backward"):
        grads = [torch.autograd.grad(found, weight) for found in (loss, want)]
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("option", ["plain", "rows", "sum", "number"])
def test_with_grad(torch: Any, option: str, kind: str) -> None:
    options = OPTIONS[option] | {"implementation": "native"}
    arrays = arguments(torch, kind)
    if option == "number":
        options |= {"grad_output": 2.5}
        arrays["target"] = torch.where(arrays["target"] < 0, -1, arrays["target"])
    if option == "rows":
        arrays["grad_output"] = torch.rand(4)

    def function(**arrays: Any) -> Any:
        return polyce.cross_entropy_with_grad(**arrays, **options)

    graphs = Graphs(torch)
    leaves = arrays | {"input": arrays["input"].clone().requires_grad_()}
    got = compiled(torch, function, graphs)(**leaves)
    assert graphs.names == [[BOTH]]
    want = function(**arrays)
    assert len(got) == len(want)
    assert not got[0].requires_grad
    assert not got[1].requires_grad
    torch.testing.assert_close(got[:2], want[:2], rtol=1e-13, atol=1e-15)
    for facts in zip(*(found[2] for found in (got, want) if len(found) > 2), strict=True):
        if facts[1] is None:
            assert facts[0] is None
        else:
            torch.testing.assert_close(*facts, equal_nan=True)


def test_bad_labels_give_nan(torch: Any) -> None:
    x = torch.zeros(3, 2, requires_grad=True)
    target = torch.tensor([0, 2, -1])
    losses = compiled(torch, by_name, Graphs(torch))(x, target, reduction="none")
    assert losses.isnan().tolist() == [False, True, True]
    (grad,) = torch.autograd.grad(losses.sum(), x)
    assert grad.isnan().tolist() == [[False] * 2, [True] * 2, [True] * 2]


def test_checkpoints(torch: Any) -> None:
    weight = torch.randn(70, 4, requires_grad=True)
    features, target = torch.randn(6, 4), torch.randint(70, (6,))

    def loss(weight: Any) -> Any:
        return by_name(features @ weight.t(), target)

    def function(weight: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(loss, weight, use_reentrant=False)

    got = compiled(torch, function, Graphs(torch))(weight)
    for found in (got, function(weight)):
        torch.testing.assert_close(found, loss(weight))
        torch.testing.assert_close(
            torch.autograd.grad(found, weight), torch.autograd.grad(loss(weight), weight)
        )


def test_a_compiled_step_with_its_backward_pass(torch: Any) -> None:
    x, target = torch.randn(6, 70), torch.randint(70, (6,))
    leaf = x.clone().requires_grad_()

    def step() -> None:
        by_name(leaf * 1, target).backward()

    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(step, backend="aot_eager")()
    got, leaf.grad = leaf.grad, None
    step()
    torch.testing.assert_close(got, leaf.grad)
    # Only the backward pass is compiled here.
    leaf.grad, value = None, by_name(leaf, target)
    from torch._dynamo import compiled_autograd

    with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
        value.backward()
    torch.testing.assert_close(leaf.grad, got)


@pytest.mark.parametrize("kind", ["index", "probability"])
def test_what_torch_cannot_compile_takes_the_rules_of_the_operators(torch: Any, kind: str) -> None:
    x, target = torch.randn(2, 5, dtype=torch.float64), torch.tensor([0, 3])
    leaves = [x.requires_grad_()]
    if kind == "probability":
        target = torch.softmax(torch.randn(2, 5, dtype=torch.float64), 1)
        leaves.append(target.requires_grad_())
    # Without AOTAutograd the graph runs on torch's eager autograd.
    function = compiled(torch, by_name, Graphs(torch, "eager"))
    seconds = []
    for loss in (function, by_name):
        (grad,) = torch.autograd.grad(loss(x, target), x, create_graph=True)
        seconds.append(torch.autograd.grad(grad.square().sum(), leaves, create_graph=True))
    torch.testing.assert_close(seconds[0], seconds[1], rtol=1e-12, atol=1e-15)
    thirds = [torch.autograd.grad(found[0].sum(), x)[0] for found in seconds]
    torch.testing.assert_close(thirds[0], thirds[1], rtol=1e-11, atol=1e-14)


def test_exports_and_traces_hold_operations_of_torch_alone(torch: Any) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    class Loss(torch.nn.Module):
        def forward(self, x: Any, target: Any) -> Any:
            return polyce.cross_entropy(x, target)

    x, target = torch.randn(600, 1000), torch.randint(1000, (600,))
    modules = [torch.export.export(Loss(), (x, target), strict=s).module() for s in (True, False)]
    for mode in ("fake", "real"):
        loss = Loss()  # make_fx treats a function's optional arguments as arguments
        modules.append(make_fx(loss, tracing_mode=mode)(x, target))
    graphs = Graphs(torch)
    per_sample = torch.func.grad(polyce.cross_entropy)
    compiled(torch, per_sample, graphs)(x, target)
    assert graphs.names == [[]]
    for module in modules:
        assert not any(str(node.target).startswith("polyce.") for node in module.graph.nodes)
        torch.testing.assert_close(module(x, target), polyce.cross_entropy(x, target))


@pytest.mark.slow("torch")
@pytest.mark.parametrize("call", ["cross_entropy(x, t)", "linear_cross_entropy(x, x, t)"])
def test_the_first_call_of_a_process_may_be_compiled(call: str) -> None:
    """A first call must not change anything that torch guards on."""
    code = f"""
import torch, polyce
x, t = torch.randn(5, 5, requires_grad=True), torch.tensor([0, 4, 2, 1, 1])
loss = lambda x, t: polyce.{call}
compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(x, t)
torch.testing.assert_close(compiled, loss(x, t))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
