"""The groups of the conformance grid about gradients of stats, and about values of the rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np

from .case import Case
from .dtypes import Array, dtype, is_float
from .grid_draw import (
    CLASSES,
    IGNORED,
    ROWS,
    SHAPES,
    draw_labels,
    draw_logits,
    draw_probabilities,
    draw_weight,
)
from .grid_values import (
    DOUBLE_MARGINS,
    MARGINS,
    PLACEMENTS,
    margin_rows,
    special_logits,
    special_targets,
)

CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"logit_scale": 0.37},
    "softcap": {"logit_scale": 3.0, "logit_softcap": 30.0},
}
BOTH = ("lse", "entropy")
OF_LABELS = ("top_probability", "brier", "rank")
OF_PROBABILITIES = OF_LABELS[:2]
# With the entropy the pivot is the likeliest class, which the label need not be.
ASKED = {"alone": OF_LABELS, "beside-entropy": ("entropy", *OF_LABELS)}
SOME_SHAPES = [one for one in SHAPES if one[0] in ("C", "3-D", "no-rows", "no-classes", "axis-0")]


def grad_stats_cases(names: Sequence[str]) -> Iterator[Case]:
    """Yield gradients that flow into lse, into the entropy and into both, on rows of every kind."""
    for name in names:
        labels = np.array([1, IGNORED, 6, 0, 2])
        soft = draw_probabilities(171, (ROWS, CLASSES), name, 1)
        logits, weight = draw_logits(172, (ROWS, CLASSES), name), draw_weight(173, CLASSES, name)
        sampled = np.array([0.5, 2.0, 0.0, -0.25, 1.25]).astype(dtype(name))
        for (kind, target), reduction, asked in product(
            (("index", labels), ("probability", soft)),
            ("none", "mean"),
            (("lse",), ("entropy",), BOTH),
        ):
            if asked != BOTH and (name != "float32" or reduction == "mean"):
                continue
            options = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.01}
            if kind == "index":
                options["ignore_index"] = IGNORED
            full = asked == BOTH
            yield _of_stats(
                f"plain/{kind}/{reduction}/{'-'.join(asked)}", name, logits, target, asked,
                weight=weight if full else None, sample_weight=sampled if full else None,
                grad_output=None if reduction == "none" else 0.0 if full else -2.5, **options,
            )  # fmt: skip
        rows, targets = special_logits(name), special_targets(len(PLACEMENTS), name)
        for t, (change, options) in product(("kept", "ignored", "soft"), CHANGES.items()):
            if name == "float32" or (t, change) == ("kept", "plain"):
                asked = ("lse",) if t == "kept" and change == "plain" else BOTH
                yield _of_stats(f"special/{t}/{change}", name, rows, targets[t], asked, **options)
        margins = DOUBLE_MARGINS if name == "float64" else MARGINS
        confident = margin_rows(174, 10, margins)
        ahead = np.arange(len(margins)) % 10
        for (t, given), (change, options) in product(
            (("top", ahead), ("wrong", (ahead + 1) % 10)), CHANGES.items()
        ):
            if name in ("float32", "float64") or (t, change) == ("wrong", "softcap"):
                label = f"margins/{t}/{change}"
                yield _of_stats(label, name, confident, given, BOTH, **options)
        if name in ("float32", "float64"):
            yield _of_stats("offset", name, margin_rows(175, 10, margins, 1e4), ahead, BOTH)
    name = names[0]
    yield _of_stats("ties", name, np.zeros((ROWS, CLASSES)), np.arange(ROWS), BOTH)
    yield _of_stats("one-class", name, np.ones((2, 1)), np.zeros(2, np.int64), BOTH)
    flat = draw_logits(176, (2, 3000), name)
    yield _of_stats("flat/3000", name, flat, np.array([7, 2999]), BOTH)
    bad = np.array([1, -1, CLASSES, 0, 2])
    plain = draw_logits(177, (ROWS, CLASSES), name)
    yield _of_stats("bad-label", name, plain, bad, BOTH, validate=False)
    for seed, (label, shape, axis) in enumerate(SOME_SHAPES, start=180):
        where: dict[str, Any] = {} if axis is None else {"axis": axis}
        given = _labels_of(seed, shape, axis)
        yield _of_stats(
            f"shape/{label}", name, draw_logits(seed, shape, name), given, BOTH, **where
        )


def _labels_of(seed: int, shape: tuple[int, ...], axis: int | None) -> Array:
    at = axis if axis is not None else min(1, len(shape) - 1)
    return draw_labels(seed, tuple(np.delete(shape, at).tolist()), shape[at])


def _of_stats(
    label: str,
    name: str,
    logits: Array,
    target: Array,
    asked: tuple[str, ...],
    *,
    weight: Array | None = None,
    sample_weight: Array | None = None,
    grad_output: float | None = None,
    **options: Any,
) -> Case:
    axis = options.get("axis")
    at = min(1, logits.ndim - 1) if axis is None else axis
    rows = tuple(np.delete(logits.shape, at).tolist())
    drawn = np.random.default_rng(178).normal(0.0, 2.0, (2, *rows))
    given = dict(zip(BOTH, drawn.astype(dtype(name)), strict=True))
    return Case(
        f"grad-stats/{label}/{name}",
        "grad-stats",
        logits.astype(dtype(name)),
        target,
        weight,
        {"reduction": "none", "return_stats": asked} | options,
        grad_output,
        sample_weight=sample_weight,
        grad_lse=np.asarray(given["lse"]) if "lse" in asked else None,
        grad_entropy=np.asarray(given["entropy"]) if "entropy" in asked else None,
    )


def target_stats_cases(names: Sequence[str]) -> Iterator[Case]:
    """Yield calls that ask for the stats beside the target, on rows of every kind."""
    for name in names:
        rows, targets = special_logits(name), special_targets(len(PLACEMENTS), name)
        half = (np.arange(len(PLACEMENTS)) % 2).astype(dtype(name))
        for t, (change, options) in product(("kept", "ignored", "soft"), CHANGES.items()):
            if name == "float32" or (t, change) == ("kept", "plain"):
                yield from _beside(f"special/{t}/{change}", name, rows, targets[t], **options)
        soft = draw_probabilities(211, (ROWS, CLASSES), name, 1)
        logits, weight = draw_logits(212, (ROWS, CLASSES), name), draw_weight(213, CLASSES, name)
        for label, target in (("index", np.array([1, IGNORED, 6, 0, 2])), ("probability", soft)):
            options = {"label_smoothing": 0.1, "z_loss": 0.01, "reduction": "mean"}
            if label == "index":
                options["ignore_index"] = IGNORED
            yield from _beside(f"plain/{label}", name, logits, target, weight=weight, **options)
        yield from _beside("sampled", name, rows, targets["kept"], sample_weight=half)
        yield from _tied(name)
        if name in ("float32", "float64"):
            yield from _of_margins(name)
    name = names[0]
    for seed, (label, shape, axis) in enumerate(SOME_SHAPES, start=220):
        where: dict[str, Any] = {} if axis is None else {"axis": axis}
        logits, given = draw_logits(seed, shape, name), _labels_of(seed, shape, axis)
        yield from _beside(f"shape/{label}", name, logits, given, **where)
    for bad in (-1, CLASSES):
        target = np.array([1, bad, 6, 0, bad])
        logits = draw_logits(214, (ROWS, CLASSES), name)
        yield from _beside(f"bad-label/{bad}", name, logits, target, validate=False)
    yield from _of_many_classes(name)


def _tied(name: str) -> Iterator[Case]:
    """Yield equal logits, of which none is larger, and such as a softcap makes equal."""
    tied = np.array([[0.0, 0.0, 0.0], [2.0, 2.0, 1.0], [1.0, 2.0, 2.0], [-np.inf, 1.0, -np.inf]])
    for label in (0, 2):
        yield from _beside(f"tie/{label}", name, tied, np.full(4, label))
    flat = np.array([[1000.0, 1500.0, 1250.0]])
    yield from _beside("saturated", name, flat, np.array([0]), logit_softcap=5.0)
    yield from _beside("one-class", name, np.ones((2, 1)), np.zeros(2, np.int64))
    yield from _beside("one-class/soft", name, np.ones((2, 1)), np.array([[1.0], [0.25]]))


def _of_margins(name: str) -> Iterator[Case]:
    margins = DOUBLE_MARGINS if name == "float64" else MARGINS
    labels = np.arange(len(margins)) % 10
    rows = margin_rows(215, 10, margins)
    following = (labels + 1) % 10
    one_hot = (labels[:, None] == np.arange(10)).astype(dtype(name))
    for change, options in CHANGES.items():
        for t, target in (("top", labels), ("wrong", following), ("one-hot", one_hot)):
            yield from _beside(f"margins/{change}/{t}", name, rows, target, **options)
    # Probabilities that the softmax meets to the last digits.
    met = np.exp(rows - rows.max(1, keepdims=True))
    met = (met / met.sum(1, keepdims=True)).astype(dtype(name))
    yield from _beside("margins/met", name, rows.astype(dtype(name)), met)
    for t, target in (("top", labels), ("wrong", following), ("one-hot", one_hot)):
        yield from _beside(f"offset/{t}", name, margin_rows(216, 10, margins, 1e4), target)


def _of_many_classes(name: str) -> Iterator[Case]:
    """Yield rows that kernels read in parts, whose largest logit and label lie in any of them."""
    long = draw_logits(217, (3, 5000), name).astype(np.float64)
    long[0, 4999], long[1, 2500], long[2, 0] = 9.0, 9.0, 9.0
    soft = draw_probabilities(218, (3, 5000), name, 1)
    for change in ("plain", "softcap"):
        options = CHANGES[change]
        yield from _beside(f"many/{change}", name, long, np.array([4999, 100, 4500]), **options)
    yield from _beside("many/soft", name, long, soft)
    beside = draw_logits(219, (200, 5), name).astype(np.float64)
    beside[[150, 10, 199, 70, 0], np.arange(5)] = 9.0
    yield from _beside("rows-apart", name, beside, np.array([150, 199, 3, 70, 100]), axis=0)
    yield from _beside(
        "rows-apart/soft", name, beside, draw_probabilities(218, (200, 5), name, 0), axis=0
    )


def _beside(
    label: str,
    name: str,
    logits: Array,
    target: Array,
    *,
    weight: Array | None = None,
    sample_weight: Array | None = None,
    **options: Any,
) -> Iterator[Case]:
    asked = {"alone": OF_PROBABILITIES} if is_float(target) else ASKED
    for way, names in asked.items():
        yield Case(
            f"target-stats/{label}/{way}/{name}",
            "target-stats",
            logits.astype(dtype(name)),
            target.astype(dtype(name)) if is_float(target) else target,
            weight,
            {"reduction": "none", "return_stats": names} | options,
            sample_weight=sample_weight,
        )


def value_cases(names: Sequence[str]) -> Iterator[Case]:
    """Yield logits and labels for `log_prob` and `entropy`."""
    for name in names:
        rows, kept = special_logits(name), special_targets(len(PLACEMENTS), name)
        margins = DOUBLE_MARGINS if name == "float64" else MARGINS
        labels = np.arange(len(margins)) % 10
        for change, options in CHANGES.items():
            if name == "float32":
                yield _of_values(f"special/{change}", name, rows, kept["ignored"], **options)
            if name in ("float32", "float64") or change == "softcap":
                logits = margin_rows(191, 10, margins)
                yield _of_values(f"margins/{change}", name, logits, labels, **options)
        if name in ("float32", "float64"):
            yield _of_values("offset", name, margin_rows(192, 10, margins, 1e4), (labels + 1) % 10)
    name = names[0]
    for seed, (label, shape, axis) in enumerate(SOME_SHAPES, start=200):
        where = {} if axis is None else {"axis": axis}
        given = _labels_of(seed, shape, axis)
        yield _of_values(f"shape/{label}", name, draw_logits(seed, shape, name), given, **where)
    bad = np.array([1, -1, CLASSES, 0, 2])
    plain = draw_logits(193, (ROWS, CLASSES), name)
    yield _of_values("bad-label", name, plain, bad, validate=False)


def _of_values(label: str, name: str, logits: Array, target: Array, **options: Any) -> Case:
    return Case(
        f"values/{label}/{name}",
        "values",
        logits.astype(dtype(name)),
        target,
        None,
        {"reduction": "none"} | options,
    )
