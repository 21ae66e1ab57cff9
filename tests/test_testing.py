"""polyce.testing itself: its answers are exact, and it catches wrong implementations."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyce import Stats
from polyce.testing import (
    GROUPS,
    Case,
    Functions,
    Report,
    cases,
    check_implementation,
    compare,
    dump,
    exact_answer,
    missing,
    read,
)

pytestmark = [pytest.mark.only("numpy"), pytest.mark.tests_of_tests]

DOUBLE = np.dtype("float64")

# compare()


def test_compare_takes_the_answer_within_the_tolerance_and_either_zero() -> None:
    want = np.array([1.0, 0.0, np.nan, np.inf, -np.inf])
    got = np.array([1.0 + 1e-9, -0.0, np.nan, np.inf, -np.inf])
    compare(got, want, np.full(5, 2e-9), dtype=DOUBLE)
    compare(np.zeros((2, 0)), np.zeros((2, 0)), np.zeros((2, 0)), dtype=DOUBLE)
    half = np.array([np.inf], dtype=np.float16)
    compare(half, np.array([1e5]), np.array([0.0]), dtype=np.dtype("float16"))


@pytest.mark.parametrize(
    ("got", "want", "message"),
    [
        ([1.0, 2.0 + 1e-6], [1.0, 2.0], r"^loss\[1\]: got 2\.00000\d+, expected 2, error 1e-06"),
        ([np.nan, 2.0], [1.0, 2.0], r"^loss\[0\]: got nan, expected 1"),
        ([1.0, 2.0], [np.nan, 2.0], r"^loss\[0\]: got 1, expected nan"),
        ([np.inf, 2.0], [1.0, 2.0], r"^loss\[0\]: got inf, expected 1"),
        ([1.0, 2.0], [np.inf, 2.0], r"^loss\[0\]: got 1, expected inf"),
        ([-np.inf, 2.0], [np.inf, 2.0], r"^loss\[0\]: got -inf, expected inf"),
        ([np.nan, 2.0], [np.inf, 2.0], r"^loss\[0\]: got nan, expected inf"),
        ([[1.0, 2.0]], [1.0, 2.0], r"^loss: shape \(1, 2\), expected \(2,\)"),
        (np.float32([1.0, 2.0]), [1.0, 2.0], r"^loss: dtype float32, expected float64"),
    ],
    ids=["value", "nan", "no-nan", "inf", "no-inf", "sign", "nan-for-inf", "shape", "dtype"],
)
def test_compare_refuses(got: Any, want: list[float], message: str) -> None:
    tolerance = np.full(len(want), 1e-7)
    with pytest.raises(AssertionError, match=message):
        compare(np.asarray(got), np.array(want), tolerance, dtype=DOUBLE, what="loss")


# The grid and its report


def exact(input: Any, target: Any, weight: Any = None, **options: Any) -> tuple[Any, ...]:
    """Return the exact loss, gradient and stats, each rounded once."""
    asked = options.pop("return_stats", False)
    options.pop("validate", None)
    answer = exact_answer(input, target, weight, **options)
    arithmetic = np.float64 if answer.loss_dtype == DOUBLE else np.float32
    found = {
        "lse": answer.stats.lse.astype(arithmetic),
        "entropy": answer.stats.entropy.astype(arithmetic),
        "prediction": answer.stats.prediction,
        "correct": answer.stats.correct,
        "top_probability": answer.stats.top_probability.astype(arithmetic),
        "brier": answer.stats.brier.astype(arithmetic),
        "rank": answer.stats.rank,
    }
    names = list(found)[:4] if asked is True else [asked] if isinstance(asked, str) else asked or ()
    stats = Stats(*(found[name] if name in names else None for name in found), answer.stats.valid)
    results = answer.loss.astype(answer.loss_dtype), answer.grad.astype(input.dtype), stats
    return results if asked else results[:2]


def loss_of(*arrays: Any, **options: Any) -> Any:
    loss, _, *stats = exact(*arrays, **options)
    return (loss, *stats) if stats else loss


def test_an_implementation_by_another_formula_passes() -> None:
    groups = ["combined", "normalizer", "sample-weight", "transform", "stats", "target-stats"]
    report = check_implementation(
        None,
        groups=groups,
        dtypes=["float64"],
        functions=Functions(loss_of, exact),
        leave_out=lambda case: "takes long" if case.logits.size > 5000 else "",
    )
    assert list(report.ran) == groups


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda results: results[:2],
            r"tuple is not \(loss of cross_entropy_with_grad, grad, stats",
        ),
        (
            lambda results: (*results[:2], tuple(results[2])),
            r"stats: tuple is not \(lse, entropy, ",
        ),
        (
            lambda results: (*results[:2], results[2]._replace(entropy=None)),
            r"entropy: NoneType is not an array of numpy",
        ),
        (
            lambda results: (*results[:2], results[2]._replace(valid=np.ones(5))),
            r"valid: dtype float64, expected bool",
        ),
        (
            lambda results: (*results[:2], results[2]._replace(prediction=np.zeros((5, 1), int))),
            r"prediction: shape \(5, 1\), expected \(5,\)",
        ),
        (
            lambda results: (*results[:2], results[2]._replace(lse=results[2].lse[:, None])),
            r"lse: shape \(5, 1\), expected \(5,\)",
        ),
        (
            lambda results: (*results[:2], results[2]._replace(correct=~results[2].correct)),
            r"correct: got \[False, .*\], expected \[True, ",
        ),
    ],
    ids=["none", "tuple", "None", "dtype", "shape", "axis", "values"],
)
def test_results_with_wrong_stats_are_refused(change: Any, message: str) -> None:
    functions = Functions(loss_of, lambda *arrays, **options: change(exact(*arrays, **options)))
    with pytest.raises(AssertionError, match=message):
        check_implementation(
            None,
            groups=["stats"],
            dtypes=["float32"],
            functions=functions,
            leave_out=lambda case: "" if "/plain/index/none/" in case.name else "another one",
        )


def test_the_thinned_product_of_options_holds_every_pair_of_choices() -> None:
    for name in ("float16", "bfloat16", "float32", "float64"):
        if name in missing():
            continue
        chosen = [case.name.split("/")[1:-1] for case in cases(["combined"], [name])]
        columns = list(zip(*chosen, strict=True))
        for one, other in itertools.combinations(columns, 2):
            pairs = set(zip(one, other, strict=True))
            assert pairs == set(itertools.product(set(one), set(other)))
        assert [len(set(column)) for column in columns] == [3, 4, 2, 2, 2, 2, 3]
    whole = [c for c in cases(["combined"], ["float32"]) if "/none/float32" in c.name]
    assert len(whole) == 3 * 4 * 2**4


def test_names_of_cases_are_unique_and_without_spaces() -> None:
    names = [case.name for case in cases()]
    assert len(set(names)) == len(names)
    assert not [name for name in names if " " in name or not name.isascii()]
    assert names == [case.name for case in cases()]


def test_groups_and_dtypes_choose_among_the_cases() -> None:
    chosen = cases(["cotangent", "layouts"], ["float64", "float32"])
    assert {case.group for case in chosen} == {"cotangent", "layouts"}
    assert {case.logits.dtype.name for case in chosen} == {"float32", "float64"}
    assert {case.group for case in cases(dtypes=["float32"])} == set(GROUPS)
    with pytest.raises(ValueError, match="unknown group 'option'; there are options, "):
        cases(["option"])
    with pytest.raises(ValueError, match="unknown dtype 'float8'; there are float16, "):
        cases(dtypes=["float8"])


@pytest.mark.parametrize("name", [None, "native", "reference"])
def test_numpy_is_the_library_by_default(name: str | None) -> None:
    report = check_implementation(name, groups=["cotangent"], dtypes=["float32"])
    assert report.backend == "numpy"


def test_few_shapes_are_few_and_hold_every_group_and_option() -> None:
    few = cases(few_shapes=True)
    assert len({case.shape_key for case in few}) <= 36
    assert {case.group for case in few} == set(GROUPS)
    options = [case.name for case in cases(["options"])]
    assert [case.name for case in few if case.group == "options"] == options


def test_the_report_counts_what_ran_and_names_what_did_not() -> None:
    report = check_implementation(
        None,
        groups=["layouts", "cotangent"],
        dtypes=["float32"],
        leave_out=lambda case: "only labels" if case.kind == "probability" else "",
    )
    assert isinstance(report, Report)
    assert str(report) == (
        "default on numpy: 42 cases right (layouts 14, cotangent 28)\n  left out 42: only labels"
    )
    assert len(report.left_out["only labels"]) == 42
    with pytest.raises(ValueError, match=r"^no case of the grid ran: reference on numpy: 0 cases"):
        check_implementation("reference", groups=["layouts"], leave_out=lambda case: "none")


# The files for drivers in other languages


@pytest.fixture(scope="module")
def dumped() -> list[Case]:
    """Cases of every dtype, layout and kind of target, some of them with nans and infinities."""
    special = cases(["special"], ["float16", "float32"])[::25]
    groups = ["layouts", "targets", "cotangent", "normalizer"]
    of_stats = cases(["grad-stats"], ["float16", "float64"])[::7]
    options = cases(["combined", "sample-weight", "stats"], ["float16", "float32"])[::9]
    targets = cases(["sparse", "teacher"], ["float32"])[::5]
    return cases(groups) + cases(["shapes"], ["float32"]) + special + options + of_stats + targets


def expected_arrays(case: Case) -> dict[str, Any]:
    """Return a case's arrays as the files hold them, without the tolerances."""
    incoming, weight = case.grad_output, case.sample_weight
    of_stats = {"grad_lse": case.grad_lse, "grad_entropy": case.grad_entropy}
    stats, target, probability = case.answer.stats, case.target, case.target_probability
    if case.kind in ("index", "sparse"):
        target = target.astype(np.int64)
    if probability is not None:
        axis = case.options.get("axis", min(1, target.ndim - 1))
        target, probability = (np.moveaxis(array, axis, -1) for array in (target, probability))
    found = {
        "logits": case.logits,
        "target": target,
        "target_probability": None if probability is None else probability.astype(np.float64),
        "weight": case.weight,
        "grad_output": None if incoming is None else np.asarray(incoming, dtype=np.float64),
        **{name: None if a is None else a.astype(np.float64) for name, a in of_stats.items()},
        "loss": case.answer.loss,
        "grad": case.answer.grad,
        "sample_weight": None if weight is None else weight.astype(np.float64),
        "lse": stats.lse,
        "entropy": stats.entropy,
        "prediction": stats.prediction,
        "correct": stats.correct.astype(np.uint8),
        "valid": stats.valid.astype(np.uint8),
        "top_probability": stats.top_probability,
        "brier": stats.brier,
        "rank": stats.rank,
    }
    return {name: array for name, array in found.items() if array is not None}


NUMBERS = (
    "label_smoothing",
    "z_loss",
    "logit_scale",
    "logit_softcap",
    "normalizer",
    "teacher_scale",
)
OPTIONAL = ("grad_lse", "grad_entropy", "target_probability")
TOLERANCES = (
    *("loss_tol", "grad_tol", "lse_tol", "entropy_tol"),
    *("top_probability_tol", "brier_tol"),
)


def expected_numbers(case: Case) -> dict[str, float]:
    """Return a case's options that are real numbers, as the index holds them."""
    found = {"label_smoothing": 0.0, "z_loss": 0.0}
    found |= {name: float(case.options[name]) for name in NUMBERS if name in case.options}
    return found | ({} if case.normalizer is None else {"normalizer": float(case.normalizer)})


def test_what_is_written_is_read_back(dumped: list[Case], tmp_path: Path) -> None:
    index = dump(tmp_path, dumped)
    assert index == tmp_path / "cases.txt"
    found = read(tmp_path)
    assert [fields["name"] for fields in found] == [case.name for case in dumped]
    for case, fields in zip(dumped, found, strict=True):
        assert fields["reduction"] == case.options.get("reduction", "mean")
        assert fields["return_stats"] == (",".join(case.stats_names) or "-")
        numbers = expected_numbers(case)
        for name in NUMBERS:
            assert fields[name] == (numbers[name].hex() if name in numbers else "-")
        arrays_of_case = expected_arrays(case)
        for name in ("weight", "sample_weight", "grad_output", *OPTIONAL):
            assert (fields[name] is None) == (name not in arrays_of_case)
        for name, array in arrays_of_case.items():
            assert fields[name].dtype == array.dtype
            assert fields[name].shape == array.shape
            assert fields[name].tobytes() == array.tobytes()
        for name in TOLERANCES:
            assert np.all(fields[name] >= 0.0)


def checksum(array: Any) -> tuple[int, int, int, float]:
    """Count elements, nans and infinities, and sum the rest as dump_reader.cpp does."""
    values = array.astype(np.float64).reshape(-1)
    finite = np.where(np.isfinite(values), values, 0.0) * (np.arange(values.size) % 7 + 1)
    total = float(np.cumsum(finite)[-1]) if values.size else 0.0
    return values.size, int(np.isnan(values).sum()), int(np.isinf(values).sum()), total


@pytest.mark.slow("numpy")
def test_a_reader_in_cpp_finds_the_same_numbers(dumped: list[Case], tmp_path: Path) -> None:
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    assert compiler is not None, "a C++ compiler is required"
    source, program = Path(__file__).with_name("dump_reader.cpp"), tmp_path / "dump_reader"
    # No contraction: a fused multiply-add would round the checksum differently.
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
    subprocess.run([compiler, *flags, str(source), "-o", str(program)], check=True, timeout=300)
    dump(tmp_path / "grid", dumped)
    command = [str(program), str(tmp_path / "grid")]
    printed = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=300
    ).stdout

    found: dict[tuple[str, str], tuple[int, int, int, float]] = {}
    for line in printed.splitlines():
        name, field, size, nans, infinities, total = line.split(" ")
        found[name, field] = (int(size), int(nans), int(infinities), float.fromhex(total))
    expected = {
        (case.name, field): checksum(array)
        for case in dumped
        for field, array in expected_arrays(case).items()
    }
    expected |= {
        (case.name, field): (1, 0, 0, number)
        for case in dumped
        for field, number in expected_numbers(case).items()
    }
    tolerances = {key for key in found if key[1] in TOLERANCES}
    assert len(tolerances) == len(TOLERANCES) * len(dumped)
    assert {key: value for key, value in found.items() if key not in tolerances} == expected
    dtypes = {case.logits.dtype.name for case in dumped}
    assert dtypes == {"float16", "bfloat16", "float32", "float64"} - set(missing())
