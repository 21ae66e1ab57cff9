"""The losses as torch modules: torch's constructor and state, and polyce's options."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest

import polyce
from error_calls import T, X

pytestmark = pytest.mark.only("torch")

NAMES = ["CrossEntropyLoss", "NLLLoss"]
BOTH = pytest.mark.parametrize("name", NAMES)
EXTRAS: dict[str, dict[str, Any]] = {
    "CrossEntropyLoss": {
        "axis": None,
        "z_loss": 0.0,
        "logit_scale": None,
        "logit_softcap": None,
        "return_stats": False,
        "validate": None,
        "implementation": None,
        "inplace_backward": False,
        "group": None,
        "class_start": None,
        "num_classes": None,
    },
    "NLLLoss": {"axis": None, "validate": None},
}


def ours(name: str) -> Any:
    import polyce.torch

    return getattr(polyce.torch, name)


def theirs(torch: Any, name: str) -> Any:
    return getattr(torch.nn, name)


def batch(torch: Any) -> tuple[Any, Any]:
    target = torch.randint(0, 5, (7, 2))
    target[0, 0] = -100
    return torch.randn(7, 5, 2), target


@BOTH
def test_it_is_one_of_torchs(torch: Any, name: str) -> None:
    kind = theirs(torch, name)
    assert issubclass(ours(name), kind)
    parameters = inspect.signature(ours(name)).parameters.values()
    torchs = list(inspect.signature(kind).parameters.values())
    assert [(p.name, p.default) for p in list(parameters)[: len(torchs)]] == [
        (p.name, p.default) for p in torchs
    ]
    extras = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert {p.name: p.default for p in extras} == EXTRAS[name] | {"dim": None}
    assert [*kind.__constants__, *EXTRAS[name]] == ours(name).__constants__
    module = ours(name)()
    assert repr(module) == repr(kind()) == f"{name}()"
    assert repr(torch.nn.Sequential(module)) == repr(torch.nn.Sequential(kind()))
    assert list(module.parameters()) == []


def test_repr_shows_what_is_not_at_its_default(torch: Any) -> None:
    import polyce.torch

    module = polyce.torch.CrossEntropyLoss(torch.ones(3), z_loss=1e-4, inplace_backward=True)
    assert repr(module) == (
        "CrossEntropyLoss(weight of shape (3,), z_loss=0.0001, inplace_backward=True)"
    )
    assert repr(polyce.torch.NLLLoss(reduction="sum")) == "NLLLoss(reduction='sum')"
    head = polyce.torch.LinearCrossEntropyLoss(3, 4, label_smoothing=0.1)
    head.chunk_size = 2
    assert repr(head).splitlines() == [
        "LinearCrossEntropyLoss(",
        "  label_smoothing=0.1, chunk_size=2",
        "  (linear): Linear(in_features=3, out_features=4, bias=False)",
        ")",
    ]


@pytest.mark.parametrize("name", [*NAMES, "LinearCrossEntropyLoss"])
def test_fx_takes_it_for_a_leaf(torch: Any, name: str) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 5)
            self.criterion = ours(name)(*([5, 6] if name[0] == "L" else []))

        def forward(self, features: Any, target: Any) -> Any:
            hidden = self.linear(features)
            return self.criterion(hidden, target, sample_weight=features[:, 0].exp())

    arrays = torch.randn(7, 4), torch.randint(5, (7,))
    model = Model()
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == [
        "linear",
        "criterion",
    ]
    assert torch.equal(graph(*arrays), model(*arrays))
    copied = pickle.loads(pickle.dumps(model.criterion))
    assert type(copied) is ours(name)
    model.criterion = copied
    assert torch.equal(torch.fx.symbolic_trace(model)(*arrays), model(*arrays))


def test_the_extras_are_those_of_the_class_for_any_library() -> None:
    for name in NAMES:
        parameters = inspect.signature(getattr(polyce, name)).parameters
        own = inspect.signature(ours(name)).parameters
        beyond = ["inplace_backward", "group", "class_start", "num_classes"]
        assert list(own) == [*parameters, *(beyond if name[0] == "C" else [])]


@BOTH
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradient_are_torchs(
    torch: Any, name: str, reduction: str, weighted: bool
) -> None:
    x, target = batch(torch)
    options: dict[str, Any] = {"reduction": reduction, "ignore_index": 3}
    if name == "CrossEntropyLoss":
        options["label_smoothing"] = 0.1
    else:
        x = torch.log_softmax(x, 1)
    target[target < 0] = 3
    weight = torch.rand(5) if weighted else None
    answers = []
    for kind in (theirs(torch, name), ours(name)):
        leaf = x.clone().requires_grad_()
        loss = kind(weight, **options)(leaf, target)
        loss.sum().backward()
        answers.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(answers[1], answers[0])


def test_the_options_beside_torchs_reach_the_call(torch: Any) -> None:
    x, target = batch(torch)
    options = {"z_loss": 0.1, "logit_scale": 0.5, "logit_softcap": 3.0, "return_stats": "lse"}
    rows = torch.rand(7, 2)
    module = ours("CrossEntropyLoss")(axis=1, **options)
    got = module(x, target, sample_weight=rows, normalizer=5.0)
    want = polyce.cross_entropy(x, target, sample_weight=rows, normalizer=5.0, **options)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1].lse, want[1].lse, rtol=0.0, atol=0.0, equal_nan=True)
    assert got[1].entropy is None
    logs = torch.log_softmax(x, 1)
    got = ours("NLLLoss")(axis=1)(logs, target, sample_weight=rows, normalizer=5.0)
    want = polyce.nll_loss(logs, target, sample_weight=rows, normalizer=5.0)
    torch.testing.assert_close(got, want, rtol=0.0, atol=0.0)
    by_name = ours("CrossEntropyLoss")()(target=target, input=x)
    torch.testing.assert_close(by_name, polyce.cross_entropy(x, target), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("path", ["native", "reference"])
def test_backward_in_place(torch: Any, path: str) -> None:
    x, target = batch(torch)
    leaf = x.clone().requires_grad_()
    plain = ours("CrossEntropyLoss")(implementation=path)
    (want,) = torch.autograd.grad(plain(leaf, target), leaf)
    logits = leaf * 1
    module = ours("CrossEntropyLoss")(implementation=path, inplace_backward=True)
    module(logits, target).backward()
    torch.testing.assert_close(logits.detach(), want, rtol=1e-6, atol=0.0)
    assert torch.equal(leaf.grad, logits)
    module.inplace_backward = False
    logits = leaf * 1
    module(logits, target).backward()
    assert torch.equal(logits, leaf)


@BOTH
@pytest.mark.parametrize("weighted", [False, True])
def test_state_dicts_load_both_ways(torch: Any, name: str, weighted: bool) -> None:
    weight, other = (torch.rand(5), torch.rand(5)) if weighted else (None, None)
    for first, second in (
        (ours(name), theirs(torch, name)),
        (theirs(torch, name), ours(name)),
        (ours(name), ours(name)),
    ):
        source, loaded = first(weight), second(other)
        state = source.state_dict()
        assert list(state) == (["weight"] if weighted else [])
        loaded.load_state_dict(state, strict=True)
        if weighted:
            assert torch.equal(loaded.weight, weight)
            with pytest.raises(RuntimeError, match="Unexpected key"):
                second().load_state_dict(state)
            with pytest.raises(RuntimeError, match="size mismatch"):
                second(torch.rand(4)).load_state_dict(state)


@BOTH
def test_the_weight_is_a_buffer(torch: Any, name: str) -> None:
    module = ours(name)(torch.rand(5))
    assert [key for key, _ in module.named_buffers()] == ["weight"]
    assert module.half().weight.dtype == torch.float16
    assert module.double().weight.dtype == torch.float64
    assert module.to(torch.float32).weight.dtype == torch.float32
    assert module.to("meta").weight.device.type == "meta"
    x, target = batch(torch)
    weight = torch.rand(5)
    for cast in ("half", "bfloat16", "double"):
        # torch requires the logits' own dtype.
        got = getattr(ours(name)(weight), cast)()(x, target)
        want = ours(name)(getattr(weight, cast)())(x, target)
        torch.testing.assert_close(got, want, rtol=0.0, atol=0.0)
    for kind in (theirs(torch, name), ours(name)):
        with pytest.raises(TypeError, match="cannot assign 'list'"):
            kind().weight = [1.0]
        with pytest.raises((AttributeError, TypeError)):
            kind([1.0, 2.0])


@BOTH
def test_attributes_may_be_assigned(torch: Any, name: str) -> None:
    x, target = batch(torch)
    module = ours(name)(torch.rand(5))
    module.weight = weight = torch.rand(5)
    module.reduction, module.ignore_index, module.axis = "none", 2, 1
    function = polyce.cross_entropy if name == "CrossEntropyLoss" else polyce.nll_loss
    target[target < 0] = 2
    want = function(x, target, weight, reduction="none", ignore_index=2)
    torch.testing.assert_close(module(x, target), want, rtol=0.0, atol=0.0)
    for key, value in EXTRAS[name].items():
        assert getattr(ours(name)(), key) == value


def saved(torch: Any, module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@BOTH
@pytest.mark.parametrize("how", ["copy", "deepcopy", "pickle", "save"])
def test_copies_keep_everything(torch: Any, name: str, how: str) -> None:
    ways: dict[str, Callable[[Any], Any]] = {
        "copy": copy.copy,
        "deepcopy": copy.deepcopy,
        "pickle": lambda module: pickle.loads(pickle.dumps(module)),
        "save": lambda module: saved(torch, module),
    }
    x, target = batch(torch)
    module = ours(name)(torch.rand(5), ignore_index=2, reduction="none", axis=1, validate=False)
    again = ways[how](module)
    assert type(again) is type(module)
    for key in (*theirs(torch, name).__constants__, *EXTRAS[name]):
        assert getattr(again, key) == getattr(module, key)
    target[target < 0] = 2
    assert torch.equal(again(x, target), module(x, target))
    # A shallow copy shares its buffers, as with every module.
    again.weight = again.weight * 2
    assert torch.equal(again.weight, module.weight) == (how == "copy")


@BOTH
def test_torchs_deprecated_arguments(torch: Any, name: str) -> None:
    for pair in ((True, None), (None, False), (False, True)):
        found = []
        for kind in (theirs(torch, name), ours(name)):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                module = kind(size_average=pair[0], reduce=pair[1], reduction="nonsense")
            found.append((module.reduction, [str(w.message) for w in caught]))
        assert found[0] == found[1]


# The constructor accepts these, and the call reports them: every rule of the functions.
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"reduction": "Mean"}, ValueError, "reduction must be"),
    ({"reduction": None}, ValueError, "reduction must be"),
    ({"ignore_index": None}, TypeError, "ignore_index must be an integer"),
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing must lie"),
    ({"axis": 7}, ValueError, "axis must lie"),
    ({"axis": True}, TypeError, "axis must be"),
    ({"z_loss": -1.0}, ValueError, "z_loss must be finite"),
    ({"logit_scale": 0.0}, ValueError, "logit_scale must lie between 1e-15"),
    ({"logit_softcap": "3"}, TypeError, "logit_softcap must be a real number"),
    ({"return_stats": "loss"}, ValueError, "return_stats takes"),
    ({"validate": "yes"}, TypeError, "validate must be"),
    ({"implementation": "fast"}, ValueError, "implementation must be"),
]


@BOTH
@pytest.mark.parametrize(("options", "error", "match"), WRONG)
def test_the_constructor_checks_nothing_and_the_call_does(
    torch: Any, name: str, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    (key,) = options
    if name == "NLLLoss" and key not in (*theirs(torch, name).__constants__, *EXTRAS[name]):
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            ours(name)(**options)
        return
    module = ours(name)(**options)
    with pytest.raises(error, match=f"^{match}"):
        module(torch.tensor(X), torch.tensor(T))


@BOTH
def test_what_the_call_gets_is_checked(torch: Any, name: str) -> None:
    module, x, y = ours(name)(), torch.tensor(X), torch.tensor(T)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
        ((x, y + 2), {}, IndexError, "labels must lie in 0 to 4"),
        ((x, y[:2]), {}, ValueError, "target must hold class indices of shape"),
        ((x, y.bool()), {}, TypeError, "target .* must be an integer dtype"),
        ((x.int(), y), {}, TypeError, "input must be real floating point"),
        ((x, y.to("meta")), {}, TypeError, "all arrays must lie on one device"),
        ((x, T), {}, TypeError, "all arrays must come from one library"),
        ((x.to_sparse(), y), {}, TypeError, "input must be a dense tensor"),
        ((x, y), {"sample_weight": torch.ones(2)}, ValueError, "sample_weight must have one"),
        ((x, y), {"normalizer": True}, TypeError, "normalizer must be a real number"),
        ((x, y), {"sample_weight": torch.ones(3, requires_grad=True)}, TypeError, "sample_weight"),
    ]
    for arrays, options, error, match in cases:
        with pytest.raises(error, match=f"^{match}"):
            module(*arrays, **options)
    with pytest.raises(ValueError, match=r"^weight must be 1-D .* got shape \(4,\)"):
        ours(name)(torch.ones(4))(x, y)
    module.weight = torch.ones(5, requires_grad=True)
    with pytest.raises(TypeError, match=r"^weight has a gradient only where"):
        module(x, y)
    with pytest.raises(TypeError, match=r"^polyce.torch takes torch tensors, .* is ndarray; conv"):
        ours(name)()(X, T)


@BOTH
def test_hooks_and_modes_of_modules(torch: Any, name: str) -> None:
    x, target = batch(torch)
    module, seen = ours(name)(), []
    module.register_forward_hook(lambda *found: seen.append(found[2]))
    for mode in (module.train, module.eval):
        assert torch.equal(mode()(x, target), seen[-1])
    assert len(seen) == 2
    model = torch.nn.ModuleDict({"loss": ours(name)(torch.rand(5))})
    assert list(model.state_dict()) == ["loss.weight"]


def test_a_weight_kept_as_a_buffer_moves_with_a_model(torch: Any) -> None:
    class Model(torch.nn.Module):
        def __init__(self, criterion: Any) -> None:
            super().__init__()
            self.linear, self.criterion = torch.nn.Linear(4, 5), criterion

        def forward(self, features: Any, target: Any) -> Any:
            return self.criterion(self.linear(features), target)

    weight, features, target = torch.rand(5), torch.randn(6, 4), torch.randint(5, (6,))
    losses = []
    for kind in (theirs(torch, "CrossEntropyLoss"), ours("CrossEntropyLoss")):
        torch.manual_seed(3)
        model = Model(kind(weight.clone())).double()
        losses.append(model(features.double(), target))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-13, atol=0.0)


def test_explain_takes_the_function_for_torch(torch: Any) -> None:
    import polyce.torch

    x, target = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    told = polyce.explain(x, target, function=polyce.torch.cross_entropy)
    assert told == polyce.explain(x, target)


def test_the_module_is_imported_when_it_is_asked_for() -> None:
    code = (
        "import sys, polyce; assert 'torch' not in sys.modules; "
        "print(polyce.torch.CrossEntropyLoss(), hasattr(polyce, 'tensorflow'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split() == ["CrossEntropyLoss()", "False"]
