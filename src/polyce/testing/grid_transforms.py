"""The groups of the conformance grid about transformed logits, the z-loss and the rows' stats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np

from .case import USUAL_STATS, Case
from .dtypes import Array, dtype
from .grid_draw import CLASSES, ROWS, draw_labels, draw_logits, draw_probabilities
from .grid_values import (
    DOUBLE_MARGINS,
    MARGINS,
    PLACEMENTS,
    margin_rows,
    special_logits,
    special_targets,
)

CHANGES: dict[str, dict[str, Any]] = {
    "scale-0.37": {"logit_scale": 0.37},  # not exact in any binary format
    "scale-3": {"logit_scale": 3.0},
    "softcap-30": {"logit_softcap": 30.0},
    "softcap-50": {"logit_softcap": 50.0},
    "scale-0.37-softcap-30": {"logit_scale": 0.37, "logit_softcap": 30.0},
}
# The limits of logit_scale and logit_softcap.
ENDS = (1e-15, 1e15)
EXTREMES: dict[str, dict[str, Any]] = {
    f"scale-{scale}-softcap-{cap}": {"logit_scale": scale, "logit_softcap": cap}
    for scale, cap in product((None, *ENDS), (None, *ENDS))
    if (scale, cap) != (None, None)
}
ROWWISE: dict[str, Any] = {"reduction": "none"}


def transform_cases(names: Sequence[str]) -> Iterator[Case]:
    """Yield transforms and z-loss on special values, ties, confident rows and large offsets."""
    for name in names:
        yield from _special_cases(name)
        yield from _tie_cases(name)
        yield from _saturated_cases(name)
        yield from _extreme_cases(name)
        if name in ("float32", "float64"):
            yield from _margin_cases(name)
        else:
            yield from _narrow_cases(name)
    yield from _flat_cases(names[0])


def _case(label: str, name: str, logits: Array, target: Array, **options: Any) -> Case:
    return Case(
        f"transform/{label}/{name}",
        "transform",
        logits.astype(dtype(name)),
        target,
        None,
        ROWWISE | options,
    )


def _special_cases(name: str) -> Iterator[Case]:
    changes: dict[str, dict[str, Any]] = {
        "z-loss": {"z_loss": 0.01},
        "scale": {"logit_scale": 0.7},
        "softcap": {"logit_softcap": 5.0},
        "everything": {"z_loss": 0.01, "logit_scale": 0.7, "logit_softcap": 5.0},
    }
    logits, targets = special_logits(name), special_targets(len(PLACEMENTS), name)
    for (change, options), t, eps in product(
        changes.items(), ("kept", "soft", "sparse", "ignored"), (0.0, 0.1)
    ):
        if name == "float32" or (eps and t != "ignored" and change in ("softcap", "everything")):
            yield _case(
                f"special/{change}/{t}/smoothing-{eps:g}", name, logits, targets[t],
                **options, label_smoothing=eps,
            )  # fmt: skip


def _tie_cases(name: str) -> Iterator[Case]:
    """Yield equal logits, at 0 and where the softcap is almost flat."""
    for classes, value in product((2, CLASSES), (0.0, -3.0, 1e4)):
        logits = np.full((ROWS, classes), value)
        labels = np.arange(ROWS) % classes
        one_hot = (labels[:, None] == np.arange(classes)).astype(dtype(name))
        options = {"logit_scale": 0.7, "logit_softcap": 5.0, "z_loss": 0.01 if value else 0.0}
        for t, target in (("index", labels), ("one-hot", one_hot)):
            if t == "index" or name == "float32":
                label = f"tie/{classes}-classes/at{value:g}/{t}"
                yield _case(label, name, logits, target, **options)


def _saturated_cases(name: str) -> Iterator[Case]:
    """Yield logits at which tanh is 1 or still near 0, and the largest logits."""
    large = 6e4 if name == "float16" else 3e38
    rows = np.array(
        [
            [40.0, 60.0, 80.0, 10.0, -200.0, 0.0, -1.0],
            [400.0, 300.0, 500.0, 400.0, 500.0, -500.0, -400.0],
            [-400.0, -300.0, -500.0, -60.0, -80.0, -44.0, -46.0],
            [large, -large, large / 2, 0.0, 1.0, -large / 2, 30.0],
            [2.0**-20, -(2.0**-21), 2.0**-14, 0.0, 0.0, 2.0**-24, -(2.0**-20)],
        ]
    )
    targets = special_targets(ROWS, name)
    for t, cap, scale in product(("kept", "soft"), (5.0, 50.0), (None, 0.37)):
        options = {"logit_softcap": cap} | ({} if scale is None else {"logit_scale": scale})
        if t == "kept" or name in ("float32", "float64"):
            label = f"saturated/{t}/softcap-{cap:g}/scale-{scale or 1:g}"
            yield _case(label, name, rows, targets[t], **options)


def extreme_rows(name: str) -> Array:
    """Return ordinary rows, ties, and rows as large and as small as a dtype's numbers.

    Their differences are finite, which they must be if a scale makes them small again.
    """
    large, small = {
        "float16": (3e4, 2.0**-14),
        # For larger ones the tolerances, in float64 themselves, cannot be computed.
        "float64": (1e120, 2.0**-1000),
    }.get(name, (1.5e38, 2.0**-120))
    rows = draw_logits(146, (8, CLASSES), name).astype(np.float64)
    rows[1] = [0.0, 0.0, 1.0, 1.0, 1.0, -1.0, 0.5]
    rows[2] = -40.0
    rows[3] = [large, -large, large / 2, 0.0, 1.0, -large / 2, 30.0]
    rows[4] = [large / 2, large / 2, large / 4, -large / 4, 0.0, -1.0, 1.0]
    rows[5] = [small, -small, 0.0, 2 * small, 3 * small, 0.0, -small]
    rows[6] = [1e3, 1.001e3, -1e3, 0.0, -np.inf, 5e2, 1e-3]
    rows[7] *= 1e-4
    return rows


def _extreme_cases(name: str) -> Iterator[Case]:
    rows = extreme_rows(name)
    labels = np.arange(len(rows)) % CLASSES
    # The label of the row with a class at -inf is another class.
    soft = draw_probabilities(147, rows.shape, name, 1)
    soft[6] = soft[6] * (np.arange(CLASSES) != 4)
    plain = rows[[0, 1, 2, 6, 7]]
    for change, options in EXTREMES.items():
        yield _case(f"extreme/{change}/index", name, rows, labels, **options)
        yield _case(f"extreme/{change}/soft", name, rows, soft, **options)
        yield _case(f"extreme/{change}/z-loss", name, plain, labels[:5], **options, z_loss=0.01)
    for z_loss in (1e-30, 1e30):
        yield _case(f"extreme/z-loss-{z_loss:g}", name, plain, labels[:5], z_loss=z_loss)


def _margin_cases(name: str) -> Iterator[Case]:
    margins = MARGINS if name == "float32" else DOUBLE_MARGINS
    for (change, options), classes in product(CHANGES.items(), (2, 10)):
        labels = np.arange(len(margins)) % classes
        rows = margin_rows(141, classes, margins)
        one_hot = labels[:, None] == np.arange(classes)
        following = (labels + 1) % classes
        mixed = 0.75 * one_hot + 0.25 * (following[:, None] == np.arange(classes))
        given: list[tuple[str, Array, dict[str, float]]] = [
            ("top", labels, {}),
            ("wrong", following, {}),
            ("two-labels", mixed.astype(dtype(name)), {}),
            ("smoothing", labels, {"label_smoothing": 0.1, "z_loss": 1e-4}),
        ]
        for t, target, more in given if classes == 10 else given[:1]:
            label = f"margins/{change}/{classes}/{t}"
            yield _case(label, name, rows, target, **options, **more)
    classes = 10
    labels = np.arange(len(margins)) % classes
    one_hot = (labels[:, None] == np.arange(classes)).astype(dtype(name))
    for offset, (change, options) in product(
        (1e4, -3e4), (("z-loss", {"z_loss": 0.01}), ("scale", {"logit_scale": 0.37}))
    ):
        rows = margin_rows(142, classes, margins, offset)
        for t, target in (("top", labels), ("wrong", (labels + 1) % classes), ("one-hot", one_hot)):
            yield _case(f"offset/{offset:g}/{change}/{t}", name, rows, target, **options)
    # The z-loss where lse is a small difference of two numbers.
    near = np.full((ROWS, classes), -np.log(classes)) + np.arange(ROWS)[:, None] * 1e-5
    yield _case("lse-near-0", name, near, np.arange(ROWS), z_loss=0.5)
    many = margin_rows(143, 1000, margins[:6])
    for change in ("scale-3", "scale-0.37-softcap-30"):
        yield _case(f"margins/{change}/1000/top", name, many, np.arange(6), **CHANGES[change])


def _narrow_cases(name: str) -> Iterator[Case]:
    """Yield 16-bit logits, which must be computed in float32 and rounded once."""
    labels = np.arange(len(MARGINS)) % 10
    rows = margin_rows(144, 10, MARGINS)
    for change, reduction in product(CHANGES, ("none", "mean")):
        options = CHANGES[change] | {"reduction": reduction, "z_loss": 1e-4}
        yield _case(f"narrow/{change}/{reduction}", name, rows, labels, **options)
    shifted = rows + 1e3
    yield _case("narrow/offset1000/scale", name, shifted, labels, logit_scale=0.37)
    yield _case("narrow/offset1000/z-loss", name, shifted, labels, z_loss=0.01)


def flat_rows() -> Array:
    """Return two rows of 32000 classes, none of which stands out."""
    rows = np.tile(np.random.default_rng(145).normal(0.0, 0.25, 125), (2, 256))
    rows[1] = 0.25
    return rows


def _flat_cases(name: str) -> Iterator[Case]:
    for change in ("scale-0.37", "softcap-30"):
        target = np.array([7, 31999])
        yield _case(f"flat/32000/{change}", name, flat_rows(), target, **CHANGES[change])


def stats_cases(names: Sequence[str]) -> Iterator[Case]:
    """Yield calls that ask for all or some stats, on rows of every kind."""
    for name in names:
        yield from _special_stats(name)
        yield from _plain_stats(name)
        for change, options in EXTREMES.items():
            rows = extreme_rows(name)
            yield _stats(f"extreme/{change}", name, rows, np.arange(len(rows)) % 7, **options)
        if name in ("float32", "float64"):
            yield from _confident_stats(name)
    yield from _named_stats(names[0])
    name = names[0]
    yield _stats("flat/32000", name, flat_rows(), np.array([7, 31999]), label_smoothing=0.1)
    for other in names[1:]:
        soft = draw_probabilities(156, (ROWS, CLASSES), other, 1)
        yield _stats(f"probability/{other}", name, draw_logits(157, (ROWS, CLASSES), name), soft)


def _stats(
    label: str,
    name: str,
    logits: Array,
    target: Array,
    *,
    asked: Any = True,
    sample_weight: Array | None = None,
    **options: Any,
) -> Case:
    return Case(
        f"stats/{label}/{name}",
        "stats",
        logits.astype(dtype(name)),
        target,
        None,
        ROWWISE | {"return_stats": asked} | options,
        sample_weight=sample_weight,
    )


def _special_stats(name: str) -> Iterator[Case]:
    logits, targets = special_logits(name), special_targets(len(PLACEMENTS), name)
    half = (np.arange(len(PLACEMENTS)) % 2).astype(dtype(name))
    transforms: dict[str, dict[str, Any]] = {
        "plain": {},
        "everything": {"z_loss": 0.01, "logit_scale": 0.7, "logit_softcap": 5.0},
    }
    for t, (change, options) in product(targets, transforms.items()):
        if name == "float32" or (change == "plain") == (t in ("kept", "soft")):
            yield _stats(f"special/{t}/{change}", name, logits, targets[t], **options)
    for t in ("kept", "soft"):
        yield _stats(f"special/{t}/sampled", name, logits, targets[t], sample_weight=half)


def _plain_stats(name: str) -> Iterator[Case]:
    """Yield ordinary rows, ties and a single class."""
    logits = draw_logits(151, (ROWS, CLASSES), name)
    labels = draw_labels(152, (ROWS,), CLASSES)
    labels[0] = logits.astype(np.float64)[0].argmax()
    soft = draw_probabilities(153, (ROWS, CLASSES), name, 1)
    for reduction, (kind, target) in product(
        ("none", "sum", "mean"), (("index", labels), ("probability", soft))
    ):
        yield _stats(f"plain/{kind}/{reduction}", name, logits, target, reduction=reduction)
    # The first of several largest logits is predicted, whichever is the label.
    tied = np.zeros((CLASSES, CLASSES))
    tied[1:, 3] = tied[1:, 5] = tied[2:, 1] = 2.0
    tied[3, :] = -4.0
    tied[4] = [-np.inf, -np.inf, 1.0, -np.inf, 1.0, -np.inf, 1.0]
    uniform = np.full((CLASSES, CLASSES), 0.125).astype(dtype(name))
    changes: dict[str, dict[str, Any]] = {"plain": {}, "softcap": {"logit_softcap": 5.0}}
    for change, options in changes.items():
        yield _stats(f"tie/index/{change}", name, tied, np.arange(CLASSES), **options)
        label = np.full(CLASSES, 3)
        yield _stats(f"tie/same-index/{change}", name, tied, label, **options)
        yield _stats(f"tie/probability/{change}", name, tied, uniform, **options)
    # Different logits that tanh makes equal.
    flat = np.arange(ROWS)[:, None] * 100.0 + np.array([1000.0, 1500.0, 1250.0])
    yield _stats("saturated", name, flat, np.array([1, 0, 2, 1, 1]), logit_softcap=5.0)
    single = draw_logits(154, (ROWS, 1), name)
    zeros = np.zeros(ROWS, dtype=np.int64)
    yield _stats("one-class/index", name, single, zeros, logit_scale=0.7)
    yield _stats("one-class/probability", name, single, np.ones_like(single))


def _named_stats(name: str) -> Iterator[Case]:
    logits = draw_logits(155, (ROWS, CLASSES), name)
    labels = np.array([1, -100, 6, 0, 2])
    soft = draw_probabilities(155, (ROWS, CLASSES), name, 1)
    weight = np.array([1.0, 1.0, 0.0, 2.0, 0.5]).astype(dtype(name))
    usual = USUAL_STATS
    asked: list[Any] = [*usual, *((one,) for one in usual), ("entropy", "correct"), usual[::-1]]
    for i, names in enumerate(asked):
        label = names if isinstance(names, str) else f"tuple-{'-'.join(names)}"
        yield _stats(
            f"named/{label}", name, logits, (soft, labels)[i % 2], asked=names, reduction="mean",
            sample_weight=weight,
        )  # fmt: skip
    # The stand-in for a label that does not exist must not count as a correct prediction.
    logits = logits.copy()
    logits[1, 0] = 9.0
    for bad, eps in product((-1, CLASSES, 2**40), (0.0, 0.1)):
        target = np.array([1, bad, 6, 0, bad])
        yield _stats(
            f"bad-label/{bad}/smoothing-{eps:g}", name, logits, target, validate=False,
            label_smoothing=eps, sample_weight=weight,
        )  # fmt: skip


def _confident_stats(name: str) -> Iterator[Case]:
    margins = MARGINS if name == "float32" else DOUBLE_MARGINS
    labels = np.arange(len(margins)) % 10
    rows = margin_rows(158, 10, margins)
    one_hot = (labels[:, None] == np.arange(10)).astype(dtype(name))
    changes: dict[str, dict[str, Any]] = {"plain": {}, "z-loss": {"z_loss": 0.01}} | CHANGES
    for (change, options), (t, target) in product(
        changes.items(),
        (("top", labels), ("wrong", (labels + 1) % 10), ("one-hot", one_hot)),
    ):
        if t != "one-hot" or change == "plain":
            yield _stats(f"margins/{change}/{t}", name, rows, target, **options)
    for offset, t in product((1e4, -3e4), ("top", "wrong")):
        target = labels if t == "top" else (labels + 1) % 10
        yield _stats(f"offset/{offset:g}/{t}", name, rows + offset, target)
        yield _stats(f"offset/{offset:g}/{t}/scale", name, rows + offset, target, logit_scale=0.37)
