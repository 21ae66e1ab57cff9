"""How many rows of logits exist at a time, and how many classes are multiplied at once.

The model: a chunk of n rows costs three products of n by F by C, and each reads or writes the whole
weight, C by F, or its gradient. With few rows the processor waits for the weight; many rows take
memory. So n is what a budget of bytes allows: one that was measured for CPUs, and one that keeps
products efficient on GPUs. The chunks of a call are then made as equal as possible.

Within a chunk the classes are taken in blocks, small enough that a block of the weight is still in
a cache when it is used again: for the product with the gradient, then for the next chunk's logits.
Each block also reads and writes the sums of the hidden states' gradient. Where a GPU's cache does
not hold those of a chunk, that costs more than the cache saves, and the blocks are large.

In torch on a CPU, the logits of few rows of a wide head are stored class by class: MKL multiplies a
tall matrix by a narrow one faster than the reverse, which saves more than the loss then loses.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

from polyce.arrays import dtypes
from polyce.call.problem import Problem


@dataclass(frozen=True)
class Limits:
    """The best sizes for a kind of device."""

    bytes: int
    """Of a chunk's logits, and of a teacher's beside them."""
    fewest: int
    """Rows of a chunk at least, whatever memory they take."""
    most: int
    multiple: int
    """What the rows are a multiple of, so that no tile of a product is half empty."""
    block_bytes: int
    """Of a block's weight and its logits in a chunk, as a cache holds them."""
    large_block_bytes: int
    """The same where no cache holds a chunk's gradient of the hidden states."""


CPU = Limits(
    bytes=48 << 20, fewest=16, most=4096, multiple=16,
    block_bytes=4 << 20, large_block_bytes=4 << 20,
)  # fmt: skip
# Data centres' GPUs have a second cache of 40 MB or more.
ACCELERATOR = Limits(
    bytes=512 << 20, fewest=2048, most=8192, multiple=128,
    block_bytes=32 << 20, large_block_bytes=128 << 20,
)  # fmt: skip

# With fewer rows of a chunk on a CPU, reading the weight takes longer than computing with it.
FEW_ROWS = 128
# From this many features on, faster products of few rows make up for their slower loss.
WIDE = 512
_CLASSES = 64


@dataclass(frozen=True)
class Chunks:
    """How a call is cut."""

    total: int
    """Rows of the call."""
    rows: int
    """Rows of a chunk; the last one may have fewer."""
    classes: int
    """Classes of a block."""
    by_class: bool = False
    """Whether a chunk's logits lie class by class, not row by row."""

    @property
    def count(self) -> int:
        """Return the number of chunks."""
        return -(-self.total // self.rows) if self.total else 0

    def spans(self, total: int | None = None) -> list[slice]:
        """Return the rows of each chunk, of `total` rows if that is given."""
        total = self.total if total is None else total
        return [slice(i, min(i + self.rows, total)) for i in range(0, total, self.rows)]

    def blocks(self, classes: int) -> list[slice]:
        """Return the classes of each block."""
        return [slice(i, min(i + self.classes, classes)) for i in range(0, classes, self.classes)]


def check_chunk_size(chunk_size: Any) -> int | None:
    """Refuse a chunk_size that is not a number of rows."""
    if chunk_size is None:
        return None
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, numbers.Integral):
        raise TypeError(
            f"chunk_size must be an integer, got {chunk_size!r}; pass a number of rows, or None "
            "for polyce to choose"
        )
    if chunk_size < 1:
        raise ValueError(
            f"chunk_size must be at least 1, got {chunk_size}; pass a number of rows, or None for "
            "polyce to choose"
        )
    return int(chunk_size)


def choose(problem: Problem, features: int, chunk_size: int | None) -> Chunks:
    """Choose the chunks of a call, from the caller's chunk size or else by the model."""
    if problem.library.is_lazy:
        # Lazy libraries cut for themselves, and may not know the number of rows yet.
        total = 0 if None in problem.row_shape else math.prod(problem.row_shape)
        return Chunks(total, max(total, 1), max(problem.classes, 1))
    total = math.prod(problem.row_shape)
    is_jax = problem.backend == "jax"
    if is_jax and not isinstance(total, int):
        # An export with symbolic rows cannot loop over a number of chunks that may be 0.
        return Chunks(total, total, max(problem.classes, 1))
    limits = limits_of(problem)
    itemsize = _itemsize(problem.logits_dtype)
    rows = chunk_size
    if rows is None:
        fits = limits.bytes // max(_row_bytes(problem), 1)
        rows = min(max(_down(fits, limits.multiple), limits.fewest), limits.most)
        count = max(-(-total // rows), 1)
        rows = min(_up(-(-total // count), limits.multiple), rows)
        if is_jax:
            rows = _without_rest(total, count) or rows
    rows = max(min(rows, total), 1)
    # Sums of 16-bit products have 32 bits. They are read and written.
    of_hidden = 2 * rows * features * max(itemsize, 4)
    is_cached = of_hidden <= limits.block_bytes
    block_bytes = limits.block_bytes if is_cached else limits.large_block_bytes
    classes = max(block_bytes // ((features + rows) * itemsize), 1)
    classes = max(min(_up(classes, _CLASSES), problem.classes), 1)
    is_few = limits is CPU and rows < FEW_ROWS
    by_class = is_few and problem.backend == "torch" and features >= WIDE and itemsize >= 4
    return Chunks(total, rows, classes, by_class)


def _without_rest(total: int, count: int) -> int:
    """Return the rows of equal chunks, `count` or a few more of them; 0 if there are none.

    XLA would keep extra memory for a smaller last chunk.
    """
    equal = (total // more for more in range(count, 2 * count + 1) if total % more == 0)
    return next(equal, 0)


def _itemsize(dtype: Any) -> int:
    return {"float64": 8, "float32": 4}.get(dtypes.name_of(dtype), 2)


def _row_bytes(problem: Problem) -> int:
    """Return the bytes of a row's logits, with those that a teacher's head computes beside them."""
    of_teacher = 0 if problem.teacher_dtype is None else _itemsize(problem.teacher_dtype)
    return problem.classes * (_itemsize(problem.logits_dtype) + of_teacher)


def limits_of(problem: Problem) -> Limits:
    """Return the limits of the device that a call will run on."""
    device = problem.device
    if device == "unknown":
        device = problem.library.default_device_kind()
    return CPU if device == "cpu" else ACCELERATOR


def summary(problem: Problem, cut: Chunks) -> str:
    """Describe how a call is cut, the memory it takes, and when all at once would be better."""
    if problem.backend == "dask":
        return "chunks within each of dask's blocks of rows"
    row = _row_bytes(problem) / 1e6
    many = "chunk" if cut.count == 1 else "chunks"
    return (
        f"{cut.count} {many} of {cut.rows} rows: {cut.rows * row:.0f} MB of logits at a time, not "
        f"{cut.total * row:.0f}; {advice(problem, cut)}"
    )


def advice(problem: Problem, cut: Chunks) -> str:
    """Describe when the loss of all logits at once would be better."""
    if cut.count <= 1:
        return "the loss of all logits at once takes as much memory and is as fast"
    if problem.options.reduction == "none":
        return (
            "a gradient of reduction 'none' computes them again; if all logits fit into memory, "
            "cross_entropy is faster"
        )
    fewest = FEW_ROWS if limits_of(problem) is CPU else ACCELERATOR.fewest
    if cut.rows < fewest:
        return (
            f"fewer than {fewest} rows take less time to compute than the weight to read; if all "
            "logits fit into memory, cross_entropy is faster"
        )
    return "products this large are about as fast as with all logits at once"


def _down(count: int, multiple: int) -> int:
    return count // multiple * multiple


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
