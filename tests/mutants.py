"""Implementations with one fault each, which the conformance grid must catch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from polyce.arrays import numpy
from polyce.call.problem import Problem
from polyce.formula import (
    rowgradient,
    rows,
    rowstate,
    rowstats,
    stats,
    targets,
    teacher,
    transform,
    whole,
)
from polyce.formula.rowgradient import StatsCotangents
from polyce.formula.rowstate import RowState
from polyce.formula.stats import RowStats
from polyce.formula.targets import Plan
from polyce.implementations import registry
from polyce.implementations.contract import Implementation

ONE = np.float32(1.0)
RIGHT = rows.forward_backward
Patch = tuple[Any, str, Callable[..., Any]]


@dataclasses.dataclass(frozen=True)
class Mutant:
    """The reference with one fault, and the group of the grid that must catch it."""

    group: str
    losses: Callable[..., Any] | None = None
    """What it does to the rows' losses: losses(problem, plan, logits, losses)."""
    grad: Callable[..., Any] | None = None
    """What it does to the gradient: grad(problem, plan, logits, gradient)."""
    call: Callable[[Problem, Plan], tuple[Problem, Plan]] | None = None
    """The call that it computes instead: call(problem, plan)."""
    patch: Patch | None = None
    """What it replaces elsewhere: a module, a name, and the new function."""
    stats: Callable[[RowStats], RowStats] | None = None
    """What it does to the rows' stats."""
    dtype: str = "float32"
    """The dtype of the logits of the cases that must catch it."""

    def forward(self, problem: Problem, plan: Plan, logits: Any) -> tuple[Any, Any]:
        call = self.call(problem, plan) if self.call else (problem, plan)
        losses, found = rows.forward(*call, logits)
        losses = self.losses(problem, plan, logits, losses) if self.losses else losses
        return losses, self.changed(found)

    def forward_backward(
        self,
        problem: Problem,
        plan: Plan,
        cotangent: Any,
        logits: Any,
        of_stats: StatsCotangents,
    ) -> tuple[Any, Any, Any]:
        call = self.call(problem, plan) if self.call else (problem, plan)
        losses, grad, found = RIGHT(*call, cotangent, logits, of_stats)
        losses = self.losses(problem, plan, logits, losses) if self.losses else losses
        grad = self.grad(problem, plan, logits, grad) if self.grad else grad
        return losses, grad, self.changed(found)

    def changed(self, found: RowStats | None) -> RowStats | None:
        return self.stats(found) if self.stats and found else found

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put it before the reference in the table, under the name mutant."""

        def cross_entropy(*call: Any) -> Any:
            return whole.cross_entropy(*call, self.forward)

        path = Implementation(
            "mutant", cross_entropy, whole.cross_entropy_with_grad, takes_grad_stats=True
        )
        monkeypatch.setattr(registry, "TABLE", (path, *registry.TABLE))
        monkeypatch.setattr(rows, "forward_backward", self.forward_backward)
        if self.patch is not None:
            monkeypatch.setattr(*self.patch)


def textbook(problem: Problem, plan: Plan, logits: Any, rows: Any) -> Any:
    """Compute log Σ exp(x) - x_y where the target is a plain label."""
    if problem.kind != "index" or problem.used_options or problem.is_empty:
        return rows
    lse = np.log(np.sum(np.exp(logits), axis=problem.axis, keepdims=True))
    wrong = lse - np.take_along_axis(logits, plan.label, axis=problem.axis)
    return targets.weigh_rows(plan, np, wrong.astype(rows.dtype))


def at_label(change: Callable[[Any], Any]) -> Callable[..., Any]:
    """Change the gradient's entry at each label."""

    def changed(problem: Problem, plan: Plan, logits: Any, grad: Any) -> Any:
        if plan.label is None or problem.is_empty:
            return grad
        mask = problem.library.one_hot(plan.label, grad, problem.axis)
        return np.where(mask, change(grad), grad)

    return changed


def spoil(problem: Problem, plan: Plan, logits: Any, rows: Any) -> Any:
    if logits.flags.writeable:
        logits *= np.float32(0.5)
    return rows


def total_weight(change: Callable[[Any, Any], tuple[Any, Any]]) -> Patch:
    """Make the mean divide by change(counted, row_weight)."""
    true = targets._denominator

    def changed(problem: Problem, operands: Any, counted: Any, row_weight: Any) -> Any:
        return true(problem, operands, *change(counted, row_weight))

    return targets, "_denominator", changed


def one_by_one(values: Any, axis: int) -> Any:
    """Sum one number after another in float32."""
    return np.take(np.cumsum(values, axis=axis, dtype=np.float32), [-1], axis=axis)


def class_sum(values: Any, axis: int, dtype: Any) -> Any:
    return one_by_one(values, axis).astype(dtype)


def reduce(problem: Problem, plan: Plan, rows: Any, *, true: Any = targets.reduce) -> Any:
    if problem.options.reduction == "none" or rows.size == 0:
        return true(problem, plan, rows)
    return true(problem, plan, one_by_one(rows.reshape(-1), 0).astype(rows.dtype))


MUTANTS = {
    "loss-off-by-2e-6": Mutant("options", losses=lambda p, plan, x, rows: rows * (1 + 2e-6)),
    "label-gradient-off": Mutant("options", grad=at_label(lambda g: g * np.float32(1.00001))),
    "softmax-minus-one": Mutant("accuracy", grad=at_label(lambda g: (g + ONE) - ONE)),
    "textbook-formula": Mutant("accuracy", losses=textbook),
    "ignored-rows-kept": Mutant("options", call=lambda p, plan: (p, plan._replace(counted=None))),
    "smoothing-dropped": Mutant(
        "options", call=lambda p, plan: (p.with_options(label_smoothing=0.0), plan)
    ),
    "weight-dropped": Mutant(
        "options",
        call=lambda p, plan: (p, plan._replace(class_weight=None, label_weight=None)),
    ),
    "mean-over-all-rows": Mutant("options", patch=total_weight(lambda counted, w: (None, w))),
    "mean-without-weight": Mutant(
        "options", patch=total_weight(lambda counted, w: (counted, None))
    ),
    "gradient-dtype": Mutant("options", grad=lambda p, plan, x, g: g.astype(np.float64)),
    "gradient-shape": Mutant("shapes", grad=lambda p, plan, x, g: g.reshape(-1)),
    "gradient-sign": Mutant("cotangent", grad=lambda p, plan, x, g: -g),
    "memory-order-read": Mutant(
        "layouts", losses=lambda p, plan, x, rows: rows if x.flags.c_contiguous else rows[::-1]
    ),
    "argument-changed": Mutant("layouts", losses=spoil),
    "bad-labels-answered": Mutant("targets", call=lambda p, plan: (p, plan._replace(invalid=None))),
    "nan-hidden": Mutant("special", losses=lambda p, plan, x, rows: np.fmax(rows, 0.0)),
    "infinity-capped": Mutant("special", losses=lambda p, plan, x, rows: np.minimum(rows, 3e38)),
    "classes-added-one-by-one": Mutant("accuracy", patch=(numpy.LIBRARY, "class_sum", class_sum)),
    "apart-classes-added-one-by-one": Mutant(
        "accuracy",
        patch=(numpy.LIBRARY, "sum_by_blocks", lambda x, axis: np.sum(x, axis=axis, keepdims=True)),
        dtype="float64",
    ),
    "rows-added-one-by-one": Mutant("accuracy", patch=(targets, "reduce", reduce)),
}


def swapped(module: Any, name: str, change: Callable[..., Any]) -> Patch:
    """Replace a function by change(the true function, its arguments)."""
    true = getattr(module, name)
    return module, name, lambda *values, **options: change(true, *values, **options)


def last_of_each(array: Any, labels: Any, values: Any, axis: int) -> Any:
    """Add at several labels of each row, of equal ones the last alone."""
    before = np.take_along_axis(array, labels, axis)
    np.put_along_axis(array, labels, before + values, axis)
    return array


def without(**values: Any) -> Callable[[Problem, Plan], tuple[Problem, Plan]]:
    """Treat the call as one with other options."""
    return lambda problem, plan: (problem.with_options(**values), plan)


def scaled_first(true: Any, problem: Problem, logits: Any, reference: Any, **options: Any) -> Any:
    """Subtract after scaling, when a large offset has cost the digits."""
    if transform.is_capped(problem):
        return true(problem, logits, reference, **options)
    return logits * transform.scale_of(problem) - reference * transform.scale_of(problem)


def capped_first(true: Any, problem: Problem, logits: Any, reference: Any, **options: Any) -> Any:
    """Subtract after the softcap, when tanh has cost the digits."""
    if not transform.is_capped(problem):
        return true(problem, logits, reference, **options)
    inexact = transform.value(problem, logits) - transform.value(problem, reference)
    finite = np.isfinite(logits) & np.isfinite(reference)
    return np.where(finite, inexact, true(problem, logits, reference))


def slope_by_tanh(true: Any, problem: Problem, logits: Any) -> Any:
    if not transform.is_capped(problem):
        return true(problem, logits)
    tanh = np.tanh(logits * transform.scale_and_cap(problem)[0])
    return transform.scale_of(problem) * (1.0 - tanh * tanh)


def masked_is_capped(
    true: Any, problem: Problem, logits: Any, reference: Any, **options: Any
) -> Any:
    """Cap -inf like any other logit, to -cap."""
    finite = np.where(logits == -np.inf, np.float32(-3e38), logits)
    if not transform.is_capped(problem):
        return true(problem, logits, reference, **options)
    return true(problem, finite, reference, **options)


def inexact_lse_square(true: Any, problem: Problem, state: Any, lse_penalty: Any = None) -> Any:
    if lse_penalty is None:
        return true(problem, state)
    lse = rowstate.lse(problem, state).astype(np.float32)
    return true(problem, state) + lse_penalty * (lse * lse) * (1 + 4e-6)


def last_of_the_largest(true: Any, problem: Problem, state: Any, pivot: Any) -> Any:
    first = state.rest_first
    tied = state.pivot_logit == state.rest_max
    leads = (state.pivot_logit > state.rest_max) | (tied & (pivot > first))
    return np.where(leads, pivot, first)


def nan_where_silent(problem: Problem, plan: Plan) -> tuple[Problem, Plan]:
    if plan.invalid is None or plan.counted is None:
        return problem, plan
    return problem, plan._replace(invalid=plan.invalid | ~plan.counted)


def changed_plan(**values: Any) -> Patch:
    """Finish the stats with a plan that has been changed."""
    return swapped(
        stats,
        "finish",
        lambda true, problem, plan, found: true(problem, plan._replace(**values), found),
    )


def unasked(true: Any, *values: Any) -> Any:
    given = true(*values)
    return given._replace(correct=given.valid) if given.correct is None else given


def one_minus(true: Any, problem: Problem, state: RowState, apart: Any, logit: Any) -> Any:
    """Compute 1 - 2 p_y + Σ p_c², which is 0 for confident rows, where the label is the pivot."""
    scalars = rowstate.scalars(problem, state)
    factor = rowstate.factor_of_rest(np, scalars)
    near = rowstate.pivot_probability(np, scalars)
    squares = state.rest_squares * factor**2 + near**2
    at_label = 1.0 - 2.0 * near + squares
    if apart is None:
        return at_label
    return np.where(apart, true(problem, state, apart, logit), at_label)


def smoothed(true: Any, problem: Problem, *given: Any) -> Any:
    *others, probabilities = given
    kept = 1.0 - problem.options.label_smoothing
    share = problem.options.label_smoothing / problem.classes
    return true(problem, *others, probabilities * kept + share)


def plain_distance(problem: Problem, state: RowState, probability: Any) -> Any:
    return (rowstate.pivot_probability(np, rowstate.scalars(problem, state)) - probability) ** 2


def stats_cotangents(**values: Any) -> Patch:
    """Drop the cotangent of a stat."""
    return swapped(rows, "stats_cotangents", lambda true, *given: true(*given)._replace(**values))


OPTION_MUTANTS = {
    "sample-weight-dropped": Mutant(
        "combined", call=lambda p, plan: (p, plan._replace(sample_weight=None))
    ),
    "silent-rows-kept": Mutant(
        "sample-weight", call=lambda p, plan: (p, plan._replace(counted=None))
    ),
    "sample-weight-not-in-the-mean": Mutant(
        "combined",
        patch=swapped(
            targets,
            "_denominator",
            lambda true, p, operands, counted, w: true(p, operands, counted, None),
        ),
    ),
    "silent-bad-labels-are-nan": Mutant("sample-weight", call=nan_where_silent),
    "normalizer-dropped": Mutant(
        "normalizer",
        patch=swapped(
            targets,
            "_denominator",
            lambda true, p, *rest: true(p._replace(normalized=False), *rest),
        ),
    ),
    "z-loss-dropped": Mutant("combined", call=without(z_loss=0.0)),
    "z-loss-without-weight": Mutant(
        "combined", patch=(targets, "lse_penalty", lambda p, plan: p.options.z_loss or None)
    ),
    "z-loss-without-gradient": Mutant(
        "combined",
        patch=swapped(
            rowgradient,
            "gradient",
            lambda true, *values, **more: true(*values[:-2], None, values[-1], **more),
        ),
    ),
    "z-loss-inexact": Mutant("transform", patch=swapped(rowstate, "loss", inexact_lse_square)),
    "scale-dropped": Mutant("combined", call=without(logit_scale=None)),
    "scale-first": Mutant("transform", patch=swapped(transform, "difference", scaled_first)),
    "scale-not-in-the-gradient": Mutant(
        "combined", grad=lambda p, plan, x, g: g / np.float32(transform.scale_of(p))
    ),
    "softcap-dropped": Mutant("combined", call=without(logit_softcap=None)),
    "softcap-first": Mutant("transform", patch=swapped(transform, "difference", capped_first)),
    "softcap-slope-by-tanh": Mutant("transform", patch=swapped(transform, "slope", slope_by_tanh)),
    "softcap-on-masked-classes": Mutant(
        "transform", patch=swapped(transform, "difference", masked_is_capped)
    ),
    "lse-off": Mutant("stats", stats=lambda s: s._replace(lse=s.lse * (1 + 2e-6))),
    "lse-of-the-logits": Mutant(
        "stats",
        patch=swapped(
            rowstate,
            "lse",
            lambda true, p, state: true(
                p.with_options(logit_scale=None, logit_softcap=None), state
            ),
        ),
    ),
    "entropy-absolute": Mutant(
        "stats", stats=lambda s: s if s.entropy is None else s._replace(entropy=s.entropy + 1e-9)
    ),
    "prediction-is-the-last": Mutant(
        "stats", patch=swapped(rowstate, "prediction", last_of_the_largest)
    ),
    "stats-of-ignored-rows": Mutant("stats", patch=changed_plan(counted=None)),
    "bad-labels-correct": Mutant("stats", patch=changed_plan(invalid=None)),
    "stats-not-asked-for": Mutant("stats", patch=swapped(stats, "finish", unasked)),
    "stats-too-wide": Mutant(
        "stats",
        patch=swapped(
            stats,
            "finish",
            lambda true, p, *rest: true(p._replace(arithmetic_dtype=np.dtype("float64")), *rest),
        ),
    ),
    "entropy-without-gradient": Mutant("grad-stats", patch=stats_cotangents(entropy=None)),
    "lse-without-gradient": Mutant("grad-stats", patch=stats_cotangents(lse=None)),
    "entropy-beside-a-label": Mutant(
        "grad-stats", patch=(targets, "pivot_leads", lambda problem: problem.kind != "index")
    ),
    "no-stats": Mutant("stats", patch=(stats, "finish", lambda p, plan, found: (None,) * 8)),
    "ties-are-larger": Mutant(
        "target-stats",
        patch=(
            rowstats,
            "count_larger",
            lambda p, x, label: (x >= label).sum(p.axis, keepdims=True),
        ),
    ),
    "bad-labels-have-a-brier": Mutant("target-stats", patch=changed_plan(invalid=None)),
    "brier-of-the-pivot": Mutant(
        "target-stats",
        patch=swapped(
            rowstate, "brier", lambda true, p, state, apart, logit: true(p, state, None, logit)
        ),
    ),
    "brier-cancels": Mutant("target-stats", patch=swapped(rowstate, "brier", one_minus)),
    "brier-of-smoothed-probabilities": Mutant(
        "target-stats", patch=swapped(rowstats, "distance_of_rest", smoothed)
    ),
    "brier-without-the-rest-of-1": Mutant(
        "target-stats", patch=(rowstats, "distance_at_pivot", plain_distance)
    ),
    "entries-at-the-pivot-left-out": Mutant(
        "sparse", patch=swapped(rows, "coefficient_at", lambda true, *a: 0.0 * true(*a))
    ),
    "entries-of-one-class-do-not-add-up": Mutant(
        "sparse", patch=swapped(numpy.LIBRARY, "add_at", lambda true, a, *b: last_of_each(a, *b))
    ),
    "teacher-rounded": Mutant(
        "teacher",
        patch=swapped(
            teacher,
            "_exponentials",
            lambda true, p, t, top: true(p, (t - top).astype(np.float32), 0.0 * top),
        ),
    ),
    "teacher-without-its-scale": Mutant(
        "teacher",
        patch=swapped(
            teacher, "softmax", lambda true, p, *a: true(p._replace(teacher_scale=1.0), *a)
        ),
    ),
    "top-probability-off": Mutant(
        "target-stats",
        patch=swapped(rowstate, "top_probability", lambda true, *a: true(*a) * (1 + 2e-6)),
    ),
}
"""Like `MUTANTS`, with faults in the options that torch lacks."""
