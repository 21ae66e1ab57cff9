"""The second tier of libraries: the grid, at each library's accuracy, and what all share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import polyce
from conftest import FULL, TIER_2
from polyce.testing import GROUPS, Case, cases, check_implementation
from polyce.testing.backends import Backend, get_backend
from polyce.testing.selection import representative

pytestmark = pytest.mark.only(*TIER_2)

X = np.array([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]], dtype=np.float32)
T = np.array([0, 1])
BAD = np.array([0, 3])
BACKENDS = {name: (name,) for name in TIER_2} | {"marray": ("marray", "marray-numpy")}
# A case takes ndonnx a third of a second and cubed a whole second, so they get the most different
# cases of a group, and these empty ones, each of which has broken some library.
MOST = {"ndonnx": 3, "cubed": 1}
EMPTY = (
    "shapes/no-rows/index/plain/mean/float32",
    "shapes/no-classes/index/plain/none/float32",
    "shapes/no-classes-3-D/probability/plain/mean/float32",
)
# Whether labels are checked by default; None if arrays have no values.
LOOKS = {"mparray": True, "marray": True, "mlx": False, "ndonnx": None, "cubed": None}


def unsuited(case: Case, name: str) -> str:
    """Return the reason why a case is not for a library."""
    if name == "mparray" and case.logits.size > 20_000:
        return "a minute in arbitrary precision"
    if name.startswith("marray") and 0 in (case.logits.size, case.target.size):
        return "marray masks a sum over nothing"
    return ""


def leaves(result: Any) -> list[Any]:
    """Return the arrays of a result: the loss, a gradient if there is one, the stats there are."""
    if isinstance(result, tuple):
        return [array for part in result for array in leaves(part)]
    return [] if result is None else [result]


def refilled(result: Any, arrays: Iterator[Any]) -> Any:
    """Replace the arrays of a result."""
    if isinstance(result, tuple):
        parts = [refilled(part, arrays) for part in result]
        return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)
    return None if result is None else next(arrays)


def exported(function: Callable[..., Any]) -> Callable[..., Any]:
    """Export a function of ndonnx arrays to an ONNX model, and run that."""
    import ndonnx
    import onnxruntime

    def run(*given: Any) -> Any:
        inputs = {
            f"i{i}": ndonnx.argument(shape=array.shape, dtype=array.dtype)
            for i, array in enumerate(given)
        }
        result = function(*inputs.values())
        outputs = {f"o{i}": array for i, array in enumerate(leaves(result))}
        model = ndonnx.build(inputs, outputs, drop_unused=True).SerializeToString()
        alone = onnxruntime.SessionOptions()
        alone.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(model, alone, providers=["CPUExecutionProvider"])
        values = dict(zip(inputs, (array.unwrap_numpy() for array in given), strict=True))
        feed = {one.name: values[one.name] for one in session.get_inputs()}
        return refilled(result, map(ndonnx.asarray, session.run(list(outputs), feed)))

    return run


def together(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compute all results of a function of cubed arrays at once, not one by one."""
    import cubed

    def run(*given: Any) -> Any:
        result = function(*given)
        with np.errstate(all="ignore"):
            computed = cubed.compute(*leaves(result))
        spec = given[0].spec
        return refilled(result, (cubed.from_array(array, spec=spec) for array in computed))

    return run


# This takes much less time than running operations one by one, or twice; and exporting is what
# ndonnx is for.
WRAPPERS = {"ndonnx": exported, "cubed": together}


# These libraries copy arrays, whatever their layout was.
@pytest.mark.parametrize("group", [group for group in GROUPS if group != "layouts"])
def test_grid(backend_name: str, group: str) -> None:
    for name in BACKENDS[backend_name]:
        library = get_backend(name)
        every = [case for case in cases([group], library.floats) if not unsuited(case, name)]
        # One case with all options, which takes cubed 5 seconds, is enough.
        rich = name != "cubed" or group == "combined"
        some = [case for case in every if rich or len(case.options) + len(case.arrays) <= 5]
        few = {case.name for case in representative(some, MOST.get(name))}
        few.update(EMPTY if name in MOST else ())

        def leave_out(case: Case, name: str = name, few: set[str] = few) -> str:
            reason = unsuited(case, name)
            return reason or ("" if FULL or case.name in few else "not among the few")

        report = check_implementation(
            "reference",
            library,
            groups=[group],
            dtypes=library.floats,
            leave_out=leave_out,
            wrap=WRAPPERS.get(name),
        )
        print(report)


def test_bad_labels(backend: Backend, backend_name: str) -> None:
    """If labels are checked by default, a bad one is an error; otherwise its row is nan."""
    x, bad = backend.asarray(X), backend.asarray(BAD)
    if LOOKS[backend_name]:
        with pytest.raises(IndexError, match=r"labels must lie in 0 to 2 .*got 3 at position \(1"):
            polyce.cross_entropy(x, bad)
    else:
        rows, grad = polyce.cross_entropy_with_grad(x, bad, reduction="none")
        assert np.isnan(backend.to_numpy(rows)).tolist() == [False, True]
        assert np.isnan(backend.to_numpy(grad)).all(axis=1).tolist() == [False, True]


def test_validate(backend: Backend, backend_name: str) -> None:
    x, bad = backend.asarray(X), backend.asarray(BAD)
    if LOOKS[backend_name] is None:
        with pytest.raises(ValueError, match=r"validate=True needs .* traced or lazy"):
            polyce.cross_entropy(x, bad, validate=True)
    else:
        with pytest.raises(IndexError, match="got 3"):
            polyce.cross_entropy(x, bad, validate=True)
        want = polyce.cross_entropy(X, T)
        got = polyce.cross_entropy(x, backend.asarray(T), validate=True)
        np.testing.assert_allclose(backend.to_numpy(got), want, rtol=1e-6)


@pytest.mark.only("ndonnx", "mlx", "mparray", "marray")  # cubed takes half a minute
def test_every_function_and_option_gives_numpy_s_answer(backend: Backend) -> None:
    weight, sample_weight = np.array([1.0, 2.0, 0.5]), np.array([0.5, 2.0])
    soft = np.array([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5]], dtype=np.float32)
    options: dict[str, Any] = {
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "logit_scale": 1.5,
        "logit_softcap": 20.0,
        "return_stats": polyce.Stats._fields[:6],
    }

    def results(give: Any) -> list[Any]:
        given = [give(array) for array in (weight, sample_weight)]
        found: list[Any] = []
        for target in (T, soft):
            loss, grad, stats = polyce.cross_entropy_with_grad(
                give(X), give(target), given[0], sample_weight=given[1], **options
            )
            found += [loss, grad, *(array for array in stats if array is not None)]
        logs = polyce.log_softmax(give(X), logit_scale=0.5)
        return [*found, logs, polyce.nll_loss(logs, give(T), given[0])]

    got = results(lambda array: backend.asarray(narrow(backend, array)))
    assert all(backend.owns(array) for array in got)
    got = map(backend.to_numpy, got)
    for one, want in zip(got, map(np.asarray, results(lambda array: array)), strict=True):
        assert want.shape == one.shape
        if want.dtype.kind == "f":
            np.testing.assert_allclose(one, want, rtol=5e-6, atol=1e-7)
        else:
            np.testing.assert_array_equal(one, want)


def narrow(backend: Backend, array: Any) -> Any:
    """Leave float64 out for libraries that compute it no better than float32."""
    return array.astype(np.float32) if backend.name == "mlx" and array.dtype == float else array


def test_numpy_labels_are_refused_with_the_way_to_convert(backend: Backend) -> None:
    with pytest.raises(
        TypeError, match=r"input is \w+ and target is numpy; convert target with \w"
    ):
        polyce.cross_entropy(backend.asarray(X), T)


def test_explain_names_the_library(backend: Backend, backend_name: str) -> None:
    device = "unknown" if backend_name == "ndonnx" else "cpu"
    text = str(polyce.explain(backend.asarray(X), backend.asarray(T), label_smoothing=0.1))
    assert text.startswith(f"cross_entropy on {backend_name} / {device}: logits float32 (2, 3), ")
    assert "label_smoothing 0.1" in text.splitlines()[0]
    assert text.splitlines()[-1].split() == ["reference", "yes", "<-", "runs"]


def test_a_score_is_that_of_numpy_arrays(backend_name: str) -> None:
    wanted = polyce.score(X, T).as_dict()
    for name in BACKENDS[backend_name]:
        library = get_backend(name)
        found = polyce.score(library.asarray(X), library.asarray(T)).as_dict()
        assert found == pytest.approx(wanted, rel=1e-5, nan_ok=True)
