"""Every error: its type, and a sentence with the rule, what came and what to do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import polyce
from error_calls import (
    ALL,
    FUNCTIONS,
    GRAD,
    LOGS,
    LOSSES,
    READERS,
    SOFT,
    X3,
    Bad,
    P,
    T,
    X,
    bad,
    check,
    floats,
    ints,
    table,
)
from polyce.testing.backends import Backend


@table(
    bad("rank", "a 0-d array", input=floats(), target=ints()),
    bad("counts", "(3,)", "int32 (4,)", "3", "4", target=ints(4)),
    bad("counts", "(3,)", "int32 ()", "3", "1", target=ints()),
    bad("indices", "(3,)", "int32 (3, 4)", target=ints(3, 4)),
    bad("indices", "(3,)", "int32 (3, 1)", target=ints(3, 1)),
    bad("indices", "(3,)", "float32 (1, 5)", target=floats(1, 5), on=SOFT),
    bad("not for nll", "(3,)", "float32 (3, 5)", target=P),
    bad("not for nll", "(3,)", "int32 (3, 5)", target=ints(3, 5)),
    bad("other axis", "(5,)", "int32 (3,)", "-1", axis=0),
    bad("other axis", "(3,)", "int32 (5,)", "0", target=ints(5)),
    bad("other axis", "(2, 4)", "int32 (2, 5)", "-1", input=X3, target=ints(2, 5)),
    bad("other axis", "(2, 3, 4)", "int32 (2, 5, 3)", "-1",
        input=floats(2, 5, 3, 4), target=ints(2, 5, 3)),
    bad("other axis", "(2, 3, 4)", "int32 (2, 5, 4)", "2",
        input=floats(2, 5, 3, 4), target=ints(2, 5, 4)),
    bad("other axis", "(2, 4)", "float32 (2, 5)", "-1", input=X3, target=floats(2, 5)),
    bad("counts", "(2, 4)", "int32 (2, 3)", "8", "6", input=X3, target=ints(2, 3)),
    bad("indices", "(2, 4)", "int32 (8,)", input=X3, target=ints(8)),
    bad("indices", "()", "int32 (2,)", input=floats(5), target=ints(2)),
    bad("counts", "(32,)", "int32 (64,)", "32", "64", input=floats(32, 10), target=ints(64)),
    bad("weight shape", "(4,)", weight=floats(4)),
    bad("weight shape", "(5, 1)", weight=floats(5, 1)),
    bad("weight shape", "(1, 5)", input=X3, target=ints(2, 4), weight=floats(1, 5)),
    bad("weight shape", "()", weight=floats()),
)  # fmt: skip
def test_shapes(backend: Backend, call: Bad, name: str) -> None:
    check(backend, call, name)


@table(
    bad("integers", "bool", target=np.zeros(3, bool)),
    bad("integers", "float32", target=floats(3)),
    bad("integers", "complex64", target=np.zeros(3, np.complex64)),
    bad("probabilities", "int32 (3, 5)", target=ints(3, 5)),
    bad("probabilities", "int32 (5,)", input=floats(5), target=ints(5)),
    bad("probabilities", "bool (3, 5)", target=np.ones((3, 5), bool)),
    bad("probabilities", "complex64 (3, 5)", target=P.astype(np.complex64)),
    bad("logits", "int32 (3, 5)", input=ints(3, 5)),
    bad("swapped", "int32 (3,)", "float32 (3, 5)", input=T, target=P),
    bad("swapped", "int32 (3, 5)", "float32 (3, 5)", input=ints(3, 5), target=P),
    bad("swapped", "int32 (2, 4)", "float32 (2, 5, 4)", input=ints(2, 4), target=X3),
    bad("logits", "int32 (3, 4)", input=ints(3, 4), target=P),
    bad("logits", "bool (3, 5)", input=np.zeros((3, 5), bool)),
    bad("logits", "complex64 (3, 5)", input=X.astype(np.complex64)),
    bad("weight dtype", "bool", weight=np.ones(5, bool)),
    bad("weight dtype", "complex64", weight=np.ones(5, np.complex64)),
)
def test_dtypes(backend: Backend, call: Bad, name: str) -> None:
    check(backend, call, name)


@table(
    bad("missing", "input", input=None, on=ALL),
    bad("missing", "target", target=None),
    bad("no array", "input", "list", input=[[0.0, 1.0]], on=ALL),
    bad("no array", "input", "float", input=1.0, on=ALL),
    bad("no array", "target", "list", target=[1, 0, 4]),
    bad("no array", "target", "int", input=floats(5), target=1),
    bad("no array", "weight", "list", weight=[1.0] * 5),
    bad("no array", "weight", "float", weight=1.0),
    bad("no array", "grad_output", "list", grad_output=[1.0], on=GRAD),
    bad("no array", "grad_output", "str", grad_output="1", on=GRAD),
)
def test_what_is_no_array(backend: Backend, call: Bad, name: str) -> None:
    check(backend, call, name)


@table(
    bad("ignore_index", "None", ignore_index=None),
    bad("ignore_index", "1.0", ignore_index=1.0),
    bad("ignore_index", "True", ignore_index=True),
    bad("ignore_index range", "0", target=P, ignore_index=0),
    bad("ignore_index range", "255", target=P, ignore_index=255),
    bad("smoothing", "NoneType", label_smoothing=None),
    bad("smoothing", "str", label_smoothing="0.1"),
    bad("smoothing", "", label_smoothing=np.full(1, 0.1, np.float32)),
    bad("smoothing range", "-0.1", label_smoothing=-0.1),
    bad("smoothing range", "1.1", label_smoothing=1.1),
    bad("smoothing range", "nan", label_smoothing=float("nan")),
    bad("reduction", "'batchmean'", reduction="batchmean"),
    bad("reduction", "'Mean'", reduction="Mean"),
    bad("reduction", "None", reduction=None),
    bad("reduction", "1", reduction=1),
    bad("axis", "True", axis=True),
    bad("axis", "1.0", axis=1.0),
    bad("axis range", "2", axis=2),
    bad("axis range", "-3", axis=-3),
    bad("validate", "'yes'", validate="yes"),
    bad("validate", "1", validate=1),
    bad("validate", "0", target=P, validate=0, on=SOFT),
    bad("implementation", "'fast'", implementation="fast"),
    bad("implementation", "1", implementation=1),
)
def test_options(backend: Backend, call: Bad, name: str) -> None:
    check(backend, call, name)


@table(
    bad("grad_output", "(3,)", "'none'", "(4,)", grad_output=floats(4), reduction="none"),
    bad("grad_output", "(3,)", "'none'", "()", grad_output=floats(), reduction="none"),
    bad("grad_output", "()", "'mean'", "(3,)", grad_output=floats(3)),
    bad("grad_output", "()", "'sum'", "(1,)", grad_output=floats(1), reduction="sum"),
    bad("grad_output rows", "(3,)", "2.0", grad_output=2.0, reduction="none"),
    bad("grad_output dtype", "bool", grad_output=np.ones((), bool)),
    bad("grad_output dtype", "complex64", grad_output=np.ones((), np.complex64)),
)
def test_grad_output(backend: Backend, call: Bad, name: str) -> None:
    check(backend, call, name)


class Frame:
    """An object like a table of pandas, polars or pyarrow, or a sparse matrix of scipy."""

    def __init__(self, method: str) -> None:
        setattr(self, method, None)


@table(
    bad("no array, method", "input", "Frame", "input.to_numpy()", input=Frame("to_numpy"), on=ALL),
    bad("no array, method", "target", "Frame", "target.to_numpy()", target=Frame("to_numpy")),
    bad("no array, method", "input", "Frame", "input.toarray()", input=Frame("toarray"), on=ALL),
)
def test_what_has_a_method_for_it(backend: Backend, call: Bad, name: str) -> None:
    check(backend, call, name)


def labels(came: str, target: Any, **arguments: Any) -> Bad:
    target = np.asarray(target, None if isinstance(target, np.ndarray) else np.int32)
    return bad("labels", came, on=READERS, target=target, **arguments)


OUT_OF_RANGE = table(
    labels("5 at position (0,)", [5, 0, 1]),
    labels("-1 at position (1,)", [0, -1, 1]),
    labels("99 at position (2,)", [0, 1, 99]),
    labels("9 at position (0,)", [9, 8, -7]),
    labels("7 at position (1, 2)", [[0, 1, 2, 3], [4, 0, 7, 1]], input=X3),
    labels("6", 6, input=floats(5)),
    labels("200 at position (2,)", np.array([0, 1, 200], np.uint8)),
)


@pytest.mark.labels_read
@pytest.mark.only("numpy", "strict", "torch", "jax-x32", "jax-x64")
@table(
    bad(
        "labels of one column", "1 at position (1,)", on=READERS,
        input=floats(3, 1), target=np.array([0, 1, 0], np.int32),
    ),
)  # fmt: skip
def test_labels_of_a_binary_loss(backend: Backend, call: Bad, name: str) -> None:
    check(backend, call, name)


@pytest.mark.labels_read
@pytest.mark.only("numpy", "strict", "torch", "jax-x32", "jax-x64")
@OUT_OF_RANGE
def test_labels(backend: Backend, call: Bad, name: str) -> None:
    check(backend, call, name)


@pytest.mark.only("numpy", "strict", "torch", "torch-cuda", "jax-x32", "jax-x64", "cupy")
@OUT_OF_RANGE
def test_labels_when_asked(backend: Backend, call: Bad, name: str) -> None:
    check(backend, call, name, validate=True)


@pytest.mark.parametrize("ignored", [-1, 5, 99, np.int64(7)])
def test_an_ignored_label_is_no_error(backend: Backend, ignored: Any) -> None:
    target = backend.asarray(np.array([0, int(ignored), 4], np.int32))
    options = {"ignore_index": ignored, "reduction": "none"}
    for name in ("cross_entropy", "CrossEntropyLoss", "nll_loss", "NLLLoss"):
        rows = FUNCTIONS[name](backend.asarray(X), target, **options)
        assert backend.to_numpy(rows)[1] == 0


@pytest.mark.only("dask", "torch", "jax-x32", "jax-x64")
@table(bad("no values", on=READERS, validate=True))
def test_labels_without_values(backend: Backend, call: Bad, name: str) -> None:
    function = FUNCTIONS[name]
    arrays = [backend.asarray(array) for array in (X, T)]
    if backend.name == "jax":
        import jax

        function = jax.jit(FUNCTIONS[name], static_argnames="validate")
    elif backend.name == "torch":
        arrays = [array.to("meta") for array in arrays]
    with pytest.raises(ValueError, match=call.match):
        function(*arrays, validate=True)
    function(*arrays)


ARGUMENTS = {
    "input": X,
    "target": T,
    "weight": np.ones(5, np.float32),
    "grad_output": np.ones((), np.float32),
}


@pytest.mark.only("strict", "torch", "jax-x32", "jax-x64", "dask")
@pytest.mark.parametrize("stranger", ["target", "weight", "grad_output"])
def test_libraries_do_not_mix(backend: Backend, stranger: str) -> None:
    """Except for NumPy arrays beside those of jax and dask, which take them themselves."""
    own, converter = {
        "array-api-strict": ("array-api-strict", "array_api_strict.asarray"),
        "torch": ("torch", "torch.as_tensor"),
        "jax": ("jax", None),
        "dask-rows": ("dask", None),
    }[backend.name]
    given = {key: backend.asarray(value) for key, value in ARGUMENTS.items()}
    with_numpy = {**given, stranger: ARGUMENTS[stranger]}
    if converter is None:
        want = polyce.cross_entropy_with_grad(**given)
        for a, b in zip(polyce.cross_entropy_with_grad(**with_numpy), want, strict=True):
            assert backend.owns(a)
            np.testing.assert_array_equal(backend.to_numpy(a), backend.to_numpy(b))
    else:
        call = bad("library", own, stranger, "numpy", stranger, converter)
        with pytest.raises(TypeError, match=call.match):
            polyce.cross_entropy_with_grad(**with_numpy)
    call = bad("library", "numpy", stranger, own, stranger, "numpy.asarray")
    with pytest.raises(TypeError, match=call.match):
        polyce.cross_entropy_with_grad(**{**ARGUMENTS, stranger: given[stranger]})


@pytest.mark.only("strict", "torch")
@pytest.mark.parametrize("stranger", ["target", "weight", "grad_output"])
def test_devices_do_not_mix(backend: Backend, stranger: str) -> None:
    given = {key: backend.asarray(value) for key, value in ARGUMENTS.items()}
    if backend.name == "torch":
        given[stranger], device = given[stranger].to("meta"), "meta"
    else:
        import array_api_strict as xp

        device = "array_api_strict.Device('device1')"
        given[stranger] = xp.asarray(given[stranger], device=xp.Device("device1"))
    call = bad("device", stranger, device, stranger)
    with pytest.raises(TypeError, match=call.match):
        polyce.cross_entropy_with_grad(**given)
    del given["grad_output"]
    if stranger in given:
        for name in ("cross_entropy", "explain", "nll_loss"):
            with pytest.raises(TypeError, match=call.match):
                FUNCTIONS[name](**given)


@pytest.mark.only("numpy", "strict", "torch", "jax-x32", "jax-x64", "dask")
@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@table(
    bad("no plain array", "input", "MaskedArray", input=np.ma.masked_array(X), on=LOSSES),
    bad("no plain array", "target", "MaskedArray", target=np.ma.masked_array(T)),
    bad("no plain array", "weight", "MaskedArray", weight=np.ma.masked_array(X[0])),
    bad("no plain array", "input", "matrix", input=X.view(np.matrix)),
    bad("no plain array", "target", "matrix", target=P.view(np.matrix)),
)
def test_numpy_arrays_of_another_meaning(backend: Backend, call: Bad, name: str) -> None:
    check(backend, call, name)


@pytest.mark.only("numpy")
@table(
    bad("logits", "object (3, 5)", input=X.astype(object)),
    bad("integers", "object", target=T.astype(object)),
    bad("weight dtype", "object", weight=np.ones(5, object)),
)
def test_object_arrays(backend: Backend, call: Bad, name: str) -> None:
    check(backend, call, name)


def test_an_unknown_implementation_wherever_it_is_named(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    match = bad("implementation", "'fast'").match
    with pytest.raises(ValueError, match=match), polyce.use("fast"):
        pass
    monkeypatch.setenv("POLYCE_IMPLEMENTATION", "fast")
    match = "^POLYCE_IMPLEMENTATION must be one of dask, .*, reference, got 'fast'; leave it out"
    for name in (*SOFT, *LOGS):
        with pytest.raises(ValueError, match=match):
            FUNCTIONS[name](backend.asarray(X), backend.asarray(T))
