"""Rows whose classes are cut into parts: each read by itself, joined, and given its gradient."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import polyce
from conftest import FEW, FULL
from polyce.call.options import Options
from polyce.call.problem import Operands, Problem, describe
from polyce.formula import parts, rows, rowstate, rowstats, stats, targets
from polyce.formula.rowgradient import StatsCotangents
from polyce.implementations import registry
from polyce.implementations.contract import OfParts
from polyce.implementations.native import parts as native
from polyce.implementations.native.core import core
from polyce.testing import GROUPS, Case, cases, check_implementation
from polyce.testing.backends import Backend
from polyce.testing.conformance import Functions
from polyce.testing.selection import representative


def of_parts(name: str) -> OfParts:
    found = registry.find(name).of_parts
    assert found is not None
    return found


class Cut(NamedTuple):
    """The classes of a call, cut at random: each piece with the first of its classes."""

    problem: Problem
    pieces: list[tuple[Operands, int]]
    teacher: parts.TeacherState | None

    @classmethod
    def of(
        cls, path: OfParts, problem: Problem, operands: Operands, rng: np.random.Generator
    ) -> Cut:
        classes = problem.classes
        # Parts without classes, of one class, and uneven ones.
        inner = sorted(rng.integers(0, classes + 1, rng.integers(0, 5)))
        edges = [0, *map(int, inner), classes]
        pieces = []
        for start, end in itertools.pairwise(edges):
            here = (*(slice(None),) * problem.axis, slice(start, end))
            own = {"logits": operands.logits[here]}
            if problem.kind in ("probability", "teacher"):
                own["target"] = operands.target[here]
            pieces.append((operands._replace(**own), start))
        teacher = None
        if problem.kind == "teacher":
            read = [path.read_teacher(problem, piece.target) for piece, _ in pieces]
            teacher = parts.join_teacher(problem, read)
        return cls(problem, pieces, teacher)

    def whole(self, path: OfParts) -> parts.Whole:
        read = [path.read(self.problem, *piece, self.teacher) for piece in self.pieces]
        return parts.join(self.problem, read)

    def gradient(self, path: OfParts, whole: parts.Whole, *cotangents: Any) -> Any:
        problem = self.problem
        grads = [
            path.gradient(problem, *piece, whole, *cotangents, self.teacher)
            for piece in self.pieces
        ]
        cast = [problem.library.cast(grad, problem.logits_dtype) for grad in grads]
        return problem.xp.concat(cast, axis=problem.axis)

    def stats(self, whole: parts.Whole, plan: targets.Plan) -> stats.Stats | None:
        problem, found = self.problem, whole.stats
        if found is None:
            return None
        for name in filter(lambda name: rowstats.looks_again(problem, name), problem.options.stats):
            added = [
                parts.rank(problem, piece, whole.label_logit)
                if name == "rank"
                else parts.brier(problem, piece, start, whole)
                for piece, start in self.pieces
            ]
            found = found._replace(**{name: sum(added[1:], added[0])})
        return stats.finish(problem, plan, found)


def cut_functions(path: OfParts) -> Functions:
    """Return polyce's functions as `path` computes them from parts of the classes."""
    rng = np.random.default_rng(0)

    def call(with_grad: bool, given: dict[str, Any]) -> Any:
        whole_call = dict(given)
        options = Options.taken_from(given)
        names = ("input", "target", "weight", "sample_weight", "normalizer")
        arrays = [given.pop(name, None) for name in names]
        problem, operands = describe(*arrays, options, **given)
        if problem.is_empty:
            function = polyce.cross_entropy_with_grad if with_grad else polyce.cross_entropy
            return function(**whole_call)
        with problem.library.computing(operands.named()):
            plan = targets.plan(problem, operands)
            cut = Cut.of(path, problem, operands, rng)
            whole = cut.whole(path)
            results = [targets.reduce(problem, plan, whole.losses)]
            if with_grad:
                cotangent = targets.cotangent(problem, plan, operands.grad_output)
                of_stats = selected(problem, plan, rows.stats_cotangents(problem, operands))
                results.append(cut.gradient(path, whole, cotangent, of_stats))
            found = cut.stats(whole, plan)
        results += [] if found is None else [found]
        return results[0] if len(results) == 1 else tuple(results)

    return Functions(lambda **given: call(False, given), lambda **given: call(True, given))


def selected(problem: Problem, plan: targets.Plan, given: StatsCotangents) -> StatsCotangents:
    """Leave out the cotangents of rows that do not count, whose stats are nan."""
    return StatsCotangents(
        *(a if a is None else targets.select_rows(plan, problem.xp, a) for a in given)
    )


def few(group: str, floats: tuple[str, ...]) -> Callable[[Case], str]:
    chosen = {case.name for case in representative(cases([group], floats), 12)}
    return lambda case: "" if case.name in chosen else "not among the few"


@pytest.mark.slow("torch")
@pytest.mark.only("numpy", "torch")
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("name", ["native", "reference"])
def test_grid_of_parts(backend: Backend, name: str, group: str) -> None:
    functions = cut_functions(of_parts(name))
    all_of_them = FULL or (backend.name == "numpy" and name == "native" and not FEW)
    leave_out = None if all_of_them else few(group, backend.floats)
    check = {"groups": [group], "functions": functions, "leave_out": leave_out}
    print(check_implementation(None, backend, **check))


# What must be caught

Swap = Callable[[pytest.MonkeyPatch], None]


def swap(module: Any, name: str, change: Callable[..., Any]) -> Swap:
    """Replace a function by change(the true function, its arguments)."""
    true = getattr(module, name)
    return lambda patch: patch.setattr(module, name, lambda *a, **more: change(true, *a, **more))


class FromTheFirst:
    """Kernels that take every part for the first."""

    def __init__(self, true: Any) -> None:
        self.true = true

    def run_part(self, *, start: int, **given: Any) -> None:
        self.true.run_part(start=0, **given)


MUTANTS: dict[str, tuple[str, str, Swap]] = {
    "pivots-that-were-passed-are-lost": (
        "reference",
        "options",
        swap(rowstate, "demote", lambda true, problem, state, *rest: state),
    ),
    "sums-are-not-carried": (
        "reference",
        "options",
        swap(
            rowstate,
            "merge",
            lambda true, p, a, b: true(p, a, b)._replace(rest_sum=a.rest_sum + b.rest_sum),
        ),
    ),
    "labels-in-every-part": (
        "reference",
        "options",
        swap(parts, "pick", lambda true, *a: (np.True_, true(*a)[1])),
    ),
    "labels-in-no-part": (
        "native",
        "options",
        swap(native, "kernel", lambda true, *a, **more: FromTheFirst(true(*a, **more))),
    ),
    "entries-of-every-part": (
        "native",
        "sparse",
        swap(native, "kernel", lambda true, *a, **more: FromTheFirst(true(*a, **more))),
    ),
    "a-teacher-by-parts": (
        "native",
        "teacher",
        swap(parts, "join_teacher", lambda true, problem, read: read[0]),
    ),
}


@pytest.mark.only("numpy")
@pytest.mark.tests_of_tests
@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, group, install = MUTANTS[name]
    functions = cut_functions(of_parts(path))
    install(monkeypatch)
    with pytest.raises(AssertionError, match=r"\d+ of \d+ cases fail") as caught:
        check_implementation(None, groups=[group], dtypes=["float32"], functions=functions)
    assert not re.search(r"/float32: \w+(Error|Warning)", str(caught.value))


# What the kernels promise besides

KINDS: dict[str, dict[str, Any]] = {
    "labels": {"label_smoothing": 0.1},
    "stats": {"return_stats": ("entropy", "brier", "correct"), "logit_softcap": 5.0},
}


@pytest.mark.same_everywhere
@pytest.mark.only("numpy")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_same_bits_for_any_threads_and_instructions(kind: str, dtype: Any) -> None:
    settings = core()
    before = settings.isa(), settings.get_num_threads()
    rng = np.random.default_rng(0)
    # One part goes along the rows and one across them.
    logits = rng.normal(0, 5, (700, 2100)).astype(dtype)
    labels = rng.integers(0, 2100, 700)
    problem, operands = describe(logits, labels, options=Options.taken_from(dict(KINDS[kind])))
    pieces = [(operands._replace(logits=logits[:, :40]), 0)]
    pieces.append((operands._replace(logits=logits[:, 40:]), 40))
    cut = Cut(problem, pieces, None)
    path = of_parts("native")
    found = set()
    try:
        # The baseline has no fused multiply-add, and rounds otherwise.
        fused = [isa for isa in settings.isas() if isa != "baseline"] or settings.isas()[:1]
        for isa, threads in itertools.product(fused, (1, 2, 5)):
            settings.use_isa(isa)
            settings.set_num_threads(threads)
            with problem.library.quiet():
                whole = cut.whole(path)
                grad = cut.gradient(path, whole, 1.0, StatsCotangents())
            found.add((whole.losses.tobytes(), grad.tobytes()))
    finally:
        settings.use_isa(before[0])
        settings.set_num_threads(before[1])
    assert len(found) == 1


@pytest.mark.only("numpy")
def test_what_the_kernels_cannot_read_goes_to_the_reference() -> None:
    logits, labels = np.zeros((2, 3), np.float32), np.zeros(2, np.int64)
    for array, path in ((logits, "native"), (logits.astype(">f4"), "reference")):
        problem, _ = describe(array, labels)
        assert registry.select_of_parts(problem) is of_parts(path)


@pytest.mark.only("torch")
def test_what_torch_compile_traces_goes_to_the_reference(torch: Any) -> None:
    logits, labels = torch.zeros(256, 1000), torch.zeros(256, dtype=torch.int64)
    problem, _ = describe(logits, labels)
    assert registry.select_of_parts(problem) is of_parts("native")
    traced = problem._replace(is_concrete=False, is_compiling=True)
    assert registry.select_of_parts(traced) is of_parts("reference")
    with pytest.raises(ValueError, match=r"'native' cannot .* torch.compile cannot trace"):
        registry.select_of_shard(traced, "native")


@pytest.mark.only("numpy")
def test_a_part_beyond_the_classes_is_refused() -> None:
    problem, operands = describe(np.zeros((2, 3), np.float32), np.zeros(2, np.int64))
    with pytest.raises(ValueError, match="a part's classes must be some of all"):
        of_parts("native").read(problem, operands, 1)


@pytest.mark.only("numpy")
@pytest.mark.parametrize("name", ["native", "reference"])
def test_a_teacher_s_masked_part_has_no_largest_logit(name: str) -> None:
    # Beside a 0 in its place these would have no exponentials.
    teacher = np.array([[-np.inf, -np.inf, -1000.0, -1001.0]], np.float32)
    problem, _ = describe(np.zeros((1, 4), np.float32), polyce.TeacherLogits(teacher))
    with problem.library.quiet():
        read = [of_parts(name).read_teacher(problem, teacher[:, i : i + 2]) for i in (0, 2)]
        top, total = parts.join_teacher(problem, read)
    assert top == -1000.0
    np.testing.assert_allclose(total, 1.0 + np.exp(-1.0), rtol=1e-6)
