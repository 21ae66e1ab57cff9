"""torch: the gradient of a sparse target's probabilities, from the logits at its classes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from polyce.arrays import dtypes
from polyce.call.problem import Problem
from polyce.formula import targets, transform
from polyce.formula.targets import Plan


def gradient(
    problem: Problem, plan: Plan, cotangent: Any, logits: Any, losses: Callable[..., Any]
) -> Any:
    """Compute the gradient of the probabilities for cotangents of the rows' losses.

    lse - x_c is a loss where c is the likeliest class k, and that loss and x_k - x_c elsewhere.
    `losses` computes the rows' losses from (problem, logits, labels), with the class axis.
    """
    library, axis = problem.library, problem.axis
    top = library.argmax(logits, axis)
    of_top = losses(_of_labels(problem, top), logits, top)
    largest, own = (
        library.cast(library.pick(logits, classes, logits, axis), problem.row_dtype)
        for classes in (top, plan.entries)
    )
    gaps = transform.difference(problem, largest, own) + of_top
    gaps = torch.where(plan.entries == top, of_top, gaps)
    gaps = targets.weigh_rows(plan, problem.xp, gaps * cotangent)
    return targets.probabilities_backward(
        problem, plan, library.cast(gaps, problem.arithmetic_dtype)
    )


def label_plan(label: Any) -> Plan:
    """Return the plan of a class of each row, without weights."""
    nothing: dict[str, Any] = dict.fromkeys(Plan._fields)
    return Plan(**nothing | {"label": label})


def _of_labels(problem: Problem, label: Any) -> Problem:
    """Return the problem of the rows' plain losses for labels, in the row dtype."""
    plain = problem.options._replace(reduction="none", label_smoothing=0.0, z_loss=0.0, stats=None)
    return problem._replace(
        kind="index",
        options=plain,
        target_dtype=dtypes.name_of(label.dtype),
        result_dtype=problem.row_dtype,
        check_labels=False,
        weighted=False,
        sample_weighted=False,
        normalized=False,
        inplace_backward=False,
        grad_stats=(),
    )
