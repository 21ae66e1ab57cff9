"""The conformance grid: the calls that every implementation has to answer alike.

`cases` builds it. Each group is one function that yields cases; the groups about unusual values are
in `grid_values`, those about options that torch lacks in `grid_options` and `grid_transforms`,
those about gradients of stats and values of the rows in `grid_stats`, and those about targets that
torch lacks in `grid_targets`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np

from .case import Case
from .dtypes import FLOAT_NAMES, INTEGER_NAMES, Array, dtype, missing
from .grid_draw import (
    CLASSES,
    IGNORED,
    REDUCTIONS,
    ROWS,
    SHAPES,
    draw_labels,
    draw_logits,
    draw_probabilities,
    draw_weight,
)
from .grid_options import combined_cases, normalizer_cases, sample_weight_cases
from .grid_stats import grad_stats_cases, target_stats_cases, value_cases
from .grid_targets import sparse_cases, teacher_cases
from .grid_transforms import stats_cases, transform_cases
from .grid_values import accuracy_cases, special_cases


def option_cases(names: Sequence[str]) -> Iterator[Case]:
    """Yield the whole product of options, on one small shape."""
    labels = np.array([1, IGNORED, 6, 0, IGNORED], dtype=np.int64)
    targets = {
        "plain": (labels, -100),
        "ignore-inner": (labels, IGNORED),
        "ignore-all": (np.full(ROWS, IGNORED, dtype=np.int64), IGNORED),
    }
    for name in names:
        logits = draw_logits(1, (ROWS, CLASSES), name)
        weights = {
            "unweighted": None,
            "weighted": draw_weight(2, CLASSES, name),
            "zero-weights": draw_weight(2, CLASSES, name, zeros=True),
        }
        soft = draw_probabilities(3, (ROWS, CLASSES), name, 1)
        for (w, weight), eps, reduction in product(weights.items(), (0.0, 0.1, 1.0), REDUCTIONS):
            tail = f"{w}/smoothing-{eps:g}/{reduction}/{name}"
            options = {"reduction": reduction, "label_smoothing": eps}
            for t, (target, ignore_index) in targets.items():
                more = {} if ignore_index == -100 else {"ignore_index": ignore_index}
                yield Case(
                    f"options/index/{t}/{tail}", "options", logits, target, weight, options | more
                )
            yield Case(f"options/probability/{tail}", "options", logits, soft, weight, options)


def shape_cases(names: Sequence[str]) -> Iterator[Case]:
    """Yield shapes of every rank, empty ones included, and class axes elsewhere."""
    for name in (n for n in names if n in ("float32", "float64")):
        for seed, (label, shape, axis) in enumerate(SHAPES, start=10):
            class_axis = axis if axis is not None else min(1, len(shape) - 1)
            classes = shape[class_axis]
            rows = tuple(np.delete(shape, class_axis).tolist())
            logits = draw_logits(seed, shape, name)
            labels = draw_labels(seed, rows, classes)
            targets = {"index": labels}
            if len(shape) == 1:
                # Logits of one dimension also take one label in one dimension.
                targets["index-1"] = labels.reshape(1)
            targets["probability"] = draw_probabilities(seed, shape, name, class_axis)
            where = {} if axis is None else {"axis": axis}
            for (kind, target), full, reduction in product(
                targets.items(), (False, True), REDUCTIONS
            ):
                options: dict[str, Any] = {"reduction": reduction} | where
                if full:
                    options["label_smoothing"] = 0.1
                if full and kind != "probability" and classes > 1:
                    options["ignore_index"] = int(labels.flat[0]) if labels.size else 0
                yield Case(
                    f"shapes/{label}/{kind}/{'full' if full else 'plain'}/{reduction}/{name}",
                    "shapes",
                    logits,
                    target,
                    draw_weight(seed, classes, name) if full else None,
                    options,
                )


def layout_cases(names: Sequence[str]) -> Iterator[Case]:
    """Yield logits and targets in memory that is not C-contiguous."""
    placements = [(layout, "plain") for layout in ("fortran", "strided", "reversed", "broadcast")]
    placements += [("plain", "strided"), ("plain", "reversed"), ("fortran", "strided")]
    for name in names:
        for shape, (layout, target_layout), kind in product(
            ((ROWS, CLASSES), (2, CLASSES, 3)), placements, ("index", "probability")
        ):
            logits = draw_logits(31, shape, name)
            if layout == "broadcast":
                logits = np.broadcast_to(logits[:1], shape).copy()
            target = draw_labels(32, (shape[0], *shape[2:]), CLASSES)
            if kind == "probability":
                target = draw_probabilities(32, shape, name, 1)
            yield Case(
                f"layouts/logits-{layout}/target-{target_layout}/{len(shape)}-D/{kind}/{name}",
                "layouts",
                logits,
                target,
                draw_weight(33, CLASSES, name),
                {"reduction": "none", "label_smoothing": 0.1},
                None,
                layout,
                target_layout,
            )


def target_cases(names: Sequence[str]) -> Iterator[Case]:
    """Yield dtypes of targets and weights, unusual ignore_index, labels that do not exist."""
    name = "float32" if "float32" in names else names[0]
    logits = draw_logits(41, (ROWS, CLASSES), name)
    labels = np.array([1, IGNORED, 6, 0, 2])
    weight = draw_weight(42, CLASSES, name)

    def case(label: str, target: Array, **options: Any) -> Case:
        full = {"reduction": "none"} | options
        return Case(f"targets/{label}/{name}", "targets", logits, target, weight, full)

    for integer in INTEGER_NAMES:
        target = labels.astype(integer)
        for reduction in ("none", "mean"):
            yield case(f"{integer}/{reduction}", target, reduction=reduction, ignore_index=IGNORED)
        yield case(f"{integer}/smoothing", target, label_smoothing=0.1)
    for integer, ignored in product(("uint8", "int8"), (-100, -1, 255, 256 + IGNORED, 2**62)):
        # A number that the dtype cannot hold matches nothing, not even what it would wrap to.
        yield case(
            f"{integer}/ignore_index/{ignored}", labels.astype(integer), ignore_index=ignored
        )
    marked = np.array([1, 255, 6, 255, 2], dtype=np.uint8)
    yield case("uint8/ignored-255", marked, ignore_index=255, reduction="mean")
    minus = np.array([1, -100, 6, -100, 2], dtype=np.int8)
    yield case("int8/ignored-minus-100", minus, reduction="mean")
    yield case("int64/ignore_index-not-present", labels, ignore_index=2**62, reduction="mean")
    for bad, reduction in product((-1, CLASSES, 2**40), REDUCTIONS):
        target = np.array([1, bad, 6, 0, 2])
        yield case(f"bad-label/{bad}/{reduction}", target, validate=False, reduction=reduction)
    wrapped = np.array([1, 156, 6, 0, 2], dtype=np.uint8)
    yield case("bad-label/uint8-156-is-not-minus-100", wrapped, validate=False)

    many = draw_logits(43, (4, 300), name)
    byte = np.array([0, 255, 44, 200], dtype=np.uint8)
    for reduction, eps in product(("none", "mean"), (0.0, 0.1)):
        yield Case(
            f"targets/uint8-of-300-classes/{reduction}/smoothing-{eps:g}/{name}",
            "targets",
            many,
            byte,
            None,
            {"reduction": reduction, "label_smoothing": eps},
        )
    yield from mixed_dtype_cases(names)


def mixed_dtype_cases(names: Sequence[str]) -> Iterator[Case]:
    """Yield targets and weights of other dtypes than the logits."""
    for name, other in product(names, names):
        if name == other:
            continue
        logits = draw_logits(51, (ROWS, CLASSES), name)
        soft = draw_probabilities(52, (ROWS, CLASSES), other, 1)
        for reduction in ("none", "mean"):
            yield Case(
                f"targets/probability/{other}/{reduction}/{name}",
                "targets",
                logits,
                soft,
                None,
                {"reduction": reduction},
            )
        # Quarters are exact in every dtype, so converting the weight changes nothing.
        weight = (np.arange(CLASSES) / 4 + 0.25).astype(dtype(other))
        labels = draw_labels(53, (ROWS,), CLASSES)
        for kind, target in (
            ("index", labels),
            ("probability", draw_probabilities(52, (ROWS, CLASSES), name, 1)),
        ):
            yield Case(f"targets/weight/{other}/{kind}/{name}", "targets", logits, target, weight)
    for name, integer in product(names, ("int32", "uint8")):
        weight = np.arange(CLASSES).astype(integer)
        logits = draw_logits(51, (ROWS, CLASSES), name)
        soft = draw_probabilities(52, (ROWS, CLASSES), name, 1)
        for kind, target in (("index", draw_labels(53, (ROWS,), CLASSES)), ("probability", soft)):
            yield Case(f"targets/weight/{integer}/{kind}/{name}", "targets", logits, target, weight)


def cotangent_cases(names: Sequence[str]) -> Iterator[Case]:
    """Yield incoming gradients: rows for none, numbers otherwise; negative, large and 0."""
    for name, kind, shape in product(
        names, ("index", "probability"), ((ROWS, CLASSES), (2, CLASSES, 3))
    ):
        logits = draw_logits(61, shape, name)
        rows = (shape[0], *shape[2:])
        target = draw_labels(62, rows, CLASSES)
        if kind == "probability":
            target = draw_probabilities(62, shape, name, 1)
        weight = draw_weight(63, CLASSES, name)
        cotangent = np.random.default_rng(64).normal(0.0, 2.0, rows)
        cotangent.flat[1] = 0.0
        incoming: list[tuple[str, str, Array | float]] = [
            ("none", "rows", cotangent.astype(dtype(name))),
            ("none", "zeros", np.zeros(rows, dtype=dtype(name))),
        ]
        for reduction, value in product(("sum", "mean"), (-2.5, 0.0, 1024.0)):
            incoming.append((reduction, f"number{value:g}", value))
            incoming.append((reduction, f"array{value:g}", np.array(value, dtype=dtype(name))))
        for reduction, label, given in incoming:
            options: dict[str, Any] = {"reduction": reduction}
            if kind == "index":
                options["ignore_index"] = IGNORED
            yield Case(
                f"cotangent/{reduction}/{label}/{len(shape)}-D/{kind}/{name}",
                "cotangent",
                logits,
                target,
                weight,
                options,
                given,
            )


_BUILDERS: dict[str, Callable[[Sequence[str]], Iterator[Case]]] = {
    "options": option_cases,
    "shapes": shape_cases,
    "layouts": layout_cases,
    "targets": target_cases,
    "special": special_cases,
    "accuracy": accuracy_cases,
    "cotangent": cotangent_cases,
    "combined": combined_cases,
    "sample-weight": sample_weight_cases,
    "normalizer": normalizer_cases,
    "transform": transform_cases,
    "stats": stats_cases,
    "grad-stats": grad_stats_cases,
    "target-stats": target_stats_cases,
    "values": value_cases,
    "sparse": sparse_cases,
    "teacher": teacher_cases,
}
GROUPS = tuple(_BUILDERS)


def cases(
    groups: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    *,
    few_shapes: bool = False,
) -> list[Case]:
    """Build the conformance grid, or some groups of it; always the same cases.

    Parameters
    ----------
    groups : sequence of str, optional
        Names from `GROUPS`. All of them by default.
    dtypes : sequence of str, optional
        Names of floating dtypes. All four by default, bfloat16 only where ml_dtypes is
        installed (`missing` says what is left out); a named dtype is never left out.
    few_shapes : bool
        Take every case of the group options, which has one shape, and of every other group the
        first index case and the first probability case: for libraries that compile for each
        shape.

    Returns
    -------
    list of Case
        The exact answers are computed when they are asked for.
    """
    wanted = GROUPS if groups is None else tuple(groups)
    for group in wanted:
        if group not in _BUILDERS:
            raise ValueError(f"unknown group {group!r}; there are {', '.join(GROUPS)}")
    names = [n for n in FLOAT_NAMES if n not in missing()] if dtypes is None else list(dtypes)
    for name in names:
        if name not in FLOAT_NAMES:
            raise ValueError(f"unknown dtype {name!r}; there are {', '.join(FLOAT_NAMES)}")
    # float32 first: a selection takes the first case of a kind.
    names.sort(key=lambda name: name != "float32")
    chosen: list[Case] = []
    for group in dict.fromkeys(wanted):
        built = list(_BUILDERS[group](names)) if names else []
        if few_shapes and group != "options":
            first: dict[str, Case] = {}
            for case in built:
                first.setdefault(case.kind, case)
            built = list(first.values())
        chosen += built
    return chosen
