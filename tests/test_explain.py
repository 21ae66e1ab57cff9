"""explain() and show_versions(): what they print, and that they compute nothing."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import polyce
from polyce.explain import versions
from polyce.implementations import registry
from polyce.implementations.contract import Implementation
from polyce.implementations.native import core as native

pytestmark = pytest.mark.only("numpy")

LOGITS = np.zeros((8, 10), dtype=np.float32)
LABELS = np.zeros(8, dtype=np.int64)
WEIGHT = np.ones(10, dtype=np.float32)
FUNCTIONS = {
    "cross_entropy": polyce.cross_entropy,
    "cross_entropy_with_grad": polyce.cross_entropy_with_grad,
}
# Arguments that only one of the functions takes are passed to that one only.
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "weight": ("cross_entropy", {"weight": WEIGHT}),
    "ignore_index": ("cross_entropy", {"ignore_index": 3}),
    "reduction": ("cross_entropy", {"reduction": "none"}),
    "label_smoothing": ("cross_entropy", {"label_smoothing": 0.1}),
    "axis": ("cross_entropy", {"axis": -1}),
    "validate": ("cross_entropy", {"validate": False}),
    "implementation": ("cross_entropy", {"implementation": "reference"}),
    "grad_output": ("cross_entropy_with_grad", {"grad_output": 2.0}),
    "grad_output-array": (
        "cross_entropy_with_grad",
        {"grad_output": np.ones(8, dtype=np.float32), "reduction": "none"},
    ),
}


def fails(*args: Any) -> Any:
    raise AssertionError("explain must not run an implementation")


def fake(name: str, **declared: Any) -> Implementation:
    """Make an implementation that must not run."""
    return Implementation(name, fails, fails, **declared)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace the table by implementations that must not run; the last one serves all calls."""

    def put(*rows: Implementation) -> None:
        monkeypatch.setattr(registry, "TABLE", (*rows, fake("reference")))

    return put


# explain


def test_the_whole_text(table: Callable[..., None]) -> None:
    table(
        fake("triton", unavailable=lambda: "triton is not installed (pip install triton)"),
        fake("cupy", backends=frozenset({"cupy"}), devices=frozenset({"cuda"})),
        fake("bare", options=frozenset()),
        fake("native", dtypes=frozenset({"float32", "float64"})),
    )
    explanation = polyce.explain(LOGITS, LABELS, WEIGHT, label_smoothing=0.1)
    expected = """\
cross_entropy on numpy / cpu: logits float32 (8, 10), target int64 (8,), weight float32, \
label_smoothing 0.1
  triton     no   triton is not installed (pip install triton)
  cupy       no   takes arrays of cupy, not numpy; runs on cuda, not cpu
  bare       no   takes no weight; takes no label_smoothing
  native     yes  <- runs
  reference  yes"""
    assert str(explanation) == repr(explanation) == expected
    assert explanation.chosen == "native"
    assert explanation.reasons == {
        "triton": ("triton is not installed (pip install triton)",),
        "cupy": ("takes arrays of cupy, not numpy", "runs on cuda, not cpu"),
        "bare": ("takes no weight", "takes no label_smoothing"),
        "native": (),
        "reference": (),
    }


def test_the_text_without_other_implementations(table: Callable[..., None]) -> None:
    table()
    probabilities = np.zeros((8, 10), dtype=np.float64)
    explanation = polyce.explain(
        LOGITS, probabilities, grad_output=1.0, function=polyce.cross_entropy_with_grad
    )
    assert str(explanation) == (
        "cross_entropy_with_grad on numpy / cpu: logits float32 (8, 10), target float64 (8, 10)\n"
        "  reference  yes  <- runs"
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_runs_nothing(name: str, table: Callable[..., None]) -> None:
    table(fake("first"))
    function = FUNCTIONS[name]
    assert polyce.explain(LOGITS, LABELS, function=function).chosen == "first"
    with pytest.raises(AssertionError, match="must not run"):
        function(LOGITS, LABELS)


def test_labels_are_not_looked_at() -> None:
    bad = np.full(8, 10)
    with pytest.raises(IndexError, match="labels must lie in 0 to 9"):
        polyce.cross_entropy(LOGITS, bad)
    assert polyce.explain(LOGITS, bad).chosen == "native"


@pytest.mark.parametrize("label", CALLS)
def test_it_takes_the_arguments_of_the_call(label: str, table: Callable[..., None]) -> None:
    name, options = CALLS[label]
    FUNCTIONS[name](LOGITS, LABELS, **options)
    table()
    explanation = polyce.explain(LOGITS, LABELS, **options, function=FUNCTIONS[name])
    assert explanation.chosen == "reference"
    assert explanation.call.startswith(f"{name} on numpy / cpu: ")


@pytest.mark.parametrize("option", ["size_average", "reduce"])
def test_the_deprecated_pair_warns_at_the_caller(option: str) -> None:
    with pytest.warns(UserWarning, match="reduction='sum'|reduction='none'") as caught:
        polyce.explain(LOGITS, LABELS, **{option: False})
    assert [warning.filename for warning in caught] == [__file__]


WRONG_CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "no-target": ((LOGITS, None), {}),
    "a-list": (([[0.0, 1.0]], np.zeros(1, dtype=np.int64)), {}),
    "integer-logits": ((LOGITS.astype(np.int64), LABELS), {}),
    "0-d-logits": ((np.zeros(()), LABELS), {}),
    "target-shape": ((LOGITS, LABELS[:7]), {}),
    "target-dtype": ((LOGITS, LABELS.astype(np.float32)), {}),
    "weight-shape": ((LOGITS, LABELS, WEIGHT[:9]), {}),
    "weight-dtype": ((LOGITS, LABELS, WEIGHT.astype(np.complex64)), {}),
    "reduction": ((LOGITS, LABELS), {"reduction": "average"}),
    "label_smoothing": ((LOGITS, LABELS), {"label_smoothing": 1.5}),
    "label_smoothing-type": ((LOGITS, LABELS), {"label_smoothing": "0.1"}),
    "ignore_index": ((LOGITS, LABELS), {"ignore_index": 0.5}),
    "axis": ((LOGITS, LABELS), {"axis": 2}),
    "axis-type": ((LOGITS, LABELS), {"axis": 1.0}),
    "validate": ((LOGITS, LABELS), {"validate": "yes"}),
    "unknown-name": ((LOGITS, LABELS), {"implementation": "fast"}),
    "cannot-serve": ((LOGITS, LABELS), {"implementation": "picky"}),
    "grad_output-shape": ((LOGITS, LABELS), {"grad_output": WEIGHT}),
    "grad_output-number": ((LOGITS, LABELS), {"grad_output": 1.0, "reduction": "none"}),
}


@pytest.mark.parametrize("label", WRONG_CALLS)
def test_it_raises_what_the_call_raises(label: str, table: Callable[..., None]) -> None:
    table(fake("picky", unavailable=lambda: "not built"))
    args, options = WRONG_CALLS[label]
    function = FUNCTIONS["cross_entropy_with_grad" if "grad_output" in options else "cross_entropy"]
    with pytest.raises((TypeError, ValueError)) as of_the_call:
        function(*args, **options)
    with pytest.raises(of_the_call.type, match=f"^{re.escape(str(of_the_call.value))}$"):
        polyce.explain(*args, **options, function=function)


def test_it_knows_use_and_the_variable(
    table: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    table(fake("a"), fake("b"), fake("c"), fake("picky", unavailable=lambda: "not built"))
    monkeypatch.setenv("POLYCE_IMPLEMENTATION", "b")
    assert polyce.explain(LOGITS, LABELS).chosen == "b"
    with polyce.use("c"):
        assert polyce.explain(LOGITS, LABELS).chosen == "c"
        assert polyce.explain(LOGITS, LABELS, implementation="a").chosen == "a"
    with polyce.use("picky"), pytest.raises(ValueError, match="cannot serve this call: not built"):
        polyce.explain(LOGITS, LABELS)


@pytest.mark.parametrize(
    "function", [polyce.nll_loss, polyce.log_softmax, 3], ids=["nll_loss", "log_softmax", "number"]
)
def test_another_function_is_refused(function: Any) -> None:
    with pytest.raises(ValueError, match=r"^function must be polyce\.cross_entropy, "):
        polyce.explain(LOGITS, LABELS, function=function)


# show_versions and `python -m polyce`


def run_module(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "polyce", *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | variables,
    )


def test_show_versions_prints_versions_and_implementations(
    capsys: pytest.CaptureFixture[str],
    table: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table(fake("triton", unavailable=lambda: "not installed"), fake("native"))
    monkeypatch.setenv("POLYCE_IMPLEMENTATION", "native")
    assert polyce.show_versions() is None
    versions, _, implementations = capsys.readouterr().out.partition("\n\n")
    found = dict(line.split(maxsplit=1) for line in versions.splitlines())
    libraries = ["numpy", "array_api_compat", "torch", "triton", "jax", "dask", "cupy"]
    more = ["array_api_strict", "ndonnx", "cubed", "mlx", "mparray", "marray", "ml_dtypes"]
    assert list(found) == ["polyce", "python", *libraries, *more]
    assert found["polyce"] == polyce.__version__
    assert found["python"] == platform.python_version()
    assert found["numpy"] == np.__version__
    assert found["array_api_compat"] == importlib.metadata.version("array-api-compat")
    # The core's line has a test of its own.
    lines = implementations.splitlines(keepends=True)
    assert "".join(line for line in lines if not line.startswith("native core")) == (
        "implementations, in order of preference\n"
        "  triton     no   not installed\n"
        "  native     yes\n"
        "  reference  yes\n"
        "POLYCE_IMPLEMENTATION  native\n"
    )


def test_a_library_that_is_not_there_is_said_to_be_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr("polyce.arrays.find.installed", lambda module: module == "torch")
    polyce.show_versions()
    printed = capsys.readouterr().out
    assert re.search(r"^jax  +not installed$", printed, re.MULTILINE)
    assert re.search(r"^torch  +installed, version unknown$", printed, re.MULTILINE)
    assert printed.endswith("\nPOLYCE_IMPLEMENTATION  not set\n")


def test_the_module_prints_the_versions(capsys: pytest.CaptureFixture[str]) -> None:
    polyce.show_versions()
    done = run_module()
    assert done.returncode == 0, done.stderr
    assert done.stdout == capsys.readouterr().out
    assert done.stderr == ""


@pytest.mark.slow("numpy", "torch", "jax-x32", "dask")
def test_the_demo_learns_the_digits_and_compares_libraries() -> None:
    done = run_module("demo")
    assert done.returncode == 0, done.stderr
    steps = re.findall(r"^ *(\d+) +(\d+\.\d+) +(\d\.\d+)$", done.stdout, re.MULTILINE)
    losses = [float(loss) for _, loss, _ in steps]
    assert len(losses) >= 5
    assert losses[0] == pytest.approx(np.log(10), abs=1e-3)
    assert all(after < before for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.3
    assert float(steps[-1][2]) > 0.9
    (exact,) = re.findall(r"the loss is (\S+)$", done.stdout, re.MULTILINE)
    assert float(exact) == pytest.approx(2 * np.exp(-40.0), rel=1e-8)
    small, *others = re.findall(r"^(?:polyce|torch|NumPy by hand) +(\S+e\S+)$", done.stdout, re.M)
    assert float(small) == pytest.approx(2 * np.exp(-40.0), rel=1e-7)
    assert [float(other) for other in others] == [0.0]
    cost = re.findall(r"^(?:polyce|torch|NumPy by hand) +\d+\.\d+ s(.*)$", done.stdout, re.M)
    assert len(cost) == 2
    if sys.platform == "linux":
        taken = [float(re.search(r"^, (\d+) MB beside the logits$", row)[1]) for row in cost]
        assert 120 < taken[0] < 170 < taken[1]
    row = r"^numpy +\d\.\d{6,} +\d\.\d{6,} +native$"
    assert re.search(row, done.stdout, re.MULTILINE), done.stdout
    difference = re.search(r"^largest difference from float64.*: (\S+)$", done.stdout, re.MULTILINE)
    assert difference is not None
    assert float(difference[1]) < 1e-6


@pytest.mark.parametrize(
    ("variable", "value", "rule"),
    [
        ("POLYCE_NUM_THREADS", "2147483648", "a number of threads from 1 to 1024"),
        ("POLYCE_NUM_THREADS", "100000", "a number of threads from 1 to 1024"),
        ("POLYCE_ISA", "foo", "one of .*baseline on this processor"),
        ("POLYCE_IMPLEMENTATION", "foo", "one of dask, native, triton, cupy, reference"),
    ],
)
def test_a_variable_that_asks_for_what_there_is_not(variable: str, value: str, rule: str) -> None:
    says = f"{variable} must be {rule}, got '{value}'; leave it out"
    call = "import numpy, polyce; polyce.cross_entropy(numpy.zeros((1, 2)), numpy.zeros(1, int))"
    environment = os.environ | {variable: value}
    done = subprocess.run(
        [sys.executable, "-c", call],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )
    assert re.search(f"^ValueError: {says}", done.stderr, re.MULTILINE), done.stderr
    done = run_module(**{variable: value})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"polyce            {polyce.__version__}\n")
    (line,) = (line for line in done.stdout.splitlines() if "must be" in line)
    assert re.search(says, line)


def test_help_is_printed_when_asked_for() -> None:
    done = run_module("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: python -m polyce [demo | score LOGITS LABELS]\n")


@pytest.mark.parametrize("arguments", ["train", "demo more", "--version"])
def test_an_unknown_subcommand_ends_with_usage_and_exit_code_2(arguments: str) -> None:
    done = run_module(*arguments.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: python -m polyce [demo | score LOGITS LABELS]\n")


def test_without_the_compiled_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an install without a compiler."""
    monkeypatch.setattr(native, "_IS_BUILT", False)
    monkeypatch.setattr(registry, "_choices", {})
    monkeypatch.setattr(native, "_warned", [])
    silence = r"warnings.simplefilter\('ignore', polyce.CoreMissingWarning\) silences this$"
    polyce.cross_entropy(LOGITS, LABELS, implementation="reference")
    with pytest.warns(polyce.CoreMissingWarning, match=f"^the compiled .*; {silence}") as warned:
        polyce.cross_entropy(LOGITS, LABELS)
    assert warned[0].filename == __file__
    # Once in a process; warnings are errors here.
    polyce.cross_entropy(LOGITS.astype(np.float64), LABELS)
    explanation = polyce.explain(LOGITS, LABELS)
    assert explanation.chosen == "reference"
    (reason,) = explanation.reasons["native"]
    assert reason.startswith("the compiled core is not built, so calls on NumPy and torch CPU")
    # Otherwise pip would take the wheel from its cache, or leave what is installed as it is.
    assert "pip install --no-cache-dir --force-reinstall --no-deps polyce" in reason
    assert f"native     no   {reason}" in versions()
    with pytest.raises(ValueError, match="only the native path has threads, but the compiled core"):
        polyce.set_num_threads(2)
    with pytest.raises(ValueError, match="'native' cannot serve this call: the compiled core is"):
        polyce.cross_entropy(LOGITS, LABELS, implementation="native")


def test_the_core_s_instruction_set_and_threads_are_shown() -> None:
    core = native.core()
    line = next(line for line in versions().splitlines() if line.startswith("native core"))
    assert line.split()[2] == core.isa()
    assert line.endswith(f"{core.get_num_threads()} threads")
