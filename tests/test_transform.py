"""The transform of the logits: differences keep their digits, and parts of a row merge."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import polyce
from polyce.call.options import Options
from polyce.call.problem import Problem, describe
from polyce.formula import rowstate, transform
from polyce.testing.backends import Backend

# jax compiles nearly every call anew.
pytestmark = pytest.mark.slow("jax-x32")

INF = math.inf
SCALES = (1.0, 0.37, 3.0)
CAPS = (INF, 5.0, 50.0)


def problem_of(backend: Backend, shape: tuple[int, int], **options: Any) -> Problem:
    dtype = "float64" if "float64" in backend.floats else "float32"
    logits = backend.asarray(np.zeros(shape, dtype))
    target = backend.asarray(np.full(shape, 1.0 / shape[1], dtype))
    return describe(logits, target, options=Options(reduction="none", **options))[0]


def finite(cap: float) -> float | None:
    """Return a softcap as a call takes it, None for infinity."""
    return None if cap == INF else cap


def exact_difference(a: float, b: float, scale: float, cap: float) -> float:
    """Compute x(a) - x(b), with enough digits where tanh is close to 1, rounded once."""
    getcontext().prec = 60 + math.ceil(2 * scale / cap * max(abs(a), abs(b)))
    s = Decimal(scale)
    if cap == INF:
        return float(s * (Decimal(a) - Decimal(b)))

    def capped(value: float) -> Decimal:
        e = (-2 * s * Decimal(abs(value)) / Decimal(cap)).exp()
        return Decimal(cap) * (1 - e) / (1 + e) * (1 if value >= 0 else -1)

    return float(capped(a) - capped(b))


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("scale", SCALES)
def test_a_difference_keeps_its_digits(backend: Backend, scale: float, cap: float) -> None:
    generator = np.random.default_rng(0)
    dtype = "float64" if "float64" in backend.floats else "float32"
    a = generator.normal(0.0, 3.0, 200) * generator.choice([0.01, 1.0, 10.0], 200)
    b = a + generator.normal(0.0, 1.0, 200) * generator.choice([1e-6, 1e-2, 1.0, 30.0], 200)
    a[:4], b[:4] = [0.0, 0.0, 1.0, 700.0], [0.0, -1.0, 0.0, 699.0]
    a, b = a.astype(dtype), b.astype(dtype)
    problem = problem_of(backend, (1, 2), logit_scale=scale, logit_softcap=finite(cap))
    found = backend.to_numpy(
        transform.difference(problem, backend.asarray(a), backend.asarray(b))
    ).astype(np.float64)
    want = np.array(
        [exact_difference(x, y, scale, cap) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    )
    unit = np.finfo(dtype).eps / 2
    # exp(-2|u|) alone is off by half an ulp for every unit of its exponent.
    steps = 12.0 + (0.0 if cap == INF else 4.0 * scale / cap * np.maximum(abs(a), abs(b)))
    tiny = 8 * float(np.finfo(dtype).tiny)
    assert (np.abs(found - want) <= steps * unit * np.abs(want) + tiny).all()


@pytest.mark.parametrize("cap", CAPS)
def test_infinities_and_nans(backend: Backend, cap: float) -> None:
    problem = problem_of(backend, (1, 2), logit_scale=2.0, logit_softcap=finite(cap))
    dtype = problem_dtype(backend)
    rows = np.array([-INF, 1.0, -INF, INF, math.nan, 1.0], dtype)
    reference = np.array([1.0, -INF, -INF, INF, 1.0, math.nan], dtype)
    with problem.library.quiet():
        found = transform.difference(problem, backend.asarray(rows), backend.asarray(reference))
        values = transform.value(problem, backend.asarray(rows))
        slopes = transform.slope(problem, backend.asarray(rows))
    np.testing.assert_array_equal(
        backend.to_numpy(found), np.array([-INF, INF, np.nan, np.nan, np.nan, np.nan])
    )
    assert backend.to_numpy(values)[0] == -INF
    assert (slopes if cap == INF else backend.to_numpy(slopes)[0]) == (2.0 if cap == INF else 0.0)


def problem_dtype(backend: Backend) -> str:
    return "float64" if "float64" in backend.floats else "float32"


@pytest.mark.only("numpy", "strict", "torch", "jax-x64", "jax-x32")
@pytest.mark.parametrize("scale", [1.0, 0.37, 3.0, 1e-3])
def test_the_rounding_of_a_difference_is_known_exactly(backend: Backend, scale: float) -> None:
    """Except for the last part, which is itself rounded and 2⁻⁵⁰ times smaller."""
    generator = np.random.default_rng(1)
    dtype = problem_dtype(backend)
    a, b = (generator.normal(0.0, 30.0, 200).astype(dtype) for _ in range(2))
    b = (b * np.float64(1e-3)).astype(dtype)
    problem = problem_of(backend, (1, 2), logit_scale=scale)
    pair = backend.asarray(a), backend.asarray(b)
    found = backend.to_numpy(transform.difference(problem, *pair))
    error = backend.to_numpy(transform.difference_error(problem, *pair))
    unit = Fraction(float(np.finfo(dtype).eps))
    for x, y, d, e in zip(*(v.tolist() for v in (a, b, found, error)), strict=True):
        want = Fraction(scale) * (Fraction(x) - Fraction(y))
        assert abs(Fraction(d) + Fraction(e) - want) <= 2 * unit * unit * abs(want)


@pytest.mark.slow("dask")
@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("scale", SCALES)
def test_parts_of_a_row_merge_with_their_stats(backend: Backend, scale: float, cap: float) -> None:
    classes, rows = 9, 6
    generator = np.random.default_rng(2)
    logits = generator.normal(0.0, 4.0, (rows, classes))
    logits[0] = 0.0
    logits[1, [2, 7]] = logits[1].max() + 1.0
    logits[2, 3:] = -INF
    logits[3] += 1e3
    logits = logits.astype(problem_dtype(backend))
    coefficients = generator.dirichlet(np.ones(classes), rows).astype(logits.dtype)
    pivot = np.argmax(logits, axis=1)[:, None]
    problem = problem_of(
        backend, (rows, classes), stats=True, logit_scale=scale, logit_softcap=finite(cap)
    )

    def part(start: int, stop: int) -> rowstate.RowState:
        mine = np.arange(start, stop)
        own = (pivot >= start) & (pivot < stop)
        taken = [
            backend.asarray(np.where(own, np.take_along_axis(values, pivot, axis=1), 0.0))
            for values in (logits, coefficients)
        ]
        with problem.library.quiet():
            state, _ = rowstate.from_logits(
                problem,
                backend.asarray(logits[:, mine].copy()),
                backend.asarray(mine == pivot),
                *taken,
                backend.asarray(coefficients[:, mine].copy()),
            )
        return state._replace(rest_first=state.rest_first + start)

    def facts(state: rowstate.RowState) -> list[Any]:
        index = backend.asarray(pivot)
        with problem.library.quiet():
            found = [
                rowstate.loss(problem, state, 1e-3),
                rowstate.lse(problem, state),
                rowstate.entropy(problem, state),
                rowstate.prediction(problem, state, index),
            ]
        return [backend.to_numpy(array) for array in found]

    whole = facts(part(0, classes))
    assert (whole[3] == pivot).all()
    with problem.library.quiet():
        one, other, third = part(0, 2), part(2, 5), part(5, classes)
        for parts in ((one, other, third), (third, one, other)):
            merged = rowstate.merge(problem, rowstate.merge(problem, *parts[:2]), parts[2])
            for got, want in zip(facts(merged), whole, strict=True):
                # When states with a softcap merge, an exponent is rounded once more.
                rtol = (16 if cap == INF else 256) * np.finfo(logits.dtype).eps
                np.testing.assert_allclose(got, want, rtol=rtol)


@pytest.mark.only("numpy", "strict", "torch", "jax-x32", "jax-x64", "dask")
@pytest.mark.parametrize("share", [0.25, 1e-10])
@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_the_largest_logits_at_the_ends_of_the_scale(
    backend: Backend, scale: float, share: float
) -> None:
    """The grid's tolerances cannot be computed for logits this large."""
    dtype = problem_dtype(backend)
    large = float(np.finfo(dtype).max) * share
    logits = backend.asarray(np.array([[large, 0.0, -large], [0.0, large, -large]], dtype))
    labels = backend.asarray(np.array([0, 0], np.int32))
    for name in (None, "reference"):
        loss, grad = polyce.cross_entropy_with_grad(
            logits, labels, reduction="none", logit_scale=scale, implementation=name
        )
        with np.errstate(over="ignore"):
            lost = np.array([0.0, np.dtype(dtype).type(large) * np.dtype(dtype).type(scale)])
        np.testing.assert_allclose(backend.to_numpy(loss), lost, rtol=1e-6)
        gradient = np.array([[0.0, 0.0, 0.0], [-scale, scale, 0.0]])
        np.testing.assert_allclose(backend.to_numpy(grad), gradient, rtol=1e-6)
