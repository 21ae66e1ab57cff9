"""Scores of logits: the figures, their errors, what is left out, and the temperature's fit."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest

import polyce
from polyce.score import blocks
from polyce.testing.backends import Backend

RNG = np.random.default_rng(3)
CLASSES = 7
LABELS = RNG.integers(CLASSES, size=600)
LOGITS = RNG.normal(size=(600, CLASSES)) + 1.5 * (np.arange(CLASSES) == LABELS[:, None])
ODD = LABELS.copy()
ODD[::11] = -100
NUMPY = pytest.mark.only("numpy")
OTHERS = pytest.mark.only("score")


@pytest.fixture(params=["one-block", "many-blocks"])
def cut(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many-blocks":
        monkeypatch.setattr(blocks, "BLOCK_BYTES", 8 * CLASSES * 67)


def softmax(logits: Any, axis: int = 1) -> Any:
    powers = np.exp(logits - logits.max(axis=axis, keepdims=True))
    return powers / powers.sum(axis=axis, keepdims=True)


def expected(logits: Any, labels: Any, bins: int = 15) -> dict[str, float]:
    """Compute the figures by their definitions, in float64."""
    rows = np.arange(len(labels))
    p = softmax(logits)
    loss = -np.log(p[rows, labels])
    correct = p.argmax(axis=1) == labels
    values = {
        "loss": loss,
        "accuracy": correct,
        "top5_accuracy": (p > p[rows, labels][:, None]).sum(axis=1) < 5,
        "brier": ((p - (np.arange(p.shape[1]) == labels[:, None])) ** 2).sum(axis=1),
        "entropy": -(p * np.log(p)).sum(axis=1),
    }
    found = {name: float(np.mean(value)) for name, value in values.items()}
    for name, value in values.items():
        found[f"{name}_error"] = float(np.std(value, ddof=1) / math.sqrt(len(labels)))
    found["perplexity"] = math.exp(found["loss"])
    found["perplexity_error"] = found["perplexity"] * found["loss_error"]
    found["bits"] = found["loss"] / math.log(2)
    found["bits_error"] = found["loss_error"] / math.log(2)
    confidence = p.max(axis=1)
    for name, edges in (
        ("ece", np.linspace(0, 1, bins + 1)),
        ("ece_mass", np.quantile(confidence, np.linspace(0, 1, bins + 1))),
    ):
        which = np.searchsorted(edges[1:-1], confidence)
        gaps = [
            (np.mean(which == b), abs(np.mean((correct * 1.0 - confidence)[which == b])))
            for b in set(which.tolist())
        ]
        found[name] = float(sum(share * gap for share, gap in gaps))
        if name == "ece":
            found["mce"] = float(max(gap for _, gap in gaps))
    return found


def check(found: polyce.Score, wanted: dict[str, float], tolerance: float = 1e-6) -> None:
    for name, value in wanted.items():
        assert getattr(found, name) == pytest.approx(value, rel=tolerance, abs=tolerance), name


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_figures_are_those_of_their_definitions(backend: Backend, cut: None, dtype: str) -> None:
    if dtype not in backend.floats:
        pytest.skip("the library lacks the dtype")
    kept = ODD != -100
    logits = LOGITS.astype(dtype)
    found = polyce.score(backend.asarray(logits), backend.asarray(ODD))
    assert (found.rows, found.ignored, found.undefined, found.bad_labels) == (600, 55, 0, 0)
    check(found, expected(logits[kept].astype(np.float64), ODD[kept]))
    assert found.temperature == 1.0
    assert math.isnan(found.temperature_error)
    assert int(found.reliability["rows"].sum()) == 545


@NUMPY
def test_the_class_axis_anywhere(cut: None) -> None:
    wanted = polyce.score(LOGITS, LABELS).as_dict()
    images = LOGITS.reshape(20, 30, CLASSES)
    for axis in (0, 1, 2):
        moved = np.ascontiguousarray(np.moveaxis(images, -1, axis))
        found = polyce.score(moved, LABELS.reshape(20, 30), axis=axis).as_dict()
        assert found == pytest.approx(wanted, nan_ok=True)
    single = polyce.score(LOGITS[0], LABELS[0:1])
    assert single.rows == 1
    assert math.isnan(single.loss_error)


@NUMPY
@pytest.mark.parametrize("chunks", [None, (4, 5, 7)])
@pytest.mark.parametrize("rows", [1, 5, 29, 64, 10**6])
def test_blocks_are_whole_rows_cover_all_and_fit(
    monkeypatch: pytest.MonkeyPatch, rows: int, chunks: Any
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 8 * 7 * rows)
    monkeypatch.setattr(blocks, "LARGER", 4)
    seen = np.zeros((20, 30, 7), int)
    boxes = list(blocks.boxes(seen.shape, 2, 8, chunks))
    for box in boxes:
        seen[box] += 1
        assert seen[box].shape[2] == 7
        assert seen[box].size <= 7 * rows * (4 if chunks else 1)
    assert (seen == 1).all()
    if rows == 29 and chunks:
        assert boxes[1][:2] == (slice(0, 4), slice(5, 10))
    if rows == 64 and chunks:
        # Two rows of 30 fit, and chunks are four high.
        assert boxes[1][:2] == (slice(0, 4), slice(15, 30))


@NUMPY
def test_half_precision_is_scored_in_single() -> None:
    logits = LOGITS.astype(np.float16)
    check(polyce.score(logits, LABELS), expected(logits.astype(np.float64), LABELS))


@NUMPY
def test_class_weights_weigh_the_loss_alone(cut: None) -> None:
    weight = np.linspace(0.0, 2.0, CLASSES)
    found = polyce.score(LOGITS, ODD, weight=weight)
    assert found.loss == pytest.approx(polyce.cross_entropy(LOGITS, ODD, weight))
    plain = polyce.score(LOGITS, ODD)
    assert (found.brier, found.accuracy) == (plain.brier, plain.accuracy)
    kept = ODD != -100
    w = weight[ODD[kept]]
    losses = polyce.cross_entropy(LOGITS[kept], ODD[kept], reduction="none")
    residual = w * (losses - found.loss)
    error = math.sqrt((residual**2).sum() * w.size / (w.size - 1)) / w.sum()
    assert found.loss_error == pytest.approx(error)
    masked = LOGITS.copy()
    masked[LABELS == 0, 0] = -np.inf  # a class of weight 0
    assert polyce.score(masked, ODD, weight=weight).loss < math.inf


@NUMPY
def test_temperature_and_softcap_transform_the_logits() -> None:
    found = polyce.score(LOGITS, LABELS, temperature=0.5, logit_softcap=3.0)
    transformed = 3.0 * np.tanh(LOGITS / 0.5 / 3.0)
    check(found, {"temperature": 0.5, **expected(transformed, LABELS)})


@OTHERS
def test_the_fitted_temperature_has_the_smallest_loss(cut: None) -> None:
    from scipy import optimize

    for factor in (0.2, 1.0, 5.0):
        best = optimize.minimize_scalar(
            lambda t, f=factor: float(polyce.cross_entropy(LOGITS * f / t, LABELS)),
            bounds=(0.05, 20),
            method="bounded",
            options={"xatol": 1e-9},
        )
        found = polyce.score(LOGITS * factor, LABELS, fit_temperature=True)
        assert found.temperature == pytest.approx(best.x, rel=1e-5)
        check(found, expected(LOGITS * factor / found.temperature, LABELS))


@NUMPY
def test_the_fitted_temperatures_error_is_that_of_other_samples() -> None:
    rng = np.random.default_rng(5)
    temperatures, errors = [], []
    for _ in range(200):
        logits = rng.normal(size=(400, 5)) * 2
        labels = (softmax(logits).cumsum(axis=1) < rng.random((400, 1))).sum(axis=1)
        found = polyce.score(logits, labels, fit_temperature=True)
        temperatures.append(found.temperature)
        errors.append(found.temperature_error)
    assert np.mean(errors) == pytest.approx(np.std(temperatures), rel=0.15)
    larger = polyce.score(logits * 5, labels, fit_temperature=True)
    assert larger.temperature_error == pytest.approx(errors[-1] * 5, rel=0.01)


@NUMPY
def test_a_confidence_that_is_an_edge_is_in_the_bin_below() -> None:
    logits = np.array([[0.0, 0.0], [0.0, 800.0]])
    table = polyce.score(logits, np.array([1, 1]), bins=2).reliability
    assert table.tolist() == [(0.0, 0.5, 1, 0.5, 0.0), (0.5, 1.0, 1, 1.0, 1.0)]


@NUMPY
@pytest.mark.parametrize(
    "labels", [LOGITS.argmax(axis=1), LOGITS.argmin(axis=1)], ids=["right", "wrong"]
)
def test_no_temperature_fits_labels_that_are_all_right_or_worse_than_chance(labels: Any) -> None:
    with pytest.raises(ValueError, match="leave out fit_temperature"):
        polyce.score(LOGITS, labels, fit_temperature=True)


@NUMPY
def test_a_table_of_classes(cut: None) -> None:
    table = polyce.score(LOGITS, ODD, by_class=True).by_class
    kept = ODD != -100
    guesses = LOGITS[kept].argmax(axis=1)
    for row in table:
        of_class = ODD[kept] == row["class"]
        assert row["rows"] == of_class.sum()
        assert row["predicted"] == (guesses == row["class"]).sum()
        wanted = expected(LOGITS[kept][of_class], ODD[kept][of_class])
        for name in ("loss", "accuracy", "brier"):
            assert row[name] == pytest.approx(wanted[name])
        hits = (guesses == row["class"]) & of_class
        assert row["precision"] == pytest.approx(hits.sum() / row["predicted"])
    assert polyce.score(LOGITS, ODD).by_class is None


# What is left out


@NUMPY
def test_rows_without_a_softmax_are_counted_and_placed(cut: None) -> None:
    logits = LOGITS.reshape(20, 30, CLASSES).copy()
    logits[7, 13, 2] = np.nan
    logits[9, 0, 1] = np.inf
    logits[9, 1] = -np.inf
    found = polyce.score(logits, LABELS.reshape(20, 30), axis=2)
    assert (found.rows, found.undefined, found.first_undefined) == (600, 3, (7, 13))
    kept = np.isfinite(logits).all(axis=2).reshape(-1)
    check(found, expected(LOGITS[kept], LABELS[kept]))
    assert "undefined      3" in str(found)


@NUMPY
def test_a_masked_label_makes_the_loss_infinite_and_no_figure_else() -> None:
    logits = LOGITS.copy()
    logits[4, LABELS[4]] = -np.inf
    found = polyce.score(logits, LABELS)
    assert found.loss == found.perplexity == math.inf
    assert math.isnan(found.loss_error)
    assert math.isfinite(found.brier_error)
    # A loss may be finite and its exponential not.
    assert polyce.score(LOGITS * 1e4, LOGITS.argmin(axis=1)).perplexity == math.inf


def test_bad_labels_are_an_error_with_the_position_or_counted(backend: Backend, cut: None) -> None:
    labels = LABELS.copy()
    labels[[300, 301]] = CLASSES, -1
    logits = LOGITS.astype(np.float32)
    given = backend.asarray(logits), backend.asarray(labels)
    with pytest.raises(IndexError, match=r"got 7 at position \(300,\)"):
        polyce.score(*given)
    found = polyce.score(*given, validate=False)
    assert (found.rows, found.bad_labels, found.first_bad_label) == (600, 2, (300,))
    kept = (labels >= 0) & (labels < CLASSES)
    check(found, expected(logits[kept].astype(np.float64), labels[kept]))


@NUMPY
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint64"])
def test_labels_of_any_integer_dtype(dtype: str) -> None:
    labels = LABELS.astype(dtype)
    labels[5] = ignored = np.iinfo(dtype).max
    found = polyce.score(LOGITS, labels, ignore_index=int(ignored))
    assert (found.ignored, found.loss) == (
        1,
        pytest.approx(polyce.score(np.delete(LOGITS, 5, 0), np.delete(LABELS, 5)).loss),
    )


@NUMPY
def test_nothing_that_counts_gives_nan() -> None:
    found = polyce.score(LOGITS, np.full(600, -100), by_class=True)
    numbers = found.as_dict()
    assert (numbers.pop("rows"), numbers.pop("ignored"), numbers.pop("temperature")) == (
        600,
        600,
        1,
    )
    assert all(
        math.isnan(numbers[name]) for name in numbers if name[-6:] not in ("efined", "labels")
    )


@NUMPY
@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"input": np.zeros((0, 3)), "target": np.zeros(0, int)}, ValueError, "at least one row"),
        ({"target": LABELS[:-1]}, ValueError, "there are 600 rows, but 599 labels"),
        ({"target": LABELS * 1.0}, TypeError, "must be an integer dtype"),
        ({"input": LABELS[:, None]}, TypeError, "input must be real floating point"),
        ({"bins": 0}, ValueError, "bins must be an integer of at least 1, got 0"),
        ({"bins": 2.0}, ValueError, "bins must be an integer of at least 1, got 2.0"),
        ({"temperature": 0.0}, ValueError, "temperature must lie between"),
        ({"temperature": None}, TypeError, "temperature must be a real number"),
        ({"logit_softcap": 5.0, "fit_temperature": True}, ValueError, "behind a softcap"),
        ({"weight": np.ones(3)}, ValueError, "one entry for each of the 7 classes"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index must be an integer"),
        ({"validate": "off"}, TypeError, "validate must be"),
    ],
)
def test_bad_input_is_named(changed: dict[str, Any], error: type, says: str) -> None:
    given = {"input": LOGITS, "target": LABELS, **changed}
    with pytest.raises(error, match=says):
        polyce.score(given.pop("input"), given.pop("target"), **given)


@NUMPY
def test_the_record_is_frozen_prints_and_pickles() -> None:
    found = polyce.score(LOGITS, LABELS)
    with pytest.raises(AttributeError):
        found.loss = 0.0  # type: ignore[misc]
    assert str(pickle.loads(pickle.dumps(found))) == str(found)
    assert f"loss           {found.loss:<12.6g} ± {found.loss_error:.2g}" in str(found)


# Against others, on the digits as a classifier with a little regularisation sees them


@pytest.fixture(scope="module")
def digits() -> tuple[Any, Any]:
    from sklearn.linear_model import LogisticRegression

    from polyce.demo import digits

    images, labels = digits()
    model = LogisticRegression(C=0.05).fit(images[:600], labels[:600])
    return model.decision_function(images[600:]), labels[600:].astype(np.int64)


@OTHERS
def test_against_scikit_learn(digits: tuple[Any, Any]) -> None:
    from sklearn import calibration, metrics

    logits, labels = digits
    p, found = softmax(logits), polyce.score(logits, labels, by_class=True)
    confidence, guesses = p.max(axis=1), p.argmax(axis=1)
    check(
        found,
        {
            "loss": metrics.log_loss(labels, p),
            "accuracy": metrics.accuracy_score(labels, guesses),
            "top5_accuracy": metrics.top_k_accuracy_score(labels, p, k=5),
            "brier": metrics.brier_score_loss(labels, p, scale_by_half=False),
        },
    )
    for strategy, name in (("uniform", "ece"), ("quantile", "ece_mass")):
        accuracy, mean = calibration.calibration_curve(
            guesses == labels, confidence, n_bins=15, strategy=strategy
        )
        edges = np.linspace(0, 1, 16)
        if strategy == "quantile":
            edges = np.percentile(confidence, edges * 100)
        rows = np.bincount(np.searchsorted(edges[1:-1], confidence), minlength=15)
        rows = rows[rows > 0]
        check(found, {name: float((rows * np.abs(accuracy - mean)).sum() / rows.sum())})
    precision, recall, _, rows = metrics.precision_recall_fscore_support(labels, guesses)
    for name, wanted in (("precision", precision), ("accuracy", recall), ("rows", rows)):
        np.testing.assert_allclose(found.by_class[name], wanted)


@OTHERS
def test_against_torchmetrics(digits: tuple[Any, Any]) -> None:
    import torch
    from torchmetrics import functional

    logits, labels = map(torch.from_numpy, digits)
    p, of = torch.softmax(logits, 1), {"task": "multiclass", "num_classes": 10}
    found = polyce.score(logits, labels)
    wanted = {
        "perplexity": functional.text.perplexity(logits[None], labels[None]),
        "ece": functional.calibration_error(p, labels, n_bins=15, norm="l1", **of),
        "mce": functional.calibration_error(p, labels, n_bins=15, norm="max", **of),
        "accuracy": functional.accuracy(p, labels, average="micro", **of),
        "top5_accuracy": functional.accuracy(p, labels, average="micro", top_k=5, **of),
    }
    check(found, {name: float(value) for name, value in wanted.items()})


@OTHERS
def test_against_scipy(digits: tuple[Any, Any]) -> None:
    from scipy import special, stats

    logits, labels = digits
    log_p = special.log_softmax(logits, axis=1)
    losses = -log_p[np.arange(len(labels)), labels]
    entropies = stats.entropy(np.exp(log_p), axis=1)
    check(
        polyce.score(logits, labels),
        {
            "loss": losses.mean(),
            "loss_error": stats.sem(losses),
            "entropy": entropies.mean(),
            "entropy_error": stats.sem(entropies),
        },
    )
