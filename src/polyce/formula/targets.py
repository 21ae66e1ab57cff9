"""What a target means: each row's class, its weight, and what the mean divides by.

This is the only place that defines the coefficients, the denominator and the cotangent of a row.
Nothing here looks at the logits' values.

A row's loss is R·lse - Σ r_c x_c, and every kind of target is a choice of the coefficients r:

=============================  ==========================================
index y                        r_c = w_y [c = y]
index y, smoothing ε           r_c = (1 - ε) w_y [c = y] + (ε / C) w_c
probabilities p                r_c = w_c p_c
probabilities p, smoothing ε   r_c = w_c ((1 - ε) p_c + ε / C)
=============================  ==========================================

Classes j_k with probabilities p_k mean p_c = Σ p_k [c = j_k], over the k whose class is not the
ignored one; they are kept as they are, K entries of each row. A teacher's logits t with scale s
mean p = softmax(s t).

A row counts v times: 0 times if it is ignored, else as its sample weight says. The mean is
Σ v loss / D, where D = Σ v w_y for labels, Σ v for the others, or what the caller passes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from polyce.arrays.library import along_axis, columns, expand
from polyce.call.problem import Operands, Problem
from polyce.formula import labels, teacher
from polyce.formula.entries import Entries, together


class Plan(NamedTuple):
    """What the target of one call means, as arrays; None for what is absent.

    Arrays with one entry for each row keep the class axis, of length 1, to broadcast against the
    logits.
    """

    label: Any
    """Class of each row, always in range; None where the target holds no labels."""
    counted: Any
    """False for rows that are ignored or have a sample weight of 0; None if none can be."""
    invalid: Any
    """True for rows with a label out of range; None if labels were checked."""
    label_weight: Any
    """Class weight of each row's label, in the row dtype; None for 1."""
    class_weight: Any
    """Class weights along the class axis, in the arithmetic dtype; None for 1."""
    sample_weight: Any
    """What multiplies each row's loss, in the row dtype; None for 1."""
    probabilities: Any
    """Target probabilities, of the logits' shape, or of `entries`, in the arithmetic dtype."""
    denominator: Any
    """What reduction mean divides by; None for the other reductions."""
    entries: Any = None
    """The classes of a sparse target, always in range, K along the class axis; None for others."""
    kept: Any = None
    """False for the ignored ones of `entries`, whose probability is 0; None if none is ignored."""
    teacher: Any = None
    """A teacher's logits, in their own dtype; None for other targets."""


def plan(problem: Problem, operands: Operands) -> Plan:
    """Read the target of a call; raises IndexError for a bad label where labels are checked."""
    found = plan_rows(problem, operands)
    library, logits = problem.library, operands.logits
    if problem.kind == "sparse":
        return _with_entries(problem, operands, found)
    if problem.kind == "teacher":
        return found._replace(teacher=library.align(operands.target, logits))
    if problem.kind == "probability":
        probabilities = library.cast(operands.target, problem.arithmetic_dtype)
        return found._replace(probabilities=library.align(probabilities, logits))
    return found


def _with_entries(problem: Problem, operands: Operands, found: Plan) -> Plan:
    """Read the entries of a sparse target; a row with a bad one is nan if it counts."""
    xp, library, axis = problem.xp, problem.library, problem.axis
    entries, kept, invalid = labels.read(problem, operands.target, operands.logits)
    probability = library.cast(operands.target_probability, problem.arithmetic_dtype)
    probability = library.align(probability, operands.logits)
    # A row that does not count may hold anything.
    for used in (kept, found.counted):
        if used is not None:
            probability = xp.where(used, probability, 0.0)
    if invalid is not None:
        invalid = xp.any(invalid, axis=axis, keepdims=True)
        if found.counted is not None:
            invalid = invalid & found.counted
    return found._replace(entries=entries, kept=kept, probabilities=probability, invalid=invalid)


def plan_rows(problem: Problem, operands: Operands) -> Plan:
    """Read all that `plan` does but what stands in the place of a label.

    The logits only say where they lie.
    """
    xp, library, axis = problem.xp, problem.library, problem.axis
    logits = operands.logits
    sample_weight = counted = class_weight = None
    if operands.sample_weight is not None:
        sample_weight = library.cast(operands.sample_weight, problem.row_dtype)
        sample_weight = library.align(expand(sample_weight, axis), logits)
        counted = sample_weight != 0.0
    if operands.weight is not None:
        weight = library.cast(operands.weight, problem.arithmetic_dtype)
        class_weight = along_axis(weight, axis, len(problem.shape))
        class_weight = library.align(class_weight, logits)
    if problem.kind != "index":
        return Plan(
            label=None,
            counted=counted,
            invalid=None,
            label_weight=None,
            class_weight=class_weight,
            sample_weight=sample_weight,
            probabilities=None,
            denominator=_denominator(problem, operands, counted, sample_weight),
        )

    label, kept, invalid = labels.read(problem, operands.target, logits)
    if counted is None or kept is None:
        counted = kept if counted is None else counted
    else:
        counted = counted & kept
    label_weight = None
    if class_weight is not None and not problem.is_empty:
        label_weight = library.pick(class_weight, label, logits, axis)
        label_weight = library.cast(label_weight, problem.row_dtype)
        if invalid is not None:
            label_weight = xp.where(invalid, 1.0, label_weight)
    if invalid is not None and sample_weight is not None:
        invalid = invalid & counted
    row_weight = label_weight
    if sample_weight is not None:
        row_weight = sample_weight if label_weight is None else sample_weight * label_weight
    return Plan(
        label=label,
        counted=counted,
        invalid=invalid,
        label_weight=label_weight,
        class_weight=class_weight,
        sample_weight=sample_weight,
        probabilities=None,
        denominator=_denominator(problem, operands, counted, row_weight),
    )


def _denominator(problem: Problem, operands: Operands, counted: Any, row_weight: Any) -> Any:
    """Compute what the mean divides by; a Python float if no array's values are needed."""
    xp = problem.xp
    if problem.options.reduction != "mean":
        return None
    if problem.normalized:
        if isinstance(operands.normalizer, float):
            return operands.normalizer
        return problem.library.cast(operands.normalizer, problem.row_dtype)
    if problem.kind != "index" and problem.classes == 0:
        # torch counts rows as the number of logits over C, so it finds none.
        return 0.0
    if row_weight is None:
        if counted is None:
            return problem.library.row_count(
                problem.row_shape, operands.logits, problem.axis, problem.row_dtype
            )
        row_weight = problem.library.cast(counted, problem.row_dtype)
    elif counted is not None:
        row_weight = xp.where(counted, row_weight, 0.0)
    return problem.library.total(row_weight)


def coefficients(problem: Problem, plan: Plan) -> tuple[Any, Any]:
    """Compute r of each row: at its label, and at every class that is not the label.

    For labels this is (the label's coefficient, every class's share of the smoothing); for
    probabilities and teachers (None, the coefficient of every class); for a sparse target (None,
    every class's share), beside which there is what `entries` returns. None is 1 at the label and 0
    elsewhere.
    """
    smoothing = problem.options.label_smoothing
    share = smoothing / max(problem.classes, 1)
    if plan.entries is not None:
        if not smoothing or plan.class_weight is None:
            return None, share or None
        return None, plan.class_weight * share
    if plan.label is None:
        everywhere = probabilities(problem, plan)
        if smoothing:
            everywhere = everywhere * (1.0 - smoothing) + share
        if plan.class_weight is not None:
            everywhere = everywhere * plan.class_weight
        return None, everywhere
    if not smoothing:
        return at_label(problem, plan), None
    weight = plan.class_weight
    return at_label(problem, plan), share if weight is None else weight * share


def at_label(problem: Problem, plan: Plan) -> Any:
    """Compute r of each row at its label; None for 1, a number where it is that of all rows."""
    smoothing = problem.options.label_smoothing
    if not smoothing:
        return plan.label_weight
    own = 1.0 - smoothing + smoothing / max(problem.classes, 1)
    return own if plan.label_weight is None else plan.label_weight * own


def entries(problem: Problem, plan: Plan) -> Entries | None:
    """Return the classes of a sparse target, with what r has there beside the smoothing's share."""
    if plan.entries is None:
        return None
    found, kept = plan.probabilities, 1.0 - problem.options.label_smoothing
    if kept != 1.0:
        found = found * kept
    # Nothing times an infinite weight is nothing.
    if plan.class_weight is not None and kept and not problem.is_empty:
        found = found * _class_weight_at(problem, plan, found)
    return Entries(plan.entries, found)


def share_at(problem: Problem, share: Any, classes: Any, logits: Any) -> Any:
    """Return each row's share of the smoothing at one class, from that of every class."""
    if not hasattr(share, "shape"):
        return share or 0.0
    found = problem.library.pick(share, classes, logits, problem.axis)
    return problem.library.cast(found, problem.row_dtype)


def _class_weight_at(problem: Problem, plan: Plan, like: Any) -> Any:
    return problem.library.pick(plan.class_weight, plan.entries, like, problem.axis)


def probabilities(problem: Problem, plan: Plan) -> Any:
    """Return the target's probabilities of every class, of a target that has them or a teacher."""
    if plan.teacher is None:
        return plan.probabilities
    return teacher.softmax(problem, plan.teacher, teacher.state(problem, plan.teacher))


def label_of(problem: Problem, plan: Plan) -> Any:
    """Return the class that a row's target prefers: its label, or its first likeliest class.

    -1 where a sparse target has no probability above 0, and where a teacher has no softmax.
    """
    xp, library, axis = problem.xp, problem.library, problem.axis
    if plan.label is not None:
        return plan.label
    if plan.teacher is not None:
        top = library.class_max(plan.teacher, axis)
        return xp.where(xp.isfinite(top), library.argmax(plan.teacher, axis), -1)
    if plan.entries is None:
        return library.argmax(plan.probabilities, axis)
    sizes = together(problem, plan.entries, plan.probabilities)
    best, label = 0.0, -1
    for own, size in zip(columns(plan.entries, axis), columns(sizes, axis), strict=True):
        is_better = (size > best) | ((size == best) & (own < label))
        label = xp.where(is_better, own, label)
        best = xp.where(is_better, size, best)
    return label


def pivot_leads(problem: Problem) -> bool:
    """Tell whether the pivot of a row is the class of its largest logit, not its label.

    True where there is no label, and if the entropy is asked for: with another class as the pivot,
    the sum over the rest contains the 1 of the largest, and loses the digits of the others.
    """
    return problem.kind != "index" or problem.asks("entropy")


def all_coefficients(problem: Problem, plan: Plan, is_label: Any, rows: Any) -> Any:
    """Compute r of every class, the label's included, for a pivot that need not be the label.

    `is_label` marks the label of each row; `rows` is an array in the arithmetic dtype, shaped like
    the plan's. Neither is used for probabilities.
    """
    xp = problem.xp
    at_label, everywhere = coefficients(problem, plan)
    if plan.label is None:
        return everywhere
    if plan.label_weight is None:  # at_label is a number then, for mparray one of its own
        at_label = xp.full_like(rows, 1.0 if at_label is None else at_label)
    at_label = problem.library.cast(at_label, problem.arithmetic_dtype)
    return xp.where(is_label, at_label, 0.0 if everywhere is None else everywhere)


def coefficients_backward(
    problem: Problem, plan: Plan, gradient: Any, *, needs: tuple[bool, bool] = (True, True)
) -> tuple[Any, Any]:
    """Chain a gradient by r to the probabilities and to the class weights.

    The gradient has the logits' shape. A result that is not needed, or has no array, is None.
    """
    xp, library, axis = problem.xp, problem.library, problem.axis
    of_probabilities = of_class_weight = None
    if needs[0]:
        given = gradient
        if plan.entries is not None:
            given = library.pick(gradient, plan.entries, gradient, axis)
        of_probabilities = probabilities_backward(problem, plan, given)
    if needs[1] and plan.class_weight is not None:
        share = _unweighted(problem, plan, gradient)
        # A class of probability 0 has no effect, not even at a logit of -inf.
        gradient = xp.where((share == 0.0) & xp.isinf(gradient), 0.0, gradient)
        sizes = enumerate(plan.class_weight.shape)
        rows = tuple(a for a, size in sizes if size == 1 and a != problem.axis)
        of_class_weight = xp.sum(share * gradient, axis=rows, keepdims=True)
    return of_probabilities, of_class_weight


def probabilities_backward(problem: Problem, plan: Plan, gradient: Any) -> Any:
    """Chain a gradient by r, where there are probabilities, to these: of all classes or entries."""
    weight = plan.class_weight
    if weight is not None and plan.entries is not None:
        weight = _class_weight_at(problem, plan, gradient)
    found = gradient * (1.0 - problem.options.label_smoothing)
    if weight is not None:
        found = found * weight
    return found if plan.kept is None else problem.xp.where(plan.kept, found, 0.0)


def _unweighted(problem: Problem, plan: Plan, like: Any) -> Any:
    """Return r for class weights of 1, at every class also of a sparse target."""
    plan = plan._replace(class_weight=None)
    _, share = coefficients(problem, plan)
    found = entries(problem, plan)
    if found is None:
        return share
    everywhere = problem.xp.full_like(like, share or 0.0)
    return problem.library.add_at(everywhere, *found, problem.axis)


def lse_penalty(problem: Problem, plan: Plan) -> Any:
    """Return λ, the coefficient of each row's lse²: z_loss times the label's weight; None for 0."""
    z_loss = problem.options.z_loss
    if not z_loss:
        return None
    return z_loss if plan.label_weight is None else plan.label_weight * z_loss


def weigh_rows(plan: Plan, xp: Any, rows: Any) -> Any:
    """Multiply by the sample weights; set rows that do not count to 0, bad labels' rows to nan."""
    if plan.sample_weight is not None:
        rows = rows * plan.sample_weight
    return select_rows(plan, xp, rows)


def select_rows(plan: Plan, xp: Any, rows: Any) -> Any:
    """Set rows that do not count to 0, bad labels' rows to nan."""
    if plan.counted is not None:
        rows = xp.where(plan.counted, rows, 0.0)
    if plan.invalid is not None:
        rows = xp.where(plan.invalid, float("nan"), rows)
    return rows


def spoil_rows(problem: Problem, plan: Plan, array: Any) -> tuple[Plan, Any]:
    """Multiply rows with a bad label by nan, derivatives included, and clear their mark.

    `weigh_rows` selects nan instead, which has no derivative.
    """
    if plan.invalid is None:
        return plan, array
    factor = problem.library.cast(problem.xp.where(plan.invalid, math.nan, 1.0), array.dtype)
    return plan._replace(invalid=None), array * factor


def cotangent(problem: Problem, plan: Plan, grad_output: Any) -> Any:
    """Compute the gradient of the reduced loss with respect to each row's loss: g or g / D."""
    scale: Any = 1.0 if grad_output is None else grad_output
    if not isinstance(scale, float):
        scale = problem.library.cast(scale, problem.row_dtype)
        if problem.options.reduction == "none":
            scale = expand(scale, problem.axis)
    if problem.options.reduction == "mean":
        if type(plan.denominator) is float and not plan.denominator:  # NumPy's is a float too
            # Python would raise ZeroDivisionError.
            return scale * math.copysign(math.inf, plan.denominator)
        scale = problem.library.divide(scale, plan.denominator)
    return scale


def reduce(problem: Problem, plan: Plan, rows: Any) -> Any:
    """Reduce the rows' losses and round the result once, to the result dtype."""
    xp = problem.xp
    if problem.options.reduction == "none":
        rows = xp.squeeze(rows, axis=problem.axis)
        return problem.library.cast(rows, problem.result_dtype)
    total = problem.library.total(rows)
    if problem.options.reduction == "mean":
        total = problem.library.divide(total, plan.denominator)
    return problem.library.cast(total, problem.result_dtype)
