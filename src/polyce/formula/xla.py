"""The row state of traced jax arrays, written so that XLA stores nothing that it can recompute.

XLA stores an expression over all logits that two of its loops share, and on a CPU also one that it
cannot fuse into a reduction, such as any `where`. In a language model each of these takes as much
memory as the logits. So every sum here starts from the logits by an expression of its own: one that
is stored and used once can share the gradient's memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from polyce.call.problem import Problem
from polyce.formula import rowstate, targets, teacher, transform
from polyce.formula.targets import Plan


def from_logits(
    problem: Problem,
    logits: Any,
    excluded: Any,
    pivot_logit: Any,
    pivot_coefficient: Any,
    coefficients: Any,
    given_dtype: Any,
) -> tuple[rowstate.RowState, Any]:
    """Compute what `rowstate.from_logits` does; `coefficients` may also be `of_teacher`'s."""
    axis, row_dtype = problem.axis, problem.row_dtype
    scale = 1.0 if transform.is_capped(problem) else transform.scale_of(problem)
    unscaled = problem if scale == 1.0 else problem.with_options(logit_scale=None)

    def class_sum(values: Any) -> Any:
        return jnp.sum(values, axis=axis, dtype=row_dtype, keepdims=True)

    narrow, rest = _stored(given_dtype, jnp.where(excluded, -math.inf, logits))
    rest_max = jnp.max(narrow, axis=axis, keepdims=True).astype(logits.dtype)
    offset = jnp.where(rest_max == -math.inf, 0.0, rest_max)
    rest_sum = class_sum(jnp.exp(transform.difference(problem, rest, offset)))

    def gaps(*earlier: Any, store: bool = False) -> Any:
        """Compute x_c - m', and 0 where excluded."""
        top = _after(offset, *earlier)
        filled = jnp.where(excluded, top, logits)
        if store:
            _, filled = _stored(given_dtype, filled)
        gap = transform.difference(unscaled, filled, _after(top))
        return gap if scale == 1.0 else gap * _after(jnp.full_like(offset, scale))

    rest_coefficient = rest_excess = rest_entropy = rest_first = rest_squares = None
    if isinstance(coefficients, float):
        # Scaled before the sum, which could overflow.
        share = _after(jnp.full_like(offset, -coefficients))
        rest_excess = class_sum(gaps(rest_sum, store=True) * share)
        rest_coefficient = jnp.full_like(rest_excess, coefficients * (logits.shape[axis] - 1))
    elif coefficients is not None:
        # 0, but nan where there is no softmax: XLA has to wait for the sum before it.
        nothing = jnp.where(rest_sum == rest_sum, 0.0, math.nan).astype(logits.dtype)
        anew = coefficients if callable(coefficients) else lambda *_: coefficients
        rest_coefficient = class_sum(jnp.where(excluded, nothing, anew(rest_sum)))
        # A class of coefficient 0 has no effect, not even as 0 times infinity.
        others = anew(rest_sum, rest_coefficient)
        skipped = excluded | (others == 0.0)
        gap = gaps(rest_sum, rest_coefficient)
        rest_excess = class_sum(jnp.where(skipped, 0.0, others * -gap))
    if problem.asks("entropy"):
        gap = gaps(rest_sum, rest_max)
        likely = jnp.exp(gap)
        rest_entropy = class_sum(jnp.where(likely == 0.0, 0.0, likely * -gap))
    if problem.asks("prediction", "correct"):
        rest_first = problem.library.argmax(narrow, axis)
    if rowstate.needs_squares(problem):
        likely = jnp.exp(transform.difference(problem, rest, _after(offset, rest_sum)))
        rest_squares = class_sum(likely * likely)
    state = rowstate.RowState(
        rest_max=rest_max.astype(row_dtype),
        rest_sum=rest_sum,
        pivot_logit=pivot_logit.astype(row_dtype),
        pivot_coefficient=pivot_coefficient,
        rest_coefficient=rest_coefficient,
        rest_excess=rest_excess,
        rest_entropy=rest_entropy,
        rest_first=rest_first,
        rest_squares=rest_squares,
    )
    return state, jnp.exp(gaps())


def of_teacher(
    problem: Problem, plan: Plan, pivot: Any, logits: Any
) -> tuple[Any, Callable[..., Any]]:
    """Return r at the pivot, and a function that computes r of every class anew, after others."""
    top, total = teacher.state(problem, plan.teacher)

    def at(plan: Plan, top: Any) -> Any:
        softmax = teacher.softmax(problem, plan.teacher, (top, total))
        return targets.coefficients(problem, plan._replace(probabilities=softmax, teacher=None))[1]

    def picked(array: Any) -> Any:
        return array if array is None else problem.library.pick(array, pivot, logits, problem.axis)

    own = plan._replace(teacher=picked(plan.teacher), class_weight=picked(plan.class_weight))
    return at(own, top), lambda *earlier: at(plan, _after(top, *earlier))


@jax.custom_jvp
def _after(rows: Any, *others: Any) -> Any:
    """Return rows behind a barrier, through which XLA does not see, and computed after others."""
    return jax.lax.optimization_barrier((rows, *others))[0]


@_after.defjvp
def _after_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    return _after(*primals), tangents[0]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _stored(dtype: Any, array: Any) -> tuple[Any, Any]:
    """Return an array as it is to be stored, in bfloat16 if it came in that, and widened again.

    float16 would not help: XLA for CPUs does not widen it within a reduction.
    """
    if dtype != jnp.bfloat16:
        return array, array

    def keep(array: Any) -> Any:
        # As integers: XLA removes a conversion to 16 bits that is followed by one to 32 bits.
        bits = jax.lax.bitcast_convert_type(array.astype(dtype), jnp.uint16)
        return jax.lax.bitcast_convert_type(jax.lax.optimization_barrier(bits), dtype)

    def pass_on(array: Any) -> Any:
        return array.astype(dtype)

    # On other devices XLA fuses `where`, and a barrier would make it store the result.
    narrow = jax.lax.platform_dependent(array, cpu=keep, default=pass_on)
    return narrow, narrow.astype(array.dtype)


@_stored.defjvp
def _stored_jvp(dtype: Any, primals: Any, tangents: Any) -> tuple[Any, Any]:
    narrow, wide = _stored(dtype, *primals)
    # Only the row's largest logit is taken from the narrow array, and no result depends on it: it
    # is a constant here. A tangent would be rounded to 16 bits.
    return (narrow, wide), (jnp.zeros_like(narrow), tangents[0])
