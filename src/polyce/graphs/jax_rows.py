"""jax's transformations: the analytic gradient of the rows' losses as a derivative rule.

The rule is written in jax operations, so that jit, vmap and higher derivatives work with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from polyce.call.problem import Problem
from polyce.formula import rows, targets, transform
from polyce.formula.rowgradient import StatsCotangents
from polyce.formula.stats import RowStats
from polyce.formula.targets import Plan
from polyce.graphs.contract import ArraysT, Rules


def detach(given: ArraysT) -> ArraysT:
    """Cut the operands from any derivative."""
    # Labels have no derivative, and inside a jit they must remain arrays with known values.
    return type(given)(*(jax.lax.stop_gradient(a) if _is_float(a) else a for a in given))


def row_losses(problem: Problem, plan: Plan, logits: Any) -> tuple[Any, RowStats | None]:
    """Compute the rows' losses and stats, with their derivative rule."""
    # The rule computes a wide gradient, so that a 16-bit one is rounded once, after the cotangent.
    problem = problem._replace(logits_dtype=problem.arithmetic_dtype)
    # The rows do not depend on the mean's denominator; it is differentiated where it divides.
    plan = plan._replace(denominator=None)
    return _row_losses(problem, plan, logits)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _row_losses(problem: Problem, plan: Plan, logits: Any) -> tuple[Any, RowStats | None]:
    return rows.forward(problem, plan, logits)


@partial(_row_losses.defjvp, symbolic_zeros=True)
def _row_losses_jvp(problem: Problem, primals: Any, tangents: Any) -> tuple[Any, Any]:
    plan, logits = primals
    plan_tangent, tangent = tangents
    _refuse(problem, plan_tangent)
    # Through the rule again: derivatives of a higher order must not be jax's own of the formula.
    result = _row_losses(problem, plan, logits)
    losses, stats = result
    losses_tangent, stats_tangent = jnp.zeros_like(losses), jax.tree.map(no_tangent, stats)
    if not _is_zero(tangent):
        tangent = problem.library.cast(tangent, problem.arithmetic_dtype)

        def along(value: str) -> Any:
            return _row_sums(problem, _gradient(problem, value, plan, logits) * tangent)

        losses_tangent = along("loss")
        if stats is not None and not problem.is_empty:
            asked = [name for name in StatsCotangents._fields if problem.asks(name)]
            stats_tangent = stats_tangent._replace(
                **{name: _counted(plan, along(name)) for name in asked}
            )
    if problem.kind != "index":
        along_target = _along_target(problem, plan, plan_tangent, logits)
        if along_target is not None:
            losses_tangent = losses_tangent + along_target
    return result, (_counted(plan, losses_tangent), stats_tangent)


def _counted(plan: Plan, tangent: Any) -> Any:
    """Select the rows that count: where all are ignored, their cotangents are infinite."""
    return tangent if plan.counted is None else jnp.where(plan.counted, tangent, 0.0)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _gradient(problem: Problem, value: str, plan: Plan, logits: Any) -> Any:
    """Compute the gradient of the rows' "loss", "lse" or "entropy"."""
    return rows.backward(problem, plan, *_unit(value, logits))


def _unit(value: str, logits: Any) -> tuple[Any, Any, StatsCotangents]:
    """Return cotangents that are 1 for one value of the rows, around the logits."""
    if value == "loss":
        return 1.0, logits, StatsCotangents()
    return None, logits, StatsCotangents(**{value: 1.0})


@_gradient.defjvp
def _gradient_jvp(problem: Problem, value: str, primals: Any, tangents: Any) -> tuple[Any, Any]:
    # In another form, which is not faster, but whose own derivatives keep their digits.
    def gradient(plan: Plan, logits: Any) -> Any:
        return rows.differentiable_gradient(problem, plan, *_unit(value, logits))

    _, tangent = jax.jvp(gradient, primals, tangents)
    return _gradient(problem, value, *primals), tangent


def _refuse(problem: Problem, plan_tangent: Plan) -> None:
    """Refuse derivatives with respect to arguments that have none."""
    if not is_constant(plan_tangent.sample_weight):
        raise TypeError(
            "polyce gives no derivative with respect to sample_weight, which is being "
            "differentiated; multiply the losses of reduction 'none' by it instead"
        )
    if not is_constant(plan_tangent.teacher):
        raise TypeError(
            "polyce gives no derivative with respect to a teacher's logits, which are being "
            "differentiated; pass target.logits through jax.lax.stop_gradient, or give "
            "cross_entropy their softmax as probabilities"
        )
    if problem.kind == "index" and not (
        is_constant(plan_tangent.class_weight) and is_constant(plan_tangent.label_weight)
    ):
        raise TypeError(
            "polyce differentiates with respect to weight for probability targets only, but the "
            "target holds class indices; pass weight through jax.lax.stop_gradient, or give "
            "cross_entropy the target as probabilities"
        )


def _along_target(problem: Problem, plan: Plan, plan_tangent: Plan, logits: Any) -> Any:
    """Compute the rows' tangents through probabilities and class weights; None if these have none.

    The loss is linear in the coefficients r, with the slope lse - x_c, and r is linear in the
    probabilities and in the weights.
    """
    names = ("probabilities", "class_weight")
    tangents = {name: getattr(plan_tangent, name) for name in names}
    tangents = {name: tangent for name, tangent in tangents.items() if not is_constant(tangent)}
    if not tangents:
        return None
    if plan.counted is not None:
        # A row that does not count may hold anything; 0 times it must be 0.
        logits = jnp.where(plan.counted, logits, 0.0)
    logits = problem.library.cast(logits, problem.arithmetic_dtype)
    surprise = -_log_softmax(problem.with_options(stats=None), logits)
    parts = []

    def add(coefficients: Callable[..., Any], name: str, surprise: Any) -> None:
        value = getattr(plan, name)
        _, slope = jax.jvp(coefficients, (value,), (jnp.ones_like(value),))
        _, change = jax.jvp(coefficients, (value,), (tangents[name],))
        # A slope of 0 has no effect, not even as 0 times infinity. A finite surprise is kept even
        # then, for the derivatives of a higher order.
        skipped = (slope == 0.0) & ~jnp.isfinite(surprise)
        parts.append(_row_sums(problem, _times(change, jnp.where(skipped, 0.0, surprise))))

    for name in tangents:

        def everywhere(value: Any, name: str = name) -> Any:
            return targets.coefficients(problem, plan._replace(**{name: value}))[1]

        def at_entries(value: Any, name: str = name) -> Any:
            found = targets.entries(problem, plan._replace(**{name: value}))
            return None if found is None else found.coefficients

        if plan.entries is not None:
            chosen = problem.library.pick(surprise, plan.entries, surprise, problem.axis)
            add(at_entries, name, chosen)
        if plan.entries is None or (name == "class_weight" and problem.options.label_smoothing):
            add(everywhere, name, surprise)
    along = sum(parts[1:], start=parts[0])
    return targets.weigh_rows(plan, problem.xp, along)


def _times(tangent: Any, factor: Any) -> Any:
    """Multiply a tangent by a factor such that 0 times infinity is 0, linearly in the tangent.

    Infinity is replaced by three finite factors, under which a 0 stays 0 and all else overflows.
    """
    largest = jnp.finfo(factor.dtype).max
    is_infinite = jax.lax.stop_gradient(factor) == math.inf
    infinite = tangent * jnp.where(is_infinite, largest, 0.0)
    for _ in range(2):
        infinite = infinite * jnp.where(is_infinite, largest, 1.0)
    return tangent * _finite(factor) + infinite


@jax.custom_jvp
def _finite(factor: Any) -> Any:
    """Replace infinity by 0, but keep the factor's derivative."""
    return jnp.where(factor == math.inf, 0.0, factor)


@_finite.defjvp
def _finite_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    return _finite(*primals), tangents[0]


def _row_sums(problem: Problem, values: Any) -> Any:
    sums = jnp.sum(values, axis=problem.axis, keepdims=True)
    return problem.library.cast(sums, problem.row_dtype)


def nll(problem: Problem, plan: Plan, log_probabilities: Any) -> Any:
    """Compute the rows' losses for log-probabilities; a bad label's derivative is nan."""
    if not all(problem.library.has_values(a) for a in jax.tree.leaves((plan, log_probabilities))):
        plan = _constant(problem, plan._replace(denominator=None))
        plan, log_probabilities = targets.spoil_rows(problem, plan, log_probabilities)
    return rows.nll(problem, plan, log_probabilities)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _constant(problem: Problem, plan: Plan) -> Plan:
    """Return the plan, through which no derivative may pass."""
    return plan


@partial(_constant.defjvp, symbolic_zeros=True)
def _constant_jvp(problem: Problem, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (plan,), (plan_tangent,) = primals, tangents
    _refuse(problem, plan_tangent)
    return plan, jax.tree.map(no_tangent, plan)


def log_softmax(problem: Problem, logits: Any, compute: Callable[..., Any]) -> Any:
    """Compute log(softmax(logits)) by the reference, with its derivative rule."""
    logits = problem.library.cast(logits, problem.arithmetic_dtype)
    wide = problem._replace(logits_dtype=logits.dtype)
    return problem.library.cast(_log_softmax(wide, logits), problem.logits_dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _log_softmax(problem: Problem, logits: Any) -> Any:
    return rows.log_softmax(problem, logits)


@_log_softmax.defjvp
def _log_softmax_jvp(problem: Problem, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (logits,), (tangent,) = primals, tangents
    result = _log_softmax(problem, logits)
    tangent = tangent * transform.slope(problem, logits)
    mean = jnp.sum(jnp.exp(result) * tangent, axis=problem.axis, keepdims=True)
    return result, tangent - mean


def _is_float(array: Any) -> bool:
    return hasattr(array, "dtype") and bool(jnp.issubdtype(array.dtype, jnp.floating))


def no_tangent(array: Any) -> Any:
    """Return a zero tangent, on the array's mesh."""
    return SymbolicZero(jax.typeof(array).to_tangent_aval())


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


def is_constant(tangent: Any) -> bool:
    """Tell whether a tangent is absent or known to be 0."""
    return tangent is None or _is_zero(tangent)


# No `check`: only inside the rules can be seen what is differentiated; they refuse it there.
RULES = Rules(detach=detach, row_losses=row_losses, nll=nll, log_softmax=log_softmax)
