"""jax's transformations: the analytic gradient of the rows' losses as a derivative rule.

The rule is written in jax operations, so that jit, vmap and higher derivatives go through it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from polyce import arrays, reference, transform
from polyce.problem import Operands, Problem
from polyce.registry import Implementation
from polyce.stats import RowStats
from polyce.targets import Plan


def check(operands: Operands) -> None:
    """Refuse nothing yet: which arrays are being differentiated shows in the rule below."""


def detach(operands: Operands) -> Operands:
    """Cut the operands from any derivative."""
    # Labels have none, and inside a jit they must stay the arrays of known values that they are.
    return Operands(*(jax.lax.stop_gradient(a) if _is_float(a) else a for a in operands))


def row_losses(
    implementation: Implementation, problem: Problem, plan: Plan, logits: Any
) -> tuple[Any, RowStats | None]:
    """Give the rows' losses and stats, the losses with their derivative rule."""
    # Widened outside the rule, so that a 16-bit gradient is rounded once, after the cotangent.
    logits = arrays.cast(problem.xp, logits, problem.arithmetic_dtype)
    problem = problem._replace(logits_dtype=logits.dtype)
    return _row_losses(implementation, problem, plan, logits)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _row_losses(
    implementation: Implementation, problem: Problem, plan: Plan, logits: Any
) -> tuple[Any, RowStats | None]:
    rows, _, stats = implementation.forward(problem, plan, logits)
    return rows, stats


@partial(_row_losses.defjvp, symbolic_zeros=True)
def _row_losses_jvp(
    implementation: Implementation, problem: Problem, primals: Any, tangents: Any
) -> tuple[Any, Any]:
    plan, logits = primals
    plan_tangent, tangent = tangents
    for leaf in jax.tree.leaves(plan_tangent, is_leaf=_is_zero):
        if not _is_zero(leaf):
            raise TypeError(
                "polyce differentiates with respect to input only, but target or weight is being "
                "differentiated; pass it through jax.lax.stop_gradient"
            )
    rows, state, stats = implementation.forward(problem, plan, logits)
    no_tangents = jax.tree.map(_no_tangent, stats)
    if _is_zero(tangent):
        return (rows, stats), (jnp.zeros_like(rows), no_tangents)
    grad = implementation.backward(problem, plan, 1.0, logits, state)
    rows_tangent = jnp.sum(grad * tangent, axis=problem.axis, keepdims=True)
    rows_tangent = arrays.cast(problem.xp, rows_tangent, rows.dtype)
    if plan.counted is not None:
        # Selected, for the cotangent of an ignored row is infinite where all rows are ignored.
        rows_tangent = jnp.where(plan.counted, rows_tangent, 0.0)
    return (rows, stats), (rows_tangent, no_tangents)


def log_softmax(problem: Problem, logits: Any) -> Any:
    """Give log(softmax(logits)), with its derivative rule."""
    logits = arrays.cast(problem.xp, logits, problem.arithmetic_dtype)
    wide = problem._replace(logits_dtype=logits.dtype)
    return arrays.cast(problem.xp, _log_softmax(wide, logits), problem.logits_dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _log_softmax(problem: Problem, logits: Any) -> Any:
    return reference.log_softmax(problem, logits)


@_log_softmax.defjvp
def _log_softmax_jvp(problem: Problem, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (logits,), (tangent,) = primals, tangents
    result = _log_softmax(problem, logits)
    tangent = tangent * transform.slope(problem, logits)
    mean = jnp.sum(jnp.exp(result) * tangent, axis=problem.axis, keepdims=True)
    return result, tangent - mean


def _is_float(array: Any) -> bool:
    return hasattr(array, "dtype") and bool(jnp.issubdtype(array.dtype, jnp.floating))


def _no_tangent(array: Any) -> Any:
    if _is_float(array):
        return jnp.zeros_like(array)
    return np.zeros(array.shape, jax.dtypes.float0)


def _is_zero(leaf: Any) -> bool:
    return isinstance(leaf, SymbolicZero)
