"""Which implementation runs: declarations and reasons, forcing, and the frames to the kernel.

The implementations here are the reference under other names, with a list of what ran.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import polyce
from polyce.call.options import Options
from polyce.call.problem import describe
from polyce.implementations import reference, registry
from polyce.implementations.contract import Implementation
from polyce.testing.backends import Backend

PACKAGE = Path(polyce.__file__).parent
NUMPY = pytest.mark.only("numpy")

LOGITS = np.array([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]], dtype=np.float32)
LABELS = np.array([2, 0])
WEIGHT = np.array([1.0, 2.0, 3.0], dtype=np.float32)
PROBABILITIES = np.full((2, 3), 1 / 3, dtype=np.float32)


def fake(
    name: str,
    ran: list[str] | None = None,
    before: Callable[[str], None] | None = None,
    **declared: Any,
) -> Implementation:
    """Put the reference under another name; it calls `before`, then records what runs."""

    def wrapped(step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if before is not None:
                before(step)
            if ran is not None:
                ran.append(f"{name}.{step}")
            return function(*args)

        return run

    return Implementation(
        name=name,
        cross_entropy=wrapped("loss", reference.PATH.cross_entropy),
        cross_entropy_with_grad=wrapped("gradient", reference.PATH.cross_entropy_with_grad),
        **declared,
    )


@pytest.fixture
def ran() -> list[str]:
    """The implementations that ran in this test, in order."""
    return []


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put implementations before the reference."""

    def put(*rows: Implementation) -> None:
        monkeypatch.setattr(registry, "TABLE", (*rows, *registry.TABLE))

    return put


def described(target: Any = LABELS, weight: Any = None, **given: Any) -> Any:
    options = Options.taken_from(given)
    return describe(LOGITS, target, weight, **given, options=options)


def call(**options: Any) -> Any:
    return polyce.cross_entropy(LOGITS, LABELS, **options)


# The table


@NUMPY
def test_the_reference_comes_last_and_declares_no_restriction() -> None:
    last = registry.TABLE[-1]
    assert last.name == "reference"
    restrictions = (last.backends, last.devices, last.dtypes, last.kinds, last.options, last.stats)
    assert restrictions == (None,) * 6
    assert last.unavailable() is None
    names = [row.name for row in registry.TABLE]
    assert len(set(names)) == len(names)


def test_the_first_row_that_can_serve_runs(
    backend: Backend, table: Callable[..., None], ran: list[str]
) -> None:
    table(
        fake("absent", ran, unavailable=lambda: "not installed"),
        fake("first", ran),
        fake("second", ran),
    )
    logits, labels = backend.asarray(LOGITS), backend.asarray(LABELS.astype(np.int32))
    polyce.cross_entropy(logits, labels)
    assert ran == ["first.loss"]
    ran.clear()
    polyce.cross_entropy_with_grad(logits, labels)
    assert ran == ["first.gradient"]


# Reasons

DECLARATIONS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "stats": (
        {"stats": frozenset({"lse", "entropy"})},
        {"return_stats": ("lse", "rank", "brier")},
        tuple(f"computes the stats entropy, lse, not {name}" for name in ("rank", "brier")),
    ),
    "unavailable": ({"unavailable": lambda: "not built"}, {}, ("not built",)),
    "backends": (
        {"backends": frozenset({"torch", "cupy"})},
        {},
        ("takes arrays of cupy, torch, not numpy",),
    ),
    "devices": ({"devices": frozenset({"cuda"})}, {}, ("runs on cuda, not cpu",)),
    "dtypes": (
        {"dtypes": frozenset({"float64", "float16"})},
        {},
        ("takes logits in float16, float64, not float32",),
    ),
    "kinds-index": (
        {"kinds": frozenset({"probability"})},
        {},
        ("takes targets of kind probability, not index",),
    ),
    "kinds-probability": (
        {"kinds": frozenset({"index"})},
        {"target": PROBABILITIES},
        ("takes targets of kind index, not probability",),
    ),
    "options": (
        {"options": frozenset()},
        {"weight": WEIGHT, "label_smoothing": 0.1},
        ("takes no weight", "takes no label_smoothing"),
    ),
    "one-option": (
        {"options": frozenset({"weight"})},
        {"weight": WEIGHT, "label_smoothing": 0.1},
        ("takes no label_smoothing",),
    ),
    "everything": (
        {
            "unavailable": lambda: "not installed",
            "backends": frozenset({"torch"}),
            "devices": frozenset({"cuda"}),
            "dtypes": frozenset({"float64"}),
            "kinds": frozenset({"probability"}),
            "options": frozenset(),
        },
        {"weight": WEIGHT},
        (
            "not installed",
            "takes arrays of torch, not numpy",
            "runs on cuda, not cpu",
            "takes logits in float64, not float32",
            "takes targets of kind probability, not index",
            "takes no weight",
        ),
    ),
}


@NUMPY
@pytest.mark.parametrize("name", DECLARATIONS)
def test_a_declaration_gives_its_reason_and_the_call_goes_on_to_the_next_row(
    name: str, table: Callable[..., None], ran: list[str]
) -> None:
    declared, options, reasons = DECLARATIONS[name]
    limited = fake("limited", ran, **declared)
    problem, _ = described(**{"target": LABELS} | options)
    assert limited.reasons(problem) == reasons
    table(limited, fake("next", ran))
    polyce.cross_entropy(LOGITS, **{"target": LABELS} | options)
    assert ran == ["next.loss"]


@NUMPY
def test_a_declaration_that_the_call_meets_gives_no_reason() -> None:
    row = fake(
        "limited",
        backends=frozenset({"numpy"}),
        devices=frozenset({"cpu"}),
        dtypes=frozenset({"float32"}),
        kinds=frozenset({"index"}),
        options=frozenset({"weight", "label_smoothing"}),
    )
    problem, _ = describe(LOGITS, LABELS, WEIGHT, options=Options(label_smoothing=0.1))
    assert row.reasons(problem) == ()


@NUMPY
def test_a_smoothing_of_0_is_not_an_option_that_is_on() -> None:
    problem, _ = describe(LOGITS, LABELS, options=Options(label_smoothing=0.0))
    assert fake("limited", options=frozenset()).reasons(problem) == ()


@NUMPY
def test_without_a_row_that_can_serve_the_call_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "TABLE", (fake("absent", unavailable=lambda: "not built"),))
    with pytest.raises(ValueError, match="no implementation can serve this call"):
        call()


@pytest.mark.parametrize("error", [NotImplementedError, ImportError, ValueError, RuntimeError])
@NUMPY
def test_an_exception_in_a_kernel_reaches_the_caller(
    error: type[Exception], table: Callable[..., None], ran: list[str]
) -> None:
    def fail(step: str) -> None:
        raise error(f"broken in {step}")

    table(fake("broken", ran, fail), fake("next", ran))
    with pytest.raises(error, match=r"^broken in loss$"):
        call()
    with pytest.raises(error, match=r"^broken in gradient$"):
        polyce.cross_entropy_with_grad(LOGITS, LABELS)
    assert ran == []


# Forcing


@pytest.fixture
def choices(table: Callable[..., None], ran: list[str]) -> list[str]:
    """Put a, b and c, which can serve, and picky, which cannot, into the table; list what ran."""
    picky = fake("picky", ran, unavailable=lambda: "not built", dtypes=frozenset({"float64"}))
    table(fake("a", ran), fake("b", ran), fake("c", ran), picky)
    return ran


@NUMPY
def test_argument_before_use_before_variable_before_table(
    choices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call()
    monkeypatch.setenv("POLYCE_IMPLEMENTATION", "b")
    call()
    with polyce.use("c"):
        call()
        call(implementation="reference")
        polyce.cross_entropy_with_grad(LOGITS, LABELS)
        call(implementation="a")
    call()
    assert choices == [
        "a.loss",
        "b.loss",
        "c.loss",
        "c.gradient",
        "a.loss",
        "b.loss",
    ]


@NUMPY
def test_the_innermost_use_wins_and_each_ends_with_its_block(choices: list[str]) -> None:
    with polyce.use("b"):
        with polyce.use("c"):
            call()
        call()
    call()
    assert choices == ["c.loss", "b.loss", "a.loss"]


@NUMPY
def test_use_ends_with_an_exception(choices: list[str]) -> None:
    with pytest.raises(ZeroDivisionError), polyce.use("b"), polyce.use("c"):
        raise ZeroDivisionError
    call()
    assert choices == ["a.loss"]


@NUMPY
def test_use_concerns_its_own_thread_alone(choices: list[str]) -> None:
    thread = threading.Thread(target=call)
    with polyce.use("b"):
        thread.start()
        thread.join()
        call()
    assert choices == ["a.loss", "b.loss"]


@NUMPY
def test_the_variable_is_passed_over_where_it_cannot_serve(
    choices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYCE_IMPLEMENTATION", "picky")
    call()
    monkeypatch.setenv("POLYCE_IMPLEMENTATION", "")
    call()
    assert choices == ["a.loss", "a.loss"]


STRICT = (
    "^implementation 'picky' cannot serve this call: not built; takes logits in float64, "
    r"not float32; leave implementation at None to run one that can$"
)


@NUMPY
def test_argument_and_use_raise_with_all_reasons(choices: list[str]) -> None:
    with pytest.raises(ValueError, match=STRICT):
        call(implementation="picky")
    with polyce.use("picky"), pytest.raises(ValueError, match=STRICT):
        call()
    with polyce.use("picky"):
        call(implementation="b")
    assert choices == ["b.loss"]


@NUMPY
def test_unknown_names_raise_everywhere(
    choices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = (
        "^implementation must be one of a, b, c, picky, .*reference, got 'fast'; see polyce.explain"
    )
    with pytest.raises(ValueError, match=unknown):
        call(implementation="fast")
    with pytest.raises(ValueError, match=unknown):
        polyce.cross_entropy_with_grad(LOGITS, LABELS, implementation="fast")
    with pytest.raises(ValueError, match=unknown):
        polyce.CrossEntropyLoss(implementation="fast")(LOGITS, LABELS)
    with pytest.raises(ValueError, match=unknown), polyce.use("fast"):
        pass
    monkeypatch.setenv("POLYCE_IMPLEMENTATION", "fast")
    variable = unknown.replace("implementation", "POLYCE_IMPLEMENTATION").partition(";")[0]
    for name in (None, "a"):
        with pytest.raises(ValueError, match=f"{variable}; leave it out"):
            call(implementation=name)
    with pytest.raises(ValueError, match=variable):
        polyce.log_softmax(LOGITS)
    assert choices == []


# The frames above the kernel


def frames_of_polyce() -> int:
    """Count the frames of the package on the stack."""
    count, frame = 0, sys._getframe(1)
    while frame is not None:
        count += Path(frame.f_code.co_filename).is_relative_to(PACKAGE)
        frame = frame.f_back
    return count


@pytest.fixture
def depths(table: Callable[..., None]) -> dict[str, int]:
    """The number of polyce's frames above each kernel call."""
    found: dict[str, int] = {}
    table(fake("hops", before=lambda step: found.update({step: frames_of_polyce()})))
    return found


def test_at_most_three_frames_above_the_kernel(backend: Backend, depths: dict[str, int]) -> None:
    logits, labels = backend.asarray(LOGITS), backend.asarray(LABELS.astype(np.int32))
    polyce.cross_entropy(logits, labels)
    polyce.cross_entropy_with_grad(logits, labels)
    assert depths.keys() == {"loss", "gradient"}
    assert max(depths.values()) <= 3


@pytest.mark.only("torch")
def test_at_most_three_frames_above_the_kernel_under_autograd(table: Callable[..., None]) -> None:
    import torch

    from polyce.graphs import torch_calls

    depths = {}

    def noted(step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            depths[step] = frames_of_polyce()
            return function(*args)

        return run

    right = torch_calls.REFERENCE
    kernels = right._replace(
        forward=noted("forward", right.forward), backward=noted("backward", right.backward)
    )
    whole = functools.partial(torch_calls.cross_entropy, kernels)
    table(Implementation("hops", whole, reference.PATH.cross_entropy_with_grad))
    logits = torch.tensor(LOGITS, requires_grad=True)
    polyce.cross_entropy(logits, torch.tensor(LABELS)).backward()
    assert depths.keys() == {"forward", "backward"}
    assert max(depths.values()) <= 3
