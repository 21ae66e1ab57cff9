"""The groups of the conformance grid about row weights and all options together."""

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
from .grid_values import LABEL, PLACEMENTS, special_logits, special_targets

SAMPLE_WEIGHT = (0.5, 2.0, 0.0, -0.25, 1.25)
"""Exact in every dtype, and so is their sum."""
TRANSFORMS: dict[str, dict[str, Any]] = {
    "scale-softcap": {"logit_scale": 0.7, "logit_softcap": 5.0},
    "scale": {"logit_scale": 0.7},
    "softcap": {"logit_softcap": 5.0},
    "plain": {},
}


def row_weights(name: str) -> Array:
    """Return sample weights for five rows: positive ones, a zero and a negative one."""
    return np.array(SAMPLE_WEIGHT).astype(dtype(name))


def small_targets(name: str) -> dict[str, tuple[Array, dict[str, Any]]]:
    """Return targets for five rows of seven classes, with the options that belong to them."""
    labels = np.array([1, IGNORED, 6, 0, 2])
    return {
        "index-ignored": (labels, {"ignore_index": IGNORED}),
        "probability": (draw_probabilities(92, (ROWS, CLASSES), name, 1), {}),
        "index": (labels, {}),
    }


def combined_cases(names: Sequence[str]) -> Iterator[Case]:
    """Yield the product of all options on one shape: whole for float32 rows, thinned for others.

    Thinned parts contain every pair of choices, as they step through the product by a prime.
    """
    for at, name in enumerate(names):
        logits, weight = draw_logits(91, (ROWS, CLASSES), name), draw_weight(93, CLASSES, name)
        factors = product(
            ("none", "mean", "sum"),
            TRANSFORMS,
            (0.01, 0.0),
            (True, False),
            (0.1, 0.0),
            (True, False),
            small_targets(name).items(),
        )
        for i, (reduction, change, z_loss, sampled, eps, weighted, (kind, given)) in enumerate(
            factors
        ):
            whole = name == "float32" and reduction == "none"
            if not whole and (i + at) % (11 if name == "float32" else 17):
                continue
            target, options = given
            options = options | {"reduction": reduction} | TRANSFORMS[change]
            # Options at their defaults are left out.
            options |= {"z_loss": z_loss} if z_loss else {}
            options |= {"label_smoothing": eps} if eps else {}
            options |= {"return_stats": True} if whole else {}
            parts = (
                kind, change, "z-loss" if z_loss else "no-z", "sampled" if sampled else "unsampled",
                f"smoothing-{eps:g}", "weighted" if weighted else "unweighted", reduction, name,
            )  # fmt: skip
            yield Case(
                f"combined/{'/'.join(parts)}",
                "combined",
                logits,
                target,
                weight if weighted else None,
                options,
                sample_weight=row_weights(name) if sampled else None,
            )


def sample_weight_cases(names: Sequence[str]) -> Iterator[Case]:
    """Yield weights for rows of any content, of every dtype, that cancel, in every shape."""
    for name in names:
        yield from _silent_cases(name)
        yield from _total_cases(name)
        yield from _many_rows_cases(name)
    name = "float32" if "float32" in names else names[0]
    for other in [n for n in (*names, "int32", "uint8") if n != name]:
        # Thirds are not exact: they differ in every dtype.
        values = np.array([1, 2, 0, 1, 3]) / (1 if "int" in other else 3)
        weight = values.astype(dtype(other))
        for kind, (target, options) in small_targets(name).items():
            yield Case(
                f"sample-weight/dtype/{other}/{kind}/{name}",
                "sample-weight",
                draw_logits(94, (ROWS, CLASSES), name),
                target,
                None,
                options | {"reduction": "none" if kind == "index" else "mean"},
                sample_weight=weight,
            )
    yield from _shape_cases(name)


def _silent_cases(name: str) -> Iterator[Case]:
    """Yield special rows and labels that a sample weight of 0 silences."""
    logits = special_logits(name)
    rows = len(PLACEMENTS)
    undefined = np.isnan(logits.astype(np.float64)).any(axis=1) | (logits == np.inf).any(axis=1)
    undefined |= logits[:, LABEL] == -np.inf
    silent = np.where(undefined, 0.0, 1.5).astype(dtype(name))
    every_other = (np.arange(rows) % 2 * 0.5).astype(dtype(name))
    targets = special_targets(rows, name)
    for (w, weight), t, eps in product(
        (("undefined", silent), ("every-other", every_other)),
        ("kept", "soft", "ignored"),
        (0.0, 0.1),
    ):
        reduction = "none" if w == "every-other" or eps else "mean"
        yield Case(
            f"sample-weight/special/{w}/{t}/smoothing-{eps:g}/{reduction}/{name}",
            "sample-weight",
            logits,
            targets[t],
            None,
            {"reduction": reduction, "label_smoothing": eps},
            sample_weight=weight,
        )
    if name != "float32":
        return
    plain = draw_logits(95, (ROWS, CLASSES), name)
    weight = row_weights(name)
    for bad, where, reduction in product((-1, CLASSES), (0, 2), ("none", "sum", "mean")):
        target = np.full(ROWS, LABEL)
        target[where] = bad
        options = {"reduction": reduction, "validate": False, "z_loss": 0.01}
        yield Case(
            f"sample-weight/bad-label/{bad}/weighing-{weight[where]:g}/{reduction}/{name}",
            "sample-weight",
            plain,
            target,
            draw_weight(96, CLASSES, name),
            options,
            sample_weight=weight,
        )


def _total_cases(name: str) -> Iterator[Case]:
    """Yield weights that sum to 0, in every way."""
    weights = {"zeros": (0.0,) * ROWS, "opposite": (1.0, -1.0, 0.5, -0.5, 0.0)}
    for (w, values), (kind, (target, _)), reduction in product(
        weights.items(), small_targets(name).items(), ("sum", "mean")
    ):
        if kind == "index-ignored":
            continue
        yield Case(
            f"sample-weight/total/{w}/{kind}/{reduction}/{name}",
            "sample-weight",
            draw_logits(97, (ROWS, CLASSES), name),
            target,
            None,
            {"reduction": reduction, "z_loss": 0.01},
            sample_weight=np.array(values).astype(dtype(name)),
        )


def _many_rows_cases(name: str) -> Iterator[Case]:
    """Yield more rows than a float16 can count, or a float32 can add up one by one."""
    if name == "float64":
        return
    rows = np.random.default_rng(98).normal(0.0, 1.0, (20, 2))
    logits = np.tile(rows, (3500, 1)).astype(dtype(name))
    weight = np.tile(np.arange(20) / 16, 3500).astype(dtype(name))
    yield Case(
        f"sample-weight/70000-rows/mean/{name}",
        "sample-weight",
        logits,
        np.arange(70000) // 20 % 2,
        None,
        {"reduction": "mean"},
        sample_weight=weight,
    )


def _shape_cases(name: str) -> Iterator[Case]:
    """Yield every option at once in every shape, stats included."""
    full: dict[str, Any] = {"z_loss": 0.01, "label_smoothing": 0.1, "return_stats": True}
    full |= TRANSFORMS["scale-softcap"]
    for seed, (label, shape, axis) in enumerate(SHAPES, start=110):
        class_axis = axis if axis is not None else min(1, len(shape) - 1)
        classes = shape[class_axis]
        rows = tuple(np.delete(shape, class_axis).tolist())
        labels = draw_labels(seed, rows, classes)
        targets = {"index": labels}
        if len(shape) == 1:
            targets["index-1"] = labels.reshape(1)
        targets["probability"] = draw_probabilities(seed, shape, name, class_axis)
        weight = np.random.default_rng(seed).integers(-2, 5, rows) / 4
        for i, (kind, target) in enumerate(targets.items(), start=seed):
            reduction = ("none", "mean")[i % 2]
            options = full | {"reduction": reduction} | ({} if axis is None else {"axis": axis})
            if kind == "index" and classes > 1 and labels.size > 1:
                options["ignore_index"] = int(labels.flat[0])
            yield Case(
                f"sample-weight/shape/{label}/{kind}/{reduction}/{name}",
                "sample-weight",
                draw_logits(seed, shape, name),
                target,
                draw_weight(seed, classes, name),
                options,
                target_layout="strided" if reduction == "none" else "reversed",
                sample_weight=np.asarray(weight).astype(dtype(name)),
            )


def normalizer_cases(names: Sequence[str]) -> Iterator[Case]:
    """Yield normalizers of a mean: numbers and arrays, positive, negative and 0."""
    for name in names:
        arrays = [np.array(value).astype(dtype(name)) for value in (0.375, -8.0, 0.0)]
        divisors: list[tuple[str, float | Array]] = [
            *((f"array{float(array):g}", array) for array in arrays),
            ("int32-array", np.array(3, dtype=np.int32)),
            *((f"number{value:g}", value) for value in (3.5, -0.3, 0.0, 7)),
        ]
        if name != "float32":
            divisors = divisors[::3]
        for (d, divisor), (kind, (target, options)) in product(
            divisors, small_targets(name).items()
        ):
            is_array = isinstance(divisor, np.ndarray)
            number = {} if is_array else {"normalizer": divisor}
            sampled = kind != "index"
            yield Case(
                f"normalizer/{d}/{kind}/{name}",
                "normalizer",
                draw_logits(131, (ROWS, CLASSES), name),
                target,
                draw_weight(132, CLASSES, name),
                {"reduction": "mean", "label_smoothing": 0.1} | options | number,
                None if kind == "index" else -2.5,
                sample_weight=row_weights(name) if sampled else None,
                normalizer=divisor if is_array else None,
            )
    name = names[0]
    logits = draw_logits(133, (ROWS, CLASSES), name)
    targets = {"all-ignored": np.full(ROWS, -100), "bad-label": np.array([1, 2, -5, 0, 3])}
    for (t, target), divisor in product(targets.items(), (2.0, 0.0)):
        options = {"reduction": "mean", "normalizer": divisor, "validate": False}
        yield Case(
            f"normalizer/{t}/number{divisor:g}/{name}", "normalizer", logits, target, None, options
        )
    for label, shape in (("no-rows", (0, CLASSES)), ("no-classes", (3, 0))):
        options = {"reduction": "mean", "normalizer": 2.0}
        target = np.zeros(shape, dtype=dtype(name))
        empty = np.zeros(shape, dtype=dtype(name))
        yield Case(f"normalizer/{label}/{name}", "normalizer", empty, target, None, options)
