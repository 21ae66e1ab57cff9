"""The groups of the conformance grid about gradients of stats, and about values of the rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np

from .case import Case
from .dtypes import Array, dtype
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
