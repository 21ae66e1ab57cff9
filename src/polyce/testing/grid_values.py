"""The groups of the conformance grid about values: special ones, and lost digits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np

from .case import Case
from .dtypes import Array, dtype
from .grid_draw import CLASSES, ROWS, draw_logits, draw_probabilities

LABEL = 2
INF, NAN = np.inf, np.nan

PLACEMENTS = (
    "minus-inf-elsewhere",
    "minus-inf-at-label",
    "minus-inf-but-label",
    "minus-inf-but-other",
    "minus-inf-everywhere",
    "inf-at-label",
    "inf-elsewhere",
    "nan-at-label",
    "nan-elsewhere",
    "nan-and-inf",
)
"""Which special values a row holds, and where: rows of the special cases, in this order."""


def place(row: Array, placement: str) -> Array:
    """Return a row of logits with special values put in, relative to its label."""
    row = row.copy()
    other = 5
    if placement == "minus-inf-but-label":
        row[np.arange(row.size) != LABEL] = -INF
    elif placement == "minus-inf-but-other":
        row[np.arange(row.size) != other] = -INF
    elif placement == "minus-inf-everywhere":
        row[:] = -INF
    elif placement == "nan-and-inf":
        row[0], row[other] = NAN, INF
    else:
        value, where = placement.rsplit("-", 1)[0].removesuffix("-at"), placement
        number = {"minus-inf": -INF, "inf": INF, "nan": NAN}[value]
        row[LABEL if where.endswith("label") else other] = number
    return row


def special_logits(name: str) -> Array:
    """Return one row for every placement."""
    plain = np.random.default_rng(71).normal(0.0, 2.0, (len(PLACEMENTS), CLASSES))
    return np.stack(
        [place(row, placement) for row, placement in zip(plain, PLACEMENTS, strict=True)]
    ).astype(dtype(name))


def special_targets(rows: int, name: str) -> dict[str, Array]:
    """Return targets of every kind for rows of seven classes, mostly of one label."""
    one_hot = np.zeros((rows, CLASSES))
    one_hot[:, LABEL] = 1.0
    soft = np.tile(np.array([0.0, 0.125, 0.5, 0.0, 0.25, 0.125, 0.0]), (rows, 1))
    sparse = np.tile(np.array([0.0, 0.25, 0.75, 0.0, 0.0, 0.0, 0.0]), (rows, 1))
    return {
        "kept": np.full(rows, LABEL, dtype=np.int64),
        "ignored": np.where(np.arange(rows) % 2 == 0, -100, LABEL).astype(np.int64),
        "all-ignored": np.full(rows, -100, dtype=np.int64),
        "one-hot": one_hot.astype(dtype(name)),
        "soft": soft.astype(dtype(name)),
        "sparse": sparse.astype(dtype(name)),
        "nothing": np.zeros((rows, CLASSES), dtype=dtype(name)),
    }


def _special_weights(name: str) -> dict[str, Array | None]:
    weight = np.array([0.5, 1.0, 2.0, 0.25, 1.5, 0.75, 1.0])
    no_label, no_other, nan_unused = weight.copy(), weight.copy(), weight.copy()
    no_label[LABEL], no_other[5], nan_unused[4] = 0.0, 0.0, NAN
    inf_label, inf_other = weight.copy(), weight.copy()
    inf_label[LABEL], inf_other[5] = INF, INF
    weights = {
        "weighted": weight,
        "zero-at-label": no_label,
        "zero-elsewhere": no_other,
        "all-zero": np.zeros(CLASSES),
        "nan-unused": nan_unused,
        "inf-at-label": inf_label,
        "inf-elsewhere": inf_other,
    }
    return {"unweighted": None} | {key: w.astype(dtype(name)) for key, w in weights.items()}


def special_cases(names: Sequence[str]) -> Iterator[Case]:
    """Yield infinities, nans, ties, total weights of 0 and numbers close to the largest."""
    for name in names:
        logits = special_logits(name)
        weights = _special_weights(name)
        for (t, target), (w, weight), eps in product(
            special_targets(len(PLACEMENTS), name).items(), weights.items(), (0.0, 0.1, 1.0)
        ):
            options = {"reduction": "none", "label_smoothing": eps}
            label = f"special/rows/{t}/{w}/smoothing-{eps:g}/{name}"
            yield Case(label, "special", logits, target, weight, options)
        yield from _tie_cases(name)
        yield from _large_cases(name)
    for name in (n for n in names if n in ("float32", "float64")):
        # One special row among ordinary ones: its effect on a sum, and on other rows.
        logits = special_logits(name)
        plain = np.random.default_rng(72).normal(0.0, 2.0, (ROWS, CLASSES)).astype(dtype(name))
        for (i, placement), t, eps, reduction in product(
            enumerate(PLACEMENTS), ("kept", "ignored", "one-hot"), (0.0, 0.1), ("sum", "mean")
        ):
            mixed = plain.copy()
            mixed[2] = logits[i]
            yield Case(
                f"special/{placement}/{t}/smoothing-{eps:g}/{reduction}/{name}",
                "special",
                mixed,
                special_targets(ROWS, name)[t],
                weights_of_rows(name),
                {"reduction": reduction, "label_smoothing": eps},
            )
        for (w, weight), t, eps, reduction in product(
            _special_weights(name).items(),
            ("kept", "all-ignored", "soft"),
            (0.0, 0.1, 1.0),
            ("sum", "mean"),
        ):
            yield Case(
                f"special/total-weight/{t}/{w}/smoothing-{eps:g}/{reduction}/{name}",
                "special",
                plain,
                special_targets(ROWS, name)[t],
                weight,
                {"reduction": reduction, "label_smoothing": eps},
            )


def weights_of_rows(name: str) -> Array:
    """Return class weights in eighths."""
    return (np.arange(CLASSES) / 8 + 0.5).astype(dtype(name))


def _tie_cases(name: str) -> Iterator[Case]:
    """Yield equal logits: a maximum or a clamp has no derivative there, but the loss has."""
    for classes, value, eps, reduction in product(
        (2, CLASSES), (0.0, -3.0, 1e4), (0.0, 0.1), ("none", "mean")
    ):
        logits = np.full((ROWS, classes), value, dtype=dtype(name))
        labels = np.arange(ROWS) % classes
        one_hot = (labels[:, None] == np.arange(classes)).astype(dtype(name))
        half = np.full((ROWS, classes), 0.5, dtype=dtype(name))
        for t, target in (("index", labels), ("one-hot", one_hot), ("half", half)):
            yield Case(
                f"special/tie/{classes}-classes/at{value:g}/{t}/smoothing-{eps:g}"
                f"/{reduction}/{name}",
                "special",
                logits,
                target,
                None,
                {"reduction": reduction, "label_smoothing": eps},
            )


def _large_cases(name: str) -> Iterator[Case]:
    """Yield logits near the largest float32: their differences overflow, but not the answers."""
    if name == "float16":
        return
    rows = np.zeros((ROWS, CLASSES))
    rows[0, LABEL], rows[0, 5] = 3e38, -3e38
    rows[1, LABEL], rows[1, 5] = -3e38, 3e38
    rows[2, :] = 3e38
    rows[3, :] = -3e38
    rows[4, 5], rows[4, 6] = 3e38, 3e38
    for t, target in special_targets(ROWS, name).items():
        if t in ("kept", "one-hot"):
            options = {"reduction": "none"}
            yield Case(
                f"special/large/{t}/{name}", "special", rows.astype(dtype(name)), target, None,
                options,
            )  # fmt: skip
    # With smoothing every class counts, and the sum of all differences must not overflow.
    smooth = {"reduction": "none", "label_smoothing": 0.1}
    target = special_targets(ROWS, name)["kept"]
    lower = (rows / 16).astype(dtype(name))
    yield Case(f"special/large/smoothing/{name}", "special", lower, target, None, smooth)


MARGINS = (0.5, 1.3, 2.9, 5.1, 8.7, 12.3, 16.9, 17.7, 24.3, 38.1, 55.7, 79.9)
DOUBLE_MARGINS = (0.3, 4.7, 17.7, 36.1, 37.3, 52.9, 88.1, 151.3, 303.7, 498.1, 649.3, 699.7)


def margin_rows(seed: int, classes: int, margins: Sequence[float], offset: float = 0.0) -> Array:
    """Return rows whose classes 0, 1, ... lead the largest other logit by the given margins."""
    rows = np.random.default_rng(seed).normal(0.0, 1.0, (len(margins), classes)) + offset
    for i, margin in enumerate(margins):
        rows[i, i % classes] = -INF
        rows[i, i % classes] = rows[i].max() + margin
    return rows


def accuracy_cases(names: Sequence[str]) -> Iterator[Case]:
    """Yield rows on which the textbook formula loses its digits."""
    labels = np.arange(len(MARGINS))
    for name in (n for n in names if n in ("float32", "float64")):
        margins = MARGINS if name == "float32" else DOUBLE_MARGINS

        def case(
            label: str, logits: Array, target: Array, name: str = name, **options: Any
        ) -> Case:
            given = {"reduction": "none"} | options
            return Case(
                f"accuracy/{label}/{name}", "accuracy", logits.astype(dtype(name)), target, None,
                given,
            )  # fmt: skip

        for classes in (2, 10, 1000):
            target = labels % classes
            one_hot = (target[:, None] == np.arange(classes)).astype(dtype(name))
            rows = margin_rows(81, classes, margins)
            for eps in (0.0, 1e-6, 1e-3, 0.1):
                yield case(
                    f"margins/{classes}/smoothing-{eps:g}", rows, target, label_smoothing=eps
                )
            yield case(f"margins/{classes}/one-hot", rows, one_hot)
            yield case(f"margins/{classes}/mean", rows, target, reduction="mean")
            # The label lies below the top by the margin, not above.
            yield case(f"margins/{classes}/wrong", rows, (target + 1) % classes)
            spread = (target + 1) % classes
            mixed = 0.75 * one_hot + 0.25 * (spread[:, None] == np.arange(classes))
            yield case(f"margins/{classes}/two-labels", rows, mixed.astype(dtype(name)))
        for classes, offset in product((10, 1000), (1e4, -3e4)):
            rows = margin_rows(82, classes, margins, offset)
            target = labels % classes
            one_hot = (target[:, None] == np.arange(classes)).astype(dtype(name))
            for eps in (0.0, 0.1):
                yield case(
                    f"offset/{offset:g}/{classes}/smoothing-{eps:g}", rows, target,
                    label_smoothing=eps,
                )  # fmt: skip
            yield case(f"offset/{offset:g}/{classes}/one-hot", rows, one_hot)
        spread_out = np.random.default_rng(83).normal(0.0, 1000.0, (len(MARGINS), 10))
        yield case("spread", spread_out, labels % 10)
        yield case("spread/top", spread_out, spread_out.argmax(axis=1))
        yield case("spread/smoothing", spread_out, labels % 10, label_smoothing=0.1)
        yield from _likeliest_cases(name)
    for name in names:
        yield from _long_cases(name)
        yield from _narrow_cases(name)


def _likeliest_cases(name: str) -> Iterator[Case]:
    """Yield rows of 512 classes whose likeliest class has a small probability and coefficient."""
    rows, classes = 8, 512
    one_hot = (np.arange(rows)[:, None] * 7 == np.arange(classes)).astype(np.float64)
    drawn = draw_probabilities(87, (rows, classes), "float64", 1)
    targets = {"one-hot": one_hot, "drawn": drawn, "mixed": 0.5 * one_hot + 0.5 * drawn}
    for (kind, spread), (t, target) in product((("flat", 0.25), ("mild", 1.0)), targets.items()):
        yield Case(
            f"accuracy/likeliest/{kind}/{t}/{name}",
            "accuracy",
            draw_logits(88, (rows, classes), name, spread),
            target.astype(dtype(name)),
            None,
            {"reduction": "none"},
        )


def _long_cases(name: str) -> Iterator[Case]:
    """Yield many classes, whose sum accumulates errors, and many rows, whose sum does."""
    flat = np.tile(np.random.default_rng(84).normal(0.0, 0.25, 125), (2, 256))
    flat[1] = 0.25
    flat = flat.astype(dtype(name))
    labels = np.array([7, 31999])
    for eps in (0.0, 0.1):
        options = {"reduction": "none", "label_smoothing": eps}
        yield Case(
            f"accuracy/flat/32000/smoothing-{eps:g}/{name}", "accuracy", flat, labels, None, options
        )
        # The classes of a row far apart in memory, where libraries add them up in another order.
        yield Case(
            f"accuracy/apart/32000/smoothing-{eps:g}/{name}", "accuracy", flat.T[None].copy(),
            labels[None], None, options,
        )  # fmt: skip
    uniform = np.full((2, 32000), 1.0 / 32000).astype(dtype(name))
    none = {"reduction": "none"}
    yield Case(f"accuracy/flat/32000/uniform/{name}", "accuracy", flat, uniform, None, none)
    if name == "float64":
        return
    # A float16 cannot count these rows, and a float32 cannot add them up one by one.
    rows = np.random.default_rng(85).normal(0.0, 1.0, (20, 2))
    logits = np.tile(rows, (3500, 1)).astype(dtype(name))
    labels = np.arange(70000) // 20 % 2
    weight = np.array([0.3, 0.7]).astype(dtype(name))
    for reduction, w, given in (("sum", "unweighted", None), ("mean", "weighted", weight)):
        yield Case(
            f"accuracy/70000-rows/{w}/{reduction}/{name}", "accuracy", logits, labels, given,
            {"reduction": reduction},
        )  # fmt: skip


def _narrow_cases(name: str) -> Iterator[Case]:
    """Yield 16-bit logits, which must be computed in float32 and rounded once."""
    if name not in ("float16", "bfloat16"):
        return
    labels = np.arange(len(MARGINS))
    for classes, offset in ((10, 0.0), (10, 1e3), (1000, 0.0)):
        logits = margin_rows(86, classes, MARGINS, offset).astype(dtype(name))
        target = labels % classes
        for eps, reduction in product((0.0, 0.1), ("none", "mean")):
            yield Case(
                f"accuracy/narrow/{classes}/offset{offset:g}/smoothing-{eps:g}/{reduction}/{name}",
                "accuracy",
                logits,
                target,
                None,
                {"reduction": reduction, "label_smoothing": eps},
            )
