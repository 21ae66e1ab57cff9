"""A linear head under torch's tracing and transforms: its operator, export, and torch.func."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest

import polyce
from conftest import FULL
from polyce.call.options import Options
from polyce.linear.call import Gradients
from test_linear_torch import CASES, C, F, N, answer, data, errors, fused, of, pick, unfused, widen
from torch_graphs import Graphs, compiled

pytestmark = [
    pytest.mark.only("torch"),
    # torch's tracer instantiates a Function for every custom one; other warnings are about polyce.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

OPERATOR = "polyce.linear_cross_entropy.default"
# aot_eager traces everything that the others do; inductor also builds code for each graph.
COMPILERS = ["eager", "aot_eager", "inductor"] if FULL else ["aot_eager"]
Loss = Callable[..., Any]


@pytest.fixture(autouse=True)
def fresh_compiler(torch: Any) -> None:
    torch._dynamo.reset()


def compare(torch: Any, got: Any, want: Any, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol / 10, equal_nan=True)


# torch.compile


@pytest.mark.slow("torch")
@pytest.mark.parametrize("case", CASES[::3] if FULL else CASES[::7], ids=str)
@pytest.mark.parametrize("compiler", COMPILERS)
def test_one_graph_gives_the_same_loss(torch: Any, compiler: str, case: tuple[Any, ...]) -> None:
    reduction, kind, bias, name = case
    options = pick(torch, name, reduction)
    leaves, target = data(torch, kind, bias=bias)
    rows = torch.randn(N, dtype=torch.float64)
    by = rows if reduction == "none" else rows[0]
    graphs = Graphs(torch, compiler)
    # Some have dynamic sizes, for which torch may start over within the call.
    function = compiled(torch, of(fused, target, **options), graphs, dynamic=bias)
    got = answer(torch, function, leaves, by)
    assert graphs.names in ([[OPERATOR]], [[OPERATOR]] * (2 if bias else 1))
    compare(torch, got, answer(torch, of(unfused, target, **options), leaves, by))


@pytest.mark.slow("torch")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_with_grad(torch: Any, reduction: str) -> None:
    names = ("input", "linear_weight", "linear_bias")
    leaves, target = data(torch)
    options = pick(torch, "sampled", reduction)
    by = torch.rand(N, dtype=torch.float64) if reduction == "none" else 2.5
    scale = torch.as_tensor(by, dtype=torch.float64)
    want = answer(torch, of(unfused, target, **options), leaves, scale)
    for wrt in (names, ("linear_weight",), ()):

        def function(x: Any, w: Any, b: Any, by: Any, wrt: Any = wrt) -> Any:
            return polyce.linear_cross_entropy_with_grad(
                x, w, target, linear_bias=b, **options, wrt=wrt, grad_output=by, chunk_size=3
            )

        graphs = Graphs(torch)
        loss, gradients = compiled(torch, function, graphs)(*leaves, by)
        assert graphs.names == [[OPERATOR]]
        found = [loss, *(a for a in gradients if a is not None)]
        assert not any(a.requires_grad for a in found)
        assert [a is not None for a in gradients] == [name in wrt for name in names]
        wanted = [a for name, a in zip(names, want[1:], strict=True) if name in wrt]
        compare(torch, found, [want[0], *wanted])


@pytest.mark.slow("torch")
@pytest.mark.parametrize("needed", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_operator_is_asked_for_what_is_needed(
    torch: Any, reduction: str, needed: tuple[int, ...]
) -> None:
    leaves, target = data(torch)
    for leaf, need in zip(leaves, needed, strict=True):
        leaf.requires_grad_(bool(need))
    graphs = Graphs(torch)
    function = compiled(torch, of(fused, target, reduction=reduction), graphs)
    plain = of(unfused, target, reduction=reduction)
    compare(torch, function(*leaves).detach(), plain(*leaves).detach())
    if any(needed):
        compare(torch, answer(torch, function, leaves), answer(torch, plain, leaves))
        with torch.no_grad():
            compare(torch, function(*leaves), plain(*leaves))
    wants = [list(calls[0][1][13:16]) for calls in graphs.calls]
    assert wants[0] == [bool(need) and reduction != "none" for need in needed]
    assert wants[1:] == [[False] * 3] * any(needed)


@pytest.mark.parametrize("where", ["inside", "around the call", "around backward"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"] if FULL else ["bfloat16"])
def test_autocast(torch: Any, dtype: str, where: str) -> None:
    (leaves, target), narrow = data(torch, dtype="float32", rows=64), getattr(torch, dtype)

    def inside(*leaves: Any) -> Any:
        with torch.autocast("cpu", dtype=narrow):
            return fused(*leaves, target)

    function = inside if where == "inside" else of(fused, target)
    compile_ = compiled(torch, function, Graphs(torch))
    with torch.autocast("cpu", dtype=narrow, enabled=where == "around the call"):
        loss = compile_(*leaves)
    with torch.autocast("cpu", dtype=narrow, enabled=where == "around backward"):
        got = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    assert {a.dtype for a in got} == {torch.float32}
    want = answer(torch, of(unfused, target), widen(leaves, torch.float64))
    eps = torch.finfo(torch.float32 if where == "around backward" else narrow).eps
    assert max(errors(got, want)) < 2 * eps


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_16_bits(torch: Any, reduction: str, dtype: str) -> None:
    leaves, target = data(torch, dtype=dtype, rows=64)
    function = compiled(torch, of(fused, target, reduction=reduction), Graphs(torch))
    got = answer(torch, function, leaves)
    assert {a.dtype for a in got} == {leaves[0].dtype}
    wide = widen(leaves, torch.float64)
    want = answer(torch, of(unfused, target, reduction=reduction), wide)
    assert max(errors(got, want)) < 2 * torch.finfo(leaves[0].dtype).eps


def test_new_values_are_no_new_graph(torch: Any) -> None:
    graphs = Graphs(torch)

    def loss(x: Any, w: Any, b: Any, target: Any, total: float) -> Any:
        return fused(x, w, b, target, normalizer=total)

    function = compiled(torch, loss, graphs)
    counts = []
    for total in (2.0, 3.5, 4.5, 7.25):
        leaves, target = data(torch)
        given = (*leaves, target.roll(round(total)), total)
        found = [torch.autograd.grad(f(*given), leaves) for f in (function, loss)]
        compare(torch, *found)
        want = unfused(*given[:-1], normalizer=total)
        compare(torch, found[0], torch.autograd.grad(want, leaves))
        counts.append(len(graphs.calls))
    # The second value shows torch that a number changes.
    assert counts in ([1] * 4, [1, 2, 2, 2])


@pytest.mark.slow("torch")
@pytest.mark.parametrize("how", ["marked-none", "dynamic-none", "learned-none", "learned-mean"])
def test_one_graph_serves_every_number_of_rows(torch: Any, how: str) -> None:
    how, reduction = how.split("-")
    graphs, given, counts = Graphs(torch), {"reduction": reduction}, []
    function = compiled(torch, fused, graphs, dynamic=how == "dynamic" or None)
    for rows in (8, 5, 3, 20, 2):
        leaves, target = data(torch, rows=rows)
        for tensor in (leaves[0], target) if how == "marked" else ():
            torch._dynamo.mark_dynamic(tensor, 0)
        want = answer(torch, of(unfused, target, **given), leaves)
        compare(torch, answer(torch, of(function, target, **given), leaves), want)
        counts.append(len(graphs.calls))
    assert counts == [counts[0], *[2 if how == "learned" else counts[0]] * 4]


def test_one_graph_serves_every_head(torch: Any) -> None:
    graphs, counts = Graphs(torch), []
    function = compiled(torch, fused, graphs, dynamic=True)
    for classes, features in ((40, 6), (70, 5), (300, 2), (7, 9)):
        shapes = ((N, features), (classes, features), (classes,))
        leaves = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
        target = torch.randint(classes, (N,))
        want = answer(torch, of(unfused, target), leaves)
        compare(torch, answer(torch, of(function, target), leaves), want)
        counts.append(len(graphs.calls))
    assert counts == [counts[0]] * 4


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_that_do_not_count(torch: Any, reduction: str) -> None:
    leaves, target = data(torch)
    given = {"reduction": reduction}
    function = compiled(torch, fused, Graphs(torch), dynamic=False)
    clean = widen(leaves, torch.float64)
    with torch.no_grad():
        leaves[0][1], clean[0][1] = float("inf"), 0.0
    want = answer(torch, of(unfused, target, **given), clean)
    compare(torch, answer(torch, of(function, target, **given), leaves), want)
    for labels in (torch.full_like(target, -100), target[:0]):
        leaves[0] = leaves[0][: len(labels)].detach().requires_grad_()
        loss, *gradients = answer(torch, of(function, labels, **given), leaves)
        assert loss.isnan().all() if reduction == "mean" else not loss.any()
        compare(torch, gradients, [torch.zeros_like(leaf) for leaf in leaves], 0.0)


def test_bad_labels_give_nan(torch: Any) -> None:
    (x, w, b), _ = data(torch)
    target = torch.tensor([0, C, -1, -100, 1, 2, 3])
    losses = compiled(torch, fused, Graphs(torch))(x, w, b, target, reduction="none")
    assert losses.isnan().tolist() == [label in (C, -1) for label in target.tolist()]
    (grad,) = torch.autograd.grad(losses.sum(), x)
    assert grad.isnan().any(1).tolist() == losses.isnan().tolist()


@pytest.mark.slow("torch")
def test_torchs_own_checks_of_operators(torch: Any) -> None:
    from polyce.linear import torch_op

    kinds, reductions = ("index", "probability"), ("mean", "none", "sum")
    for number, (kind, reduction) in enumerate(itertools.product(kinds, reductions)):
        dtype = ("float64", "bfloat16")[number // 2 % 2]
        leaves, target = data(torch, kind, dtype, bias=number % 2 == 0)
        options = Options(
            reduction=reduction,
            label_smoothing=0.1 * (number % 3),
            logit_softcap=None if number % 2 else 4.0,
            stats="lse,correct" if number % 3 == 2 else None,
        )
        if options.stats:
            # torch compares nan, which an ignored row has, with nothing.
            target = target.clamp(0)
        wanted = Gradients(*(reduction != "none" and leaf is not None for leaf in leaves))
        scale, of_target = None, (None,) * 3
        if number == 2:
            target, of_target = torch.randint(C, (N, 2)), (torch.rand(N, 2), None, None)
        if number == 4:
            target, scale = torch.rand(N, 3), 0.5
            of_target = (None, torch.rand(C, 3), torch.rand(C))
        settings = torch_op._HeadSettings(wanted, options[:-1], leaves[0].dtype, scale, 3, None)
        weight = torch.rand(C, dtype=leaves[0].dtype) if number % 3 else None
        normalizer = torch.tensor(3.0) if reduction == "mean" and number % 2 else None
        tensors = (*leaves, target, weight, torch.rand(N), normalizer, *(None,) * 3, *of_target)
        close = {"rtol": 2e-2, "atol": 2e-2} if dtype == "bfloat16" else {}
        torch.library.opcheck(torch_op._operator, (*tensors, *settings.values()), **close)


# As a module


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_module_is_torchs(torch: Any, weighted: bool, bias: bool) -> None:
    import polyce.torch

    (x, *_), target = data(torch)
    weight = torch.rand(C, dtype=torch.float64) if weighted else None
    for options in ({}, {"reduction": "none"}, {"label_smoothing": 0.1, "reduction": "sum"}):
        given = {"bias": bias, "dtype": torch.float64, "weight": weight, **options}
        theirs = torch.nn.LinearCrossEntropyLoss(F, C, **given)
        ours = polyce.torch.LinearCrossEntropyLoss(F, C, **given)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert type(ours.linear) is torch.nn.Linear
        for one, other in ((ours, theirs), (theirs, ours)):
            with torch.no_grad():
                one.linear.weight.normal_()
            other.load_state_dict(one.state_dict())
            calls = [
                (lambda x, *_, m=m: m(x, target), [x, *m.parameters()]) for m in (ours, theirs)
            ]
            compare(torch, *(answer(torch, *call) for call in calls))


def test_the_module_has_the_options_of_the_function(torch: Any) -> None:
    import polyce.torch

    leaves, target = data(torch)
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "logit_scale": 0.5, "logit_softcap": 3.0}
    options |= {"weight": torch.rand(C, dtype=torch.float64)}
    rows = {"sample_weight": torch.rand(N), "normalizer": 3.0}
    own = {"chunk_size": 3, "validate": True, "implementation": "reference"}
    module = polyce.torch.LinearCrossEntropyLoss(F, C, bias=True, ignore_index=2, **own, **options)
    module.double().linear.load_state_dict({"weight": leaves[1], "bias": leaves[2]})
    labels = torch.where(target < 0, 2, target)
    want = unfused(*leaves, labels, ignore_index=2, **options, **rows)
    compare(torch, module(leaves[0], labels, **rows).detach(), want.detach())
    with pytest.raises(IndexError, match="labels must lie in 0 to 4"):
        module(leaves[0], labels + C)


def test_a_model_with_a_tied_head_and_a_checkpoint(torch: Any) -> None:
    import polyce.torch

    class Model(torch.nn.Module):
        def __init__(self, criterion: Any) -> None:
            super().__init__()
            self.embedding, self.criterion = torch.nn.Embedding(C, F), criterion
            criterion.linear.weight = self.embedding.weight

        def forward(self, words: Any, target: Any) -> Any:
            call = torch.utils.checkpoint.checkpoint
            return call(self.criterion, self.embedding(words), target, use_reentrant=False)

    weight, (words, target) = torch.rand(C), torch.randint(C, (2, N))
    model = Model(polyce.torch.LinearCrossEntropyLoss(F, C, weight=weight, bias=True))
    plain = Model(torch.nn.LinearCrossEntropyLoss(F, C, weight=weight, bias=True))
    plain.load_state_dict(model.state_dict())
    graphs, answers = Graphs(torch), []
    for each in (plain, model, compiled(torch, model, graphs)):
        loss = each(words, target)
        answers.append((loss.detach(), *torch.autograd.grad(loss, list(each.parameters()))))
    compare(torch, answers[1], answers[0], 1e-5)
    compare(torch, answers[2], answers[0], 1e-5)
    assert len(graphs.calls) == 1


# Without the operator


@pytest.mark.slow("torch")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_exports_with_any_number_of_rows(torch: Any, kind: str, strict: bool) -> None:
    import polyce.torch

    module = polyce.torch.LinearCrossEntropyLoss(F, C, bias=True, dtype=torch.float64, z_loss=0.1)
    (x, *_), target = data(torch, kind, rows=4)
    dims = [{0: torch.export.Dim("rows")}] * 2
    program = torch.export.export(module, (x.detach(), target), dynamic_shapes=dims, strict=strict)
    assert not any(str(node.target).startswith("polyce.") for node in program.graph.nodes)
    exported = program.module()
    for rows in (4, 3, 2):
        (x, *_), target = data(torch, kind, rows=rows)
        leaves = [x, *exported.parameters()]
        got = answer(torch, lambda x, *_, y=target: exported(x, y), leaves)
        compare(torch, got, answer(torch, of(unfused, target, z_loss=0.1), leaves))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_make_fx(torch: Any, reduction: str, mode: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def both(function: Any) -> Any:
        def run(x: Any, w: Any, b: Any, y: Any) -> Any:
            leaves = [a.detach().requires_grad_() for a in (x, w, b)]
            return answer(torch, of(function, y, reduction=reduction), leaves)

        return run

    leaves, target = data(torch)
    arrays = [leaf.detach() for leaf in leaves]
    # Traced without an ignored row, it must still ignore one later.
    graph = make_fx(both(fused), tracing_mode=mode)(*arrays, target.clamp(0))
    compare(torch, graph(*arrays, target), both(unfused)(*arrays, target))


@pytest.mark.parametrize("where", ["meta", "fake"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_shapes_and_dtypes_without_values(torch: Any, reduction: str, where: str) -> None:
    from torch._subclasses import FakeTensorMode

    for kind, dtype in itertools.product(["index", "probability"], ["bfloat16", "float32"]):
        leaves, target = data(torch, kind, dtype)
        want = answer(torch, of(unfused, target, reduction=reduction), leaves)
        mode = FakeTensorMode()
        convert = mode.from_tensor if where == "fake" else lambda array: array.to("meta")
        x, w, b, y = map(convert, (*(leaf.detach() for leaf in leaves), target))
        with mode if where == "fake" else contextlib.nullcontext():
            empty = [a.requires_grad_() for a in (x, w, b)]
            got = answer(torch, of(fused, y, reduction=reduction), empty)
            loss, gradients = polyce.linear_cross_entropy_with_grad(
                x, w, y, linear_bias=b, reduction=reduction
            )
        facts = [[(a.shape, a.dtype) for a in found] for found in (got, (loss, *gradients), want)]
        assert facts[0] == facts[1] == facts[2]


# Transforms of a loss of (x, w, b, y); `a` holds the first three, and every row of y counts.
DIMS = (0, None, None, 0)
TRANSFORMS: dict[str, Callable[[Any, Loss, Any, Any], Any]] = {
    "grad": lambda f, loss, a, y: f.grad_and_value(loss, (0, 1, 2))(*a, y),
    "jacrev": lambda f, loss, a, y: f.jacrev(loss, (0, 1, 2))(*a, y),
    "hessian": lambda f, loss, a, y: f.hessian(loss, (0, 1, 2))(*a, y),
    "jvp": lambda f, loss, a, y: f.jvp(lambda *a: loss(*a, y), a, tuple(t.cos() for t in a)),
    "jacfwd of jacfwd": lambda f, loss, a, y: f.jacfwd(f.jacfwd(loss, 1), 1)(*a, y),
    "vmap of rows": lambda f, loss, a, y: f.vmap(loss, DIMS)(*a, y),
    "vmap of grad": lambda f, loss, a, y: f.vmap(f.grad(loss, (0, 1, 2)), DIMS)(*a, y),
    "vmap of heads": lambda f, loss, a, y: f.vmap(loss, (None, 0, None, None))(
        a[0], a[1][None] * a[1][:, :1, None], a[2], y
    ),
    "grad of vmap": lambda f, loss, a, y: f.grad(
        lambda w: f.vmap(loss, DIMS)(a[0], w, a[2], y).square().sum()
    )(a[1]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("reduction", ["mean", "sum"] if FULL else ["mean"])
def test_transforms(torch: Any, name: str, reduction: str) -> None:
    leaves, target = data(torch)
    arrays, weight = tuple(leaf.detach() for leaf in leaves), torch.rand(C, dtype=torch.float64)
    labels = target.clamp(0) if "vmap" in name else target

    def compute(function: Any) -> Any:
        def loss(x: Any, w: Any, b: Any, y: Any) -> Any:
            return function(x, w, b, y, weight=weight, reduction=reduction)

        return TRANSFORMS[name](torch.func, loss, arrays, labels)

    compare(torch, compute(fused), compute(unfused))
