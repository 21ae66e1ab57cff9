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
import triton.language as tl
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from polyce.call.problem import Operands, Problem
from polyce.formula import labels, transform
from polyce.formula.stats import Stats
from polyce.implementations.strides import Rows, cdiv, cut, rows_of
from polyce.implementations.triton import kernels, layout, records
from polyce.implementations.triton.layout import Tile

_FIELDS_OF_A_PART = 12

# Whether Triton was imported under TRITON_INTERPRET=1, and runs kernels in NumPy.
EMULATED = not isinstance(kernels.forward, JITFunction)


class Results(NamedTuple):
    """Where a forward pass writes, and what a mean is divided by; None for what is not wanted."""

    loss: torch.Tensor
    stats: Stats | None
    rows: torch.Tensor | None
    """(rows, 4): largest logit besides the pivot's, factor, the pivot's gradient and class.

    (rows, 9) with cotangents of stats: then also what they add.
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
        if EMULATED:
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


class KernelCall(NamedTuple):
    """One call, laid out for the kernels."""

    problem: Problem
    logits: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor | None
    sample_weight: torch.Tensor | None
    rows: Rows
    target_rows: Rows | None
    """How probabilities lie; None for labels."""
    grad_rows: Rows | None
    """How the gradient lies; None if there is none, or if no kernel can write it."""

    @property
    def tile(self) -> Tile:
        """Return what a program reads at once."""
        shares = layout.SHARES[self.logits.element_size()]
        share = shares[transform.is_capped(self.problem)]
        return layout.tile(self.rows, self.problem.classes, share)

    @property
    def blocks(self) -> int:
        """Return the number of programs for each outer index."""
        return cdiv(self.rows.inner, self.tile.lanes)

    @property
    def programs(self) -> int:
        """Return the number of programs for all rows."""
        return self.rows.outer * self.blocks

    @property
    def row_count(self) -> int:
        """Return the number of rows."""
        return self.rows.outer * self.rows.inner


def call(problem: Problem, operands: Operands, grad: torch.Tensor | None = None) -> KernelCall:
    """Lay out a call; copy the arrays whose layout the kernels cannot read."""
    logits, target, weight, sample_weight, *_ = operands
    arrays = [_plain(logits)]
    if problem.kind == "index":
        target = _labels(problem, target.detach(), check=grad is None)
    else:
        arrays.append(_plain(target))
    given = [] if grad is None else [grad.stride()]

    def lay_out() -> tuple[Rows | None, ...]:
        strides = (array.stride() for array in arrays)
        return rows_of(problem.shape, problem.axis, *strides, *given)

    laid = lay_out()
    if None in laid[: len(arrays)]:
        arrays = [a if rows else a.contiguous() for a, rows in zip(arrays, laid, strict=False)]
        laid = lay_out()
    rows: Any = laid[0]
    if weight is not None:
        weight = _plain(weight).to(problem.arithmetic_dtype).contiguous()
    if sample_weight is not None:
        if not sample_weight.is_floating_point():
            sample_weight = sample_weight.to(problem.row_dtype)
        sample_weight = _plain(sample_weight).contiguous()
    return KernelCall(
        problem=problem,
        logits=arrays[0],
        target=target if problem.kind == "index" else arrays[1],
        weight=weight,
        sample_weight=sample_weight,
        rows=rows,
        target_rows=None if problem.kind == "index" else laid[1],
        grad_rows=laid[-1] if given else None,
    )


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def _labels(problem: Problem, target: torch.Tensor, *, check: bool) -> torch.Tensor:
    """Return one label for each row, contiguous; check them if the problem asks for it too."""
    if check and problem.check_labels:
        labels.read(problem, target, target)
    if problem.target_dtype in ("uint16", "uint32", "uint64"):
        target = target.to(torch.int64)
    return target.reshape(problem.row_shape).contiguous()


def _options(call: KernelCall) -> dict[str, Any]:
    """Return the arguments that all kernels of rows have."""
    problem = call.problem
    scale, cap = transform.scale_and_cap(problem)
    return {
        "x_ptr": call.logits,
        "target_ptr": call.target,
        "weight_ptr": call.logits if call.weight is None else call.weight,
        "sample_ptr": call.logits if call.sample_weight is None else call.sample_weight,
        "inner": call.rows.inner,
        "blocks": call.blocks,
        **_named("x", call.rows),
        "ignore_index": _ignored(problem) or 0,
        "kept": 1.0 - problem.options.label_smoothing,
        "share": problem.options.label_smoothing / problem.classes,
        "scale": scale,
        "cap": cap,
        "LANES": call.tile.lanes,
    }


def _ignored(problem: Problem) -> int | None:
    return labels.ignored_as_signed(problem) if problem.kind == "index" else None


def _form(call: KernelCall, **asked: bool) -> records.Form:
    """Return what the kernels are compiled for; `asked` is what a forward pass is asked for."""
    problem = call.problem
    scale, _ = transform.scale_and_cap(problem)
    form = "none" if scale == 1.0 else "scale"
    given = records.Form(
        TRANSFORM="softcap" if transform.is_capped(problem) else form,
        DTYPE=tl.float64 if problem.arithmetic_dtype == torch.float64 else tl.float32,
        PROBABILITY=problem.kind == "probability",
        WEIGHTED=call.weight is not None,
        SAMPLED=call.sample_weight is not None,
        SMOOTHED=problem.options.label_smoothing > 0.0,
        IGNORES=_ignored(problem) is not None,
        EMULATED=EMULATED,
        **asked,
    )
    return records.completed(given)


def _named(name: str, rows: Rows | None) -> dict[str, int]:
    """Return the strides of an array's rows as arguments, 0 for an absent one."""
    places = (f"{name}_outer", f"{name}_lane", f"{name}_class")
    return dict(zip(places, (0, 0, 0) if rows is None else rows.strides, strict=True))


def _vectors(call: KernelCall, grad: torch.Tensor | None = None) -> dict[str, Any]:
    """Return how to load and store 16 bytes at once: rows are aligned, or their ends are peeled."""
    classes, strides = call.problem.classes, call.rows.strides
    outer, lane, step = strides
    size = call.logits.element_size()
    vector, address = 16 // size, call.logits.data_ptr()
    whole = step == 1 and not (address % 16 or classes % vector or outer % vector or lane % vector)
    peeled = step == 1 and not whole and call.tile.lanes == 1 and classes > layout.SHORT

    def in_step(other: torch.Tensor, rows: Rows | None) -> bool:
        """Tell whether another array's rows are aligned wherever the logits' are."""
        return (
            (whole or peeled)
            and rows is not None
            and rows.strides[2] == 1
            and other.element_size() == size
            and (other.data_ptr() - address) % 16 == 0
            and all((a - b) % vector == 0 for a, b in zip(rows.strides, strides, strict=True))
        )

    vectors = {
        "units": classes // vector if whole else classes,
        "lead": address % 16 // size,
        "UNIT": vector if whole else 1,
        "VECTOR": vector,
        "PEEL": peeled,
        "IN_STEP": in_step(call.target, call.target_rows),
        "TILE": call.tile.classes,
    }
    if grad is not None:
        vectors["GRAD_IN_STEP"] = in_step(grad, call.grad_rows)
    return vectors


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
        **_options(call),
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
        "FORM": _form(
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
        size = (_FIELDS_OF_A_PART, parts, call.row_count)
        shared["parts_ptr"] = torch.empty(size, dtype=torch.float64, device=dummy.device)
    read = {
        **shared,
        **_named("t", call.target_rows),
        **_vectors(call),
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
        again |= {**_named("x", call.rows), **_named("t", call.target_rows)}
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
                    "EMULATED": EMULATED,
                },
                4,
            )
        )
    return launches


def _of_stats(problem: Problem) -> dict[str, bool]:
    """Return which stats have cotangents, for the form of a kernel."""
    return {f"OF_{name.upper()}": name in problem.grad_stats for name in ("lse", "entropy")}


def _by_row(cotangent: torch.Tensor | None) -> torch.Tensor | None:
    return None if cotangent is None else _plain(cotangent).contiguous()


def _bytes(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.view(torch.uint8)


def backward(
    call: KernelCall,
    saved: torch.Tensor,
    denominator: torch.Tensor,
    cotangent: Any,
    grad: torch.Tensor,
) -> list[Launch]:
    """Plan the launch that reads the logits once more and writes the gradient once."""
    problem, cotangent = call.problem, _plain(cotangent)
    wanted = cdiv(layout.WRITERS, call.programs)
    parts, chunk = cut(problem.classes, call.tile.classes, wanted)
    by_row = any(
        step for step, size in zip(cotangent.stride(), cotangent.shape, strict=True) if size > 1
    )
    arguments = {
        **_options(call),
        **_vectors(call, grad),
        **_named("t", call.target_rows),
        **_named("g", call.grad_rows),
        "saved_ptr": saved,
        "denominator_ptr": denominator,
        "cotangent_ptr": cotangent.contiguous() if by_row else cotangent,
        "grad_ptr": grad,
        "chunk": chunk,
        "FORM": _form(call, **_of_stats(problem)),
        "MEAN": problem.options.reduction == "mean",
        "BY_ROW": by_row,
    }
    return [Launch("backward", (call.programs, parts), arguments, call.tile.warps)]
