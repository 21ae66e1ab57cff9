"""The row state: parts of a row merge, in any order, to the whole row's state within a few ulp."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

from polyce.call.options import Options
from polyce.call.problem import Problem, describe
from polyce.formula import rows as formula
from polyce.formula import rowstate, targets
from polyce.formula.rowstate import RowState
from polyce.testing import accuracy, compare, exact_answer, loss_tolerance
from polyce.testing.backends import Backend

pytestmark = pytest.mark.only("numpy", "strict", "torch", "torch-cuda", "jax-x64", "cupy")

INF, NAN = np.inf, np.nan
ROWS, CLASSES = 8, 12
MERGED_ULP = {"float32": 6.0, "float64": 5.0}
"""How many ulps of the logits' dtype the loss of a merged state may be off by."""
# The row dtype is float64 on all of these backends, for both dtypes of the logits.
KINDS = ("label", "smoothed", "probability")
Merge = Callable[[Any, RowState, RowState], RowState]


class Rows(NamedTuple):
    """Some rows in NumPy, with the coefficients of their classes and each row's pivot."""

    logits: Any
    coefficients: Any
    pivot: Any
    only_pivot: bool
    """Whether all coefficients but the pivot's are 0, and so may be None."""


def draw_rows(generator: np.random.Generator, kind: str, dtype: str) -> Rows:
    """Draw rows of several spreads and offsets, some with infinities or a nan."""
    logits = generator.normal(0.0, 1.0, (ROWS, CLASSES))
    logits *= generator.choice([0.3, 3.0, 30.0], (ROWS, 1))
    logits += generator.choice([0.0, 0.0, 1e4, -3e4], (ROWS, 1))
    logits[0, generator.permutation(CLASSES)[:5]] = -INF
    logits[1] = -INF
    logits[2, generator.integers(CLASSES)] = generator.choice([INF, NAN])
    pivot = generator.integers(0, CLASSES, ROWS)
    if kind == "probability":
        logits = logits.astype(dtype)
        pivot = np.argmax(logits, axis=1)
        coefficients = generator.exponential(0.2, (ROWS, CLASSES))
        coefficients[generator.random((ROWS, CLASSES)) < 0.4] = 0.0
    else:
        # A confident row, and one where every class but the label is masked.
        logits[3, pivot[3]] = logits[3].max() + 25.0
        logits[4, np.arange(CLASSES) != pivot[4]] = -INF
        weight = generator.choice([0.0, 0.5, 1.0, 2.0], (ROWS, CLASSES))
        smoothing = 0.1 / CLASSES if kind == "smoothed" else 0.0
        coefficients = smoothing * weight
        coefficients[np.arange(ROWS), pivot] = generator.uniform(0.5, 2.0, ROWS)
    return Rows(logits.astype(dtype), coefficients.astype(dtype), pivot, kind == "label")


def problem_of(backend: Backend, rows: Rows) -> Problem:
    logits = backend.asarray(rows.logits.copy())
    target = backend.asarray(rows.coefficients.copy())
    return describe(logits, target, options=Options(reduction="none"))[0]


def identity(backend: Backend, *, only_pivot: bool = False) -> RowState:
    """Make the state of no classes."""
    zero, lowest = (backend.asarray(np.full((ROWS, 1), value)) for value in (0.0, -INF))
    none = None if only_pivot else zero
    return RowState(lowest, zero, zero, zero, none, none)


def state_of(backend: Backend, problem: Problem, rows: Rows, classes: Any) -> RowState:
    """Make the state of the classes with these indices."""
    if classes.size == 0:
        return identity(backend, only_pivot=rows.only_pivot)
    at_pivot = classes == rows.pivot[:, None]
    has_pivot = at_pivot.any(axis=1, keepdims=True)
    pivot = rows.pivot[:, None]

    def own(values: Any) -> Any:
        """Return the pivot's value for rows whose pivot is in this part, and 0 for the others."""
        taken = np.take_along_axis(values, pivot, axis=1).astype(np.float64)
        return backend.asarray(np.where(has_pivot, taken, 0.0))

    coefficients = None if rows.only_pivot else backend.asarray(rows.coefficients[:, classes])
    with problem.library.quiet():
        state, _ = rowstate.from_logits(
            problem,
            backend.asarray(rows.logits[:, classes]),
            backend.asarray(at_pivot),
            own(rows.logits),
            own(rows.coefficients),
            coefficients,
        )
    return state


def loss_of(backend: Backend, problem: Problem, state: RowState) -> Any:
    with problem.library.quiet():
        losses = backend.to_numpy(rowstate.loss(problem, state))
    return losses.astype(np.float64)[:, 0]


def check(backend: Backend, problem: Problem, rows: Rows, state: RowState) -> None:
    """Compare the loss of the state of whole rows with the exact answer."""
    dtype = rows.logits.dtype.name
    answer = exact_answer(rows.logits, rows.coefficients, reduction="none")
    rule = dataclasses.replace(accuracy(dtype, backend.name), loss_ulp=MERGED_ULP[dtype])
    tolerance = loss_tolerance(answer, dtype, rule)
    got = loss_of(backend, problem, state)
    compare(got, answer.loss, tolerance, dtype=np.dtype("float64"), what="merged loss")


def cut(generator: np.random.Generator, parts: int) -> list[Any]:
    """Deal the classes out to parts, some of which may be empty."""
    order = generator.permutation(CLASSES)
    return np.split(order, np.sort(generator.integers(0, CLASSES + 1, parts - 1)))


def merge_all(
    backend: Backend,
    problem: Problem,
    generator: np.random.Generator,
    parts: list[RowState],
    merge: Merge = rowstate.merge,
) -> RowState:
    """Merge pairs in random order, either part first."""
    parts = list(parts)
    with problem.library.quiet():
        while len(parts) > 1:
            one = parts.pop(generator.integers(len(parts)))
            other = parts.pop(generator.integers(len(parts)))
            parts.append(merge(problem, one, other))
    return parts[0]


def draws(backend: Backend) -> Iterator[np.random.Generator]:
    """Return the random generators, one for each trial; jax compiles for each length of a part."""
    for seed in range(3 if backend.name == "jax" else 40):
        yield np.random.default_rng(seed)


# The merge


@pytest.mark.parametrize("dtype", MERGED_ULP)
@pytest.mark.parametrize("kind", KINDS)
def test_parts_in_any_order_give_the_loss_of_the_whole_row(
    backend: Backend, kind: str, dtype: str
) -> None:
    for generator in draws(backend):
        rows = draw_rows(generator, kind, dtype)
        problem = problem_of(backend, rows)
        whole = state_of(backend, problem, rows, np.arange(CLASSES))
        check(backend, problem, rows, whole)
        pieces = cut(generator, int(generator.integers(1, 6)))
        parts = [state_of(backend, problem, rows, classes) for classes in pieces]
        merged = merge_all(backend, problem, generator, parts)
        check(backend, problem, rows, merged)
        pair = [np.isnan(loss_of(backend, problem, state)) for state in (whole, merged)]
        assert np.array_equal(*pair)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["first", "last"])
def test_parts_of_minus_inf_alone_and_a_pivot_at_either_end(
    backend: Backend, kind: str, place: str
) -> None:
    generator = np.random.default_rng(0)
    drawn = draw_rows(generator, kind, "float64")
    logits = drawn.logits.copy()
    pieces = np.split(np.arange(CLASSES), [4, 8])
    pivot = np.full(ROWS, 0 if place == "first" else CLASSES - 1)
    coefficients = drawn.coefficients
    coefficients[np.arange(ROWS), pivot] = 0.7
    logits[:, 4:8] = -INF
    if kind == "probability":
        coefficients[:, 4:8] = 0.0
        logits[np.arange(ROWS), pivot] = logits.max(axis=1)
    elif kind == "label":
        coefficients[np.arange(CLASSES) != pivot[:, None]] = 0.0
    rows = Rows(logits, coefficients, pivot, drawn.only_pivot)
    problem = problem_of(backend, rows)
    parts = [state_of(backend, problem, rows, classes) for classes in pieces]
    check(backend, problem, rows, merge_all(backend, problem, generator, parts))


def example() -> Rows:
    """Return rows of x = (0, 1 | 5, 2) and r = (.1, .2 | .3, .4), without a pivot."""
    logits, coefficients = np.full((ROWS, CLASSES), -INF), np.zeros((ROWS, CLASSES))
    logits[:, :4], coefficients[:, :4] = [0.0, 1.0, 5.0, 2.0], [0.1, 0.2, 0.3, 0.4]
    return Rows(logits, coefficients, np.full(ROWS, CLASSES - 1), False)


def forgets_the_coefficient(problem: Problem, one: RowState, other: RowState) -> RowState:
    """Merge, with q' added as if both parts had the same maximum."""
    rest_excess = one.rest_excess + other.rest_excess
    return rowstate.merge(problem, one, other)._replace(rest_excess=rest_excess)


def forgets_the_maximum(problem: Problem, one: RowState, other: RowState) -> RowState:
    """Merge, with d' added as if both parts had the same maximum."""
    return rowstate.merge(problem, one, other)._replace(rest_sum=one.rest_sum + other.rest_sum)


def test_the_excess_is_carried_over_with_its_own_coefficients(backend: Backend) -> None:
    rows = example()
    problem = problem_of(backend, rows)
    one, other = (state_of(backend, problem, rows, np.arange(2) + first) for first in (0, 2))
    expected: dict[Merge, float] = {rowstate.merge: 2.5, forgets_the_coefficient: 1.3}
    for merge, excess in expected.items():
        for left, right in ((one, other), (other, one)):
            found = backend.to_numpy(merge(problem, left, right).rest_excess)
            assert found == pytest.approx(np.full((ROWS, 1), excess), rel=1e-15)


@pytest.mark.parametrize("wrong", [forgets_the_coefficient, forgets_the_maximum])
def test_the_check_of_merged_rows_catches_a_wrong_merge(backend: Backend, wrong: Merge) -> None:
    caught = 0
    for generator in draws(backend):
        rows = draw_rows(generator, "smoothed", "float64")
        problem = problem_of(backend, rows)
        parts = [state_of(backend, problem, rows, classes) for classes in cut(generator, 3)]
        try:
            check(backend, problem, rows, merge_all(backend, problem, generator, parts, wrong))
        except AssertionError:
            caught += 1
    assert caught >= 2


def fields(backend: Backend, state: RowState) -> dict[str, Any]:
    named = {key: value for key, value in state._asdict().items() if value is not None}
    return {key: backend.to_numpy(value) for key, value in named.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_merging_with_the_identity_changes_nothing(backend: Backend, kind: str) -> None:
    rows = draw_rows(np.random.default_rng(1), kind, "float64")
    rows.logits[2, ~np.isfinite(rows.logits[2])] = 0.5
    problem = problem_of(backend, rows)
    state = state_of(backend, problem, rows, np.arange(CLASSES))
    nothing = identity(backend, only_pivot=rows.only_pivot)
    expected = fields(backend, state)
    with problem.library.quiet():
        merged = [
            rowstate.merge(problem, nothing, state),
            rowstate.merge(problem, state, nothing),
        ]
    for found in (fields(backend, m) for m in merged):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert np.array_equal(found[key], value, equal_nan=True), key


@pytest.mark.parametrize("kind", KINDS)
def test_the_merge_is_commutative_and_associative_to_rounding(backend: Backend, kind: str) -> None:
    for generator in draws(backend):
        rows = draw_rows(generator, kind, "float64")
        rows.logits[2, ~np.isfinite(rows.logits[2])] = 0.5
        problem = problem_of(backend, rows)
        a, b, c = (state_of(backend, problem, rows, part) for part in cut(generator, 3))
        with problem.library.quiet():
            left = rowstate.merge(problem, rowstate.merge(problem, a, b), c)
            right = rowstate.merge(problem, a, rowstate.merge(problem, b, c))
            turned = rowstate.merge(problem, c, rowstate.merge(problem, a, b))
        of_left, of_right, of_turned = (fields(backend, s) for s in (left, right, turned))
        assert ("rest_excess" in of_left) == (kind != "label")
        for key, value in of_left.items():
            assert np.array_equal(value, of_turned[key], equal_nan=True), key
            assert np.allclose(value, of_right[key], rtol=8 * 2.0**-53, atol=0.0, equal_nan=True)


def test_a_pivot_that_another_part_passes_counts_among_the_rest(backend: Backend) -> None:
    generator = np.random.default_rng(11)
    for dtype in ("float32", "float64"):
        rows = draw_rows(generator, "probability", dtype)
        problem = problem_of(backend, rows).with_options(stats=("prediction",))
        merged = None
        for classes in np.array_split(np.arange(CLASSES), 4):
            own = classes[np.argmax(rows.logits[:, classes], axis=1)]
            state = state_of(backend, problem, rows._replace(pivot=own), classes)
            first = state.rest_first + backend.asarray(np.full((ROWS, 1), classes[0]))
            passed = backend.asarray((own != rows.pivot)[:, None])
            with problem.library.quiet():
                state = rowstate.demote(
                    problem,
                    state._replace(rest_first=first),
                    backend.asarray(own[:, None]),
                    passed,
                )
                merged = state if merged is None else rowstate.merge(problem, merged, state)
        check(backend, problem, rows, merged)
        second = rows.logits.copy()
        np.put_along_axis(second, rows.pivot[:, None], -INF, axis=1)
        found = backend.to_numpy(merged.rest_first)[3:, 0]
        np.testing.assert_array_equal(found, np.argmax(second[3:], axis=1))


def test_one_coefficient_for_all_classes_is_as_good_as_an_array(backend: Backend) -> None:
    drawn = draw_rows(np.random.default_rng(2), "label", "float64")
    share = 1 / 64
    rows = Rows(drawn.logits, np.full((ROWS, CLASSES), share), drawn.pivot, False)
    problem = problem_of(backend, rows)
    array = state_of(backend, problem, rows, np.arange(CLASSES))
    at_pivot = np.arange(CLASSES) == rows.pivot[:, None]
    with problem.library.quiet():
        number, _ = rowstate.from_logits(
            problem,
            backend.asarray(rows.logits),
            backend.asarray(at_pivot),
            array.pivot_logit,
            share,
            share,
        )
    check(backend, problem, rows, array)
    check(backend, problem, rows, number)


# The reference on top of it


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_backward_from_the_saved_state_is_the_gradient_of_both_in_one(
    backend: Backend, kind: str, reduction: str
) -> None:
    generator = np.random.default_rng(3)
    rows = draw_rows(generator, "probability", "float32")
    labels = generator.integers(0, CLASSES, ROWS)
    labels[5] = -100
    target = labels if kind == "index" else rows.coefficients
    weight = generator.uniform(0.5, 2.0, CLASSES).astype(np.float32)
    problem, operands = describe(
        *(backend.asarray(array) for array in (rows.logits, target, weight)),
        options=Options(reduction=reduction, label_smoothing=0.1),
    )
    runs = []
    for _ in range(2):
        with problem.library.quiet():
            plan = targets.plan(problem, operands)
            cotangent = targets.cotangent(problem, plan, None)
            losses, _ = formula.forward(problem, plan, operands.logits)
            grad = formula.backward(problem, plan, cotangent, operands.logits)
            *both, _ = formula.forward_backward(problem, plan, cotangent, operands.logits)
        runs.append([backend.to_numpy(array).tobytes() for array in (losses, grad, *both)])
    first, second = runs
    assert first[:2] == first[2:]
    assert first == second, "the bits must not change from run to run"
