"""Calls that the core answers because one like them came before: never another answer."""

from __future__ import annotations

import gc
import os
import sys
import threading
import warnings
import weakref
from typing import Any

import numpy as np
import pytest

import polyce
from door_calls import Ways, forget, outcome
from door_numpy import FUNCTIONS, LABELS, LOGITS, MARKS, PROBABILITIES, RNG, check_after, same
from polyce.implementations import door, registry
from polyce.implementations.native import core as native
from polyce.implementations.native import path as native_path

pytestmark = MARKS
Change = dict[str, Any]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_call_like_one_before_is_not_described_again(function: str, ways: Ways) -> None:
    call = FUNCTIONS[function]
    assert ways.of(lambda: call(LOGITS, LABELS)) == 1
    assert ways.of(lambda: call(LOGITS, LABELS)) == 0
    assert ways.of(lambda: call(LOGITS + 1, LABELS[::-1].copy())) == 0
    assert ways.of(lambda: polyce.CrossEntropyLoss()(LOGITS, LABELS)) == (function != "loss")


OPTIONS: dict[str, list[Change]] = {
    "reduction": [{"reduction": r} for r in ("mean", "sum", "none", "elementwise_mean", "x", None)],
    "ignore_index": [{"ignore_index": i} for i in (-100, 2, True, 2.0, np.int64(2), 10**30, "2")],
    "label_smoothing": [{"label_smoothing": s} for s in (0.0, 0.1, 1, True, 1.0, np.float64(0.1))],
    "z_loss": [{"z_loss": z} for z in (0.0, 0.1, 1, True, -1.0, float("nan"), np.float32(0.5))],
    "logit_scale": [{"logit_scale": s} for s in (None, 1.0, 1, True, 2.0, np.float64(2), 0.0)],
    "logit_softcap": [{"logit_softcap": s} for s in (None, 1.0, 1, True, 2.0, -1.0)],
    "axis": [{"axis": a} for a in (None, 1, True, 1.0, -1, 0, 2)],
    "validate": [{"validate": v} for v in (None, True, False, 1, 0)],
    "return_stats": [{"return_stats": s} for s in (False, True, "lse", ("lse",), ["lse"], 0, ())],
    "implementation": [{"implementation": i} for i in (None, "native", "reference", "x", 1)],
    "size_average": [{"size_average": v} for v in (None, True, False, 0)],
    "reduce": [{"reduce": v} for v in (None, True, False, 1)],
    "normalizer": [
        {"normalizer": n} for n in (None, 3.0, 4.0, 4, True, np.float64(3), np.array(3))
    ],
    "dim": [{"dim": d} for d in (None, 1)],
    "weight": [
        {"weight": w}
        for w in (
            *(None, np.arange(5, dtype=np.float32), np.arange(5), np.ones(4, np.float32)),
            *(np.arange(5.0), np.arange(10, dtype=np.float32)[::2], np.ones((5, 1), np.float32)),
        )
    ],
    "sample_weight": [
        {"sample_weight": w}
        for w in (
            None,
            np.arange(6.0),
            np.arange(6, dtype=np.float32),
            np.arange(12.0)[::2],
            LABELS,
        )
    ],
}


def pairs() -> list[Any]:
    return [
        pytest.param(a, b, id=f"{name}-{i}-{j}")
        for name, changes in OPTIONS.items()
        for i, a in enumerate(changes)
        for j, b in enumerate(changes)
        if i != j
    ]


@pytest.mark.parametrize(("first", "second"), pairs())
def test_an_option_changes_between_calls(first: Change, second: Change) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for target in (LABELS, PROBABILITIES):
            for function in FUNCTIONS.values():
                check_after(
                    lambda: function(LOGITS, target, **first),  # noqa: B023
                    lambda: function(LOGITS, target, **second),  # noqa: B023
                )


def test_what_is_kept_gives_what_the_reference_gives(ways: Ways) -> None:
    for target in (LABELS, PROBABILITIES):
        for given in ({}, {"reduction": "none"}, {"weight": np.arange(5, dtype=np.float32)}):
            call: Any = lambda **more: polyce.cross_entropy_with_grad(  # noqa: E731
                LOGITS,
                target,  # noqa: B023
                **given,  # noqa: B023
                **more,
            )
            call()
            assert ways.of(call) == 0
            for found, expected in zip(call(), call(implementation="reference"), strict=True):
                np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_bad_labels_raise_the_same_error_and_nothing_is_written() -> None:
    bad = LABELS.copy()
    bad[3] = 7
    with pytest.raises(IndexError) as whole:
        polyce.cross_entropy_with_grad(LOGITS, bad)
    out = np.full_like(LOGITS, 9.0)
    polyce.cross_entropy_with_grad(LOGITS, LABELS, out=out.copy())
    with pytest.raises(IndexError) as found:
        polyce.cross_entropy_with_grad(LOGITS, bad, out=out)
    assert str(found.value) == str(whole.value)
    assert (out == 9.0).all()


def test_a_number_for_the_gradient_of_the_loss(ways: Ways) -> None:
    def call(grad_output: Any) -> Any:
        return polyce.cross_entropy_with_grad(LOGITS, LABELS, grad_output=grad_output)[1]

    whole = call(1.0)
    assert ways.of(lambda: call(2.0)) == 0
    np.testing.assert_allclose(call(2.0), 2 * whole, rtol=1e-6)
    for other in (None, 2, np.float64(2), np.array(2.0), True, "2"):
        check_after(lambda: call(1.0), lambda: (call(other),))  # noqa: B023


def test_who_chooses_is_asked_at_every_call(ways: Ways, monkeypatch: pytest.MonkeyPatch) -> None:
    def call() -> Any:
        return polyce.cross_entropy(LOGITS, LABELS)

    for name in ("reference", "native"):
        call()
        assert ways.of(call) == 0
        with polyce.use(name):
            assert ways.of(call) == 1
        assert ways.of(call) == 0
        monkeypatch.setenv(registry.VARIABLE, name)
        assert ways.of(call) == 1
        monkeypatch.delenv(registry.VARIABLE)
        assert ways.of(call) == 0
    monkeypatch.setenv(registry.VARIABLE, "no such path")
    with pytest.raises(ValueError, match="no such path"):
        call()
    monkeypatch.delenv(registry.VARIABLE)
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", {**os.environ, registry.VARIABLE: "reference"})
        assert ways.of(call) == 1
    with monkeypatch.context() as patch:
        patch.setattr(registry, "TABLE", registry.TABLE[-1:])
        assert ways.of(call) == 1
    assert ways.of(call) == 0


def test_what_another_path_computes_is_not_kept(ways: Ways) -> None:
    for _ in range(2):
        with polyce.use("native"):
            assert ways.of(lambda: polyce.cross_entropy(LOGITS, LABELS)) == 1
        again = lambda: polyce.cross_entropy(LOGITS, LABELS, implementation="reference")  # noqa: E731
        assert ways.of(again) == 1


def test_threads_and_instruction_sets_are_those_of_now(ways: Ways) -> None:
    large = RNG.standard_normal((600, 300)).astype(np.float32)
    labels = RNG.integers(0, 300, 600)
    threads, core = polyce.get_num_threads(), native.core()
    isa = core.isa()
    whole = {}
    try:
        for name in core.isas():
            core.use_isa(name)
            forget()
            whole[name] = polyce.cross_entropy_with_grad(large, labels)
        for count in (1, 2, 3):
            polyce.set_num_threads(count)
            for name, expected in whole.items():
                core.use_isa(name)
                assert ways.of(lambda: polyce.cross_entropy_with_grad(large, labels)) == 0
                assert same(polyce.cross_entropy_with_grad(large, labels), expected)
    finally:
        polyce.set_num_threads(threads)
        core.use_isa(isa)


def test_the_table_has_bounds() -> None:
    for rows in range(1, 3000):
        polyce.cross_entropy(np.zeros((rows, 2), np.float32), np.zeros(rows, int))
    for smoothing in np.linspace(0, 1, 300):
        polyce.cross_entropy(LOGITS, LABELS, label_smoothing=float(smoothing))
    first = polyce.cross_entropy(LOGITS, LABELS)
    assert first == polyce.cross_entropy(LOGITS, LABELS)
    assert polyce.cross_entropy(np.zeros((7, 2), np.float32), np.zeros(7, int)) == np.float32(
        np.log(2)
    )


def test_no_array_is_held() -> None:
    def call() -> list[Any]:
        arrays = LOGITS.copy(), LABELS.copy(), np.ones(5, np.float32), np.ones(6)
        out = np.empty_like(LOGITS)
        for _ in range(3):
            logits, labels, weight, sample_weight = arrays
            given = {"weight": weight, "sample_weight": sample_weight}
            polyce.cross_entropy(logits, labels, **given)
            results = polyce.cross_entropy_with_grad(logits, labels, **given)
            polyce.cross_entropy_with_grad(logits, labels, out=out, **given)
        return [weakref.ref(array) for array in (*arrays, out, results[1])]

    held = call()
    gc.collect()
    assert not [ref for ref in held if ref() is not None]


def test_nothing_is_lost_or_gained_call_by_call() -> None:
    grad = polyce.cross_entropy_with_grad(LOGITS, LABELS, reduction="none")
    dtypes = LOGITS.dtype, LABELS.dtype
    gc.collect()
    before = [sys.getrefcount(one) for one in (None, *dtypes, LOGITS, LABELS)]
    for _ in range(1000):
        grad = polyce.cross_entropy_with_grad(LOGITS, LABELS, reduction="none")
        polyce.cross_entropy(LOGITS, LABELS)
        outcome(lambda: polyce.cross_entropy(LOGITS, LABELS + 9))
    del grad
    gc.collect()
    after = [sys.getrefcount(one) for one in (None, *dtypes, LOGITS, LABELS)]
    # One a call would be 1000. Others in the process come by None, and drop it, meanwhile.
    assert max(abs(a - b) for a, b in zip(after, before, strict=True)) < 500


def test_threads_share_the_table() -> None:
    shapes = [(rows, classes) for rows in (3, 60, 700) for classes in (2, 11, 70)]
    calls = []
    for shape in shapes:
        logits = RNG.standard_normal(shape).astype(np.float32)
        labels = RNG.integers(0, shape[1], shape[0])
        for reduction in ("mean", "sum", "none"):
            calls.append((logits, labels, reduction))
    expected = [polyce.cross_entropy_with_grad(x, y, reduction=r) for x, y, r in calls]
    wrong: list[Any] = []

    def work(seed: int) -> None:
        order = np.random.default_rng(seed).permutation(len(calls) * 20) % len(calls)
        for i in order:
            logits, labels, reduction = calls[i]
            found = polyce.cross_entropy_with_grad(logits, labels, reduction=reduction)
            if not same(found, expected[i]):
                wrong.append(calls[i])
            if i == seed:
                forget()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_warnings_and_error_states_do_not_matter(ways: Ways) -> None:
    polyce.cross_entropy(LOGITS, LABELS)
    with np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ways.of(lambda: polyce.cross_entropy(LOGITS * np.float32(np.inf), LABELS)) == 0


def test_only_the_native_path_keeps_calls() -> None:
    assert native_path.PATH.name == "native"
    assert door.cross_entropy is native.core().answer_cross_entropy
