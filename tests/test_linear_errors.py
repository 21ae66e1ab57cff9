"""Every error of a linear head: its type, and what its sentence says was passed."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import polyce
from error_calls import RULES, Bad, bad, floats, ints
from polyce.testing.backends import Backend

X = np.linspace(-2, 2, 12, dtype=np.float32).reshape(3, 4)
W = np.linspace(-1, 1, 20, dtype=np.float32).reshape(5, 4)
B = np.zeros(5, np.float32)
T = np.array([1, 0, 4], np.int32)
ARGUMENTS = {"input": X, "linear_weight": W, "target": T, "linear_bias": B}
BOTH = ("linear_cross_entropy", "linear_cross_entropy_with_grad")
GRAD = BOTH[1:]


class Wrong:
    """A call that fails: the error, parts of its sentence in their order, and the arguments."""

    def __init__(
        self, error: type[Exception], *says: str, on: tuple[str, ...] = BOTH, **arguments: Any
    ) -> None:
        self.error, self.says, self.functions, self.arguments = error, says, on, arguments

    @property
    def match(self) -> str:
        """Return a pattern for a sentence that begins with the first part."""
        return "^" + ".*".join(map(re.escape, self.says))


def rows(*calls: Wrong) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("call", "name"),
        [
            pytest.param(call, name, id=f"{'-'.join(call.says)}-{name}".replace(" ", "_"))
            for call in calls
            for name in call.functions
        ],
    )


def converted(backend: Backend, arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        key: backend.asarray(value.copy()) if type(value) is np.ndarray else value
        for key, value in arguments.items()
    }


def check(backend: Backend, name: str, match: str, error: type[Exception], **given: Any) -> None:
    """Make the call, and check the error and that the arrays are unchanged."""
    before = ARGUMENTS | given
    arguments = converted(backend, before)
    with pytest.raises(error, match=match):
        getattr(polyce, name)(**arguments)
    for key, value in arguments.items():
        if type(before[key]) is np.ndarray:
            np.testing.assert_array_equal(backend.to_numpy(value), before[key])


@rows(
    Wrong(ValueError, "input must have a feature axis", "0-d", input=floats()),
    Wrong(ValueError, "input and linear_weight", "(3, 6) and (5, 4)", input=floats(3, 6)),
    Wrong(ValueError, "input and linear_weight", "(3, 4) and (4, 5)", linear_weight=W.T.copy()),
    Wrong(ValueError, "linear_weight must be 2-D", "(4,)", linear_weight=floats(4)),
    Wrong(ValueError, "linear_weight must be 2-D", "(5, 4, 1)", linear_weight=floats(5, 4, 1)),
    Wrong(ValueError, "linear_weight must be 2-D", "()", linear_weight=floats()),
    Wrong(ValueError, "linear_bias", "5 classes", "(4,)", linear_bias=floats(4)),
    Wrong(ValueError, "linear_bias", "5 classes", "(1, 5)", linear_bias=floats(1, 5)),
    Wrong(ValueError, "linear_bias", "5 classes", "()", linear_bias=floats()),
    # The first is the shape of flattened rows with a column of labels.
    Wrong(ValueError, "target", "(3,)", "int32 (3, 1)", "remove or add axes", target=ints(3, 1)),
    Wrong(ValueError, "target", "(3,)", "int32 (4,)", "3 rows, but 4 labels", target=ints(4)),
    Wrong(ValueError, "target", "(3,)", "int32 ()", target=ints()),
    Wrong(ValueError, "target", "(3, 5)", "float32 (3, 4)", target=floats(3, 4)),
    Wrong(ValueError, "target", "(2, 3)", "int32 (6,)", input=floats(2, 3, 4), target=ints(6)),
    # The classes are last, and there is no axis to say so.
    Wrong(
        ValueError, "target", "(2, 2)", "int32 (2, 4)", "4 rows, but 8 labels",
        input=floats(2, 2, 4), linear_weight=floats(4, 4), target=ints(2, 4),
        linear_bias=None,
    ),
    Wrong(
        ValueError, "target", "(2, 3, 5)", "float32 (2, 5, 3)",
        input=floats(2, 3, 4), target=floats(2, 5, 3),
    ),
    Wrong(ValueError, "weight must be 1-D", "5 classes", "(4,)", weight=floats(4)),
    Wrong(ValueError, "sample_weight", "(3,)", "(5,)", sample_weight=floats(5)),
    Wrong(ValueError, "grad_output", "()", "(3,)", grad_output=floats(3), on=GRAD),
    Wrong(
        ValueError, "grad_output", "(3,)", "(4,)",
        grad_output=floats(4), reduction="none", on=GRAD,
    ),
)  # fmt: skip
def test_shapes(backend: Backend, call: Wrong, name: str) -> None:
    check(backend, name, call.match, call.error, **call.arguments)


@rows(
    Wrong(TypeError, "input must be real floating point", "int32 (3, 4)", input=ints(3, 4)),
    Wrong(TypeError, "input must be real floating point", "bool", input=np.zeros((3, 4), bool)),
    Wrong(TypeError, "linear_weight must be real", "int32 (5, 4)", linear_weight=ints(5, 4)),
    Wrong(
        TypeError,
        "linear_weight must be real",
        "int32 (3,)",
        "are linear_weight and target swapped, as target is float32 (5, 4)?",
        linear_weight=T,
        target=W,
    ),
    Wrong(TypeError, "linear_bias must be real", "int32 (5,)", linear_bias=ints(5)),
    Wrong(
        TypeError, "linear_weight must be real", "complex64", linear_weight=W.astype(np.complex64)
    ),
    Wrong(TypeError, "target", "integer", "bool", target=np.zeros(3, bool)),
    Wrong(TypeError, "target", "integer", "float32", target=floats(3)),
    Wrong(TypeError, "a target", "probabilities", "int32 (3, 5)", "or cast", target=ints(3, 5)),
    Wrong(TypeError, "weight must be real numbers", "bool", weight=np.ones(5, bool)),
)
def test_dtypes(backend: Backend, call: Wrong, name: str) -> None:
    check(backend, name, call.match, call.error, **call.arguments)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("stranger", ["input", "linear_weight", "linear_bias"])
def test_dtypes_do_not_mix(backend: Backend, stranger: str, name: str) -> None:
    other = "float16" if "float16" in backend.floats else "float64"
    says = "input, linear_weight and linear_bias must have one dtype.*"
    # The message names the first one that differs from input.
    first = "linear_weight" if stranger == "input" else stranger
    came = (other, "float32") if stranger == "input" else ("float32", other)
    match = f"^{says}input is {came[0]} and {first} is {came[1]}; convert"
    check(backend, name, match, TypeError, **{stranger: ARGUMENTS[stranger].astype(other)})


@rows(
    Wrong(TypeError, "input must be an array, got None", input=None),
    Wrong(TypeError, "linear_weight must be an array, got None", linear_weight=None),
    Wrong(TypeError, "target must be an array, got None", target=None),
    Wrong(TypeError, "input must be an array", "list", input=[[1.0] * 4] * 3),
    Wrong(TypeError, "linear_weight must be an array", "list", linear_weight=[[1.0] * 4] * 5),
    Wrong(TypeError, "linear_bias must be an array", "list", linear_bias=[1.0] * 5),
    Wrong(TypeError, "linear_bias must be an array", "float", linear_bias=1.0),
    Wrong(TypeError, "target must be an array", "list", target=[1, 0, 4]),
)
def test_what_is_no_array(backend: Backend, call: Wrong, name: str) -> None:
    check(backend, name, call.match, call.error, **call.arguments)


@rows(
    Wrong(ValueError, "chunk_size must be at least 1, got 0", chunk_size=0),
    Wrong(ValueError, "chunk_size must be at least 1, got -1", chunk_size=-1),
    Wrong(TypeError, "chunk_size must be an integer, got 2.5", chunk_size=2.5),
    Wrong(TypeError, "chunk_size must be an integer, got True", chunk_size=True),
    Wrong(TypeError, "chunk_size must be an integer, got '4'", chunk_size="4"),
    Wrong(ValueError, "wrt takes the names", "linear_bias", "'weight'", wrt=("weight",), on=GRAD),
    Wrong(ValueError, "wrt takes the names", "'bias'", wrt=("input", "bias"), on=GRAD),
    Wrong(ValueError, "wrt takes the names", "'hidden'", wrt="hidden", on=GRAD),
    Wrong(ValueError, "wrt takes the names", "''", wrt="", on=GRAD),
    Wrong(ValueError, "wrt takes the names", "0", wrt=(0,), on=GRAD),
    Wrong(TypeError, "wrt must be a tuple of names", "None", wrt=None, on=GRAD),
    Wrong(TypeError, "wrt must be a tuple of names", "True", wrt=True, on=GRAD),
)
def test_options_of_its_own(backend: Backend, call: Wrong, name: str) -> None:
    check(backend, name, call.match, call.error, **call.arguments)


SHARED = (
    bad("ignore_index", "1.0", ignore_index=1.0),
    bad("ignore_index range", "0", target=floats(3, 5), ignore_index=0),
    bad("smoothing", "str", label_smoothing="0.1"),
    bad("smoothing range", "1.1", label_smoothing=1.1),
    bad("reduction", "'batchmean'", reduction="batchmean"),
    bad("reduction", "None", reduction=None),
    bad("validate", "'yes'", validate="yes"),
    bad("implementation", "'fast'", implementation="fast"),
    bad("sample_weight dtype", "bool", sample_weight=np.ones(3, bool)),
    bad("normalizer reduction", "'sum'", normalizer=2.0, reduction="sum"),
    bad("normalizer shape", "(1,)", normalizer=floats(1)),
    bad("normalizer number", "True", normalizer=True),
    bad("z_loss", "str", z_loss="1"),
    bad("z_loss range", "-1.0", z_loss=-1.0),
    bad("scale", "logit_scale", "str", logit_scale="1"),
    bad("scale range", "logit_scale", "0.0", logit_scale=0.0),
    bad("scale range", "logit_softcap", "inf", logit_softcap=float("inf")),
)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("call", SHARED, ids=lambda call: "-".join((call.rule, *call.came)))
def test_options_are_those_of_cross_entropy(backend: Backend, call: Bad, name: str) -> None:
    """The sentences are the same too."""
    with pytest.raises(RULES[call.rule].error, match=call.match) as ours:
        getattr(polyce, name)(**converted(backend, ARGUMENTS | call.arguments))
    logits, target = backend.asarray(floats(3, 5)), call.arguments.get("target", T)
    options = {key: value for key, value in call.arguments.items() if key != "target"}
    with pytest.raises(RULES[call.rule].error) as theirs:
        polyce.cross_entropy(logits, backend.asarray(target), **converted(backend, options))
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("name", BOTH)
def test_there_is_no_axis(backend: Backend, name: str) -> None:
    """Nor is there any other argument about existing logits."""
    for option in ("axis", "out"):
        match = f"unexpected keyword argument '{option}'"
        check(backend, name, match, TypeError, **{option: None})


LABELS = (
    Wrong(IndexError, "labels must lie in 0 to 4 (5 classes)", "5 at position (0,)",
          target=np.array([5, 0, 1])),
    Wrong(IndexError, "labels must lie in 0 to 4 (5 classes)", "-1 at position (2,)",
          target=np.array([0, 1, -1])),
    Wrong(IndexError, "labels must lie in 0 to 4 (5 classes)", "7 at position (1, 2)",
          input=floats(2, 3, 4), target=np.array([[0, 1, 2], [4, -100, 7]])),
    Wrong(IndexError, "labels must lie in 0 to 4 (5 classes)", "6",
          input=floats(4), target=np.array(6)),
    Wrong(IndexError, "labels must lie in 0 to 4 (5 classes)", "200 at position (2,)",
          target=np.array([0, 1, 200], np.uint8)),
)  # fmt: skip


@pytest.mark.labels_read
@pytest.mark.only("numpy", "strict", "torch", "jax-x32", "jax-x64")
@rows(*LABELS)
@pytest.mark.parametrize("chunk_size", [1, None])
def test_labels(backend: Backend, call: Wrong, name: str, chunk_size: int | None) -> None:
    """The position counts all rows, however they are cut into chunks."""
    target = call.arguments["target"]
    # Without 64-bit types jax takes no 64-bit integers.
    given = call.arguments | {"target": backend.expressible(target)[0], "chunk_size": chunk_size}
    check(backend, name, call.match, call.error, **given)


@pytest.mark.only("numpy", "strict", "torch", "torch-cuda", "jax-x32", "jax-x64", "cupy")
@pytest.mark.parametrize("name", BOTH)
def test_labels_when_asked(backend: Backend, name: str) -> None:
    match = r"^labels must lie in 0 to 4 .*got 9 at position \(1,\)"
    target = np.array([0, 9, 1], np.int32)
    check(backend, name, match, IndexError, target=target, validate=True)


@pytest.mark.only("strict", "torch")
@pytest.mark.parametrize("stranger", ["linear_weight", "target", "linear_bias", "weight"])
def test_libraries_do_not_mix(backend: Backend, stranger: str) -> None:
    every = ARGUMENTS | {"weight": np.ones(5, np.float32)}
    given = converted(backend, every)
    match = f"^all arrays must come from one library, but input is .* and {stranger} is numpy;"
    with pytest.raises(TypeError, match=match):
        polyce.linear_cross_entropy(**{**given, stranger: every[stranger]})
    match = f"^all arrays must .*, but input is numpy and {stranger} is .*; convert {stranger} with"
    with pytest.raises(TypeError, match=match):
        polyce.linear_cross_entropy(**{**every, stranger: given[stranger]})


@pytest.mark.only("strict", "torch")
@pytest.mark.parametrize("stranger", ["linear_weight", "target", "linear_bias"])
def test_devices_do_not_mix(backend: Backend, stranger: str) -> None:
    given = converted(backend, ARGUMENTS)
    if backend.name == "torch":
        given[stranger] = given[stranger].to("meta")
    else:
        import array_api_strict as xp

        given[stranger] = xp.asarray(given[stranger], device=xp.Device("device1"))
    match = f"^all arrays must lie .*, but input is on .* and {stranger} on .*; move {stranger}"
    for name in BOTH:
        with pytest.raises(TypeError, match=match):
            getattr(polyce, name)(**given)


def test_an_unknown_implementation_wherever_it_is_named(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions: list[Callable[..., Any]] = [getattr(polyce, name) for name in BOTH]
    monkeypatch.setenv("POLYCE_IMPLEMENTATION", "fast")
    for function in functions:
        with pytest.raises(ValueError, match=r"^POLYCE_IMPLEMENTATION must be one of .*'fast'"):
            function(**converted(backend, ARGUMENTS))
