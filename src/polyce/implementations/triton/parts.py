"""Rows whose classes lie in several parts, by the kernels: what `formula.parts` does, in one pass.

A part is a call on its own classes, with labels and entries counted from the first of them; its
rows that do not count have a sample weight of 0. What is known of the rows lies in an array as
`part_rows` says.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from polyce.arrays import dtypes
from polyce.call.problem import Operands, Problem
from polyce.formula import parts, rowstate, targets
from polyce.formula.parts import Part, TeacherState, Whole
from polyce.formula.rowgradient import NO_STATS, StatsCotangents
from polyce.formula.targets import Plan
from polyce.graphs.torch_calls import Saved
from polyce.implementations import part_rows
from polyce.implementations.triton import arguments, calls, launch
from polyce.implementations.triton.arguments import KernelCall, Place
from polyce.implementations.triton.launch import Launch
from polyce.implementations.triton.records import Form


def read_teacher(problem: Problem, teacher: torch.Tensor) -> TeacherState:
    """Read a part of a teacher's classes."""
    if not teacher.shape[problem.axis]:
        return parts.read_teacher(problem, teacher)
    problem = problem._replace(
        logits_dtype=teacher.dtype, target_dtype=dtypes.name_of(teacher.dtype)
    ).with_options(label_smoothing=0.0, logit_scale=None, logit_softcap=None)
    # It stands in the logits' place too.
    operands = Operands(teacher, teacher, None, None, None, None)
    call = arguments.call(*_of_classes(problem, operands, 0, None))
    rows = part_rows.empty_teacher(problem, _empty(teacher))
    _read(call, arguments.form(call), "write_teachers", {"states_ptr": rows})
    return part_rows.as_teacher(problem, rows)


def read(
    problem: Problem, operands: Operands, start: int, teacher: TeacherState | None = None
) -> Part:
    """Read a part of the classes; a teacher comes with what its whole rows have joined to."""
    logits = operands.logits
    if not logits.shape[problem.axis]:
        return parts.read(problem, operands, start, teacher)
    plan = part_rows.plan(problem, operands)
    own, given = _of_classes(problem, operands, start, plan)
    call = arguments.call(own, given, place=Place(start, problem.classes))
    form = arguments.form(
        call,
        ENTROPY=problem.asks("entropy"),
        FIRST=problem.asks("prediction", "correct"),
        BRIER=rowstate.needs_squares(problem),
    )
    rows = part_rows.empty(problem, _empty(logits))
    values = {"states_ptr": rows, **_of_teacher(problem, teacher, logits)}
    _read(call, form, "write_states", values)
    return part_rows.as_part(problem, plan, rows)


def gradient(
    problem: Problem,
    operands: Operands,
    start: int,
    whole: Whole,
    cotangent: Any,
    of_stats: StatsCotangents = NO_STATS,
    teacher: TeacherState | None = None,
) -> torch.Tensor:
    """Compute a part's gradient, in the logits' dtype, for the cotangents of its rows."""
    logits = operands.logits
    if not logits.shape[problem.axis]:
        return torch.empty_like(logits)
    plan = part_rows.plan(problem, operands)
    own, given = _of_classes(problem, operands, start, plan)
    passed = {name: array for name, array in of_stats._asdict().items() if array is not None}
    own = own._replace(grad_stats=tuple(passed))
    place = Place(start, problem.classes)
    call = arguments.call(own, given, place=place)

    def by_row(values: Any) -> torch.Tensor:
        every = torch.broadcast_to(values, whole.state.rest_max.shape)
        return every.squeeze(problem.axis).contiguous()

    penalty = targets.lse_penalty(problem, plan)
    form = arguments.form(
        call,
        KEEP=True,
        ENTROPY=problem.asks("entropy"),
        PENALTY=penalty is not None,
        **launch.of_stats(own),
    )
    zeros = torch.zeros_like(whole.state.rest_max)
    count = (math.prod(problem.row_shape), launch.saved_of_a_row(own))
    saved = torch.empty(count, dtype=problem.arithmetic_dtype, device=logits.device)
    values = {
        **arguments.read(call.arrays),
        **_of_teacher(problem, teacher, logits),
        **{f"of_{name}_ptr": by_row(array) for name, array in passed.items()},
        "states_ptr": part_rows.of_whole(problem, whole, _empty(logits)),
        "saved_ptr": saved,
    }
    if penalty is not None:
        values["penalty_ptr"] = by_row(penalty + zeros)
    shared = {**_shared(call, form), "classes": own.classes}
    saving = launch.taken("save_states", shared)
    launch.run([Launch("save_states", (call.programs, 1, 1), saving, 1)], values, logits)
    cotangent = by_row(targets.weigh_rows(plan, problem.xp, cotangent + zeros))
    given = given._replace(grad_output=cotangent)
    return calls.write_gradient(own, given, Saved(saved, None), None, None, place)


def _of_classes(
    problem: Problem, operands: Operands, start: int, plan: Plan | None
) -> tuple[Problem, Operands]:
    """Return a part as a call of its own; without a plan, all rows of a teacher count."""
    logits, target, axis = operands.logits, operands.target, problem.axis
    width = logits.shape[axis]
    shape = (*problem.shape[:axis], width, *problem.shape[axis + 1 :])
    own = problem.with_options(reduction="none", stats=None)._replace(
        shape=shape, check_labels=False, grad_stats=()
    )
    weight = operands.weight
    if weight is not None:
        weight = weight[start : start + width]
    if plan is not None and plan.label is not None:
        own = own._replace(target_dtype="int64")
        target = plan.label.squeeze(axis) - start
    elif problem.kind == "sparse":
        target = target.to(torch.int64) - start
    counted = None
    if plan is not None and plan.counted is not None:
        counted = plan.counted.squeeze(axis).to(problem.row_dtype)
    probability = operands.target_probability
    given = Operands(logits, target, weight, counted, None, None, target_probability=probability)
    return own, given


def _of_teacher(
    problem: Problem, teacher: TeacherState | None, logits: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return what a teacher's rows have joined to, as an argument."""
    if teacher is None:
        return {}
    return {"teacher_ptr": part_rows.of_teacher(problem, teacher, _empty(logits))}


def _read(call: KernelCall, form: Form, kernel: str, values: dict[str, Any]) -> None:
    """Read the rows, and let a kernel join and write what the programs leave behind."""
    left = (launch.MOST_FIELDS_OF_A_PART, launch.parts_of(call)[0], call.row_count)
    memory = torch.empty(left, dtype=torch.float64, device=call.logits.device)
    shared = _shared(call, form)
    launches = [launch.reader(call, shared, split=True), launch.joiner(kernel, call, shared)]
    values = {**arguments.read(call.arrays), "parts_ptr": memory, **values}
    launch.run(launches, values, call.logits)


def _shared(call: KernelCall, form: Form) -> dict[str, Any]:
    """Return the arguments that all calls like this one share."""
    return {
        **arguments.options(call),
        "rows": call.row_count,
        "first_class": 0 if call.place is None else call.place.start,
        # The states know no penalty.
        "z_loss": 0.0,
        "FORM": form,
    }


def _empty(like: torch.Tensor) -> Callable[..., torch.Tensor]:
    return lambda shape, dtype: torch.empty(shape, dtype=dtype, device=like.device)
