"""How the cupy kernels are launched, from the problem and the arrays' layouts: no array is touched.

A module holds one kernel for one combination of the macros that `cuda/numbers.cu` lists, so only
what runs is compiled. There are few: the dtypes of logits and target, and whether there is
smoothing, a softcap, stats, which stats and gradients of them, and a contiguous class axis. A
kernel reads everything else when it runs. CuPy keeps what it has compiled, in memory and on disk.
"""

from __future__ import annotations

import importlib.resources
from typing import Any, NamedTuple

import numpy as np

from polyce.arrays import dtypes
from polyce.call.options import BESIDE_TARGET
from polyce.call.problem import Problem
from polyce.formula import labels, rowstate, targets, transform
from polyce.implementations.strides import Rows, cdiv, cut, power_of_two, rows_of

FILES = (
    *("numbers.cu", "row.cu", "outcome.cu", "classes.cu", "gradient.cu", "blocks.cu", "entries.cu"),
    *("kernels.cu", "parts.cu"),
)
KERNELS = ("forward", "join", "reduce", "weigh", "forward_backward", "backward")
# Of a part of the classes.
PART_KERNELS = ("state_of_part", "gradient_of_part")
# The numbers by which the CUDA sources know these dtypes; their names there are in capitals.
KINDS: dict[str | None, int] = {
    name: number for number, name in enumerate((*dtypes.FLOATS, *dtypes.INTEGERS), start=1)
}

# The launch parameters; none has been tuned on a GPU yet.
#
# The threads of a block: with 48 registers each, five blocks share a multiprocessor.
BLOCK = 256
# Blocks of a grid: enough to fill a large device twice. The same on every device, so that the bits
# of a sum are too.
MOST_BLOCKS = 2048
# Rows of this many contiguous classes or more are read up to 16 bytes at once.
VECTORS = 64
# Classes that a thread should have before another thread shares its row.
PER_THREAD = 4
# Neighbouring rows that a block takes together where the classes are not contiguous: a whole
# cache line in 16 bits. It takes more, down to one thread for a row, as long as that leaves so many
# blocks, twice what fills a large device: the threads of a row have much to do besides its classes.
NEIGHBOURS, FILLING = 64, 1024
# Rows of more than LONG classes are split over blocks where there are too few rows to fill a
# device; a part is long enough to be worth a merge.
LONG, FEW_ROWS, PART = 16384, 256, 8192
MOST_PARTS = 64
# Each block that adds up row weights takes at least WEIGHED of them.
WEIGHED = 2048
MOST_WEIGHING = 256


_text: list[str] = []


def source() -> str:
    """Return the text of the kernels, read on the first call."""
    if not _text:
        folder = importlib.resources.files("polyce.implementations.cupy") / "cuda"
        # Compilers then report errors by file and line.
        parts = ((name, (folder / name).read_text(encoding="utf-8")) for name in FILES)
        _text.append("\n".join(f'#line 1 "{name}"\n{text}' for name, text in parts))
    return _text[0]


class Layout(NamedTuple):
    """How an array lies in memory."""

    strides: tuple[int, ...]
    """In bytes."""
    address: int
    """Bytes beyond a boundary of 16."""
    itemsize: int


class PartKey(NamedTuple):
    """Which of the rows' classes the arrays hold."""

    start: int
    width: int
    valued: bool
    """Whether the gradient is also that of lse or entropy."""


class LaunchKey(NamedTuple):
    """All that a launch plan depends on besides the problem; None for what is absent."""

    logits: Layout
    probabilities: Layout | None
    grad: Layout | None
    sample: str | None
    """The dtype of the sample weights."""
    normalizer: str | None
    """The dtype of an array to divide by, or "number"."""
    cotangent: str | None
    """The dtype of an array of cotangents."""
    cotangent_by_row: bool
    part: PartKey | None = None


class LaunchPlan(NamedTuple):
    """How a call is launched."""

    call: np.ndarray[Any, Any]
    """`struct Call`, as the kernels take it."""
    options: dict[str, tuple[str, ...]]
    """What each kernel is compiled with."""
    block: int
    """The threads of a block."""
    blocks: int
    parts: int
    """Blocks for each row, where rows are split."""
    rows: int
    weighing: int
    """Blocks that add up row weights."""
    copies: tuple[bool, bool, bool]
    """Whether logits, probabilities and gradient have a layout that the kernels cannot read."""


def plan(problem: Problem, key: LaunchKey) -> LaunchPlan:
    """Plan the launches of a call."""
    given = [key.logits, key.probabilities, key.grad]
    part, axis = key.part, problem.axis
    width = problem.classes if part is None else part.width
    shape = (*problem.shape[:axis], width, *problem.shape[axis + 1 :])
    laid = iter(rows_of(shape, axis, *(_steps(shape, one) for one in given if one is not None)))
    rows = [None if one is None else next(laid) for one in given]
    copies = tuple(a is not None and b is None for a, b in zip(given, rows, strict=True))
    x = rows[0] or Rows(1, 1, (0, 0, 0))
    threads = _threads(problem, width, x, rows[1:], key.logits.itemsize)
    if part is not None:
        threads = threads._replace(parts=1, chunk=width)
    real = dtypes.name_of(problem.arithmetic_dtype)
    scale, cap = transform.scale_and_cap(problem)
    ignored = labels.ignored_as_signed(problem) if problem.names_classes else None
    count = x.outer * x.inner
    weighing = min(MOST_WEIGHING, cdiv(count, WEIGHED))
    mean = 0
    if problem.options.reduction == "mean":
        # BY_WEIGHTS, BY_NUMBER or BY_ARRAY in the CUDA sources.
        mean = {None: 1, "number": 2}.get(key.normalizer, 3)
    call = np.zeros(1, _CALL[real] if part is None else _PART_CALL[real])
    if part is not None:
        call["start"], call["all_classes"] = part.start, problem.classes
    for name, value in {
        "outer": x.outer,
        "inner": x.inner,
        "classes": width,
        "x": x.strides,
        "t": rows[1].strides if rows[1] else 0,
        "g": rows[2].strides if rows[2] else 0,
        "blocks": cdiv(x.inner, threads.lanes),
        "lanes": threads.lanes,
        "team": _block(problem) // threads.lanes,
        "across": threads.across,
        "parts": threads.parts,
        "chunk": threads.chunk,
        "weighed": weighing,
        "t_in_step": _in_step(threads.width, key.logits, x, key.probabilities, rows[1]),
        "g_in_step": _in_step(threads.width, key.logits, x, key.grad, rows[2]),
        "ignores": ignored is not None,
        "ignore_index": ignored or 0,
        "mean": mean,
        "loss_kind": KINDS[dtypes.name_of(problem.result_dtype)],
        "sample_kind": KINDS.get(key.sample, 0),
        "normalizer_kind": KINDS.get(key.normalizer, 0),
        "cotangent_kind": KINDS.get(key.cotangent, 0),
        "cotangent_by_row": key.cotangent_by_row,
        "exact_scale": scale,
        "exact_cap": cap,
        "teacher_scale": problem.teacher_scale,
        "scale": scale,
        "cap": cap,
        "kept": 1.0 - problem.options.label_smoothing,
        "share": problem.options.label_smoothing / problem.classes,
        "z_loss": problem.options.z_loss,
    }.items():
        call[name] = value
    return LaunchPlan(
        call=call,
        options=_options(problem, real, threads.width, part),
        block=_block(problem),
        blocks=min(MOST_BLOCKS, x.outer * cdiv(x.inner, threads.lanes)),
        parts=threads.parts,
        rows=count,
        weighing=weighing,
        copies=(copies[0], copies[1], copies[2]),
    )


def check_address(address: int, itemsize: int, strides: tuple[int, ...] = ()) -> None:
    """Refuse a misaligned array: reading it on a GPU would end the process's CUDA context."""
    if address % itemsize or any(step % itemsize for step in strides):
        raise ValueError(
            "arrays on a GPU must lie at multiples of their item size, got items of "
            f"{itemsize} bytes, {address % itemsize} bytes behind such a place, with strides of "
            f"{strides} bytes; copy them in NumPy"
        )


def _steps(shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """Return strides in elements, 0 for axes of length 1."""
    pairs = zip(layout.strides, shape, strict=True)
    steps = tuple(step if size > 1 else 0 for step, size in pairs)
    check_address(layout.address, layout.itemsize, steps)
    return tuple(step // layout.itemsize for step in steps)


def _in_step(width: int, logits: Layout, x: Rows, other: Layout | None, rows: Rows | None) -> bool:
    """Tell whether another array is aligned to `width` of its elements wherever the logits are."""
    if other is None or rows is None or rows.strides[2] != 1:
        return False
    apart = [a - b for a, b in zip(rows.strides, x.strides, strict=True)]
    apart.append(other.address // other.itemsize - logits.address // logits.itemsize)
    return not any(steps % width for steps in apart)


class _Threads(NamedTuple):
    """How the threads of a block are assigned."""

    lanes: int
    across: bool
    width: int
    """How many numbers a thread loads at once."""
    parts: int
    chunk: int


def _block(problem: Problem) -> int:
    """Return how many threads a block has: half as many where its rows' states would not fit."""
    wide = dtypes.name_of(problem.arithmetic_dtype) == "float64"
    return BLOCK // 2 if wide and problem.kind == "teacher" else BLOCK


def _threads(
    problem: Problem, classes: int, x: Rows, others: list[Rows | None], itemsize: int
) -> _Threads:
    count, block = x.outer * x.inner, _block(problem)
    along = x.strides[2] == 1 or classes == 1
    width = 1
    if classes >= VECTORS and all(one is None or one.strides[2] == 1 for one in (x, *others)):
        # 16 bytes of logits, but for kernels that need the registers.
        probability = problem.kind in ("probability", "teacher")
        capped = transform.is_capped(problem)
        most = 4 if probability or capped else 8
        # On sm_80 the kernels for these would spill a register.
        halves = problem.logits_dtype_name == problem.target_dtype == "float16"
        if probability and (capped or halves or problem.options.stats is not None):
            most = 2
        if problem.kind == "teacher":
            most = 2
        width = min(16 // itemsize, most)
    team = min(block, power_of_two(cdiv(classes, max(PER_THREAD, 2 * width))))
    lanes = block // team
    if not along:
        lanes = max(lanes, min(NEIGHBOURS, block))
        while lanes < block and x.outer * cdiv(x.inner, 2 * lanes) >= FILLING:
            lanes *= 2
    lanes = min(lanes, power_of_two(x.inner))
    parts, chunk = 1, classes
    # What looks at a row again takes all of it.
    looks_again = problem.kind == "sparse" or (
        problem.kind == "probability" and problem.asks("brier")
    )
    if along and classes > LONG and count < FEW_ROWS and not looks_again:
        wanted = min(MOST_PARTS, classes // PART, cdiv(2 * FEW_ROWS, count))
        parts, chunk = cut(classes // width, block, wanted)
        lanes = 1
    return _Threads(lanes, not along, width, parts, chunk)


def _options(
    problem: Problem, real: str, width: int, part: PartKey | None
) -> dict[str, tuple[str, ...]]:
    target, smoothed = problem.target_dtype, problem.options.label_smoothing > 0.0
    of_rows = {
        "REAL": real.upper(),
        "TARGET": target.upper(),
        "SPREAD": int(problem.kind != "index" or smoothed),
        "SPARSE": int(problem.kind == "sparse"),
        "TEACHER": int(problem.kind == "teacher"),
        "SMOOTHED": int(smoothed and problem.kind in ("sparse", "teacher")),
        "SOFTCAP": int(transform.is_capped(problem)),
        "STATS": int(problem.options.stats is not None),
        "BESIDE": int(problem.asks(*BESIDE_TARGET)),
        "VALUED": 0,
    }
    if part is not None:
        # The entropy alone takes another pivot than the label. The gradient then goes by what has
        # joined, the label's coefficient included.
        stats, leads = problem.asks("entropy"), targets.pivot_leads(problem)
        state = {
            **of_rows,
            "LOGITS": problem.logits_dtype_name.upper(),
            "WIDTH": width,
            "STATS": int(stats),
            "BESIDE": int(rowstate.needs_squares(problem)),
            "FIRST": int(not leads and problem.asks("prediction", "correct")),
        }
        valued = part.valued or (leads and problem.kind == "index")
        gradient = {
            **state,
            "BESIDE": 0,
            "FIRST": 0,
            "VALUED": int(valued),
            "SPREAD": int(leads or smoothed),
        }
        return _texts(problem, dict(zip(PART_KERNELS, (state, gradient), strict=True)))
    names = ("SOFTCAP", "SPARSE", "TEACHER", "SMOOTHED", "STATS", "BESIDE", "VALUED")
    off = dict.fromkeys(names, 0)
    plain = {**off, "LOGITS": real.upper(), "SPREAD": 1, "WIDTH": 1}
    macros: dict[str, dict[str, Any]] = {
        "reduce": {**plain, "REAL": real.upper(), "TARGET": "FLOAT32"},
        "weigh": {
            **plain,
            "REAL": real.upper(),
            "TARGET": target.upper(),
            "SPARSE": of_rows["SPARSE"],
        },
        "join": {**of_rows, "LOGITS": real.upper(), "WIDTH": 1},
    }
    reading = {**of_rows, "LOGITS": problem.logits_dtype_name.upper(), "WIDTH": width}
    writing = {**reading, "VALUED": int(bool(problem.grad_stats))}
    macros |= {"forward": reading, "forward_backward": writing, "backward": writing}
    return _texts(problem, {name: macros[name] for name in KERNELS})


def _texts(problem: Problem, macros: dict[str, dict[str, Any]]) -> dict[str, tuple[str, ...]]:
    return {
        name: (
            "--std=c++17",
            f"-DKERNEL={name.upper()}",
            f"-DBLOCK={_block(problem)}",
            *(f"-D{macro}={value}" for macro, value in sorted(own.items())),
        )
        for name, own in macros.items()
    }


def _call_dtype(real: str, *, part: bool) -> np.dtype[Any]:
    """Return the dtype of `struct Call` in `cuda/row.cu`."""
    whole = "outer inner classes x*3 t*3 g*3 blocks lanes team across parts chunk weighed t_in_step"
    whole += " g_in_step ignores ignore_index mean loss_kind sample_kind normalizer_kind"
    whole += " cotangent_kind cotangent_by_row"
    fields: list[Any] = []
    for name in whole.split():
        base, _, times = name.partition("*")
        fields.append((base, np.int64, (int(times),)) if times else (base, np.int64))
    fields += [(name, np.float64) for name in ("exact_scale", "exact_cap", "teacher_scale")]
    fields += [(name, real) for name in ("scale", "cap", "kept", "share", "z_loss")]
    if part:
        fields += [("start", np.int64), ("all_classes", np.int64)]
    return np.dtype(fields, align=True)


_CALL, _PART_CALL = (
    {real: _call_dtype(real, part=part) for real in ("float32", "float64")}
    for part in (False, True)
)
