"""Rows whose classes are cut into parts: each read by itself, joined, and given its gradient."""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import polyce
from conftest import FEW, FULL
from in_parts import Cut, cut_functions, of_parts
from polyce.call.options import Options
from polyce.call.problem import describe
from polyce.formula import parts, rowstate
from polyce.formula.rowgradient import StatsCotangents
from polyce.implementations import registry
from polyce.implementations.native import parts as native
from polyce.implementations.native.core import core
from polyce.testing import GROUPS, Case, cases, check_implementation
from polyce.testing.backends import Backend
from polyce.testing.selection import representative


def few(
    group: str, floats: tuple[str, ...], most: int = 12, largest: float = math.inf
) -> Callable[[Case], str]:
    found = [case for case in cases([group], floats) if case.logits.size <= largest]
    chosen = {case.name for case in representative(found, most)}
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


@pytest.mark.only("triton")
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("table", ["usual", "tiles", "parts"] if FULL else ["usual"])
def test_grid_of_parts_by_triton(backend: Backend, table: str, group: str) -> None:
    from triton_checks import PARTS, TILES, changed

    check: dict[str, Any] = {"groups": [group], "functions": cut_functions(of_parts("triton"))}
    check["leave_out"] = few(group, backend.floats, 20 if FULL else 6, largest=300)
    with changed({"usual": {}, "tiles": TILES, "parts": PARTS}[table]):
        print(check_implementation(None, backend, **check))


@pytest.mark.only("triton")
def test_states_by_triton() -> None:
    from triton_checks import states

    states()


@pytest.fixture
def group(torch: Any) -> Iterator[Any]:
    """Yield a group of this process alone."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.only("triton")
@pytest.mark.skipif(sys.platform != "linux", reason="as in test_sharded.py")
def test_a_shard_by_triton(torch: Any, group: Any) -> None:
    import polyce.torch

    by_triton = {"group": group, "implementation": "triton"}
    x, t = 3.0 * torch.randn(5, 19), torch.randint(19, (5,))
    index = torch.randint(19, (5, 3))

    def results(leaf: Any, **how: Any) -> list[Any]:
        loss, stats = polyce.torch.cross_entropy(leaf, t, return_stats=("entropy",), **how)
        log_prob = polyce.torch.log_prob(leaf, index, **how)
        entropy = polyce.torch.entropy(leaf, **how)
        total = loss + (stats.entropy * entropy).sum() + log_prob.square().sum()
        (grad,) = torch.autograd.grad(total, leaf)
        return [loss, log_prob, entropy, grad]

    found = results(x.requires_grad_(), **by_triton)
    want = results(x, implementation="reference")
    for ours, theirs in zip(found, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


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
