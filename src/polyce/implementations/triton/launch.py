"""What the triton kernels are launched with: grids and arguments.

Nothing here waits for the device or reads from it: sizes, strides and addresses are known on the
host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from triton.runtime import driver

from polyce.call.problem import Problem
from polyce.formula.stats import Stats
from polyce.graphs.torch_calls import Saved
from polyce.implementations.strides import cdiv, cut, power_of_two
from polyce.implementations.triton import arguments, kernels, layout, plans, records
from polyce.implementations.triton.arguments import Arrays, KernelCall
from polyce.implementations.triton.plans import Kept

# How many numbers a part of a row leaves behind, without a teacher and beside one; and most of all.
_FIELDS_OF_A_PART = (12, 17)
MOST_FIELDS_OF_A_PART = 18
# What the kernels call their memory.
_MEMORY = {
    "rows": "saved_ptr",
    "sums": "sums_ptr",
    "added": "added_ptr",
    "softmax": "softmax_ptr",
    "parts": "parts_ptr",
    "denominator": "denominator_ptr",
    "weights": "weights_ptr",
}


class Sizes(NamedTuple):
    """The shapes of a forward pass's memory besides its results; None for what it does not need."""

    rows: tuple[int, int] | None
    sums: tuple[int, int] | None
    added: tuple[int, int] | None
    softmax: tuple[int, int] | None
    parts: tuple[int, int, int] | None
    weights: tuple[int] | None = None


class Results(NamedTuple):
    """Where a forward pass writes, and what a mean is divided by; None for what is not wanted."""

    loss: torch.Tensor
    stats: Stats | None
    rows: torch.Tensor | None
    """(rows, 4): largest logit besides the pivot's, factor, the pivot's gradient and class.

    (rows, 9) with cotangents of stats: then also what they add. Two more numbers beside a teacher.
    """
    sums: torch.Tensor | None
    """(programs, 2): the sums of losses and row weights of each program's rows."""
    added: torch.Tensor | None
    """(chunks, 2): the sums of chunks of these, where there are many."""
    softmax: torch.Tensor | None
    """(rows, 5): what another look at the rows needs of each."""
    parts: torch.Tensor | None
    """(numbers, parts, rows): the states of parts of rows."""
    denominator: torch.Tensor | None
    normalizer: Any
    of_stats: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    """The cotangents of lse and entropy, which are read."""
    weights: torch.Tensor | None = None
    """(programs,): the sums of the row weights of chunks of rows, for a mean in one pass."""


class Launch(NamedTuple):
    """A kernel, its grid, and those of its arguments that all calls like this one share."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    warps: int


def run(
    launches: Sequence[Launch], values: Mapping[str, Any], logits: torch.Tensor
) -> tuple[Kept, ...]:
    """Launch kernels one after the other, on the current stream of the logits' device.

    `values` are their other arguments by name; the logits stand in the places of arrays that there
    are not, which are neither read nor written. What is returned launches the kernels again, by
    `plans.run`, for other values of the same kinds.
    """
    kept = []
    for launch in launches:
        jitted = getattr(kernels, launch.kernel)
        kernel = jitted[launch.grid]
        others = [name for name in jitted.arg_names if name not in launch.arguments]
        given = launch.arguments | {name: values.get(name, logits) for name in others}
        # A product fused with a sum is not rounded, and the kernels compute the exact rounding
        # errors of both.
        options = {"num_warps": launch.warps, "enable_fp_fusion": False}
        if arguments.EMULATED:
            plans.interpret(kernel, **given, **options)
            start = plans.interpreted(kernel, jitted.arg_names)
        else:
            with torch.cuda.device_of(logits):
                # AMD's larger GPUs have warps of 64.
                size = driver.active.get_current_target().warp_size
                options["num_warps"] = max(1, 32 * launch.warps // size)
                start = kernel(**given, **options)[launch.grid]
        places = ((i, name) for i, name in enumerate(jitted.arg_names) if name in others)
        kept.append(
            Kept(
                start,
                tuple(map(launch.arguments.get, jitted.arg_names)),
                tuple((i, name) for i, name in places if name in values),
            )
        )
    return tuple(kept)


def sizes(call: KernelCall, keep: bool) -> Sizes:
    """Return what memory the launches of a forward pass need."""
    problem, rows, parts = call.problem, call.row_count, parts_of(call)[0]
    reduced = problem.options.reduction != "none"
    looks_again = problem.kind == "probability" and problem.asks("brier")
    return Sizes(
        rows=(rows, saved_of_a_row(problem)) if keep else None,
        sums=(call.programs, 2) if reduced else None,
        added=(_chunks(call.programs), 2) if reduced and _chunks(call.programs) else None,
        softmax=(rows, 5) if looks_again else None,
        parts=(_FIELDS_OF_A_PART[problem.kind == "teacher"], parts, rows) if parts > 1 else None,
    )


def saved_of_a_row(problem: Problem) -> int:
    """Return how many numbers are saved of a row."""
    return (9 if problem.grad_stats else 4) + (2 if problem.kind == "teacher" else 0)


def _chunks(programs: int) -> int:
    """Return how many programs first add up the sums of the others; 0 if one adds them alone."""
    return 0 if programs <= layout.MANY_SUMS else cdiv(programs, layout.CHUNK_OF_SUMS)


def parts_of(call: KernelCall) -> tuple[int, int]:
    """Return into how many parts rows are cut, and how many classes a part has."""
    programs, classes = call.programs, call.problem.classes
    if classes <= layout.LONG or programs >= layout.FEW_PROGRAMS:
        return cut(classes, call.tile.classes, 1)
    wanted = min(cdiv(classes, layout.PART), cdiv(2 * layout.FEW_PROGRAMS, programs))
    return cut(classes, call.tile.classes, wanted)


def of_forward(arrays: Arrays, results: Results) -> dict[str, Any]:
    """Return the arguments of a forward pass that differ from call to call, without absent ones."""
    number = results.normalizer
    values = {
        **arguments.read(arrays),
        "loss_ptr": results.loss,
        "result_ptr": results.loss,
        "normalizer": 1.0,
    }
    if isinstance(number, float):
        values["normalizer"] = number
    elif number is not None:
        values["normalizer_ptr"] = number
    for name, argument in _MEMORY.items():
        if (memory := getattr(results, name)) is not None:
            values[argument] = memory
    if results.added is None and results.sums is not None:
        values["added_ptr"] = results.sums
    if results.stats is not None:
        for name, entry in zip(Stats._fields, results.stats, strict=True):
            if entry is not None:
                # Kernels write bytes.
                is_bool = entry.dtype == torch.bool
                values[f"{name}_ptr"] = entry.view(torch.uint8) if is_bool else entry
    for name, cotangent in zip(("of_lse_ptr", "of_entropy_ptr"), results.of_stats, strict=True):
        if cotangent is not None:
            values[name] = arguments.plain(cotangent).contiguous()
    return values


def forward(call: KernelCall, results: Results) -> list[Launch]:
    """Plan the launches that read the rows once and reduce their losses."""
    problem, classes = call.problem, call.problem.classes
    shared = {
        **arguments.options(call),
        "rows": call.row_count,
        "z_loss": problem.options.z_loss,
        "FORM": _form(problem, call, results, keep=results.rows is not None),
    }
    is_split = parts_of(call)[0] > 1
    launches = [reader(call, shared, split=is_split)]
    if is_split:
        launches.append(joiner("join", call, shared))
    if results.softmax is not None:
        again = {
            name: shared[name] for name in ("inner", "blocks", "scale", "cap", "FORM", "LANES")
        }
        again |= {**arguments.named("x", call.rows), **arguments.named("t", call.target_rows)}
        again |= {"classes": classes, "TILE": call.tile.classes}
        launches.append(Launch("distance", (call.programs, 1, 1), again, call.tile.warps))
    if results.sums is not None:
        launches += _reduction(call, results)
    return launches


def reader(call: KernelCall, shared: dict[str, Any], *, split: bool) -> Launch:
    """Plan the launch that reads the rows; if `split`, it leaves their parts behind."""
    parts, chunk = parts_of(call)
    given = {
        **shared,
        **arguments.named("t", call.target_rows),
        **arguments.vectors(call),
        "chunk": chunk,
        "SPLIT": split,
    }
    grid = (call.programs, parts, 1)
    return Launch("forward", grid, taken("forward", given), call.tile.warps)


def joiner(kernel: str, call: KernelCall, shared: dict[str, Any]) -> Launch:
    """Plan the launch of a kernel that joins the parts which a split reading leaves behind."""
    parts, lanes = parts_of(call)[0], call.tile.lanes
    at_once = layout.parts_at_once(parts, lanes)
    given = {**shared, "classes": call.problem.classes, "parts": parts, "TILE": at_once}
    warps = max(at_once * lanes // 32, 1)
    return Launch(kernel, (call.programs, 1, 1), taken(kernel, given), warps)


def taken(kernel: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return those of some arguments that a kernel has."""
    return {name: given[name] for name in getattr(kernels, kernel).arg_names if name in given}


def _form(problem: Problem, call: KernelCall, results: Results, *, keep: bool) -> records.Form:
    """Return what kernels that read rows for a loss are compiled for."""
    asked = problem.options.stats or ()
    return arguments.form(
        call,
        PENALTY=problem.options.z_loss > 0.0,
        REDUCED=results.sums is not None,
        KEEP=keep,
        STATS=results.stats is not None,
        LSE="lse" in asked,
        ENTROPY="entropy" in asked,
        PREDICTION="prediction" in asked,
        CORRECT="correct" in asked,
        TOP="top_probability" in asked,
        BRIER="brier" in asked,
        RANK="rank" in asked,
        **of_stats(problem),
    )


def _reduction(call: KernelCall, results: Results) -> list[Launch]:
    """Plan the launches that add up the sums of the programs."""
    launches, programs = [], call.programs
    if chunks := _chunks(programs):
        added = {"programs": programs, "chunk": layout.CHUNK_OF_SUMS, "TILE": layout.SUMS}
        launches.append(Launch("add_up", (chunks, 1, 1), added, 4))
    reduced = {
        "programs": chunks or programs,
        "MEAN": call.problem.options.reduction == "mean",
        "NORMALIZER": _kind(results.normalizer),
        "TILE": layout.SUMS,
        "EMULATED": arguments.EMULATED,
    }
    return [*launches, Launch("reduce", (1, 1, 1), reduced, 4)]


def _kind(normalizer: Any) -> str:
    is_number = isinstance(normalizer, float)
    return "none" if normalizer is None else "number" if is_number else "tensor"


def of_stats(problem: Problem) -> dict[str, bool]:
    """Return which stats have cotangents, for the form of a kernel."""
    return {f"OF_{name.upper()}": name in problem.grad_stats for name in ("lse", "entropy")}


def of_backward(
    arrays: Arrays, saved: Saved, cotangent: Any, grad: torch.Tensor, found: torch.Tensor | None
) -> dict[str, Any]:
    """Return the arguments of a backward pass that differ from call to call.

    `found` is memory for the gradient at the entries of a sparse target.
    """
    is_number = not isinstance(cotangent, torch.Tensor)
    values = {**arguments.read(arrays), "saved_ptr": saved.rows, "grad_ptr": grad}
    values["cotangent"] = cotangent if is_number else 1.0
    if not is_number:
        values["cotangent_ptr"] = cotangent
    if saved.denominator is not None:
        values["denominator_ptr"] = saved.denominator
    if found is not None:
        values["found_ptr"] = found
    return values


def backward(call: KernelCall, cotangent: Any, grad: torch.Tensor) -> list[Launch]:
    """Plan the launches that read the logits once more and write the gradient once.

    The cotangent is a number, or a tensor that `arguments.cotangent` has returned.
    """
    wanted = cdiv(layout.WRITERS, call.programs)
    parts, chunk = cut(call.problem.classes, call.tile.classes, wanted)
    given = {
        **arguments.options(call),
        **arguments.vectors(call, grad),
        **arguments.named("t", call.target_rows),
        **arguments.named("g", call.grad_rows),
        "chunk": chunk,
        "FORM": arguments.form(call, **of_stats(call.problem)),
        "MEAN": call.problem.options.reduction == "mean",
        "BY_ROW": arguments.is_by_row(cotangent),
        "NUMBER": not isinstance(cotangent, torch.Tensor),
    }
    whole = Launch("backward", (call.programs, parts, 1), given, call.tile.warps)
    if not call.problem.entries:
        return [whole]
    before, behind = _of_entries(call, given)
    return [before, whole, behind]


def _of_entries(call: KernelCall, given: dict[str, Any]) -> tuple[Launch, Launch]:
    """Plan the launches that compute, and that put in its place, the gradient at the entries."""
    alone = {
        **given,
        "classes": call.problem.classes,
        "rows": call.row_count,
        "TILE": layout.ENTRIES_ALONE,
    }
    programs = cdiv(call.row_count * call.problem.entries, layout.ENTRIES_ALONE)

    def launch(name: str) -> Launch:
        return Launch(name, (programs, 1, 1), taken(name, alone), 4)

    return launch("at_entries"), launch("put_entries")


def sizes_of_both(call: KernelCall) -> Sizes:
    """Return what memory the launches of loss and gradient in one pass need."""
    weighers = _weighers(call)[0]
    return sizes(call, keep=False)._replace(weights=(weighers,) if weighers else None)


def _weighers(call: KernelCall) -> tuple[int, int]:
    """Return how many programs add up the rows' weights, 0 if nobody asks, and of how many rows."""
    options, rows = call.problem.options, call.row_count
    if options.reduction != "mean" or call.problem.normalized:
        return 0, 0
    return cut(rows, layout.WEIGHED, layout.WEIGHERS)


def of_both(arrays: Arrays, results: Results, cotangent: Any, grad: torch.Tensor) -> dict[str, Any]:
    """Return the arguments of loss and gradient in one pass that differ from call to call."""
    is_number = not isinstance(cotangent, torch.Tensor)
    values = {**of_forward(arrays, results), "grad_ptr": grad}
    values["cotangent"] = cotangent if is_number else 1.0
    if not is_number:
        values["cotangent_ptr"] = cotangent
    return values


def both(call: KernelCall, results: Results, cotangent: Any, grad: torch.Tensor) -> list[Launch]:
    """Plan the launches that read the logits once, and write losses and gradient."""
    problem, normalizer = call.problem, results.normalizer
    weighers, chunk = _weighers(call)
    shared = {**arguments.options(call), "FORM": _form(problem, call, results, keep=True)}
    given = {
        **shared,
        **arguments.vectors(call, grad),
        **arguments.named("g", call.grad_rows),
        "weighers": weighers,
        "z_loss": problem.options.z_loss,
        "MEAN": problem.options.reduction == "mean",
        "NORMALIZER": _kind(normalizer),
        "WEIGHERS": power_of_two(max(weighers, 1)),
        "BY_ROW": arguments.is_by_row(cotangent),
        "NUMBER": not isinstance(cotangent, torch.Tensor),
    }
    launches = []
    if weighers:
        alone = {
            "classes": problem.classes,
            "rows": call.row_count,
            "chunk": chunk,
            "entries": 0,
            "ignore_index": shared["ignore_index"],
            "FORM": shared["FORM"],
            "TILE": layout.WEIGHED,
        }
        launches.append(Launch("weigh", (weighers, 1, 1), alone, 8))
    launches.append(Launch("both", (call.programs, 1, 1), taken("both", given), call.tile.warps))
    return launches + (_reduction(call, results) if results.sums is not None else [])
