"""Calls on a linear head whose answers are known exactly.

Hidden states and weights are small integers times powers of two, such that the logits, and every
sum on the way to them, are exact in the dtype of the call. So `exact_answer` of these logits holds
for the head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from .case import Case
from .dtypes import FLOAT_NAMES, FORMATS, Array, Floats, dtype, missing
from .grid_draw import IGNORED, REDUCTIONS, draw_labels, draw_probabilities, draw_weight
from .tolerances import accuracy, grad_tolerance


@dataclass(frozen=True, eq=False)
class LinearCase:
    """One call of ``linear_cross_entropy_with_grad``, with its exact answer.

    Attributes
    ----------
    of_logits : Case
        The same call of ``cross_entropy_with_grad``, on the exact logits. Its layouts are those
        of input, linear_weight and target.
    input, linear_weight, linear_bias : ndarray
        Hidden states and head, in place of the logits. Rows of input that do not count may hold
        anything.
    chunk_size : int or None
        Rows at a time.
    teacher : tuple of ndarray
        Hidden states, weight and bias of a teacher's head, whose logits are the target of
        `of_logits`; empty for other targets.
    """

    of_logits: Case
    input: Array
    linear_weight: Array
    linear_bias: Array | None = None
    chunk_size: int | None = None
    teacher: tuple[Array, ...] = ()

    @property
    def name(self) -> str:
        """Return a readable identity, without spaces."""
        return self.of_logits.name

    @property
    def arrays(self) -> dict[str, Array]:
        """Return the arrays of the call by the names of their arguments, without absent ones.

        Those of a teacher's head are target, teacher_weight and teacher_bias.
        """
        head = {"linear_weight": self.linear_weight, "linear_bias": self.linear_bias}
        found = self.of_logits.arrays | {"input": self.input}
        found |= dict(zip(("target", "teacher_weight", "teacher_bias"), self.teacher, strict=False))
        return found | {name: array for name, array in head.items() if array is not None}

    @cached_property
    def factors(self) -> dict[str, tuple[Any, Any]]:
        """Return the two factors of each gradient: the logits' gradient and an exact array.

        Both have a first axis to sum over, of rows for the head and of classes for input. Rows of
        input that do not count are 0.
        """
        grad = self.of_logits.answer.grad.astype(np.longdouble)
        grad = grad.reshape(math.prod(grad.shape[:-1]), grad.shape[-1])
        valid = self.of_logits.answer.stats.valid[..., None]
        hidden = np.where(valid, self.input.astype(np.longdouble), 0)
        hidden = hidden.reshape(len(grad), self.input.shape[-1])
        found = {"input": (grad.T, self.linear_weight.astype(np.longdouble))}
        found["linear_weight"] = (grad, hidden)
        if self.linear_bias is not None:
            found["linear_bias"] = (grad, np.ones(len(grad), np.longdouble))
        return found

    @cached_property
    def gradients(self) -> dict[str, Floats]:
        """Return the exact gradients by the names of their arrays, rounded to float64."""
        products = {name: (grad.T @ other) for name, (grad, other) in self.factors.items()}
        return {
            name: product.reshape(self.arrays[name].shape).astype(np.float64)
            for name, product in products.items()
        }

    def tolerances(self, backend: str | None, product: str) -> dict[str, Floats]:
        """Return the largest error allowed in each entry of each gradient.

        An entry is a sum over K entries G of the logits' gradient, each times an exact number w.
        Allowed are

        - what `grad_tolerance` allows each G, times ``|w|``: for products of 16 bits this includes
          the rounding of G to these;
        - K + 2 unit roundoffs of the arithmetic times the sum of ``|G * w|``, for sums in any
          order: K - 1 additions, a product, and the answer's own rounding on both sides;
        - for products of 16 bits one unit roundoff of these times the same sum, since parts of the
          sum may be rounded before they are added up;
        - where the array is of 16 bits, half an ulp of the result.

        Parameters
        ----------
        backend : str or None
            Name of the array library.
        product : str
            Name of the dtype in which the gradient of the logits is multiplied.
        """
        result = self.input.dtype.name
        rule = accuracy(product, backend)
        allowed = grad_tolerance(self.of_logits.answer, product, rule).astype(np.longdouble)
        allowed = allowed.reshape(math.prod(allowed.shape[:-1]), allowed.shape[-1])
        unit = FORMATS[rule.arithmetic].unit
        narrow = FORMATS[product].unit if product != rule.arithmetic else 0.0
        found = {}
        for name, (grad, other) in self.factors.items():
            error = (allowed if name == "input" else allowed.T) @ abs(other)
            size = abs(np.nan_to_num(grad)).T @ abs(other)
            error = error + ((len(other) + 2) * unit + narrow) * size
            error = error.reshape(self.arrays[name].shape).astype(np.float64)
            if result != rule.arithmetic:
                want = np.nan_to_num(abs(self.gradients[name]))
                error = error + FORMATS[result].spacing(want + error) / 2
            found[name] = error
        return found


STEPS = {"bfloat16": 4, "float16": 8, "float32": 2**9, "float64": 2**20}
"""The largest integers drawn: a dozen products of two of them add up exactly."""
SIZES: tuple[tuple[tuple[int, ...], int, int, int | None], ...] = (
    ((5,), 6, 7, None),
    ((5,), 6, 7, 1),
    ((5,), 6, 7, 4),
    ((5,), 6, 7, 5),
    ((5,), 1, 7, 99),
    ((33,), 12, 33, 7),
    ((33,), 3, 130, 4),
    ((33,), 2, 130, None),
    ((1,), 4, 2, 1),
    ((1,), 7, 1, None),
    ((0,), 4, 7, None),
    ((0,), 4, 7, 3),
    ((5,), 0, 7, 2),
    ((5,), 4, 0, 2),
    ((2, 3), 6, 7, 4),
    ((2, 3), 6, 7, None),
    ((2, 3, 2), 5, 33, 5),
    ((2, 0), 4, 7, 1),
    ((), 6, 7, None),
    ((), 6, 7, 1),
)
"""Shape of the rows, features, classes, and rows at a time."""
SILENT = (0, 3)
"""Rows that an option leaves out: they hold infinities and nans."""
LABELS = np.array([IGNORED, 1, 6, IGNORED, 2])
UNCHECKED = np.array([1, -1, 6, 7, 2])
"""Labels of which some are no classes."""
ROW_WEIGHTS = (0.0, 2.0, 0.5, 0.0, -0.25)
"""Exact in every dtype, and so is their sum."""
MORE_KINDS = ("sparse", "teacher", "teacher-head")
"""Targets that are more than one array: a teacher with its logits, and with its head."""
EVERYTHING: dict[str, Any] = {
    "label_smoothing": 0.1, "z_loss": 0.01, "logit_scale": 0.7, "logit_softcap": 5.0
}  # fmt: skip
_FIELDS = (
    *("weight", "grad_output", "layout", "target_layout", "sample_weight", "normalizer"),
    *("grad_lse", "grad_entropy", "target_probability"),
)


def linear_cases(dtypes: Sequence[str] | None = None) -> list[LinearCase]:
    """Build the cases, always the same ones.

    Parameters
    ----------
    dtypes : sequence of str, optional
        Names of floating dtypes. All four by default, bfloat16 only where ml_dtypes is installed.

    Returns
    -------
    list of LinearCase
        Of groups "sizes" and "options". The exact answers are computed when they are asked for.
    """
    names = [n for n in FLOAT_NAMES if n not in missing()] if dtypes is None else list(dtypes)
    # float32 first, which has the most cases, as in `cases`.
    names.sort(key=lambda name: name != "float32")
    return [
        case for name in names for build in (_size_cases, _option_cases) for case in build(name)
    ]


def _size_cases(name: str) -> Iterator[LinearCase]:
    """Yield every size, with reductions and biases in turn; for most dtypes a third of them."""
    plain = list(product(SIZES, ("index", "probability")))
    more = [(size, MORE_KINDS[i // 3 % 3]) for i, size in enumerate(SIZES)]
    for i, ((rows, features, classes, chunk_size), kind) in enumerate(plain + more):
        if name != "float32" and (i + FLOAT_NAMES.index(name)) % 3:
            continue
        shape = "x".join(map(str, (*rows, features, classes)))
        reduction, bias = REDUCTIONS[i % 3], i % 4 < 2
        label = f"sizes/{shape}/chunk-{chunk_size}/{'bias' if bias else 'no-bias'}/{reduction}"
        yield _case(
            label, name, rows=rows, features=features, classes=classes, chunk_size=chunk_size,
            kind=kind, bias=bias, reduction=reduction,
        )  # fmt: skip


def _option_cases(name: str) -> Iterator[LinearCase]:
    """Yield options alone and together, on chunks of two rows and a last one of one row."""
    kinds = ("index", "probability")
    weight, rows = draw_weight(5, 7, name), np.array(ROW_WEIGHTS).astype(dtype(name))
    left_out: dict[str, Any] = {"target": LABELS, "ignore_index": IGNORED, "silent": SILENT}
    for reduction, one in zip(REDUCTIONS, MORE_KINDS, strict=True):
        for kind in (*kinds, *(MORE_KINDS if name == "float32" else (one,))):
            some = left_out if kind == "index" else {"silent": SILENT}
            yield _case(
                f"options/everything/{reduction}", name, kind=kind, reduction=reduction,
                weight=weight, sample_weight=rows, **some, **EVERYTHING,
            )  # fmt: skip
        yield _case(f"options/ignored/{reduction}", name, reduction=reduction, **left_out)
        yield _case(
            f"options/all-ignored/{reduction}", name, reduction=reduction, silent=range(5),
            target=np.full(5, -100),
        )  # fmt: skip
    of_rows = _draw(6, (5,), 4, 2.0).astype(dtype(name))
    incoming: tuple[tuple[str, str, Any], ...] = (
        ("mean", "index", -2.5), ("sum", "probability", 4.0), ("none", "index", of_rows)
    )  # fmt: skip
    for reduction, kind, grad_output in incoming:
        yield _case(
            f"options/grad_output/{reduction}", name, kind=kind, reduction=reduction,
            grad_output=grad_output,
        )  # fmt: skip
    yield _case("options/bad-labels", name, reduction="none", target=UNCHECKED, validate=False)
    yield from _stats_cases(name, left_out)
    if name != "float32":
        return
    for option, kind in product((*EVERYTHING, "weight", "sample_weight"), kinds):
        given: dict[str, Any] = {"reduction": "none" if kind == "index" else "mean"}
        given[option] = ({"weight": weight, "sample_weight": rows} | EVERYTHING)[option]
        yield _case(f"options/{option}", name, kind=kind, **given)
    for label, normalizer in (("number", 16.0), ("array", np.array(0.375))):
        yield _case(f"options/normalizer/{label}", name, normalizer=normalizer, **left_out)
    for other in ("float16", "float64"):
        soft = draw_probabilities(4, (5, 7), other, -1)
        yield _case(f"options/target/{other}", name, kind="probability", target=soft)
        yield _case(f"options/weight/{other}", name, weight=weight.astype(other))
        yield _case(f"options/teacher/{other}", name, kind="teacher-head", teacher_dtype=other)
    wrong = np.array([[0, 1], [2, -1], [IGNORED, 6], [7, 7], [4, 4]])
    yield _case(
        "options/bad-classes", name, kind="sparse", reduction="none", target=wrong, validate=False,
        ignore_index=IGNORED,
    )  # fmt: skip
    for integer in ("uint8", "int32"):
        yield _case(
            f"options/target/{integer}", name, **left_out | {"target": LABELS.astype(integer)}
        )
    for layout, kind in product(("fortran", "strided", "reversed"), kinds):
        yield _case(f"options/{layout}", name, kind=kind, layout=layout, target_layout=layout)


def _stats_cases(name: str, left_out: dict[str, Any]) -> Iterator[LinearCase]:
    """Yield stats, with gradients that flow into them, some much larger than those of the loss."""
    of_lse, of_entropy = (_draw(seed, (5,), 4, 2.0).astype(dtype(name)) for seed in (7, 8))
    both: dict[str, Any] = {"return_stats": True, "grad_lse": of_lse, "grad_entropy": of_entropy}
    yield _case("options/stats/mean", name, **left_out, **both)
    yield _case(
        "options/stats/none", name, kind="probability", reduction="none", silent=SILENT,
        sample_weight=np.array(ROW_WEIGHTS).astype(dtype(name)), **both, **EVERYTHING,
    )  # fmt: skip
    if name != "float32":
        return
    for kind in MORE_KINDS:
        yield _case("options/stats/more", name, kind=kind, silent=(), **both)
    yield _case("options/stats/lse", name, return_stats=("lse",), grad_lse=of_lse, grad_output=0.0)
    for asked in (
        ("correct",),
        ("prediction", "entropy"),
        ("top_probability", "brier", "rank"),
        (),
    ):
        label = f"options/stats/{'-'.join(asked) or 'valid'}"
        yield _case(label, name, reduction="sum", return_stats=asked, **left_out)
    yield _case(
        "options/stats/bad-labels", name, reduction="none", target=UNCHECKED, validate=False, **both
    )


def _draw(seed: int, shape: tuple[int, ...], steps: int, size: float) -> Floats:
    """Return multiples of ``size / steps`` between plus and minus `size`."""
    drawn = np.random.default_rng(seed).integers(-steps, steps + 1, shape)
    return np.asarray(drawn * (size / steps))


def _case(
    label: str,
    name: str,
    *,
    rows: tuple[int, ...] = (5,),
    features: int = 6,
    classes: int = 7,
    chunk_size: int | None = 2,
    kind: str = "index",
    bias: bool = True,
    silent: Sequence[int] = (),
    teacher_dtype: str | None = None,
    **given: Any,
) -> LinearCase:
    """Build a case in a dtype; the other arguments are fields of its `Case`, or options."""
    hidden, head, shift, exact = _head(1, name, rows, features, classes, bias=bias, silent=silent)
    target = given.pop("target", None)
    teacher: tuple[Array, ...] = ()
    if kind == "sparse":
        target = draw_labels(4, (*rows, 2), classes) if target is None else target
        given["target_probability"] = draw_probabilities(9, target.shape, name, -1)
    elif kind in MORE_KINDS:
        given["teacher_scale"] = 0.5
        other = teacher_dtype or name
        *own, target = _head(11, other, rows, features + 2, classes, bias=bias, silent=silent)
        if kind == "teacher-head":
            teacher = tuple(array for array in own if array is not None)
    elif target is None and kind == "probability":
        target = draw_probabilities(4, exact.shape, name, -1)
    elif target is None:
        target = draw_labels(4, rows, classes)
    fields = {
        key: given.pop(key) for key in _FIELDS if isinstance(given.get(key), (np.ndarray, str))
    }
    if "grad_output" in given:
        fields["grad_output"] = given.pop("grad_output")
    group, options = label.partition("/")[0], {"axis": -1, **given}
    return LinearCase(
        Case(f"{label}/{kind}/{name}", group, exact, target, options=options, **fields),
        *(hidden, head, shift),
        chunk_size,
        teacher,
    )


def _head(
    seed: int,
    name: str,
    rows: tuple[int, ...],
    features: int,
    classes: int,
    *,
    bias: bool,
    silent: Sequence[int],
) -> tuple[Any, ...]:
    """Return hidden states, weight, bias or None, and their logits, all of them exact.

    The hidden states of the silent rows hold something else.
    """
    steps, own = STEPS[name], dtype(name)
    hidden = _draw(seed, (*rows, features), steps, 2.0)
    head = _draw(seed + 1, (classes, features), steps, 1.0)
    shift = _draw(seed + 2, (classes,), steps * steps, 2.0) if bias else None
    logits = np.asarray(hidden @ head.T + (0.0 if shift is None else shift))
    if not np.array_equal(logits.astype(own).astype(np.float64), logits):
        raise ValueError(f"the logits of a head of {features} features are not exact in {name}")
    for place, row in enumerate(silent):
        hidden[row] = (np.inf, np.nan)[place % 2]
        hidden[row, 0] = -np.inf
    shift = None if shift is None else shift.astype(own)
    return hidden.astype(own), head.astype(own), shift, logits.astype(own)
