"""The losses as objects, torch's constructor included, and torch's deprecated arguments."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import polyce
from polyce.testing.backends import Backend

CLASSES: dict[str, Callable[..., Any]] = {
    "CrossEntropyLoss": polyce.CrossEntropyLoss,
    "NLLLoss": polyce.NLLLoss,
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "cross_entropy": polyce.cross_entropy,
    "cross_entropy_with_grad": polyce.cross_entropy_with_grad,
    "nll_loss": polyce.nll_loss,
}
BOTH = pytest.mark.parametrize("name", CLASSES)

# The parameters of torch 2.13, in its order.
NLL = [
    ("weight", None),
    ("size_average", None),
    ("ignore_index", -100),
    ("reduce", None),
    ("reduction", "mean"),
]
TORCH = {
    "CrossEntropyLoss": [*NLL, ("label_smoothing", 0.0)],
    "NLLLoss": NLL,
    "cross_entropy": [*NLL, ("label_smoothing", 0.0)],
    "cross_entropy_with_grad": [*NLL, ("label_smoothing", 0.0)],
    "nll_loss": NLL,
}
EXTRAS = {
    "CrossEntropyLoss": {
        "axis": None,
        "z_loss": 0.0,
        "logit_scale": None,
        "logit_softcap": None,
        "return_stats": False,
        "validate": None,
        "implementation": None,
        "dim": None,
    },
    "NLLLoss": {"axis": None, "validate": None, "dim": None},
}
OPTIONS = {"sample_weight": None, "normalizer": None} | EXTRAS["CrossEntropyLoss"]
VALUES = {"axis": None, "logit_scale": None, "logit_softcap": None, "implementation": None}
FUNCTION_EXTRAS = {
    "cross_entropy": OPTIONS,
    "cross_entropy_with_grad": OPTIONS | {"grad_output": None, "grad_stats": None, "out": None},
    "nll_loss": {"sample_weight": None, "normalizer": None} | EXTRAS["NLLLoss"],
    "log_softmax": {"logit_scale": None, "logit_softcap": None, "dim": None},
    "log_prob": VALUES | {"ignore_index": -100, "validate": None},
    "entropy": VALUES,
}

X = np.linspace(-2, 2, 24, dtype=np.float32).reshape(2, 3, 4)
T = np.array([[0, 1, 2, 1], [2, 2, 0, 1]], dtype=np.int32)
W = np.array([1.0, 0.5, 2.0], dtype=np.float32)


def parameters(function: Any) -> dict[Any, list[inspect.Parameter]]:
    kinds: dict[Any, list[inspect.Parameter]] = {}
    for parameter in inspect.signature(function).parameters.values():
        kinds.setdefault(parameter.kind, []).append(parameter)
    return kinds


@pytest.mark.only("numpy")
@pytest.mark.parametrize("name", TORCH)
def test_torchs_parameters_in_torchs_order(name: str) -> None:
    function = getattr(polyce, name)
    names = [
        (p.name, p.default) for p in parameters(function)[inspect.Parameter.POSITIONAL_OR_KEYWORD]
    ]
    before = (
        []
        if name in CLASSES
        else [("input", inspect.Parameter.empty), ("target", inspect.Parameter.empty)]
    )
    assert names == before + TORCH[name]


@pytest.mark.only("numpy")
@BOTH
def test_extras_are_by_keyword_only_and_off(name: str) -> None:
    extras = parameters(CLASSES[name])[inspect.Parameter.KEYWORD_ONLY]
    assert {p.name: p.default for p in extras} == EXTRAS[name]
    assert [p.name for p in extras] == list(EXTRAS[name])
    with pytest.raises(TypeError, match="positional"):
        CLASSES[name](*(default for _, default in TORCH[name]), 1)


@pytest.mark.only("numpy")
@pytest.mark.parametrize("name", FUNCTION_EXTRAS)
def test_every_function_takes_the_options_by_keyword(name: str) -> None:
    extras = parameters(getattr(polyce, name))[inspect.Parameter.KEYWORD_ONLY]
    assert {p.name: p.default for p in extras} == FUNCTION_EXTRAS[name]


@pytest.mark.only("torch")
@pytest.mark.parametrize("name", TORCH)
def test_the_parameters_are_those_of_the_installed_torch(name: str) -> None:
    import torch

    module = torch.nn if name in CLASSES else torch.nn.functional
    theirs = getattr(module, name.removesuffix("_with_grad"))
    found = [(p.name, p.default) for p in inspect.signature(theirs).parameters.values()]
    assert found[0 if name in CLASSES else 2 :] == TORCH[name]


@BOTH
def test_attributes_are_what_was_given(backend: Backend, name: str) -> None:
    default = CLASSES[name]()
    weight = backend.asarray(W)
    given = CLASSES[name](weight, ignore_index=1, reduction="sum", axis=-1, validate=False)
    assert given.weight is weight
    assert (given.ignore_index, given.reduction, given.axis, given.validate) == (
        1,
        "sum",
        -1,
        False,
    )
    attributes = dict(TORCH[name]) | EXTRAS[name]
    for key in ("size_average", "reduce", "dim"):
        del attributes[key]
    assert vars(default) == attributes
    if name == "CrossEntropyLoss":
        given = polyce.CrossEntropyLoss(label_smoothing=0.5, implementation="reference")
        assert (given.label_smoothing, given.implementation) == (0.5, "reference")


@BOTH
def test_repr_shows_what_is_not_at_its_default(backend: Backend, name: str) -> None:
    assert repr(CLASSES[name]()) == f"{name}()"
    changed = CLASSES[name](backend.asarray(W), ignore_index=-100, reduction="sum", axis=0)
    assert repr(changed) == f"{name}(weight of shape {W.shape}, reduction='sum', axis=0)"
    changed.validate = False
    assert repr(changed).endswith(", axis=0, validate=False)")


CASES = [
    pytest.param({}, id="defaults"),
    pytest.param({"weight": W, "reduction": "sum"}, id="weight"),
    pytest.param({"ignore_index": 1, "reduction": "none"}, id="ignore_index"),
    pytest.param({"label_smoothing": 0.3, "weight": W}, id="label_smoothing"),
    pytest.param({"axis": 1, "validate": False}, id="extras"),
]


@pytest.mark.parametrize("options", CASES)
@BOTH
def test_a_call_is_the_functions(backend: Backend, name: str, options: dict[str, Any]) -> None:
    if name == "NLLLoss":
        options = {key: value for key, value in options.items() if key != "label_smoothing"}
    options = {k: backend.asarray(v) if k == "weight" else v for k, v in options.items()}
    function = {"CrossEntropyLoss": polyce.cross_entropy, "NLLLoss": polyce.nll_loss}[name]
    x, t = backend.asarray(X), backend.asarray(T)
    got, want = CLASSES[name](**options)(x, t), function(x, t, **options)
    assert backend.owns(got)
    np.testing.assert_array_equal(backend.to_numpy(got), backend.to_numpy(want))
    by_name = CLASSES[name](**options)(target=t, input=x)
    np.testing.assert_array_equal(backend.to_numpy(by_name), backend.to_numpy(want))


def test_axis_reaches_the_call(backend: Backend) -> None:
    x, t = backend.asarray(np.moveaxis(X, 1, -1).copy()), backend.asarray(T)
    want = backend.to_numpy(polyce.cross_entropy(backend.asarray(X), t))
    got = backend.to_numpy(polyce.CrossEntropyLoss(axis=-1)(x, t))
    # The layout may change the order of a sum: a few units in the last place of float32.
    np.testing.assert_allclose(got, want, rtol=1e-6)
    log_probabilities = polyce.log_softmax(x, axis=-1)
    got = backend.to_numpy(polyce.NLLLoss(axis=-1)(log_probabilities, t))
    np.testing.assert_allclose(got, want, rtol=1e-6)


# Options that no call can take, and what the call says of them.
UNCHECKED = [
    ({"weight": [1.0, 2.0]}, TypeError, "weight must be an array"),
    ({"ignore_index": None}, TypeError, "ignore_index must be an integer"),
    ({"reduction": "Mean"}, ValueError, "reduction must be"),
    ({"reduction": None}, ValueError, "reduction must be"),
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing must lie"),
    ({"axis": 7}, ValueError, "axis must lie"),
    ({"validate": "yes"}, TypeError, "validate must be"),
    ({"implementation": "fast"}, ValueError, "implementation must be"),
]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [pytest.param(*row, id="-".join(map(str, (*row[0], *row[0].values())))) for row in UNCHECKED],
)
@BOTH
def test_the_constructor_checks_nothing_and_the_call_does(
    backend: Backend, name: str, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    if name == "NLLLoss" and options.keys() & {"label_smoothing", "implementation"}:
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            polyce.NLLLoss(**options)
        return
    loss = CLASSES[name](**options)
    for key, value in options.items():
        assert getattr(loss, key) == value
    with pytest.raises(error, match=f"^{match}"):
        loss(backend.asarray(X), backend.asarray(T))


@BOTH
@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles_keep_everything(
    backend: Backend, name: str, how: Callable[[Any], Any]
) -> None:
    loss = CLASSES[name](backend.asarray(W), ignore_index=2, reduction="none", validate=False)
    again = how(loss)
    assert type(again) is type(loss)
    assert backend.owns(again.weight)
    assert {**vars(again), "weight": 0} == {**vars(loss), "weight": 0}
    x, t = backend.asarray(X), backend.asarray(T)
    np.testing.assert_array_equal(backend.to_numpy(again(x, t)), backend.to_numpy(loss(x, t)))


# torch's whole truth table: size_average, reduce, and the reduction they make; None keeps it.
LEGACY = [
    (None, None, None),
    (None, True, "mean"),
    (None, False, "none"),
    (True, None, "mean"),
    (True, True, "mean"),
    (True, False, "none"),
    (False, None, "sum"),
    (False, True, "sum"),
    (False, False, "none"),
]
LEGACY_TABLE = pytest.mark.parametrize(("size_average", "reduce", "becomes"), LEGACY)


def caught(call: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, list[str]]:
    """Return what a call returns and its warnings: UserWarnings that point to the call."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result, line = call(*args, **options), inspect.stack(0)[0].lineno
    assert all(w.category is UserWarning for w in found)
    assert {(w.filename, w.lineno) for w in found} <= {(__file__, line)}
    return result, [str(w.message) for w in found]


def same(backend: Backend, got: Any, want: Any) -> None:
    """Compare results, pairs or not."""
    pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
    for a, b in pairs:
        np.testing.assert_array_equal(backend.to_numpy(a), backend.to_numpy(b))


def legacy_text(reduction: str) -> str:
    return (
        "size_average and reduce args will be deprecated, please use "
        f"reduction='{reduction}' instead."
    )


@LEGACY_TABLE
@pytest.mark.parametrize("given", ["none", "bad"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_legacy_arguments_of_functions(
    backend: Backend,
    name: str,
    given: str,
    size_average: bool | None,
    reduce: bool | None,
    becomes: str | None,
) -> None:
    x, t = backend.asarray(X), backend.asarray(T)
    options = {"size_average": size_average, "reduce": reduce, "reduction": given}
    if becomes is None and given == "bad":
        with pytest.raises(ValueError, match=r"^reduction must be"):
            FUNCTIONS[name](x, t, **options)
        return
    got, texts = caught(FUNCTIONS[name], x, t, **options)
    assert texts == ([] if becomes is None else [legacy_text(becomes)])
    same(backend, got, FUNCTIONS[name](x, t, reduction=becomes or given))


@LEGACY_TABLE
@pytest.mark.parametrize("given", ["none", "bad"])
@BOTH
def test_legacy_arguments_of_classes(
    backend: Backend,
    name: str,
    given: str,
    size_average: bool | None,
    reduce: bool | None,
    becomes: str | None,
) -> None:
    options = {"size_average": size_average, "reduce": reduce, "reduction": given}
    loss, texts = caught(CLASSES[name], **options)
    assert texts == ([] if becomes is None else [legacy_text(becomes)])
    assert loss.reduction == (becomes or given)
    assert not hasattr(loss, "size_average")
    assert not hasattr(loss, "reduce")
    if loss.reduction != "bad":
        # The warning came once, at the constructor.
        shape = loss(backend.asarray(X), backend.asarray(T)).shape
        assert tuple(shape) == (T.shape if loss.reduction == "none" else ())


def test_explain_warns_as_the_call_would(backend: Backend) -> None:
    x, t = backend.asarray(X), backend.asarray(T)
    _, texts = caught(polyce.explain, x, t, size_average=False)
    assert texts == [legacy_text("sum")]


ELEMENTWISE = "reduction='elementwise_mean' is deprecated. Please use reduction='mean' instead."


def test_elementwise_mean_is_the_mean_with_a_warning(backend: Backend) -> None:
    x, t = backend.asarray(X), backend.asarray(T)
    for function in FUNCTIONS.values():
        got, texts = caught(function, x, t, reduction="elementwise_mean")
        assert texts == [ELEMENTWISE]
        same(backend, got, function(x, t))
    for kind in CLASSES.values():
        loss, texts = caught(kind, reduction="elementwise_mean")
        got, more = caught(loss, x, t)
        assert texts + more == [ELEMENTWISE]
        same(backend, got, kind()(x, t))
