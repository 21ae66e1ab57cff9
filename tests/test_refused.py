"""Libraries whose arrays are refused: one sentence each, which says what to pass instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import polyce
from polyce.arrays.find import NOT_TAKEN

X = np.array([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]], dtype=np.float32)
T = np.array([0, 1])


@pytest.mark.only("numpy", "torch")
@pytest.mark.parametrize("module", NOT_TAKEN)
@pytest.mark.parametrize("name", ["input", "target", "weight"])
def test_stand_ins(module: str, name: str) -> None:
    """Only the module names of the class and of its base classes are looked at."""
    kind = type("Array", (), {"__module__": f"{module}.core", "shape": (2, 3), "dtype": X.dtype})
    derived = type("Mine", (kind,), {"__module__": "mine"})
    for stand_in in (kind(), derived()):
        given = {"input": X, "target": T, "weight": np.ones(3)} | {name: stand_in}
        with pytest.raises(TypeError) as caught:
            polyce.cross_entropy(**given)
        message = str(caught.value)
        why, instead = NOT_TAKEN[module]
        assert message.startswith(f"{name} must not be ")
        assert why in message
        assert message.endswith(instead.format(name=name))


def blosc2_array(array: Any) -> Any:
    import blosc2

    return blosc2.asarray(array)


def blosc2_expression(array: Any) -> Any:
    return blosc2_array(array) + 0


def sparse_array(array: Any) -> Any:
    import sparse

    return sparse.COO.from_numpy(array)


def xarray_array(array: Any) -> Any:
    import xarray

    return xarray.DataArray(array)


def xarray_variable(array: Any) -> Any:
    import xarray

    return xarray.Variable([f"d{i}" for i in range(array.ndim)], array)


def pint_quantity(array: Any) -> Any:
    import pint

    return pint.UnitRegistry().Quantity(array, "meter")


REAL: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "blosc2": (blosc2_array, lambda array: array[:]),
    "blosc2-expression": (blosc2_expression, lambda array: array[:]),
    "sparse": (sparse_array, lambda array: array.todense()),
    "xarray": (xarray_array, lambda array: array.data),
    "xarray-variable": (xarray_variable, lambda array: array.data),
    "pint": (pint_quantity, lambda array: array.magnitude),
}


@pytest.mark.only("refused")
@pytest.mark.parametrize("kind", REAL)
@pytest.mark.parametrize("name", ["input", "target"])
def test_real_ones(kind: str, name: str) -> None:
    make, unmake = REAL[kind]
    plain = {"input": X, "target": T}
    given = plain | {name: make(plain[name])}
    module = kind.partition("-")[0]
    with pytest.raises(TypeError, match=rf"^{name} must not be {module}\.") as caught:
        polyce.cross_entropy(**given)
    assert str(caught.value).endswith(NOT_TAKEN[module][1].format(name=name))
    # What the sentence suggests works.
    given[name] = unmake(given[name])
    assert polyce.cross_entropy(X, T) == polyce.cross_entropy(**given)


@pytest.mark.only("refused")
def test_xarray_through_apply_ufunc() -> None:
    import xarray

    logits = xarray.DataArray(X, dims=("row", "class"))
    rows = xarray.apply_ufunc(
        lambda x, t: polyce.cross_entropy(x, t, reduction="none", axis=-1),
        logits,
        xarray.DataArray(T, dims="row"),
        input_core_dims=[["class"], []],
    )
    np.testing.assert_array_equal(polyce.cross_entropy(X, T, reduction="none"), rows.data)
