"""The loss of all logits at once, where chunks cannot be used.

This is for libraries that cut and fuse for themselves, and wherever torch needs operations of its
own: under transforms, in forward mode, for export, and to differentiate a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyce.call.problem import Head, Operands, Problem, describe
from polyce.call.target import SparseTarget, TeacherLogits
from polyce.formula import targets
from polyce.formula.stats import Stats
from polyce.implementations.registry import select
from polyce.linear.call import Gradients, HeadCall

WHY = "no chunks: operations on all logits at once, which is what the arrays need here"
"""What `explain` says about it."""


def is_wanted(problem: Problem) -> bool:
    """Tell whether a call has to be computed on all logits at once."""
    if not problem.library.cuts_heads:
        return True
    return problem.backend == "torch" and not (problem.is_concrete or problem.is_compiling)


def loss(call: HeadCall) -> tuple[Any, Stats | None]:
    """Compute the loss and the stats, on the library's graph where it has one."""
    problem, operands = _described(call)
    result, stats = select(problem, call.name).cross_entropy(problem, operands)
    return call.whole.library.cast(result, call.whole.result_dtype), stats


def loss_and_gradients(call: HeadCall, wanted: Gradients) -> tuple[Any, Gradients, Stats | None]:
    """Compute the loss, the gradients wanted and the stats."""
    problem, operands = _described(call)
    path = select(problem, call.name)
    result, grad, stats = path.cross_entropy_with_grad(problem, operands, None)
    result = call.whole.library.cast(result, call.whole.result_dtype)
    return result, gradients(call, wanted, grad), stats


def _described(call: HeadCall) -> tuple[Problem, Operands]:
    """Describe the call on all logits."""
    whole, given = call.whole, with_logits(call)
    # Whether labels are checked has been decided already.
    options = whole.options._replace(axis=-1, validate=whole.check_labels or None)
    if options.stats is None:
        options = options._replace(stats=False)
    problem, operands = describe(
        given.logits,
        _target(whole, given),
        given.weight,
        given.sample_weight,
        given.normalizer,
        options,
        grad_output=given.grad_output,
        grad_stats={name: getattr(given, f"grad_{name}") for name in whole.grad_stats} or None,
    )
    return problem._replace(label_name=whole.label_name), operands


def _target(whole: Problem, given: Operands) -> Any:
    """Return the target as a caller with all logits would pass it."""
    if whole.kind == "sparse":
        return SparseTarget(given.target, given.target_probability)
    if whole.kind == "teacher":
        return TeacherLogits(given.target, whole.teacher_scale)
    return given.target


def with_logits(call: HeadCall) -> Operands:
    """Return the operands with logits, and with those of a teacher, in place of hidden states."""
    given, dtype = call.operands, call.whole.teacher_dtype
    if call.teacher is not None:
        states = call.whole.library.cast(given.target, dtype)
        options = call.product_options(given.target)
        teacher = _product(call, states, call.teacher, dtype, options)
        given = given._replace(target=teacher, teacher_weight=None, teacher_bias=None)
    options = call.product_options(given.logits)
    logits = _product(call, _states(call), call.head, call.whole.logits_dtype, options)
    return given._replace(logits=logits)


def _product(
    call: HeadCall, states: Any, head: Head, dtype: Any, options: Mapping[str, Any]
) -> Any:
    library = call.whole.library
    product = call.whole.xp.matmul(states, library.cast(head.weight, dtype).T, **options)
    return product if head.bias is None else product + library.cast(head.bias, dtype)


def _states(call: HeadCall) -> Any:
    """Return the hidden states, 0 in rows that do not count, which may hold infinities and nans."""
    whole = call.whole.with_options(reduction="none")._replace(check_labels=False)
    states = whole.library.cast(call.operands.logits, whole.logits_dtype)
    counted = targets.plan_rows(whole, call.operands._replace(weight=None)).counted
    return states if counted is None else whole.xp.where(counted, states, 0.0)


def gradients(call: HeadCall, wanted: Gradients, grad: Any) -> Gradients:
    """Compute the gradients wanted from that of the logits, in operations that have derivatives."""
    xp, dtype, head = call.whole.xp, call.whole.logits_dtype, call.head
    hidden = call.operands.logits
    of_input = of_weight = of_bias = None
    if wanted.input:
        of_input = xp.matmul(grad, call.whole.library.cast(head.weight, dtype))
        of_input = call.whole.library.cast(of_input, hidden.dtype)
    axes = tuple(range(hidden.ndim - 1))
    if wanted.linear_weight:
        of_weight = xp.tensordot(grad, _states(call), axes=(axes, axes))
        of_weight = call.whole.library.cast(of_weight, head.weight.dtype)
    if wanted.linear_bias:
        total = xp.sum(grad, axis=axes) if axes else grad
        of_bias = call.whole.library.cast(total, head.bias.dtype)
    return Gradients(of_input, of_weight, of_bias)
