"""One call laid out for the triton kernels: its arrays as rows, and the arguments that say so."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from triton.runtime.jit import JITFunction

from polyce.call.problem import Operands, Problem
from polyce.formula import labels, transform
from polyce.implementations.strides import Rows, cdiv, rows_of
from polyce.implementations.triton import kernels, layout, records
from polyce.implementations.triton.layout import Tile

# Whether Triton was imported under TRITON_INTERPRET=1, and runs kernels in NumPy.
EMULATED = not isinstance(kernels.forward, JITFunction)


class Arrays(NamedTuple):
    """What the kernels of rows read."""

    logits: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor | None
    sample_weight: torch.Tensor | None
    chances: torch.Tensor | None
    """(rows, K), the probabilities of a sparse target, beside the target's (rows, K) classes."""


class Place(NamedTuple):
    """Where the classes of a call lie among those of whole rows."""

    start: int
    """The first of them."""
    classes: int
    """How many classes the whole rows have."""


class KernelCall(NamedTuple):
    """One call, laid out for the kernels."""

    problem: Problem
    arrays: Arrays
    rows: Rows
    target_rows: Rows | None
    """How probabilities or a teacher's logits lie; None for targets that name classes."""
    grad_rows: Rows | None
    """How the gradient lies; None if there is none, or if no kernel can write it."""
    place: Place | None = None
    """Where its classes lie, of a call that has some of them; None for one that has all."""
    is_whole: bool = False
    """Whether a program keeps whole rows, for loss and gradient in one pass."""

    @property
    def logits(self) -> torch.Tensor:
        """Return the logits."""
        return self.arrays.logits

    @property
    def tile(self) -> Tile:
        """Return what a program reads at once."""
        if self.is_whole and self._whole_tile is not None:
            return self._whole_tile
        return layout.tile(*self._laid, is_heavy=self.problem.kind == "teacher")

    @property
    def _whole_tile(self) -> Tile | None:
        is_capped = transform.is_capped(self.problem)
        return layout.whole_tile(*self._laid, is_heavy=is_capped)

    @property
    def _laid(self) -> tuple[Rows, int, int]:
        """Return what tiles depend on."""
        shares = layout.SHARES[self.logits.element_size()]
        is_heavy = self.problem.kind == "teacher" or transform.is_capped(self.problem)
        return self.rows, self.problem.classes, shares[is_heavy]

    @property
    def fits(self) -> bool:
        """Tell whether a program can keep whole rows, and write their gradient."""
        return self._whole_tile is not None and self.grad_rows is not None

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


def call(
    problem: Problem,
    operands: Operands,
    grad: torch.Tensor | None = None,
    place: Place | None = None,
    *,
    check: bool = True,
) -> KernelCall:
    """Lay out a call; copy the arrays whose layout the kernels cannot read.

    With `check`, look at the labels, if the problem asks for it.
    """
    logits, target, weight, sample_weight, *_ = operands
    arrays = [plain(logits)]
    if problem.names_classes:
        target = _labels(problem, target.detach(), check=check)
    else:
        arrays.append(plain(target))
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
        weight = plain(weight).to(problem.arithmetic_dtype).contiguous()
    if sample_weight is not None:
        if not sample_weight.is_floating_point():
            sample_weight = sample_weight.to(problem.row_dtype)
        sample_weight = plain(sample_weight).contiguous()
    return KernelCall(
        problem=problem,
        arrays=Arrays(
            logits=arrays[0],
            target=target if problem.names_classes else arrays[1],
            weight=weight,
            sample_weight=sample_weight,
            chances=_chances(problem, operands.target_probability),
        ),
        rows=rows,
        target_rows=None if problem.names_classes else laid[1],
        grad_rows=laid[-1] if given else None,
        place=place,
    )


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor without a graph, as it lies in memory."""
    tensor = tensor.detach()
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def _labels(problem: Problem, target: torch.Tensor, *, check: bool) -> torch.Tensor:
    """Return each row's label or entries, contiguous; check them if the problem asks for it too."""
    if check and problem.check_labels:
        labels.read(problem, target, target)
    if problem.target_dtype in ("uint16", "uint32", "uint64"):
        target = target.to(torch.int64)
    if problem.kind == "sparse":
        return _by_entry(problem, target)
    return target.reshape(problem.row_shape).contiguous()


def _chances(problem: Problem, probability: torch.Tensor | None) -> torch.Tensor | None:
    if probability is None:
        return None
    return _by_entry(problem, plain(probability).to(problem.arithmetic_dtype))


def _by_entry(problem: Problem, tensor: torch.Tensor) -> torch.Tensor:
    """Return the entries of one row after those of the other."""
    return tensor.movedim(problem.axis, -1).contiguous()


def options(call: KernelCall) -> dict[str, Any]:
    """Return the arguments that all kernels of rows have, besides the arrays."""
    problem = call.problem
    scale, cap = transform.scale_and_cap(problem)
    all_classes = problem.classes if call.place is None else call.place.classes
    return {
        "entries": problem.entries,
        "inner": call.rows.inner,
        "blocks": call.blocks,
        **named("x", call.rows),
        "ignore_index": _ignored(call) or 0,
        "kept": 1.0 - problem.options.label_smoothing,
        "share": problem.options.label_smoothing / all_classes,
        "scale": scale,
        "cap": cap,
        "teacher_scale": problem.teacher_scale,
        "LANES": call.tile.lanes,
    }


def read(arrays: Arrays) -> dict[str, Any]:
    """Return the arrays that all kernels of rows read, as arguments, without absent ones."""
    logits, target, weight, sample_weight, chances = arrays
    found = {"x_ptr": logits, "target_ptr": target}
    if weight is not None:
        found["weight_ptr"] = weight
    if sample_weight is not None:
        found["sample_ptr"] = sample_weight
    if chances is not None:
        found["chance_ptr"] = chances
    return found


def _ignored(call: KernelCall) -> int | None:
    """Return which class is ignored, as the target numbers them; None if none is."""
    problem, place = call.problem, call.place
    found = labels.ignored_as_signed(problem) if problem.names_classes else None
    if found is None or place is None:
        return found
    # Of a part, rows with an ignored label are those that do not count.
    return found - place.start if problem.kind == "sparse" else None


def form(call: KernelCall, **asked: bool) -> records.Form:
    """Return what the kernels are compiled for; `asked` is what a forward pass is asked for."""
    problem = call.problem
    scale, _ = transform.scale_and_cap(problem)
    change, lanes = "none" if scale == 1.0 else "scale", call.tile.lanes
    given = records.Form(
        TRANSFORM="softcap" if transform.is_capped(problem) else change,
        DTYPE=tl.float64 if problem.arithmetic_dtype == torch.float64 else tl.float32,
        PROBABILITY=not problem.names_classes,
        TEACHER=problem.kind == "teacher",
        TEMPERED=problem.teacher_scale != 1.0,
        ENTRIES=0
        if call.arrays.chances is None
        else layout.entries_at_once(problem.entries, lanes),
        WEIGHTED=call.arrays.weight is not None,
        SAMPLED=call.arrays.sample_weight is not None,
        SMOOTHED=problem.options.label_smoothing > 0.0,
        IGNORES=_ignored(call) is not None,
        EMULATED=EMULATED,
        PART=call.place is not None,
        **asked,
    )
    return records.completed(given)


def cotangent(given: Any) -> Any:
    """Return a cotangent as kernels read it: a number, one for all rows, or one after the other."""
    if not isinstance(given, torch.Tensor):
        return 1.0 if given is None else given
    given = plain(given)
    return given.contiguous() if is_by_row(given) else given


def is_by_row(cotangent: Any) -> bool:
    """Tell whether a cotangent has a number of its own for each row."""
    if not isinstance(cotangent, torch.Tensor):
        return False
    pairs = zip(cotangent.stride(), cotangent.shape, strict=True)
    return any(step for step, size in pairs if size > 1)


def named(name: str, rows: Rows | None) -> dict[str, int]:
    """Return the strides of an array's rows as arguments, 0 for an absent one."""
    places = (f"{name}_outer", f"{name}_lane", f"{name}_class")
    return dict(zip(places, (0, 0, 0) if rows is None else rows.strides, strict=True))


def vectors(call: KernelCall, grad: torch.Tensor | None = None) -> dict[str, Any]:
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

    found = {
        "units": classes // vector if whole else classes,
        "lead": address % 16 // size,
        "UNIT": vector if whole else 1,
        "VECTOR": vector,
        "PEEL": peeled,
        "IN_STEP": in_step(call.arrays.target, call.target_rows),
        "TILE": call.tile.classes,
        "BY_TWO": call.tile.by_two,
    }
    if grad is not None:
        found["GRAD_IN_STEP"] = in_step(grad, call.grad_rows)
    return found
