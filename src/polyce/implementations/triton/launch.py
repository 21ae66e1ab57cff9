"""What the triton kernels are launched with: grids and arguments.

Nothing here waits for the device or reads from it: sizes, strides and addresses are known on the
host.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from triton.runtime import driver

from polyce.call.problem import Problem
from polyce.formula.stats import Stats
from polyce.implementations.strides import cdiv, cut
from polyce.implementations.triton import arguments, kernels, layout
from polyce.implementations.triton.arguments import KernelCall

# How many numbers a part of a row leaves behind, without a teacher and beside one.
_FIELDS_OF_A_PART = (12, 17)


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
    denominator: torch.Tensor | None
    normalizer: Any
    of_stats: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    """The cotangents of lse and entropy, which are read."""


class Launch(NamedTuple):
    """A kernel, its grid and its arguments."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int


def run(launches: Sequence[Launch], logits: torch.Tensor) -> None:
    """Launch kernels one after the other, on the current stream of the logits' device."""
    for launch in launches:
        kernel = getattr(kernels, launch.kernel)[launch.grid]
        # A product fused with a sum is not rounded, and the kernels compute the exact rounding
        # errors of both.
        options = {"num_warps": launch.warps, "enable_fp_fusion": False}
        if arguments.EMULATED:
            with np.errstate(all="ignore"), warnings.catch_warnings():
                # NumPy warns about rows that are nan; a kernel on a device does not.
                warnings.simplefilter("ignore", RuntimeWarning)
                kernel(**launch.arguments, **options)
            continue
        with torch.cuda.device_of(logits):
            # AMD's larger GPUs have warps of 64.
            size = driver.active.get_current_target().warp_size
            options["num_warps"] = max(1, 32 * launch.warps // size)
            kernel(**launch.arguments, **options)


def forward(call: KernelCall, results: Results) -> list[Launch]:
    """Plan the launches that read the rows once and reduce their losses."""
    problem, asked = call.problem, call.problem.options.stats or ()
    programs, classes = call.programs, problem.classes
    parts, chunk = 1, classes
    if classes > layout.LONG and programs < layout.FEW_PROGRAMS:
        wanted = min(classes // layout.PART, cdiv(2 * layout.FEW_PROGRAMS, programs))
        parts, chunk = cut(classes, call.tile.classes, wanted)
    dummy = call.logits
    found = results.stats
    of_lse, of_entropy = (_by_row(cotangent) for cotangent in results.of_stats)
    looks_again = problem.kind == "probability" and "brier" in asked
    softmax = None
    if looks_again:
        softmax = torch.empty((call.row_count, 5), dtype=torch.float64, device=dummy.device)

    def place(tensor: torch.Tensor | None) -> torch.Tensor:
        return dummy if tensor is None else tensor

    shared = {
        **arguments.options(call),
        "loss_ptr": results.loss,
        "saved_ptr": place(results.rows),
        "sums_ptr": place(results.sums),
        "lse_ptr": dummy if found is None else place(found.lse),
        "entropy_ptr": dummy if found is None else place(found.entropy),
        "prediction_ptr": dummy if found is None else place(found.prediction),
        "correct_ptr": dummy if found is None else place(_bytes(found.correct)),
        "valid_ptr": dummy if found is None else place(_bytes(found.valid)),
        "top_probability_ptr": dummy if found is None else place(found.top_probability),
        "brier_ptr": dummy if found is None else place(found.brier),
        "rank_ptr": dummy if found is None else place(found.rank),
        "softmax_ptr": place(softmax),
        "of_lse_ptr": place(of_lse),
        "of_entropy_ptr": place(of_entropy),
        "rows": call.row_count,
        "z_loss": problem.options.z_loss,
        "FORM": arguments.form(
            call,
            PENALTY=problem.options.z_loss > 0.0,
            REDUCED=results.sums is not None,
            KEEP=results.rows is not None,
            STATS=found is not None,
            LSE="lse" in asked,
            ENTROPY="entropy" in asked,
            PREDICTION="prediction" in asked,
            CORRECT="correct" in asked,
            TOP="top_probability" in asked,
            BRIER="brier" in asked,
            RANK="rank" in asked,
            **_of_stats(problem),
        ),
    }
    shared["parts_ptr"] = dummy
    if parts > 1:
        fields = _FIELDS_OF_A_PART[problem.kind == "teacher"]
        size = (fields, parts, call.row_count)
        shared["parts_ptr"] = torch.empty(size, dtype=torch.float64, device=dummy.device)
    read = {
        **shared,
        **arguments.named("t", call.target_rows),
        **arguments.vectors(call),
        "chunk": chunk,
        "SPLIT": parts > 1,
    }
    launches = [Launch("forward", (programs, parts), read, call.tile.warps)]
    if parts > 1:
        joined = {**shared, "classes": classes, "parts": parts}
        launches.append(Launch("join", (programs,), joined, 1))
    if looks_again:
        names = ("x_ptr", "target_ptr", "softmax_ptr", "brier_ptr", "inner", "blocks")
        again = {name: shared[name] for name in (*names, "scale", "cap", "FORM", "LANES")}
        again |= {**arguments.named("x", call.rows), **arguments.named("t", call.target_rows)}
        again |= {"classes": classes, "TILE": call.tile.classes}
        launches.append(Launch("distance", (programs,), again, call.tile.warps))
    if results.sums is not None:
        normalizer = results.normalizer
        is_number = isinstance(normalizer, float)
        given = "none" if normalizer is None else "number" if is_number else "tensor"
        launches.append(
            Launch(
                "reduce",
                (1,),
                {
                    "sums_ptr": results.sums,
                    "result_ptr": results.loss,
                    "denominator_ptr": place(results.denominator),
                    "normalizer_ptr": dummy if is_number or normalizer is None else normalizer,
                    "programs": programs,
                    "normalizer": normalizer if is_number else 1.0,
                    "MEAN": problem.options.reduction == "mean",
                    "NORMALIZER": given,
                    "TILE": layout.SUMS,
                    "EMULATED": arguments.EMULATED,
                },
                4,
            )
        )
    return launches


def _of_stats(problem: Problem) -> dict[str, bool]:
    """Return which stats have cotangents, for the form of a kernel."""
    return {f"OF_{name.upper()}": name in problem.grad_stats for name in ("lse", "entropy")}


def _by_row(cotangent: torch.Tensor | None) -> torch.Tensor | None:
    return None if cotangent is None else arguments.plain(cotangent).contiguous()


def _bytes(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.view(torch.uint8)


def backward(
    call: KernelCall,
    saved: torch.Tensor,
    denominator: torch.Tensor,
    cotangent: Any,
    grad: torch.Tensor,
) -> list[Launch]:
    """Plan the launches that read the logits once more and write the gradient once."""
    problem, cotangent = call.problem, arguments.plain(cotangent)
    wanted = cdiv(layout.WRITERS, call.programs)
    parts, chunk = cut(problem.classes, call.tile.classes, wanted)
    by_row = any(
        step for step, size in zip(cotangent.stride(), cotangent.shape, strict=True) if size > 1
    )
    given = {
        **arguments.options(call),
        **arguments.vectors(call, grad),
        **arguments.named("t", call.target_rows),
        **arguments.named("g", call.grad_rows),
        "saved_ptr": saved,
        "denominator_ptr": denominator,
        "cotangent_ptr": cotangent.contiguous() if by_row else cotangent,
        "grad_ptr": grad,
        "chunk": chunk,
        "FORM": arguments.form(call, **_of_stats(problem)),
        "MEAN": problem.options.reduction == "mean",
        "BY_ROW": by_row,
    }
    whole = Launch("backward", (call.programs, parts), given, call.tile.warps)
    if not problem.entries:
        return [whole]
    before, behind = _of_entries(call, given)
    return [before, whole, behind]


def _of_entries(call: KernelCall, given: dict[str, Any]) -> tuple[Launch, Launch]:
    """Plan the launches that compute, and that put in its place, the gradient at the entries."""
    count = call.row_count * call.problem.entries
    grad = given["grad_ptr"]
    alone = {
        **given,
        "found_ptr": torch.empty(count, dtype=grad.dtype, device=grad.device),
        "classes": call.problem.classes,
        "rows": call.row_count,
        "TILE": layout.ENTRIES_ALONE,
    }

    def launch(name: str) -> Launch:
        taken = {name: alone[name] for name in getattr(kernels, name).arg_names}
        return Launch(name, (cdiv(count, layout.ENTRIES_ALONE),), taken, 4)

    return launch("at_entries"), launch("put_entries")
