"""Large exact answers are kept, and found again only by the same call."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from polyce.testing import answers, oracle

pytestmark = [pytest.mark.only("numpy"), pytest.mark.same_everywhere]
LOGITS = np.random.default_rng(0).standard_normal((20, 50)).astype(np.float32)
LABELS = np.arange(20)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(answers.VARIABLE, str(tmp_path / "answers"))
    return tmp_path / "answers"


def test_an_answer_is_computed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = oracle.exact_answer(LOGITS, LABELS, None, label_smoothing=0.1)
    first = answers.exact_answer(LOGITS, LABELS, None, label_smoothing=0.1)
    monkeypatch.setattr(oracle, "exact_answer", None)
    again = answers.exact_answer(LOGITS, LABELS, None, label_smoothing=0.1)
    for got in (first, again):
        assert got.loss.tobytes() == want.loss.tobytes()
        assert got.grad.tobytes() == want.grad.tobytes()
        assert got.stats.entropy.tobytes() == want.stats.entropy.tobytes()
    assert len(list(folder.iterdir())) == 1


def test_every_part_of_a_call_tells_it_from_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [
        ((LOGITS, LABELS, None), {}),
        ((LOGITS, LABELS + 1, None), {}),
        ((LOGITS, LABELS.astype(np.uint8), None), {}),
        ((LOGITS.reshape(20, 5, 10), np.zeros((20, 10), np.int64), None), {}),
        ((LOGITS, LABELS, np.ones(50)), {}),
        ((LOGITS, LABELS, None), {"z_loss": 0.1}),
        ((LOGITS, LABELS, None), {"z_loss": 0.2}),
        ((LOGITS, LABELS, None), {"reduction": "sum"}),
        ((LOGITS, LABELS, None), {"grad_output": np.array(2.0)}),
    ]
    for arguments, options in calls:
        want = oracle.exact_answer(*arguments, **options)
        np.testing.assert_array_equal(answers.exact_answer(*arguments, **options).grad, want.grad)
    assert len(list(folder.iterdir())) == len(calls)
    # A changed oracle computes its own answers.
    monkeypatch.setattr(answers, "_oracle", lambda: b"another")
    answers.exact_answer(LOGITS, LABELS, None)
    assert len(list(folder.iterdir())) == len(calls) + 1


def test_small_answers_are_not_kept(folder: Path) -> None:
    answers.exact_answer(LOGITS[:19], LABELS[:19], None)
    assert not folder.exists()
