"""The exact answers of polyce.testing: right by closed forms, by torch's autograd and by mpmath."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest

from polyce.testing import exact_answer
from polyce.testing.oracle_row import measures

pytestmark = [pytest.mark.only("numpy"), pytest.mark.tests_of_tests]

LOGITS = np.random.default_rng(1).normal(0.0, 2.0, (5, 7))
LABELS = np.array([1, 3, 6, 0, 3])
SOFT = np.random.default_rng(2).dirichlet(np.ones(7), 5)
WEIGHT = np.array([0.5, 1.0, 2.0, 0.25, 1.5, 0.75, 1.0])
SAMPLE_WEIGHT = np.array([0.5, 2.0, 0.0, 1.25, -0.75])
TRANSFORMS: tuple[dict[str, Any], ...] = (
    {},
    {"logit_scale": 0.7},
    {"logit_softcap": 5.0},
    {"logit_scale": 3.0, "logit_softcap": 2.5},
)


def assert_close(got: Any, want: Any, ulp: float = 2.0) -> None:
    want = np.asarray(want)
    assert np.all(np.abs(np.asarray(got) - want) <= ulp * np.spacing(np.abs(want)))


@pytest.mark.parametrize("offset", [0.0, 2.0**20])
@pytest.mark.parametrize("margin", [0.0, 0.5, 1.0, 17.0, 36.75, 100.0, 700.0])
def test_two_classes_lose_the_softplus_of_their_difference(margin: float, offset: float) -> None:
    logits = np.array([[margin, 0.0]] * 2) + offset
    answer = exact_answer(logits, np.array([0, 1]), reduction="none")
    tail = math.exp(-margin)
    assert_close(answer.loss, [math.log1p(tail), margin + math.log1p(tail)])
    small, large = tail / (1 + tail), 1 / (1 + tail)
    assert_close(answer.grad, [[-small, small], [large, -large]], ulp=3)


@pytest.mark.parametrize("classes", [1, 2, 3, 1000])
def test_equal_logits_lose_the_logarithm_of_the_number_of_classes(classes: int) -> None:
    logits = np.full((2, classes), -7.25)
    answer = exact_answer(logits, np.array([0, classes - 1]), label_smoothing=0.25)
    assert_close(answer.loss, math.log(classes))
    uniform = exact_answer(logits, np.full((2, classes), 1.0))
    assert_close(uniform.loss, classes * math.log(classes))
    assert np.all(uniform.grad == 0.0)


def test_a_weighted_mean_with_an_ignored_row() -> None:
    logits = np.array([[0.0, math.log(3.0)], [5.0, np.nan], [0.0, 0.0]])
    weight = np.array([2.0, 0.5])
    answer = exact_answer(logits, np.array([1, 7, 0]), weight, ignore_index=7)
    expected = (0.5 * math.log(4 / 3) + 2.0 * math.log(2.0)) / 2.5
    assert_close(answer.loss, expected, ulp=4)
    assert np.all(answer.grad[1] == 0.0)
    assert_close(answer.grad[2], [-0.4, 0.4])


def test_z_loss_adds_the_square_of_lse_times_the_weight_of_the_label() -> None:
    logits = np.zeros((2, 4)) + np.array([[1.0], [-2.0]])
    lse = np.array([1.0, -2.0]) + math.log(4.0)
    weight = np.array([1.0, 1.0, 0.5, 3.0])
    labels = np.array([2, 3])
    answer = exact_answer(logits, labels, weight, reduction="none", z_loss=0.25)
    w = weight[labels]
    assert_close(answer.loss, w * (math.log(4.0) + 0.25 * lse**2), ulp=4)
    uniform = exact_answer(logits, np.full((2, 4), 0.25), weight, reduction="none", z_loss=0.25)
    assert_close(uniform.loss, weight.mean() * math.log(4.0) + 0.25 * lse**2, ulp=4)
    # dz/dlogit is 2 * 0.25 * lse / 4 at every class.
    assert_close(answer.grad[0, [0, 1, 3]], 0.5 * (0.25 + 0.5 * lse[0] / 4), ulp=4)
    # The z-loss of lse = m + h counts as much as |m| + h does, and its slope likewise.
    size = 2.0 + math.log(4.0)
    assert_close(answer.loss_scale[1], 3.0 * (math.log(4.0) + 0.25 * size**2), ulp=4)
    assert_close(answer.softmax_part[1, 0], 3.0 * (1 + 0.5 * size) / 4, ulp=4)
    assert_close(answer.softmax_part[1, 3], 3.0 * (0.75 + 0.5 * size / 4), ulp=4)
    assert_close(answer.square_part[1], 3.0 * 0.25 * size**2, ulp=4)
    assert_close(answer.pull_part[1], 3.0 * 0.5 * size / 4, ulp=4)


def test_the_likeliest_class_is_measured_by_the_smaller_terms() -> None:
    quarters = np.full((2, 4), 0.25)
    logits = np.array([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, math.log(27.0)]])
    answer = exact_answer(logits, quarters, reduction="none")
    # The first of 1/4 - 1/4 and 3/4 - 3/4; the second of 9/10 - 1/4 and 3/4 - 1/10.
    assert_close(answer.softmax_part[[0, 1], [0, 3]], [0.25, 0.1])
    assert_close(answer.coefficient_part[[0, 1], [0, 3]], [0.25, 0.75])
    assert_close(answer.grad[1, 3], 0.65)
    # A label always takes the form 1 - p.
    labels = exact_answer(logits, np.array([0, 3]), reduction="none")
    assert_close(labels.softmax_part[[0, 1], [0, 3]], [0.75, 0.1])


def test_a_scale_multiplies_and_a_softcap_bounds_the_logits() -> None:
    scaled = exact_answer(LOGITS, LABELS, reduction="none", logit_scale=0.5)
    plain = exact_answer(LOGITS * 0.5, LABELS, reduction="none")
    assert_close(scaled.loss, plain.loss, ulp=0)
    assert_close(scaled.grad, plain.grad * 0.5, ulp=0)
    assert_close(scaled.gap, plain.gap, ulp=1)
    assert scaled.transform == "scale"
    assert plain.transform == "none"
    # In float64 tanh(±1e4) is ±1 and its slope 0; tanh(log 2) is 3/5 and its slope 16/25.
    logits = np.array([[1e4, 5.0 * math.log(2.0), -1e4]])
    capped = exact_answer(logits, np.array([1]), reduction="none", logit_softcap=5.0)
    plain = exact_answer(np.array([[5.0, 3.0, -5.0]]), np.array([1]), reduction="none")
    assert_close(capped.loss, plain.loss)
    assert_close(capped.grad, plain.grad * np.array([0.0, 16 / 25, 0.0]), ulp=4)
    assert_close(capped.gap, plain.gap)
    assert_close(capped.angle, [[4000.0, 2.0 * math.log(2.0), 4000.0]])
    assert capped.transform == "softcap"


def test_minus_infinity_stays_that_under_a_softcap_and_infinity_has_no_answer() -> None:
    logits = np.array([[-np.inf, 1.0, 2.0], [np.inf, 1.0, 2.0], [np.nan, 1.0, 2.0]])
    for options in TRANSFORMS:
        answer = exact_answer(logits, np.array([1, 0, 1]), reduction="none", **options)
        without = exact_answer(logits[:1, 1:], np.array([0]), reduction="none", **options)
        assert answer.loss[0] == without.loss[0]
        assert answer.grad[0].tolist() == [0.0, *without.grad[0]]
        assert np.all(np.isnan(answer.loss[1:]))
        assert np.all(np.isnan(answer.grad[1:]))
    masked = exact_answer(logits[:1], np.array([0]), reduction="none", logit_softcap=5.0)
    assert masked.loss == np.inf
    assert masked.grad[0, 0] == 0.0
    scaled = exact_answer(logits[:1], np.array([0]), reduction="none", logit_scale=0.5)
    assert scaled.grad[0, 0] == -0.5


@pytest.mark.parametrize("target", [LABELS, SOFT], ids=["index", "probability"])
def test_sample_weights_multiply_rows_and_count_in_the_mean(target: Any) -> None:
    weight = WEIGHT if target.ndim == 1 else None
    logits = LOGITS.copy()
    rows = exact_answer(logits, target, weight, reduction="none", z_loss=0.01)
    logits[2] = np.nan  # of sample weight 0
    given: dict[str, Any] = {"sample_weight": SAMPLE_WEIGHT, "z_loss": 0.01}
    answer = exact_answer(logits, target, weight, reduction="none", **given)
    assert_close(answer.loss, SAMPLE_WEIGHT * rows.loss)
    assert_close(answer.grad, SAMPLE_WEIGHT[:, None] * rows.grad)
    counted = SAMPLE_WEIGHT * (WEIGHT[LABELS] if target.ndim == 1 else 1.0)
    total = (SAMPLE_WEIGHT * rows.loss).sum()
    mean = exact_answer(logits, target, weight, **given)
    assert_close(mean.loss, total / counted.sum(), ulp=16)
    assert_close(mean.grad, answer.grad / counted.sum(), ulp=16)
    for divisor in (3.0, -0.5, np.array(8, np.int32)):
        divided = exact_answer(logits, target, weight, normalizer=divisor, **given)
        assert_close(divided.loss, total / divisor, ulp=16)
        assert_close(divided.grad, answer.grad / divisor, ulp=4)
    # Nothing cancels in the magnitudes, which use the absolute values of all rows.
    size = np.abs(SAMPLE_WEIGHT) @ rows.loss_scale / abs(counted.sum())
    assert_close(mean.loss_scale, size * np.abs(counted).sum() / abs(counted.sum()), ulp=16)
    assert mean.loss_scale > abs(mean.loss)


def test_a_mean_over_weights_that_sum_to_nothing() -> None:
    logits = np.zeros((2, 2))
    labels, none = np.array([0, 5]), np.zeros(2)
    answer = exact_answer(logits, labels, sample_weight=none)
    assert np.isnan(answer.loss)
    assert np.all(answer.grad == 0.0)
    assert not answer.stats.valid.any()
    assert exact_answer(logits, labels[:1].repeat(2), normalizer=0.0).loss == np.inf
    opposite = exact_answer(logits, labels * 0, sample_weight=np.array([1.0, -1.0]))
    assert np.isnan(opposite.loss)
    assert opposite.grad[0].tolist() == [-np.inf, np.inf]
    # A label out of range counts as 1, times its sample weight.
    half = np.array([1.0, 0.5])
    bad = exact_answer(logits, labels, np.array([0.5, 0.5]), sample_weight=half)
    assert np.isnan(bad.loss)
    assert_close(bad.grad[0], [-0.25, 0.25])


def test_stats_of_ordinary_ignored_and_special_rows() -> None:
    inf, nan = np.inf, np.nan
    third = math.log(2.0)
    logits = np.array(
        [[0.0, third, -inf], [1.0, 3.0, 3.0], [nan, 0.0, 0.0], [0.0, inf, 0.0], [-inf] * 3]
        + [[0.0, 0.0, 0.0]] * 3
    )
    labels = np.array([1, 2, 1, 1, 1, -100, 0, 7])
    weight = np.array([1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    stats = exact_answer(logits, labels, reduction="none", sample_weight=weight).stats
    top = 3.0 + math.log(2.0 + math.exp(-2.0))
    assert_close(stats.lse[[0, 1, 7]], [math.log(3.0), top, math.log(3.0)])
    flat = math.exp(-2.0) / (2.0 + math.exp(-2.0))
    expected = [math.log(3.0) - third * 2 / 3, top - 3.0 + 2.0 * flat, math.log(3.0)]
    assert_close(stats.entropy[[0, 1, 7]], expected, ulp=8)
    assert np.all(np.isnan(stats.lse[2:7]))
    assert np.all(np.isnan(stats.entropy[2:7]))
    assert stats.prediction.tolist() == [1, 1, -1, -1, -1, -1, -1, 0]
    assert stats.correct.tolist() == [True] + [False] * 7
    assert stats.valid.tolist() == [True] * 5 + [False, False, True]
    # The first class of the largest probability, and of the largest logit before the softcap.
    soft = np.array([[0.4, 0.4, 0.2], [0.2, 0.4, 0.4], [1.0, 0.0, 0.0]])
    logits = np.array([[2.0, 2.0, 1.0], [1e4, 2e4, 3e4], [nan, 0.0, 0.0]])
    stats = exact_answer(logits, soft, reduction="none", logit_softcap=2.0).stats
    assert stats.prediction.tolist() == [0, 2, -1]
    assert stats.correct.tolist() == [True, False, False]
    assert_close(stats.lse[1], 2.0 + math.log(3.0))
    assert_close(stats.entropy[1], math.log(3.0))


def test_stats_beside_the_target_on_paper() -> None:
    third = math.log(2.0)
    logits = np.array([[0.0, third, -np.inf]] * 4 + [[3.0, 3.0, 3.0], [np.nan, 0.0, 0.0]])
    labels = np.array([1, 0, 2, 7, 2, 1])
    stats = exact_answer(logits, labels, reduction="none").stats
    assert_close(stats.top_probability[:5], [2 / 3] * 4 + [1 / 3])
    assert np.isnan(stats.top_probability[5])
    assert_close(stats.brier[[0, 1, 2, 4]], [2 / 9, 8 / 9, 14 / 9, 2 / 3])
    assert np.all(np.isnan(stats.brier[[3, 5]]))
    assert stats.rank.tolist() == [0, 1, 2, -1, 0, -1]
    assert not stats.brier_scale.any()
    # Two thirds of the probability; a third is what the likeliest class is measured by.
    soft = np.array([[0.25, 0.5, 0.25]] * 2)
    stats = exact_answer(logits[[0, 5]], soft, reduction="none", label_smoothing=0.1).stats
    off = np.array([1 / 12, 1 / 6, 1 / 4])
    assert_close(stats.brier[0], (off**2).sum(), ulp=4)
    size = np.array([1 / 3, 1 / 3, 0.0])
    assert_close(stats.brier_scale[0], (off * (size + off)).sum(), ulp=4)
    assert_close(stats.brier_reach[0], (off * size).sum(), ulp=4)
    assert_close(stats.brier_square[0], 2 / 9, ulp=4)
    assert stats.brier_gap[0] == 0.0
    assert stats.rank.tolist() == [-1, -1]


@pytest.mark.parametrize("shape", [(3, 0), (2, 0, 3), (0, 4), (2, 4, 0)])
def test_stats_without_rows_or_classes(shape: tuple[int, ...]) -> None:
    answer = exact_answer(np.zeros(shape), np.zeros(shape), reduction="none", z_loss=0.1)
    rows = (shape[0], *shape[2:])
    assert np.all(answer.loss == 0.0)
    for name in ("lse", "entropy", "prediction", "correct", "valid", "brier", "rank"):
        assert getattr(answer.stats, name).shape == rows
    assert np.all(np.isnan(answer.stats.lse))
    assert np.all(answer.stats.prediction == -1)
    assert not answer.stats.correct.any()
    assert answer.stats.valid.all()


def test_the_measures_of_a_row_on_paper() -> None:
    # Beside class 1 there are gaps of 0 and log 2, weighing 1 and a half.
    row = (math.log(2.0), 5.0, 0.0, -math.inf)
    seen = measures(row, 1)
    assert seen is not None
    assert_close(seen.gap, [0.0, 0.0, math.log(2.0), 0.0])
    assert_close(seen.spread, math.log(2.0) / 3, ulp=4)
    assert_close(seen.lead, 5.0 - math.log(2.0), ulp=4)
    wrong = measures(row, 2)
    assert wrong is not None
    assert_close(wrong.lead, 5.0)
    alone = measures((3.0, -math.inf), 0)
    assert alone is not None
    assert (alone.spread, alone.lead, alone.entropy, alone.lse) == (0.0, 0.0, 0.0, 3.0)
    assert measures((3.0, math.inf), 0) is None


# The oracle against the plain formulas, differentiated by torch


def option_product() -> list[dict[str, Any]]:
    """List every second combination of the options."""
    given = product(
        ("index", "probability"),
        (None, SAMPLE_WEIGHT),
        (0.0, 0.125),
        TRANSFORMS,
        (0.0, 0.1),
        (None, WEIGHT),
        (("none", None), ("sum", None), ("mean", None), ("mean", -3.5)),
    )
    names = ("kind", "sample_weight", "z_loss", "transform", "label_smoothing", "weight", "reduce")
    return [dict(zip(names, values, strict=True)) for values in given][::3]


@pytest.mark.only("torch")
def test_answers_are_those_of_autograd_on_the_plain_formulas() -> None:
    import torch

    cotangent = np.array([1.0, -2.0, 0.5, 3.0, 1.0])
    for options in option_product():
        soft, (reduction, normalizer) = options["kind"] == "probability", options["reduce"]
        target = SOFT if soft else LABELS
        ignored = not soft and normalizer is None
        answer = exact_answer(
            LOGITS, target, options["weight"], label_smoothing=options["label_smoothing"],
            z_loss=options["z_loss"], sample_weight=options["sample_weight"], reduction=reduction,
            normalizer=normalizer, ignore_index=3 if ignored else -100, **options["transform"],
            grad_output=cotangent if reduction == "none" else None,
        )  # fmt: skip

        logits = torch.tensor(LOGITS, requires_grad=True)
        x = logits * options["transform"].get("logit_scale", 1.0)
        cap = options["transform"].get("logit_softcap")
        x = x if cap is None else cap * torch.tanh(x / cap)
        lse = torch.logsumexp(x, dim=1)
        w = torch.ones(7) if options["weight"] is None else torch.tensor(options["weight"])
        y = torch.tensor(LABELS)
        p = torch.tensor(SOFT) if soft else torch.nn.functional.one_hot(y, 7).double()
        eps = options["label_smoothing"]
        zeta = options["z_loss"] * (1.0 if soft else w[y])
        rows = ((p * (1 - eps) + eps / 7) * w * (lse[:, None] - x)).sum(dim=1) + zeta * lse**2
        v = torch.ones(5, dtype=torch.float64)
        if options["sample_weight"] is not None:
            v = torch.tensor(options["sample_weight"])
        v = torch.where(y == 3, 0.0, v) if ignored else v
        rows = rows * v
        divisor = normalizer or float((v if soft else v * w[y]).sum())
        loss = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / divisor}[reduction]
        (loss * torch.tensor(cotangent) if reduction == "none" else loss).sum().backward()
        close: dict[str, float] = {"rtol": 1e-13, "atol": 1e-14}
        np.testing.assert_allclose(answer.loss, loss.detach().numpy(), **close)
        assert logits.grad is not None
        np.testing.assert_allclose(answer.grad, logits.grad.numpy(), **close)

        counts = v.numpy() != 0
        softmax, stats = torch.softmax(x, dim=1), answer.stats
        entropy = -(softmax * softmax.log()).sum(dim=1)
        assert np.array_equal(stats.valid, counts)
        for got, want in ((stats.lse, lse), (stats.entropy, entropy)):
            expected = np.where(counts, want.detach().numpy(), np.nan)
            np.testing.assert_allclose(got, expected, rtol=1e-13)
        guess = LOGITS.argmax(axis=1)
        assert np.array_equal(stats.prediction, np.where(counts, guess, -1))
        right = guess == (SOFT.argmax(axis=1) if soft else LABELS)
        assert np.array_equal(stats.correct, counts & right)


# The oracle against mpmath, for cases where float64 has no digits left


def by_mpmath(x: Any, r: Any, options: dict[str, Any]) -> tuple[list[float], list[list[float]]]:
    """Compute (loss, lse, entropy) and (gradient) of one row by the plain formulas, 800 digits."""
    import mpmath  # torch depends on it

    with mpmath.workdps(800):
        x, r = [mpmath.mpf(v) for v in x.tolist()], [mpmath.mpf(v) for v in r.tolist()]
        slopes = [mpmath.mpf(options.get("logit_scale", 1.0))] * len(x)
        x = [v * slopes[0] for v in x]
        if "logit_softcap" in options:
            cap = mpmath.mpf(options["logit_softcap"])
            tanh = [mpmath.tanh(v / cap) for v in x]
            x = [cap * t for t in tanh]
            slopes = [slopes[0] * (1 - t * t) for t in tanh]
        zeta = mpmath.mpf(options.get("z_loss", 0.0))
        total = sum(mpmath.exp(v) for v in x)
        lse, p = mpmath.log(total), [mpmath.exp(v) / total for v in x]
        loss = sum(c * (lse - v) for c, v in zip(r, x, strict=True)) + zeta * lse**2
        grad = [
            s * ((sum(r) + 2 * zeta * lse) * q - c) for s, q, c in zip(slopes, p, r, strict=True)
        ]
        entropy = sum(q * (lse - v) for q, v in zip(p, x, strict=True))
        return [float(v) for v in (loss, lse, entropy)], [float(g) for g in grad]


@pytest.mark.only("torch")
@pytest.mark.parametrize("options", [o | z for o in TRANSFORMS for z in ({}, {"z_loss": 0.01})])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_confident_rows_keep_every_digit_under_every_option(
    options: dict[str, Any], offset: float
) -> None:
    rows = np.random.default_rng(3).normal(0.0, 1.0, (6, 5))
    rows[np.arange(6), 2] = [3.0, 17.7, 38.1, 88.3, 303.7, 699.7]
    rows += offset
    if "logit_softcap" in options:
        # A cap of 30 leaves gaps of up to 60, and slopes down to exp(-46).
        rows, options = np.clip(rows, -500.0, 500.0), options | {"logit_softcap": 30.0}
    one_hot = np.arange(5) == 2
    two = np.array([0.25, 0.0, 0.75, 0.0, 0.0])
    for r, target in ((one_hot, np.full(6, 2)), (two, np.tile(two, (6, 1)))):
        answer = exact_answer(rows, target, reduction="none", **options)
        for i, x in enumerate(rows):
            (loss, lse, entropy), grad = by_mpmath(x, r.astype(np.float64), options)
            assert_close(answer.loss[i], loss, ulp=0.5)
            assert_close(answer.grad[i], grad, ulp=0.5)
            assert_close(answer.stats.lse[i], lse, ulp=0.5)
            assert_close(answer.stats.entropy[i], entropy, ulp=0.5)
