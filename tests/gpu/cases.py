"""What is compared with float64 on a GPU (dtypes, classes, layouts, options), and how much of it.

In a `Case` losses are not reduced and each row has a cotangent of its own, so that any row can be
checked alone. Of large arrays only a few rows are, the first and the last ones among them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

IGNORED = -100
DTYPES = ("float16", "bfloat16", "float32", "float64")
# Words that `Case.options` may hold, in the combinations that are tried.
OPTIONS = (
    ("ignore",),
    ("weight",),
    ("smoothing",),
    ("ignore", "weight", "smoothing"),
    ("probabilities",),
    ("probabilities", "weight", "smoothing"),
)
LAYOUTS = ("misaligned", "row-strided", "column-major", "every second")


class Case(NamedTuple):
    """One call."""

    dims: tuple[int, ...]
    dtype: str
    target: str = "int64"
    layout: str = "plain"
    options: tuple[str, ...] = ()
    scales: bool = False
    """Whether there may be fewer rows if memory is short."""

    @property
    def name(self) -> str:
        """The full name of the case."""
        dims = "x".join(map(str, self.dims))
        return ", ".join((dims, self.dtype, self.target, self.layout, *self.options))


class Size(NamedTuple):
    """How much is compared."""

    classes: tuple[int, ...]
    few_classes: tuple[int, ...]
    """The numbers of classes for the layouts and the options."""
    few_dtypes: tuple[str, ...]
    """The dtypes for them."""
    elements: int
    """How many logits a case has that is not meant to be large."""
    checked: int
    """How many logits are compared."""
    images: tuple[tuple[int, ...], ...]
    long_rows: tuple[tuple[int, int], ...]
    many_rows: tuple[tuple[int, int], ...]
    large: tuple[tuple[int, ...], ...]
    """Shapes of a mean over all rows, as large as those that are timed."""
    dims: tuple[int, int]
    """The shape of the logits in the tests of behaviour."""
    repeats: int
    """How often a call must repeat its result."""


FULL = Size(
    classes=(1, 2, 10, 1000, 4096, 32000, 32001, 50257, 128256, 262144),
    few_classes=(10, 1000, 50257, 128256),
    few_dtypes=DTYPES,
    elements=2**21,
    checked=2**21,
    images=((8, 19, 1024, 2048), (16, 21, 512, 512)),
    long_rows=((1, 262144), (1, 1_000_003), (3, 2**22)),
    many_rows=((2**22, 2), (2**20, 10), (2**17, 1000)),
    large=(
        (1_048_576, 2),
        (65536, 10),
        (4096, 1000),
        (8192, 4096),
        (4096, 32000),
        (4096, 50257),
        (4096, 128256),
        (2048, 262144),
        (8, 128256),
        (16, 21, 512, 512),
        (8, 19, 1024, 2048),
    ),
    dims=(64, 128256),
    repeats=20,
)
REHEARSAL = Size(
    classes=(1, 10, 65),
    few_classes=(10, 65),
    few_dtypes=("bfloat16", "float32"),
    elements=200,
    checked=2**18,
    images=((2, 3, 2, 5),),
    long_rows=((1, 70001),),
    many_rows=((150, 2),),
    large=((4, 100), (1, 3, 2, 5)),
    dims=(4, 65),
    repeats=2,
)
REACH = 2**31
"""Offsets beyond this do not fit into 32 bits."""


def cases(size: Size) -> Iterator[Case]:
    """Yield the cases that fit in any machine's memory, some with fewer rows."""

    def rows(classes: int) -> tuple[int, int]:
        return max(3, min(4096, size.elements // classes)), classes

    for dtype in DTYPES:
        for classes, target in itertools.product(size.classes, ("int32", "int64")):
            yield Case(rows(classes), dtype, target)
    for dtype in size.few_dtypes:
        for classes in size.few_classes:
            for options in OPTIONS:
                yield Case(rows(classes), dtype, options=options)
            for layout in LAYOUTS:
                yield Case(rows(classes), dtype, layout=layout)
                yield Case(rows(classes), dtype, layout=layout, options=("in place",))
            yield Case(rows(classes), dtype, options=("in place",))
            both = ("probabilities", "weight", "smoothing", "in place")
            yield Case(rows(classes), dtype, options=both)
        for dims, layout in itertools.product(size.images, ("plain", "channels last")):
            yield Case(dims, dtype, layout=layout, scales=True)
            yield Case(dims, dtype, layout=layout, options=("ignore", "weight"), scales=True)
        for dims in size.long_rows:
            yield Case(dims, dtype)
            yield Case(dims, dtype, options=("probabilities", "smoothing"))
        for dims in size.many_rows:
            yield Case(dims, dtype, scales=True)


def beyond_32_bits() -> Iterator[Case]:
    """Yield cases whose end is beyond the reach of 32-bit offsets."""
    for classes in (50257, 65536):
        yield Case((REACH // classes + 5, classes), "bfloat16")
    yield Case((REACH // (19 * 2**21) + 1, 19, 1024, 2048), "bfloat16")
    yield Case((2, 5001), "bfloat16", layout="rows far apart")


def small_set() -> Iterator[Case]:
    """Yield a case for every kernel and every layout of programs, for a memory checker to watch."""
    for dtype in ("bfloat16", "float32"):
        for dims, layout in (
            ((5, 7), "plain"),  # rows that share a program
            ((3, 1000), "plain"),  # 16-byte loads from the start
            ((3, 1001), "misaligned"),  # 16-byte loads after the first classes
            ((150, 33), "column-major"),  # neighbouring rows
            ((1, 70001), "plain"),  # a row for several programs
        ):
            for options in ((), ("probabilities", "weight", "smoothing"), ("in place",)):
                yield Case(dims, dtype, "int64", layout, options)


def large_cases(size: Size) -> Iterator[Case]:
    """Yield cases with plain labels and logits as large as those that are timed."""
    for dims in size.large:
        for dtype in ("bfloat16", "float32", "float16"):
            for layout in ("plain", "channels last") if len(dims) > 2 else ("plain",):
                yield Case(dims, dtype, layout=layout, scales=True)
