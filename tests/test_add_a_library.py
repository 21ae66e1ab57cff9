"""What docs/how-to/add-a-library.md says, done for the toy library of thin.py.

The page shows `Thin` and `thin_backend` as they stand here.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import pytest

import polyce
import thin
from conftest import FULL
from polyce.arrays import find, others
from polyce.arrays.library import Library, WithNumPyDtypes, expand, widens_nothing
from polyce.arrays.numpy import OnNumPy
from polyce.testing import Backend, cases, check_implementation
from polyce.testing.selection import representative

pytestmark = pytest.mark.only("numpy")
Register: TypeAlias = Callable[[type[Library]], None]

# These groups together use everything that a library has; all groups would take half a minute.
GROUPS = ("options", "shapes", "special", "combined", "stats")
LOGITS = np.array([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]])
LABELS = np.array([0, 1])


class Thin(OnNumPy, WithNumPyDtypes):
    """thin, whose argmax drops the axis and whose sum takes no dtype."""

    def argmax(self, values: Any, axis: int) -> Any:
        """Put the axis back."""
        return expand(self.xp.argmax(values, axis=axis), axis)

    def class_sum(self, values: Any, axis: int, dtype: Any) -> Any:
        """Widen before the sum."""
        values = self.cast(values, dtype)
        if widens_nothing(values, axis, dtype) and self.adds_one_by_one(values, axis):
            return self.sum_by_blocks(values, axis)
        return self.xp.sum(values, axis=axis, keepdims=True)


def thin_backend() -> Backend:
    return Backend(
        name="thin",
        asarray=lambda array: thin.asarray(array.copy()),
        to_numpy=thin.to_numpy,
        owns=lambda result: isinstance(result, thin.Array),
        floats=("float32", "float64"),
        quiet=True,
    )


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Register:
    """Put a class into the table as a contributor would."""
    monkeypatch.setattr(find, "_known", dict(find._known))

    def put(kind: type[Library]) -> None:
        monkeypatch.setitem(others.CLASSES, "thin", (kind, "thin.asarray"))

    return put


@pytest.mark.parametrize("group", GROUPS)
def test_grid(register: Register, group: str) -> None:
    register(Thin)
    backend = thin_backend()
    few = {case.name for case in representative(cases([group], backend.floats))}
    report = check_implementation(
        "reference",
        backend,
        groups=[group],
        leave_out=lambda case: "" if FULL or case.name in few else "not among the few",
    )
    assert report.ran[group] > 0


class WithoutDtypes(OnNumPy):
    argmax, class_sum = Thin.argmax, Thin.class_sum


class WithoutArgmax(OnNumPy, WithNumPyDtypes):
    class_sum = Thin.class_sum


class WithoutSum(OnNumPy, WithNumPyDtypes):
    argmax = Thin.argmax


class Loud(Thin):
    quiet_numpy = False


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (WithoutDtypes, "has no attribute '__array_namespace_info__'"),
        (WithoutArgmax, "argmax.. got an unexpected keyword argument 'keepdims'"),
        (WithoutSum, "sum.. got an unexpected keyword argument 'dtype'"),
        (Loud, "RuntimeWarning: invalid value encountered"),
    ],
)
def test_the_grid_finds_what_the_class_leaves_out(
    register: Register, kind: type[Library], message: str
) -> None:
    register(kind)
    with pytest.raises(AssertionError, match=message):
        check_implementation("reference", thin_backend(), groups=["stats"], dtypes=["float32"])


def test_explain_and_errors_know_its_name(register: Register) -> None:
    register(Thin)
    logits, labels = thin.asarray(LOGITS), thin.asarray(LABELS)
    text = str(polyce.explain(logits, labels))
    assert text.startswith("cross_entropy on thin / cpu: logits float64 (2, 3), target int64 (2,)")
    with pytest.raises(
        TypeError, match=r"input is thin and target is numpy; convert target with thin\.asarray"
    ):
        polyce.cross_entropy(logits, LABELS)
    with pytest.raises(IndexError, match=r"got 3 at position \(1,\)"):
        polyce.cross_entropy(logits, thin.asarray(np.array([0, 3])))


def test_a_mask_is_as_long_as_what_is_picked_from(register: Register) -> None:
    """A head's class weights are picked beside hidden states, which have another length."""
    register(Thin)
    library, _ = find.of(input=thin.asarray(LOGITS))
    weight, labels = np.array([[1.0, 2.0, 3.0, 4.0, 5.0]]), np.array([[4], [0]])
    picked = library.pick(*map(thin.asarray, (weight, labels, LOGITS)), 1)
    assert thin.to_numpy(picked).tolist() == [[5.0], [1.0]]


def test_other_processes_find_it_by_its_name(register: Register) -> None:
    register(Thin)
    library, _ = find.of(input=thin.asarray(LOGITS))
    assert isinstance(library, Thin)
    found = pickle.loads(pickle.dumps(library))
    assert (type(found), found.name, found.xp) == (Thin, "thin", thin)
