"""The passes over all blocks: one for the figures, and one for each step of a temperature's fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from polyce.arrays import dtypes, find
from polyce.call import checks, options
from polyce.score import blocks, calibration, totals
from polyce.score.record import Score
from polyce.score.totals import Box, OfBlocks, Question, Totals

LIMIT = math.log(1e4)
"""A fitted temperature lies between 1e-4 and 1e4."""
EXACT = 1e-6
"""A fit ends when its next step would change the temperature by less than this share of it."""
MOST_STEPS = 60
TOGETHER = 4
"""The rows of so many blocks are summed up together: 0.2 ms of NumPy's calls, where a block of many
classes has few rows."""


class Readable(Protocol):
    """Logits or labels: what is known of them, and how a box of them is read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape."""

    @property
    def dtype(self) -> Any:
        """Return the dtype."""

    @property
    def chunks(self) -> tuple[int, ...] | None:
        """Return the shape of what is read at once, where that is not a single number."""

    def read(self, box: Box) -> Any:
        """Return the array in a box."""


@dataclass(frozen=True)
class Held:
    """An array of any library that the caller holds."""

    array: Any
    chunks: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the array's shape."""
        return tuple(self.array.shape)

    @property
    def dtype(self) -> Any:
        """Return the array's dtype."""
        return self.array.dtype

    def read(self, box: Box) -> Any:
        """Return a view of the array."""
        # A 0-d array of labels has nothing to cut, nor has torch's single label for one row.
        return self.array[box] if box else self.array


def held(name: str, array: Any) -> Held:
    """Take an array that the caller holds, if its values can be read."""
    library, (array,) = find.of(**{name: array})
    if not library.is_lazy and not library.has_values(array):
        raise TypeError(
            f"{name} must have values to score, got a traced array without any; call score "
            "outside of the trace"
        )
    return Held(array)


class Call(NamedTuple):
    """A score that is asked for, checked."""

    logits: Readable
    target: Readable
    question: Question
    temperature: float
    fit_temperature: bool


class Running(NamedTuple):
    """How far a score has come: after each block, and at the end of each pass."""

    step: int
    """The number of the pass, from 1."""
    temperature: float
    curvature: float
    """Of the loss by the logarithm of the temperature; nan where no pass has shown it."""
    totals: Totals
    kept: list[tuple[Any, Any]]
    """The rows' confidences, and whether they were correct: 5 bytes a row in float32."""
    entries: int
    """How many entries of that list the totals cover: the pass goes on adding to it."""


Each = Callable[[Question, float, Iterable[Box]], Iterator[OfBlocks]]
"""What scores the blocks of a pass, in order: here, or elsewhere."""


def describe(
    logits: Readable,
    target: Readable,
    *,
    axis: int | None,
    ignore_index: int,
    weight: Any,
    temperature: float,
    logit_softcap: float | None,
    bins: int,
    by_class: bool,
    fit_temperature: bool,
    validate: bool | None,
    implementation: str | None,
) -> Call:
    """Check the arguments of a score, and all labels unless `validate` is False."""
    shape, axis = checks.logits_shape(logits, axis, target)
    if None in shape:  # as in an ONNX graph
        raise ValueError(
            f"input must have values and a known shape to score, got shape {shape}; score it where "
            "the model runs"
        )
    row_shape = totals.without(shape, axis)
    checks.target_kind(shape, row_shape, logits, target, probabilities=False, takes_axis=True)
    if math.prod(row_shape) == 0 or shape[axis] == 0:
        raise ValueError(
            f"input must have at least one row and one class to score, got shape {shape}; "
            "pass logits that are not empty"
        )
    if type(bins) is not int or bins < 1:
        raise ValueError(f"bins must be an integer of at least 1, got {bins!r}; 15 is usual")
    scale = options.check_positive("temperature", temperature)
    softcap = options.check_positive("logit_softcap", logit_softcap)
    if scale is None:
        raise TypeError("temperature must be a real number, got None; 1 changes nothing")
    if fit_temperature and softcap is not None:
        raise ValueError(
            "fit_temperature has no derivative behind a softcap, got "
            f"logit_softcap={softcap}; cap the logits first"
        )
    if weight is not None:
        library, (weight,) = find.of(weight=weight)
        checks.weight(weight, shape[axis])
        weight = library.to_numpy(weight)[0].astype(np.float64)
    question = Question(
        shape=shape,
        axis=axis,
        ignore_index=options.check_ignore_index(ignore_index),
        weight=weight,
        softcap=softcap,
        bins=bins,
        by_class=by_class,
        implementation=implementation,
    )
    call = Call(logits, target, question, scale, fit_temperature)
    if options.check_validate(validate) is not False:
        check_labels(call)
    return call


def boxes(call: Call) -> Iterator[Box]:
    """Return the boxes of the logits, in order."""
    name = dtypes.dtype_name(call.logits)
    itemsize = 8 if name == "float64" else 4
    question = call.question
    return blocks.boxes(question.shape, question.axis, itemsize, call.logits.chunks)


def check_labels(call: Call) -> None:
    """Raise IndexError for the first label that is not a class; read no logits."""
    shape, axis = call.question.shape, call.question.axis
    # As of logits with one class: so many labels are read at once as fill a block.
    of_rows = (*shape[:axis], 1, *shape[axis + 1 :])
    for box in blocks.boxes(of_rows, axis, np.dtype(np.int64).itemsize):
        labels = read_labels(call.question, call.target, box)
        library, (labels,) = find.of(target=labels)
        labels = library.to_numpy(labels)[0].reshape(-1)
        _, bad = totals.left_out(call.question, labels)
        place = totals.first(call.question, [box], bad)
        if place is not None:
            position = _position(call.question, place)
            classes = call.question.shape[call.question.axis]
            raise IndexError(
                f"labels must lie in 0 to {classes - 1} ({classes} classes), got "
                f"{labels[np.argmax(bad)]} at position {position}; give rows to leave out the "
                "label ignore_index, or pass validate=False to score and count the rest"
            )


def read_labels(question: Question, target: Readable, box: Box) -> Any:
    """Return the labels of a block."""
    return target.read(totals.without(box, question.axis))


def together(given: Iterable[Box]) -> Iterator[list[Box]]:
    """Return the blocks whose rows are summed up together."""
    left = iter(given)
    while some := list(itertools.islice(left, TOGETHER)):
        yield some


def score_blocks(
    question: Question, scale: float, logits: Readable, target: Readable, some: list[Box]
) -> OfBlocks:
    """Score some blocks, one after the other."""
    rows = []
    for box in some:
        labels = read_labels(question, target, box)
        rows.append(totals.columns(question, scale, logits.read(box), labels))
    return totals.of_blocks(question, some, rows)


def here(call: Call) -> Each:
    """Score blocks in this process."""

    def each(question: Question, scale: float, given: Iterable[Box]) -> Iterator[OfBlocks]:
        for some in together(given):
            yield score_blocks(question, scale, call.logits, call.target, some)

    return each


def run(call: Call, each: Each) -> Iterator[Running]:
    """Run all passes; the last of what is returned has every figure."""
    place = -math.log(call.temperature)
    if not call.fit_temperature:
        yield from one_pass(call, each, 1, place, math.nan)
        return
    before, curvature, low, high = None, math.nan, -LIMIT, LIMIT
    for step in range(1, MOST_STEPS + 1):
        for running in one_pass(call, each, step, place, curvature):
            yield running
        found = running.totals.means
        slope = found.slope.value
        if not math.isfinite(slope):
            raise ValueError(
                f"no temperature makes the loss finite, got {found.loss.value}; "
                "leave out fit_temperature"
            )
        low, high = (place, high) if slope < 0 else (low, place)
        if before is not None and abs(place - before[0]) > 1e-3:
            # Nearer to each other the two slopes differ by their rounding.
            curvature = (slope - before[1]) / (place - before[0])
        following = _next(place, slope, curvature, low, high)
        if found.accuracy.value == 1.0 or LIMIT - abs(place) < EXACT:
            break
        if abs(following - place) < EXACT:
            return
        before, place = (place, slope), following
    raise ValueError(
        "a temperature can be fitted if some labels do not have the largest logit, and those that "
        f"do are more than chance, got an accuracy of {found.accuracy.value:g} and a loss that "
        f"still falls at temperature {math.exp(-place):g}; leave out fit_temperature"
    )


def _next(place: float, slope: float, curvature: float, low: float, high: float) -> float:
    """Take Newton's step, with the second derivative from two passes' first.

    The loss is convex in the scale, so that its slope changes sign once, between `low` and `high`.
    """
    if math.isnan(curvature):
        step = -math.copysign(0.25, slope) if slope else 0.0
    elif curvature > 0.0:
        step = max(-1.5, min(1.5, -slope / curvature))
    else:
        # Far from the minimum the loss bends the other way, in the logarithm of the scale.
        step = -math.copysign(1.5, slope)
    following = place + step
    if low <= following <= high:
        return following
    nearer = low if following < low else high
    return nearer if abs(nearer) == LIMIT else (place + nearer) / 2


def one_pass(
    call: Call, each: Each, step: int, place: float, curvature: float
) -> Iterator[Running]:
    """Score all blocks once, at a logarithm of the scale."""
    found, kept = totals.nothing(call.question), list[tuple[Any, Any]]()
    temperature = call.temperature if step == 1 else math.exp(-place)
    for some in each(call.question, 1.0 / temperature, boxes(call)):
        kept.append((some.confidence, some.correct))
        found = found + some.totals
        yield Running(step, temperature, curvature, found, kept, len(kept))


def finish(call: Call, running: Running) -> Score:
    """Return the figures of what has been read."""
    question, found = call.question, running.totals
    edges = calibration.equal_width(question.bins)
    kept = zip(*running.kept[: running.entries], strict=True)
    confidence, correct = (np.concatenate(column) for column in kept)
    by_mass = calibration.equal_mass(confidence, question.bins)
    means = found.means
    values = {
        name: number
        for name, mean in means._asdict().items()
        if name != "slope"
        for name, number in ((name, mean.value), (f"{name}_error", mean.error))
    }
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(np.float64(means.loss.value)))
    temperature, curvature = running.temperature, running.curvature
    return Score(
        rows=found.rows,
        ignored=found.ignored,
        undefined=found.undefined,
        bad_labels=found.bad_labels,
        first_undefined=_position(question, found.first_undefined),
        first_bad_label=_position(question, found.first_bad_label),
        **values,
        bits=means.loss.value / math.log(2.0),
        bits_error=means.loss.error / math.log(2.0),
        perplexity=perplexity,
        perplexity_error=perplexity * means.loss.error,
        ece=calibration.expected_error(found.bins),
        mce=calibration.largest_error(found.bins),
        ece_mass=calibration.expected_error(calibration.binned(confidence, correct, by_mass)),
        temperature=temperature,
        temperature_error=temperature * means.slope.error / curvature if curvature else math.nan,
        reliability=calibration.reliability(found.bins, edges),
        by_class=None if found.classes is None else totals.class_table(found.classes),
    )


def _position(question: Question, place: int | None) -> tuple[int, ...] | None:
    if place is None:
        return None
    return tuple(map(int, np.unravel_index(place, question.row_shape)))
