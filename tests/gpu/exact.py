"""Exact answers for many rows at once, in float64 or better, and the errors of results.

The formula has no cancellation: the loss is a sum of non-negative terms, and the gradient at the
label is the share of all other classes. The tolerances are those of the conformance grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from polyce.testing import Answer, accuracy, compare, grad_tolerance, loss_tolerance
from polyce.testing.dtypes import FORMATS, dtype

Row = dict[str, Any]
# Gradient errors are grouped by how far a logit lies below the largest other one.
GAPS = (0.0, 1.0, 4.0, 16.0, 64.0, 128.0, 1024.0)


class Options(NamedTuple):
    """The arguments of a call besides logits and target."""

    weight: np.ndarray | None = None
    smoothing: float = 0.0
    ignore_index: int = -100


def exact(logits: np.ndarray, target: np.ndarray, g: np.ndarray, options: Options) -> Answer:
    """Compute the row losses, and the gradient for a cotangent of each row.

    Parameters
    ----------
    logits : ndarray, shape (N, C)
        In float64, or in a wider dtype, in which everything is then computed.
    target : ndarray, shape (N,) or (N, C)
        Labels or probabilities.
    g : ndarray, shape (N,)
        The cotangents.
    options : Options
        The rest.
    """
    rows, classes = logits.shape
    each = np.arange(rows)
    kept = np.ones(rows, bool) if target.ndim > 1 else target != options.ignore_index
    largest = logits.argmax(axis=1)
    pivot = largest if target.ndim > 1 else np.where(kept, target, 0)
    r = _coefficients(target, pivot, classes, options, logits.dtype)
    behind = logits[each, largest, None] - logits
    p = np.exp(-behind)
    p[each, largest] = 0.0
    rest = p.sum(axis=1, keepdims=True)
    p[each, largest] = 1.0
    p /= 1.0 + rest
    losses = np.where(kept, (r * (behind + np.log1p(rest))).sum(axis=1), 0.0)

    at = np.zeros((rows, classes), bool)
    at[each, pivot] = True
    others = np.where(at, 0.0, r).sum(axis=1)
    total = others + r[each, pivot]
    # Where the pivot is the largest class, 1 - p is what all others have.
    besides = np.where(pivot == largest, rest[:, 0] / (1.0 + rest[:, 0]), 1.0 - p[each, pivot])
    grad = total[:, None] * p - r
    grad[each, pivot] = others - total * besides
    softmax_part, coefficient_part = total[:, None] * p, np.abs(r)
    # The likeliest class takes the form with the smaller terms, a label always this one.
    plain = softmax_part[each, pivot] + coefficient_part[each, pivot] < total * besides + others
    taken = each[~plain] if target.ndim > 1 else each
    softmax_part[taken, pivot[taken]] = (total * besides)[taken]
    coefficient_part[taken, pivot[taken]] = others[taken]
    without = np.where(at, -np.inf, logits)
    gap = np.where(at, 0.0, without.max(axis=1, keepdims=True) - logits)
    share = np.where(kept, g, 0.0)[:, None]
    parts = (np.asarray(part * np.abs(share), float) for part in (softmax_part, coefficient_part))
    return _answer(losses, grad * share, *parts, gap, at)


def _coefficients(
    target: np.ndarray, labels: np.ndarray, classes: int, options: Options, kind: Any
) -> np.ndarray:
    weight = np.ones(classes) if options.weight is None else options.weight
    weight = weight.astype(kind)
    smoothing = kind.type(options.smoothing)
    if target.ndim > 1:
        return weight * ((1 - smoothing) * target + smoothing / classes)
    r = np.broadcast_to(smoothing / classes * weight, (len(labels), classes)).copy()
    r[np.arange(len(labels)), labels] += (1 - smoothing) * weight[labels]
    return r


def _answer(
    losses: np.ndarray,
    grad: np.ndarray,
    softmax_part: np.ndarray,
    coefficient_part: np.ndarray,
    gap: np.ndarray,
    pivot: np.ndarray,
) -> Answer:
    """Put the results into the record that the grid's tolerances take, without a transform."""
    zero: Any = np.zeros(())
    nothing: Any = None
    return Answer(
        loss=np.asarray(losses, float),
        grad=np.asarray(grad, float),
        loss_dtype=nothing,
        transform="none",
        loss_scale=np.asarray(losses, float),
        square_part=zero,
        loss_spread=zero,
        loss_lead=zero,
        softmax_part=softmax_part,
        pull_part=zero,
        coefficient_part=coefficient_part,
        target_loss=zero,
        target_part=zero,
        stats_part=zero,
        gap=np.asarray(gap, float),
        angle=zero,
        pivot=pivot,
        spread=zero,
        lead=zero,
        stats=nothing,
    )


def judged(answer: Answer, losses: np.ndarray, grad: np.ndarray, name: str, library: str) -> Row:
    """Check results against the tolerances, and return their largest errors.

    Errors are in units in the last place, and as a share of the tolerance.
    """
    rule = accuracy(name, library)
    found: Row = {
        "loss_ulp": _largest(losses, answer.loss, name),
        "label_ulp": _largest(grad[answer.pivot], answer.grad[answer.pivot], name),
        "entry_ulp": _largest(grad[~answer.pivot], answer.grad[~answer.pivot], name),
    }
    for what, got, want, allowed in (
        ("loss", losses, answer.loss, loss_tolerance(answer, name, rule)),
        ("grad", grad, answer.grad, grad_tolerance(answer, name, rule)),
    ):
        found[f"{what}_of_allowed"] = _share(got, want, allowed)
        compare(got, want, allowed, dtype=dtype(name), what=what)
    return found


def _largest(got: np.ndarray, want: np.ndarray, name: str) -> float:
    errors = ulps(got, want, name)
    return float(errors.max()) if errors.size else 0.0


def ulps(got: np.ndarray, want: np.ndarray, name: str) -> np.ndarray:
    """Return errors in units in the last place of the exact values; inf for a nan."""
    with np.errstate(invalid="ignore"):
        error = np.abs(got.astype(np.float64) - want)
    return np.where(np.isnan(error), np.inf, error) / FORMATS[name].spacing(want)


def _share(got: np.ndarray, want: np.ndarray, allowed: np.ndarray) -> float:
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = np.abs(got.astype(np.float64) - want) / allowed
    # 0/0 where the result is an exact zero, as it should be.
    shares = np.where(got.astype(np.float64) == want, 0.0, np.nan_to_num(shares, nan=np.inf))
    return float(shares.max()) if shares.size else 0.0


def by_gap(answer: Answer, grad: np.ndarray, name: str) -> Row:
    """Return the largest error of gradient entries by how far below the largest logit they are."""
    found: Row = {}
    errors = ulps(grad, answer.grad, name)
    # Below the smallest normal number an exponential may be 0.
    normal = ~answer.pivot & (np.abs(answer.grad) >= FORMATS[name].tiny)
    for low, high in itertools.pairwise(GAPS):
        inside = normal & (answer.gap >= low) & (answer.gap < high)
        if inside.any():
            found[f"{low:g} to {high:g}"] = float(errors[inside].max())
    return found


# From logits and labels on the host: the logits that the call gets, its losses, its gradient.
Run = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]


def exponentials(run: Run, name: str, few: bool, library: str) -> Row:
    """Check exp from 0 down to where results are subnormal, through gradients."""
    reach = 85.0 if name == "float32" else 700.0
    steps = np.linspace(0.0, reach, 64 if few else 16384)
    logits = np.stack([np.r_[0.0, 0.0, -steps * scale] for scale in (1.0, 0.99, 0.5, 0.07)])
    answer, grad, found = _of_rows(run, logits, name, library)
    return found | {"ulp_by_gap": by_gap(answer, grad, name)}


def logarithms(run: Run, name: str, few: bool, library: str) -> Row:
    """Check log(1 + exp(x)) through the losses of rows of two classes."""
    reach = 85.0 if name == "float32" else 700.0
    steps = np.linspace(-reach, reach, 101 if few else 16385)
    logits = np.stack([np.zeros_like(steps), steps], axis=1)
    return _of_rows(run, logits, name, library)[-1]


FUNCTIONS = {"exp": exponentials, "log": logarithms}


def _of_rows(
    run: Run, logits: np.ndarray, name: str, library: str
) -> tuple[Answer, np.ndarray, Row]:
    labels = np.zeros(len(logits), np.int64)
    seen, losses, grad = run(logits, labels)
    answer = exact(seen.astype(np.longdouble), labels, np.ones(len(logits)), Options())
    return answer, grad, judged(answer, losses, grad, name, library)
