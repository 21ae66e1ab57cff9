"""polyce.testing itself: its answers are exact, and it catches implementations that are wrong."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyce import arrays, reference, registry, targets
from polyce.problem import Problem
from polyce.registry import Implementation
from polyce.targets import Plan
from polyce.testing import (
    GROUPS,
    Case,
    Report,
    cases,
    check_implementation,
    compare,
    dump,
    exact_answer,
    missing,
    read,
)

pytestmark = pytest.mark.only("numpy")

DOUBLE, ONE = np.dtype("float64"), np.float32(1.0)

# The oracle against closed forms


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


# Wrong implementations are caught

Patch = tuple[Any, str, Callable[..., Any]]


@dataclasses.dataclass(frozen=True)
class Mutant:
    """The reference with something wrong, and the group of the grid that has to notice."""

    group: str
    rows: Callable[..., Any] | None = None
    """What it does to the rows' losses: rows(problem, plan, logits, losses)."""
    grad: Callable[..., Any] | None = None
    """What it does to the gradient: grad(problem, plan, logits, gradient)."""
    call: Callable[[Problem, Plan], tuple[Problem, Plan]] | None = None
    """What it takes the call to be."""
    patch: Patch | None = None
    """What it does elsewhere: module, name, function in its place."""

    def forward(self, problem: Problem, plan: Plan, logits: Any) -> tuple[Any, Any, Any]:
        call = self.call(problem, plan) if self.call else (problem, plan)
        rows, state, stats = reference.forward(*call, logits)
        return (self.rows(problem, plan, logits, rows) if self.rows else rows), state, stats

    def forward_backward(
        self, problem: Problem, plan: Plan, cotangent: Any, logits: Any
    ) -> tuple[Any, Any, Any]:
        call = self.call(problem, plan) if self.call else (problem, plan)
        rows, grad, stats = reference.forward_backward(*call, cotangent, logits)
        rows = self.rows(problem, plan, logits, rows) if self.rows else rows
        return rows, self.grad(problem, plan, logits, grad) if self.grad else grad, stats

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put it before the reference, under the name mutant."""
        row = Implementation("mutant", self.forward, reference.backward, self.forward_backward)
        monkeypatch.setattr(registry, "TABLE", (row, *registry.TABLE))
        if self.patch is not None:
            monkeypatch.setattr(*self.patch)


def textbook(problem: Problem, plan: Plan, logits: Any, rows: Any) -> Any:
    """Give log Σ exp(x) - x_y where the target is a plain label."""
    if problem.kind != "index" or problem.options or problem.is_empty:
        return rows
    lse = np.log(np.sum(np.exp(logits), axis=problem.axis, keepdims=True))
    wrong = lse - np.take_along_axis(logits, plan.label, axis=problem.axis)
    return targets.weigh_rows(plan, np, wrong.astype(rows.dtype))


def at_label(change: Callable[[Any], Any]) -> Callable[..., Any]:
    """Change the gradient's entry at each label."""

    def changed(problem: Problem, plan: Plan, logits: Any, grad: Any) -> Any:
        if plan.label is None or problem.is_empty:
            return grad
        mask = arrays.one_hot(np, "numpy", plan.label, grad, problem.axis)
        return np.where(mask, change(grad), grad)

    return changed


def spoil(problem: Problem, plan: Plan, logits: Any, rows: Any) -> Any:
    if logits.flags.writeable:
        logits *= np.float32(0.5)
    return rows


def total_weight(change: Callable[[Any, Any], tuple[Any, Any]]) -> Patch:
    """Make the mean divide by something else: change(counted, row_weight)."""
    true = targets._denominator

    def changed(problem: Problem, operands: Any, counted: Any, row_weight: Any) -> Any:
        return true(problem, operands, *change(counted, row_weight))

    return targets, "_denominator", changed


def one_by_one(values: Any, axis: int) -> Any:
    """Sum as a loop over float32 does."""
    return np.take(np.cumsum(values, axis=axis, dtype=np.float32), [-1], axis=axis)


def class_sum(xp: Any, backend: str, values: Any, axis: int, dtype: Any) -> Any:
    return one_by_one(values, axis).astype(dtype)


def reduce(problem: Problem, plan: Plan, rows: Any, *, true: Any = targets.reduce) -> Any:
    if problem.reduction == "none" or rows.size == 0:
        return true(problem, plan, rows)
    return true(problem, plan, one_by_one(rows.reshape(-1), 0).astype(rows.dtype))


MUTANTS = {
    "loss-off-by-2e-6": Mutant("options", rows=lambda p, plan, x, rows: rows * (1 + 2e-6)),
    "label-gradient-off": Mutant("options", grad=at_label(lambda g: g * np.float32(1.00001))),
    "softmax-minus-one": Mutant("accuracy", grad=at_label(lambda g: (g + ONE) - ONE)),
    "textbook-formula": Mutant("accuracy", rows=textbook),
    "ignored-rows-kept": Mutant("options", call=lambda p, plan: (p, plan._replace(counted=None))),
    "smoothing-dropped": Mutant(
        "options", call=lambda p, plan: (p._replace(label_smoothing=0.0), plan)
    ),
    "weight-dropped": Mutant(
        "options",
        call=lambda p, plan: (p, plan._replace(class_weight=None, label_weight=None)),
    ),
    "mean-over-all-rows": Mutant("options", patch=total_weight(lambda counted, w: (None, w))),
    "mean-without-weight": Mutant(
        "options", patch=total_weight(lambda counted, w: (counted, None))
    ),
    "gradient-dtype": Mutant("options", grad=lambda p, plan, x, g: g.astype(np.float64)),
    "gradient-shape": Mutant("shapes", grad=lambda p, plan, x, g: g.reshape(-1)),
    "gradient-sign": Mutant("cotangent", grad=lambda p, plan, x, g: -g),
    "memory-order-read": Mutant(
        "layouts", rows=lambda p, plan, x, rows: rows if x.flags.c_contiguous else rows[::-1]
    ),
    "argument-changed": Mutant("layouts", rows=spoil),
    "bad-labels-answered": Mutant("targets", call=lambda p, plan: (p, plan._replace(invalid=None))),
    "nan-hidden": Mutant("special", rows=lambda p, plan, x, rows: np.fmax(rows, 0.0)),
    "infinity-capped": Mutant("special", rows=lambda p, plan, x, rows: np.minimum(rows, 3e38)),
    "classes-added-one-by-one": Mutant("accuracy", patch=(arrays, "class_sum", class_sum)),
    "rows-added-one-by-one": Mutant("accuracy", patch=(targets, "reduce", reduce)),
}


def fewer(case: Case) -> str:
    """Leave out what takes the exact answers long and shows no mutant."""
    return "takes long" if "/1000/" in case.name or "/32000/smoothing" in case.name else ""


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_implementation_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = MUTANTS[name]
    mutant.install(monkeypatch)
    with pytest.raises(AssertionError, match=r"^mutant on numpy: \d+ of \d+ cases fail") as caught:
        check_implementation("mutant", groups=[mutant.group], dtypes=["float32"], leave_out=fewer)
    failures = str(caught.value).splitlines()[1:]
    assert all(line.startswith((f"  {mutant.group}/", "  ... and ")) for line in failures)
    # For the wrong answer, not because the mutant itself broke down.
    assert not any(re.search(r"/float32: \w+(Error|Warning)", line) for line in failures)
    assert ("the call changed its argument" in failures[0]) == (name == "argument-changed")


def test_nothing_is_wrong_with_the_mutant_without_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    Mutant("").install(monkeypatch)
    groups = ["options", "shapes", "layouts", "targets", "cotangent"]
    report = check_implementation("mutant", groups=groups, dtypes=["float32"])
    assert list(report.ran) == groups


def test_an_exception_is_a_failure_of_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise NotImplementedError("not today")

    Mutant("", rows=fail).install(monkeypatch)
    message = (
        r"(?s)56 of 56 cases fail\n  cotangent/.*: NotImplementedError: not today\n.* and 36 m"
    )
    with pytest.raises(AssertionError, match=message):
        check_implementation("mutant", groups=["cotangent"], dtypes=["float32"])


# The grid and its report


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


def test_few_shapes_are_few_and_hold_every_group_and_option() -> None:
    few = cases(few_shapes=True)
    assert len({case.shape_key for case in few}) <= 30
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
    """Some cases of every dtype, layout and kind of target, some with nans and infinities."""
    special = cases(["special"], ["float16", "float32"])[::25]
    return cases(["layouts", "targets", "cotangent"]) + cases(["shapes"], ["float32"]) + special


def expected_arrays(case: Case) -> dict[str, Any]:
    """Give a case's arrays as the files hold them, but for the tolerances."""
    incoming = case.grad_output
    found = {
        "logits": case.logits,
        "target": case.target.astype(np.int64) if case.kind == "index" else case.target,
        "weight": case.weight,
        "grad_output": None if incoming is None else np.asarray(incoming, dtype=np.float64),
        "loss": case.answer.loss,
        "grad": case.answer.grad,
    }
    return {name: array for name, array in found.items() if array is not None}


def test_what_is_written_is_read_back(dumped: list[Case], tmp_path: Path) -> None:
    index = dump(tmp_path, dumped)
    assert index == tmp_path / "cases.txt"
    found = read(tmp_path)
    assert [fields["name"] for fields in found] == [case.name for case in dumped]
    for case, fields in zip(dumped, found, strict=True):
        assert float.fromhex(fields["label_smoothing"]) == case.options.get("label_smoothing", 0.0)
        assert fields["reduction"] == case.options.get("reduction", "mean")
        arrays_of_case = expected_arrays(case)
        for name in ("weight", "grad_output"):
            assert (fields[name] is None) == (name not in arrays_of_case)
        for name, array in arrays_of_case.items():
            assert fields[name].dtype == array.dtype
            assert fields[name].shape == array.shape
            assert fields[name].tobytes() == array.tobytes()
        for name in ("loss_tol", "grad_tol"):
            assert np.all(fields[name] >= 0.0)


def checksum(array: Any) -> tuple[int, int, int, float]:
    """Count elements, nans and infinities, and add the rest as dump_reader.cpp does."""
    values = array.astype(np.float64).reshape(-1)
    finite = np.where(np.isfinite(values), values, 0.0) * (np.arange(values.size) % 7 + 1)
    total = float(np.cumsum(finite)[-1]) if values.size else 0.0
    return values.size, int(np.isnan(values).sum()), int(np.isinf(values).sum()), total


def test_a_reader_in_cpp_finds_the_same_numbers(dumped: list[Case], tmp_path: Path) -> None:
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    assert compiler is not None, "a C++ compiler is required"
    source, program = Path(__file__).with_name("dump_reader.cpp"), tmp_path / "dump_reader"
    # Without contraction: a fused multiply-add would round the checksum differently.
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
    tolerances = {key for key in found if key[1] in ("loss_tol", "grad_tol")}
    assert len(tolerances) == 2 * len(dumped)
    assert {key: value for key, value in found.items() if key not in tolerances} == expected
    dtypes = {case.logits.dtype.name for case in dumped}
    assert dtypes == {"float16", "bfloat16", "float32", "float64"} - set(missing())
