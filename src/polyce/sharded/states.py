"""What a process sends of each row, as numbers of one size, and how that is read again.

That is the state of its classes, as `formula.parts` reads it, without what every process knows: for
class indices the pivot is the label, and its coefficient follows from the class weights. What
float32 logits have led to is sent in float32, the numbers that are sums rounded once more.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from polyce.call.problem import Problem
from polyce.formula import rowstate, rowstats, targets
from polyce.formula.parts import Part, TeacherState
from polyce.formula.rowstate import RowState
from polyce.formula.targets import Plan
from polyce.sharded.call import ShardCall

PIVOT, REST, ELSEWHERE = 1.0, -1.0, 0.0
"""Where the label is: the likeliest class of a shard, another class of it, or in another shard."""

_INTEGERS = ("rest_first", "pivot", "likeliest", "rank")


def names(problem: Problem) -> tuple[str, ...]:
    """Return the names of the numbers that are sent of each row."""
    leads, smooth = targets.pivot_leads(problem), problem.options.label_smoothing > 0.0
    found = ["rest_max", "rest_sum", "pivot_logit"]
    if leads or smooth:
        found.append("rest_excess")
    if leads and problem.kind == "index" and not smooth:
        found.append("label_place")
    elif leads or smooth:
        found.append("rest_coefficient")
        if leads:
            found.append("pivot_coefficient")
    if problem.asks("entropy"):
        found.append("rest_entropy")
    if rowstate.needs_squares(problem):
        found.append("rest_squares")
    if rowstats.needs_label_logit(problem):
        found.append("label_logit")
    if problem.asks("prediction", "correct"):
        found.append("rest_first")
    if leads and problem.asks("prediction", "correct", "brier"):
        found.append("pivot")
    if compares(problem):
        found += ["likelihood", "likeliest"]
    return tuple(found)


def compares(problem: Problem) -> bool:
    """Tell whether the class that a target prefers is known to no process alone."""
    return problem.kind in ("probability", "teacher") and problem.asks("correct")


def word_dtype(problem: Problem) -> Any:
    """Return the integers that are as wide as the arithmetic's numbers."""
    return torch.int64 if problem.arithmetic_dtype == torch.float64 else torch.int32


def encode(call: ShardCall, part: Part) -> Any:
    """Return what is sent of the classes of a shard, in one axis."""
    problem, state = call.problem, part.state
    values = {**state._asdict(), "pivot": part.pivot, "label_logit": part.label_logit}
    wanted = names(problem)
    if "label_place" in wanted:
        local = part.plan.label - call.start
        here = (local >= 0) & (local < call.width)
        place = torch.where(part.pivot == part.plan.label, PIVOT, REST)
        values["label_place"] = torch.where(here, place, ELSEWHERE)
    if compares(problem):
        soft = call.operands.target
        values["likelihood"] = problem.library.class_max(soft, problem.axis)
        values["likeliest"] = problem.library.argmax(soft, problem.axis) + call.start
    return pack(problem, [values[name] for name in wanted])


def nothing(call: ShardCall) -> Any:
    """Return what is sent of no classes."""
    problem = call.problem
    if problem.is_empty:
        return torch.empty(0, dtype=word_dtype(problem), device=call.operands.logits.device)
    lowest = {"rest_max", "likelihood"}
    if targets.pivot_leads(problem):
        lowest.add("pivot_logit")
    rows = torch.zeros(
        math.prod(problem.row_shape),
        dtype=problem.arithmetic_dtype,
        device=call.operands.logits.device,
    )
    return pack(problem, [rows - math.inf if n in lowest else rows for n in names(problem)])


def pack(problem: Problem, arrays: list[Any]) -> Any:
    """Join arrays of rows into one of words: floats by their bits, integers as they are."""
    word = word_dtype(problem)
    words = []
    for array in arrays:
        flat = array.reshape(-1)
        if flat.is_floating_point():
            flat = flat.to(problem.arithmetic_dtype).view(word)
        words.append(flat.to(word))
    return torch.cat(words)


def unpack(problem: Problem, words: Any, wanted: tuple[str, ...]) -> dict[str, Any]:
    """Return the arrays of one process by name: floats in the row dtype, integers as int64."""
    shape = list(problem.shape)
    shape[problem.axis] = 1
    found = {}
    for name, flat in zip(wanted, words.view(len(wanted), -1), strict=True):
        is_integer = name in _INTEGERS
        values = flat if is_integer else flat.view(problem.arithmetic_dtype)
        found[name] = values.to(torch.int64 if is_integer else problem.row_dtype).view(shape)
    return found


def decode(
    problem: Problem, plan: Plan, words: Any, own: int, pivot: Any
) -> tuple[list[Part], Plan]:
    """Return the parts that the processes have sent, and the plan with the class to compare with.

    `own` is this process's place, `pivot` what its part has. Of another part that leads it is no
    class of this one unless the call's stats have to know it.
    """
    wanted = names(problem)
    sent = [unpack(problem, line, wanted) for line in words]
    parts = []
    for place, values in enumerate(sent):
        state = RowState(
            rest_max=values["rest_max"],
            rest_sum=values["rest_sum"],
            pivot_logit=values["pivot_logit"],
            **_coefficients(problem, plan, values, is_first=place == 0),
            rest_excess=values.get("rest_excess"),
            rest_entropy=values.get("rest_entropy"),
            rest_first=values.get("rest_first"),
            rest_squares=values.get("rest_squares"),
        )
        if not targets.pivot_leads(problem):
            its = plan.label
        elif "pivot" in values:
            its = values["pivot"]
        else:
            its = pivot if place == own else torch.full_like(pivot, -1)
        parts.append(Part(state, its, plan, values.get("label_logit")))
    return parts, _with_likeliest(problem, plan, sent) if compares(problem) else plan


def _coefficients(
    problem: Problem, plan: Plan, values: dict[str, Any], *, is_first: bool
) -> dict[str, Any]:
    """Return r_k and R' of a part."""
    zeros = torch.zeros_like(values["rest_max"])
    if "label_place" in values:
        weight = 1.0 if plan.label_weight is None else plan.label_weight
        at_pivot, in_rest = (
            torch.where(values["label_place"] == place, weight, zeros) for place in (PIVOT, REST)
        )
        return {"pivot_coefficient": at_pivot, "rest_coefficient": in_rest}
    at_pivot = values.get("pivot_coefficient")
    if at_pivot is None:
        # The parts' add up, so it does not matter which of them has it.
        at_label = targets.at_label(problem, plan)
        at_pivot = zeros + (1.0 if at_label is None else at_label) if is_first else zeros
    return {"pivot_coefficient": at_pivot, "rest_coefficient": values.get("rest_coefficient")}


def _with_likeliest(problem: Problem, plan: Plan, sent: list[dict[str, Any]]) -> Plan:
    """Put the class that a target prefers into the place of a label."""
    best, label = sent[0]["likelihood"], sent[0]["likeliest"]
    for other in sent[1:]:
        value, own = other["likelihood"], other["likeliest"]
        is_better = (value > best) | ((value == best) & (own < label))
        label, best = torch.where(is_better, own, label), torch.maximum(best, value)
    if problem.kind == "teacher":
        label = torch.where(torch.isfinite(best), label, -1)
    return plan._replace(label=label)


def encode_teacher(problem: Problem, state: TeacherState) -> Any:
    """Return what is sent of a part of a teacher's classes, in one axis."""
    return pack(problem, list(state))


def decode_teacher(problem: Problem, words: Any) -> list[TeacherState]:
    """Return the parts of a teacher's classes that the processes have sent."""
    found = [TeacherState(**unpack(problem, line, TeacherState._fields)) for line in words]
    return [part._replace(top=part.top.to(problem.arithmetic_dtype)) for part in found]
