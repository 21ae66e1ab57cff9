"""The groups of the conformance grid about sparse targets and the logits of teachers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .case import Case
from .dtypes import Array, dtype
from .grid_draw import (
    CLASSES,
    IGNORED,
    ROWS,
    SHAPES,
    draw_logits,
    draw_weight,
)
from .grid_options import TRANSFORMS, row_weights
from .grid_values import DOUBLE_MARGINS, MARGINS, PLACEMENTS, margin_rows, special_logits

OPTIONS: tuple[tuple[str, str, float, float, bool, bool], ...] = (
    ("none", "plain", 0.0, 0.0, False, False),
    ("mean", "plain", 0.0, 0.1, True, False),
    ("sum", "scale", 0.01, 0.0, True, True),
    ("mean", "softcap", 0.0, 0.1, False, True),
    ("none", "scale-softcap", 0.01, 1.0, True, True),
    ("none", "plain", 0.0, 0.1, False, True),
)
"""Reduction, transform, z_loss, label_smoothing, and whether there are weights of classes and rows:
every pair of choices that act on each other."""
SOME_SHAPES = [one for one in SHAPES if one[0] in ("C", "one-class", "3-D", "axis-0", "axis-2")]
EMPTY_SHAPES = [one for one in SHAPES if one[0] in ("no-rows", "no-classes", "no-positions")]
SCALES = (1.0, 0.5, 3.0)


def sparse_cases(names: Sequence[str]) -> Iterator[Case]:
    """Yield classes that are equal, ignored, likely and at -inf; none, one and more than C."""
    for name in names:
        logits = draw_logits(211, (ROWS, CLASSES), name)
        classes = np.array([[0, 1, 1], [2, IGNORED, 3], [4, 4, 4], [6, 5, 0], [IGNORED] * 3])
        chances = _chances(212, classes.shape, name)
        for options in _options(name):
            full = options | {"ignore_index": IGNORED}
            yield _sparse("options", name, logits, classes, chances, **full)
        rows = special_logits(name)
        at = np.tile(np.array([2, 5, 1, 1]), (len(PLACEMENTS), 1))
        values = {"all": [0.5, 0.25, 0.125, 0.125], "none-at-5": [0.75, 0.0, 0.25, 0.0]}
        for label, row in values.items():
            given = np.tile(np.array(row), (len(PLACEMENTS), 1)).astype(dtype(name))
            for eps in (0.0, 0.1):
                part = f"special/{label}/smoothing-{eps:g}"
                options = {"return_stats": True, "label_smoothing": eps}
                yield _sparse(part, name, rows, at, given, **options)
        margins = DOUBLE_MARGINS if name == "float64" else MARGINS
        confident = margin_rows(213, 10, margins).astype(dtype(name))
        ahead = np.arange(len(margins))[:, None] % 10
        for label, own in (("top", ahead), ("others", (ahead + np.array([1, 4, 0])) % 10)):
            given = _chances(214, own.shape, name)
            yield _sparse(f"margins/{label}", name, confident, own, given)
    name = names[0]
    logits, rng = draw_logits(215, (ROWS, CLASSES), name), np.random.default_rng(216)
    for width in (0, 1, 12):
        own = rng.integers(0, CLASSES, (ROWS, width))
        for eps in (0.0, 0.1):
            yield _sparse(
                f"width/{width}/smoothing-{eps:g}", name, logits, own,
                _chances(217, own.shape, name), label_smoothing=eps, return_stats=True,
            )  # fmt: skip
    own = rng.integers(0, CLASSES, (ROWS, 3))
    odd = np.array([[0.5, -0.25, 0.0], [np.nan, 0.5, 0.5], [-0.5, 0, 0], [0, 0, 0], [1e30, 1, 2]])
    yield _sparse("odd-probabilities", name, logits, own, odd.astype(dtype(name)))
    bad = own.copy()
    bad[1, 2], bad[3, 0] = -1, CLASSES
    chances = _chances(218, own.shape, name)
    for reduction in ("none", "mean"):
        yield _sparse(
            f"bad-class/{reduction}", name, logits, bad, chances,
            validate=False, reduction=reduction, return_stats=True,
        )  # fmt: skip
    for integer in ("uint8", "int16", "uint64"):
        yield _sparse(f"dtype/{integer}", name, logits, own.astype(integer), chances)
    for other in names[1:]:
        given = _chances(218, own.shape, other)
        yield _sparse(f"dtype/{other}", name, logits, own, given, reduction="mean")
    for layout in ("fortran", "strided", "reversed"):
        yield _sparse(f"layout/{layout}", name, logits, own, chances, layout=layout)
    many = draw_logits(219, (3, 1000), name)
    own = rng.integers(0, 1000, (3, 20))
    yield _sparse("1000-classes", name, many, own, _chances(220, own.shape, name))
    for seed, (label, shape, axis) in enumerate(SOME_SHAPES + EMPTY_SHAPES, start=221):
        at_axis = min(1, len(shape) - 1) if axis is None else axis
        narrow = tuple(2 if i == at_axis else size for i, size in enumerate(shape))
        count = shape[at_axis]
        own = np.random.default_rng(seed).integers(0, max(count, 1), narrow)
        where: dict[str, Any] = {} if axis is None else {"axis": axis}
        yield _sparse(
            f"shape/{label}", name, draw_logits(seed, shape, name),
            own if count else np.full(narrow, -100), _chances(seed, narrow, name),
            weight=draw_weight(seed, count, name), reduction="mean" if 0 in shape else "none",
            label_smoothing=0.1, return_stats=True, **where,
        )  # fmt: skip


def teacher_cases(names: Sequence[str]) -> Iterator[Case]:
    """Yield teachers of every option, scale, dtype and layout, sure ones, and odd rows of both."""
    for name in names:
        logits = draw_logits(231, (ROWS, CLASSES), name)
        given = draw_logits(232, (ROWS, CLASSES), name)
        for scale, options in zip(SCALES * 2, _options(name), strict=True):
            yield _teacher("options", name, logits, given, scale, **options)
        rows = special_logits(name)
        plain = draw_logits(233, rows.shape, name)
        masked = plain.copy()
        masked[:, (2, 5)] = -np.inf
        for label, student, teacher in (
            ("student", rows, plain), ("teacher", plain, rows), ("both", rows, masked),
        ):  # fmt: skip
            yield _teacher(f"special/{label}", name, student, teacher, 0.5, return_stats=True)
        margins = DOUBLE_MARGINS if name == "float64" else MARGINS
        confident = margin_rows(234, 10, margins).astype(dtype(name))
        for label, seed in (("like", 234), ("unlike", 235)):
            teacher = margin_rows(seed, 10, margins).astype(dtype(name))
            if label == "unlike":
                teacher = np.roll(teacher, 3, axis=1)
            for scale in (1.0, 0.25):
                part = f"margins/{label}/scale-{scale:g}"
                yield _teacher(part, name, confident, teacher, scale, label_smoothing=0.0)
        if name in ("float32", "float64"):
            offset = margin_rows(236, 10, margins, 1e4).astype(dtype(name))
            yield _teacher("offset", name, offset, np.roll(offset, 1, axis=1), 1.0)
    name = names[0]
    logits = draw_logits(237, (ROWS, CLASSES), name)
    for other in names[1:]:
        given = draw_logits(238, (ROWS, CLASSES), other)
        for reduction in ("none", "mean"):
            yield _teacher(f"dtype/{other}/{reduction}", name, logits, given, reduction=reduction)
    given = draw_logits(238, (ROWS, CLASSES), name)
    for layout in ("fortran", "strided", "reversed"):
        yield _teacher(f"layout/{layout}", name, logits, given, layout=layout)
    yield _teacher("ties", name, logits, np.zeros_like(logits), return_stats=True)
    many = draw_logits(239, (3, 1000), name)
    yield _teacher("1000-classes", name, many, draw_logits(240, many.shape, name), 2.0)
    for seed, (label, shape, axis) in enumerate(SOME_SHAPES + EMPTY_SHAPES, start=241):
        where: dict[str, Any] = {} if axis is None else {"axis": axis}
        at = min(1, len(shape) - 1) if axis is None else axis
        yield _teacher(
            f"shape/{label}", name, draw_logits(seed, shape, name),
            draw_logits(seed + 20, shape, name), 0.5, weight=draw_weight(seed, shape[at], name),
            reduction="mean" if 0 in shape else "none", label_smoothing=0.1, return_stats=True,
            **where,
        )  # fmt: skip


def _chances(seed: int, shape: tuple[int, ...], name: str) -> Array:
    """Return probabilities of some classes, which need not sum to 1."""
    drawn = np.random.default_rng(seed).uniform(0.05, 0.5, shape)
    return np.asarray(drawn).astype(dtype(name))


def _options(name: str) -> Iterator[dict[str, Any]]:
    """Yield the arguments of each choice of options."""
    for reduction, change, z_loss, eps, weighted, sampled in OPTIONS:
        yield {
            "reduction": reduction,
            "z_loss": z_loss,
            "label_smoothing": eps,
            "return_stats": reduction == "none",
            "weight": draw_weight(210, CLASSES, name) if weighted else None,
            "sample_weight": row_weights(name) if sampled else None,
            **TRANSFORMS[change],
        }


def _sparse(
    label: str,
    name: str,
    logits: Array,
    classes: Array,
    probability: Array,
    *,
    weight: Array | None = None,
    sample_weight: Array | None = None,
    layout: str = "plain",
    **options: Any,
) -> Case:
    return _case(
        "sparse", label, name, logits, classes, options, weight, sample_weight, layout, probability
    )


def _teacher(
    label: str,
    name: str,
    logits: Array,
    teacher: Array,
    scale: float = 1.0,
    *,
    weight: Array | None = None,
    sample_weight: Array | None = None,
    layout: str = "plain",
    **options: Any,
) -> Case:
    options["teacher_scale"] = scale
    return _case(
        "teacher", label, name, logits, teacher, options, weight, sample_weight, layout, None
    )


def _case(
    group: str,
    label: str,
    name: str,
    logits: Array,
    target: Array,
    options: dict[str, Any],
    weight: Array | None,
    sample_weight: Array | None,
    layout: str,
    probability: Array | None,
) -> Case:
    options = {"reduction": "none"} | options
    if label == "options":
        rest = {k: v for k, v in options.items() if k in ("logit_scale", "logit_softcap") and v}
        words = [
            options["reduction"], f"smoothing-{options['label_smoothing']:g}", *rest,
            *(["weighted"] if weight is not None else []),
            *(["sampled"] if sample_weight is not None else []),
        ]  # fmt: skip
        label = f"options/{'/'.join(words)}"
    return Case(
        f"{group}/{label}/{name}",
        group,
        logits,
        target,
        weight,
        options,
        layout=layout,
        target_layout=layout,
        sample_weight=sample_weight,
        target_probability=probability,
    )
