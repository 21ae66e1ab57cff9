"""What a target means: each row's class, its weight, and what the mean divides by.

The one place for coefficients, the denominator and the cotangent of a row.
Nothing here looks at the logits' values.

A row's loss is R·lse - Σ r_c x_c, and every kind of target is a choice of the coefficients r:

=============================  ==========================================
index y                        r_c = w_y [c = y]
index y, smoothing ε           r_c = (1 - ε) w_y [c = y] + (ε / C) w_c
probabilities p                r_c = w_c p_c
probabilities p, smoothing ε   r_c = w_c ((1 - ε) p_c + ε / C)
=============================  ==========================================
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from polyce import arrays, labels
from polyce.problem import Operands, Problem


class Plan(NamedTuple):
    """What the target of one call means, as arrays. None stands for what is not there.

    What has one entry for each row keeps the class axis, of length 1, so that it meets the logits.
    """

    label: Any
    """Class of each row, always in range; None for probabilities."""
    counted: Any
    """False for rows that are ignored; None where none can be."""
    invalid: Any
    """True for rows whose label is out of range; None where labels were checked."""
    label_weight: Any
    """Class weight of each row's label, in the row dtype; None for 1."""
    class_weight: Any
    """Class weights along the class axis, in the arithmetic dtype; None for 1."""
    sample_weight: Any
    """What multiplies each row's loss, in the row dtype; None for 1."""
    probabilities: Any
    """Target probabilities, of the logits' shape, in the arithmetic dtype; None for labels."""
    denominator: Any
    """What reduction mean divides by; None for the other reductions."""


def plan(problem: Problem, operands: Operands) -> Plan:
    """Read the target of a call; raises IndexError for a bad label where labels are checked."""
    xp, backend, axis = problem.xp, problem.backend, problem.axis
    logits = operands.logits
    class_weight = None
    if operands.weight is not None:
        weight = arrays.cast(xp, operands.weight, problem.arithmetic_dtype)
        class_weight = arrays.along_axis(weight, axis, len(problem.shape))
        class_weight = arrays.align(backend, class_weight, logits)
    if problem.kind == "probability":
        probabilities = arrays.cast(xp, operands.target, problem.arithmetic_dtype)
        return Plan(
            label=None,
            counted=None,
            invalid=None,
            label_weight=None,
            class_weight=class_weight,
            sample_weight=None,
            probabilities=arrays.align(backend, probabilities, logits),
            denominator=_row_count(problem) if problem.reduction == "mean" else None,
        )

    label, counted, invalid = labels.read(problem, operands.target, logits)
    label_weight = None
    if class_weight is not None and not problem.is_empty:
        label_weight = arrays.pick(xp, backend, class_weight, label, logits, axis)
        label_weight = arrays.cast(xp, label_weight, problem.row_dtype)
        if invalid is not None:
            label_weight = xp.where(invalid, 1.0, label_weight)
    denominator = None
    if problem.reduction == "mean":
        denominator = _total_weight(problem, counted, label_weight)
    return Plan(label, counted, invalid, label_weight, class_weight, None, None, denominator)


def _row_count(problem: Problem) -> float:
    """Count the rows; torch divides the size by C and so finds none where C = 0."""
    if problem.classes == 0:
        return 0.0
    return float(math.prod(problem.row_shape))


def _total_weight(problem: Problem, counted: Any, label_weight: Any) -> Any:
    xp = problem.xp
    if label_weight is None:
        if counted is None:
            return float(math.prod(problem.row_shape))
        label_weight = arrays.cast(xp, counted, problem.row_dtype)
    elif counted is not None:
        label_weight = xp.where(counted, label_weight, 0.0)
    return arrays.total(xp, problem.backend, label_weight)


def coefficients(problem: Problem, plan: Plan) -> tuple[Any, Any]:
    """Give r of a row: at its label, and at all classes as if none were the label.

    For labels, (label's coefficient per row, what smoothing gives every class); for probabilities,
    (None, the coefficient of every class). None stands for 1 at the label and for 0 elsewhere.
    """
    smoothing = problem.label_smoothing
    share = smoothing / max(problem.classes, 1)
    if plan.probabilities is not None:
        everywhere = plan.probabilities
        if smoothing:
            everywhere = everywhere * (1.0 - smoothing) + share
        if plan.class_weight is not None:
            everywhere = everywhere * plan.class_weight
        return None, everywhere
    at_label = plan.label_weight
    if not smoothing:
        return at_label, None
    if plan.class_weight is None:
        return 1.0 - smoothing + share, share
    return at_label * (1.0 - smoothing + share), plan.class_weight * share


def mask_rows(plan: Plan, xp: Any, rows: Any) -> Any:
    """Give ignored rows 0 and rows with a bad label nan."""
    if plan.counted is not None:
        rows = xp.where(plan.counted, rows, 0.0)
    if plan.invalid is not None:
        rows = xp.where(plan.invalid, float("nan"), rows)
    return rows


def cotangent(problem: Problem, plan: Plan, grad_output: Any) -> Any:
    """Give the gradient of the reduced loss with respect to each row's loss: g or g / D."""
    xp = problem.xp
    scale: Any = 1.0 if grad_output is None else grad_output
    if not isinstance(scale, float):
        scale = arrays.cast(xp, scale, problem.row_dtype)
        if problem.reduction == "none":
            scale = arrays.expand(scale, problem.axis)
    if problem.reduction == "mean":
        if type(plan.denominator) is float:  # NumPy's float64 is a float too
            # Known without looking: the number of rows. Without any there is nothing to scale.
            return scale / plan.denominator if plan.denominator else math.nan
        scale = scale / plan.denominator
    return scale


def reduce(problem: Problem, plan: Plan, rows: Any) -> Any:
    """Reduce the rows' losses; the result is rounded once, to the result dtype."""
    xp = problem.xp
    if problem.reduction == "none":
        rows = xp.squeeze(rows, axis=problem.axis)
        return arrays.cast(xp, rows, problem.result_dtype)
    total = arrays.total(xp, problem.backend, rows)
    if problem.reduction == "mean":
        total = total / plan.denominator
    return arrays.cast(xp, total, problem.result_dtype)
