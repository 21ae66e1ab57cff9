"""The compiled gradient of loss, lse and entropy together, against its plain definition."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest

from polyce.call.options import Options
from polyce.call.problem import Operands, Problem, describe
from polyce.implementations.native import core as native
from polyce.implementations.native.run import NUMPY, run, run_backward
from polyce.testing.dtypes import FORMATS, dtype, missing

pytestmark = [pytest.mark.only("numpy"), pytest.mark.same_everywhere]

CORE = native.core()
DTYPES = [name for name in FORMATS if name not in missing()]
if np.finfo(np.longdouble).nmant <= 52:
    DTYPES.remove("float64")  # nothing here to hold it to
WIDE = [name for name in DTYPES if name in ("float32", "float64")]
# Across rows in one chunk or several, along rows of one block or several.
SHAPES = [(12, 1), (150, 2), (37, 10), (20, 65), (20, 100), (12, 1000), (9, 5000)]
IGNORED = -100
CASES: dict[str, dict[str, Any]] = {
    "labels": {},
    "stats": {"stats": True, "reduction": "none"},
    "scale": {"logit_scale": 0.3, "reduction": "none"},
    "softcap": {"logit_softcap": 20.0, "logit_scale": 0.25},
    "z_loss": {"z_loss": 0.01, "logit_scale": 1.5},
    "smoothing": {"label_smoothing": 0.1},
    "probabilities": {"stats": ("entropy",)},
    "probabilities, softcap": {"logit_softcap": 20.0, "reduction": "none"},
}
IN_ALL_DTYPES = ("labels", "stats", "probabilities, softcap")


@pytest.fixture
def settings() -> Iterator[Any]:
    """The core; its instruction set is restored after the test."""
    before = CORE.isa()
    yield CORE
    CORE.use_isa(before)


class Rows(NamedTuple):
    """Arrays of a call, the classes on the last axis."""

    logits: Any
    target: Any
    sample_weight: Any
    grad_output: Any
    grad_lse: Any
    grad_entropy: Any


def make(rows: int, classes: int, name: str, kind: str, reduction: str) -> Rows:
    """Make rows that are flat, confident, off by 1e4 or masked, some of which do not count."""
    rng = np.random.default_rng(rows * classes)
    logits = rng.standard_normal((rows, classes)) * rng.choice([0.3, 2.0, 8.0], (rows, 1))
    labels, every = rng.integers(0, classes, rows), np.arange(rows)
    logits[every, rng.integers(0, classes, rows)] += np.linspace(0.0, 60.0, rows)
    logits[0].sort()  # another class is the likeliest so far in every block
    logits[1::4] += 1e4
    masked = (rng.random((rows, classes)) < 0.4) & (every % 3 == 2)[:, None]
    masked[every, labels] = False
    logits[masked] = -np.inf
    weight = rng.uniform(0.5, 2.0, rows)
    weight[5::11] = 0.0
    target: Any = labels
    if kind == "probabilities":
        target = rng.random((rows, classes)) ** 4 * ~masked
        target /= target.sum(-1, keepdims=True)
        target = target.astype(dtype(name))
    else:
        target[3::7] = IGNORED
    cotangents = rng.standard_normal((2, rows))
    grad_output = rng.standard_normal(rows) if reduction == "none" else np.float64(-1.7)
    return Rows(logits.astype(dtype(name)), target, weight, grad_output, *cotangents)


class Exact(NamedTuple):
    entropy: Any
    grad: Any
    tolerance: Any


def exact(rows: Rows, options: dict[str, Any]) -> Exact:
    """Compute entropy and gradient by their definitions, and how far the gradient may be off.

    Differences are to the largest logit, so that nothing of small probabilities is lost.
    """
    wide = np.longdouble
    x = rows.logits.astype(wide) * wide(options.get("logit_scale", 1.0))
    slope, angle = np.full(x.shape, wide(options.get("logit_scale", 1.0))), np.zeros(x.shape)
    if (cap := options.get("logit_softcap")) is not None:
        angle = np.where(np.isfinite(x), abs(x) / cap, 0.0)
        slope = slope / np.cosh(angle) ** 2
        x = np.where(np.isfinite(x), cap * np.tanh(x / cap), x)
    classes, every = x.shape[-1], np.arange(len(x))
    top = x.argmax(-1)
    lead = x[every, top][:, None] - x
    others = np.exp(-lead)
    others[every, top] = 0.0
    h = np.log1p(others.sum(-1, keepdims=True))
    gap, lse = lead + h, x[every, top][:, None] + h
    p = np.exp(-gap)
    finite_gap = np.where(p > 0, gap, 0.0)
    entropy = (p * finite_gap).sum(-1, keepdims=True)

    counts = rows.sample_weight != 0
    if rows.target.ndim == 1:
        counts = counts & (rows.target != IGNORED)
        r = (np.arange(classes) == rows.target[:, None]).astype(wide)
    else:
        r = rows.target.astype(wide)
    smoothing = wide(options.get("label_smoothing", 0.0))
    r = r * (1 - smoothing) + smoothing / classes
    total = r.sum(-1, keepdims=True)
    factor = np.where(counts, rows.sample_weight.astype(wide), 0.0) * rows.grad_output
    if options.get("reduction", "mean") == "mean":
        factor = factor / (rows.sample_weight.astype(wide) * counts).sum()
    factor = factor[:, None]
    # R p - r = R (p - 1) + (R - r): the form with the smaller terms keeps its digits.
    near, away = total * p + r, -total * np.expm1(-gap) + (total - r)
    loss = np.where(near < away, total * p - r, total * np.expm1(-gap) + (total - r)) * factor
    pull = 2 * wide(options.get("z_loss", 0.0)) * lse * factor
    grad_lse, grad_entropy = (
        np.zeros((1, 1)) if cotangent is None else cotangent[:, None]
        for cotangent in (rows.grad_lse, rows.grad_entropy)
    )
    grad = loss + p * (pull + grad_lse + grad_entropy * (finite_gap - entropy))
    size = np.minimum(near, away) * abs(factor)
    size = size + p * (abs(pull) + abs(grad_lse) + abs(grad_entropy) * (finite_gap + entropy))
    slope = np.where(counts[:, None], slope, 0.0)
    entropy = np.where(counts, entropy[:, 0], np.nan)
    lead, grad, size = np.where(p > 0, lead, 0.0), grad * slope, size * slope
    name = rows.logits.dtype.name
    arithmetic = FORMATS["float64" if name == "float64" else "float32"]
    # A gap is rounded, so the exponential of a large one is less exact; under a softcap it is
    # rounded a few times more, and so is the angle, whose exponential the slope is.
    ulps = 10.0 + (2.5 if cap is None else 9.0) * lead + 2.0 * angle
    tolerance = ulps * arithmetic.unit * size + np.where(size > 0, 8 * arithmetic.subnormal, 0.0)
    # An exponential below the smallest normal number may be treated as 0.
    vanishes = np.maximum(lead, 2.0 * angle) > -np.log(arithmetic.tiny) - 1.0
    tolerance = tolerance + np.where(vanishes, size, 0.0)
    if name != arithmetic.name:
        spacing = FORMATS[name].spacing(abs(grad).astype(float))
        tolerance = tolerance + np.where(size > 0, spacing / 2, 0.0)
    return Exact(entropy, grad, tolerance)


def prepare(rows: Rows, options: dict[str, Any], axis: int) -> tuple[Problem, Operands]:
    """Describe the call with the classes on another axis, of arrays that lie in C order."""

    def moved(array: Any) -> Any:
        return np.ascontiguousarray(np.moveaxis(array, -1, axis))

    problem, operands = describe(
        moved(rows.logits),
        moved(rows.target) if rows.target.ndim == 2 else rows.target,
        sample_weight=rows.sample_weight,
        options=Options(axis=axis, **options),
        grad_output=rows.grad_output,
    )
    return problem, operands._replace(grad_lse=rows.grad_lse, grad_entropy=rows.grad_entropy)


def check(grad: Any, want: Exact, axis: int) -> None:
    found = np.moveaxis(grad, axis, -1)
    error = abs(found.astype(np.longdouble) - want.grad)
    wrong = ~(error <= want.tolerance)
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0])
        raise AssertionError(
            f"{grad.dtype}, axis {axis}, {CORE.isa()}: {int(wrong.sum())} wrong, first {at}: got "
            f"{found[at]:.9g}, expected {want.grad[at]:.9g} within {want.tolerance[at]:.3g}"
        )


def check_entropy(entropy: Any, want: Exact) -> None:
    form = FORMATS[entropy.dtype.name]
    error = abs(entropy - want.entropy) / form.spacing(want.entropy.astype(float))
    assert (np.isnan(entropy) == np.isnan(want.entropy)).all()
    # Nothing is wider for a row of float64.
    assert np.nanmax(error) <= (6.0 if form.name == "float64" else 4.0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gradient(settings: Any, case: str, shape: tuple[int, int]) -> None:
    options = CASES[case]
    kind, reduction = case.partition(",")[0], options.get("reduction", "mean")
    for name in DTYPES if case in IN_ALL_DTYPES else WIDE:
        both = make(*shape, name, kind, reduction)
        of_lse = both._replace(grad_entropy=None)
        for rows in (both, of_lse):
            want = exact(rows, options)
            for isa, axis in product(settings.isas(), (0, 1)):
                settings.use_isa(isa)
                check_call(rows, options, axis, want)


def check_call(rows: Rows, options: dict[str, Any], axis: int, want: Exact) -> None:
    problem, operands = prepare(rows, options, axis)
    grad = np.empty_like(operands.logits)
    _, stats = run(NUMPY, problem, operands, grad)
    check(grad, want, axis)
    if stats is not None:
        check_entropy(stats.entropy, want)
    # The backward pass alone, with and without what a forward pass has saved.
    saved = np.empty((len(rows.sample_weight), 4))
    run(NUMPY, problem, operands._replace(grad_lse=None, grad_entropy=None), saved=saved)
    for each in (None, saved):
        alone = np.empty_like(operands.logits)
        run_backward(NUMPY, problem, operands, each, alone, fresh=False)
        check(alone, want, axis)
