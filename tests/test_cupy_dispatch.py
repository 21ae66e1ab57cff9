"""CuPy without a device: real CuPy arrays, over memory that cannot be read, take the right path."""

from __future__ import annotations

import io
import itertools
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import polyce
from polyce.arrays import find
from polyce.call import problem
from polyce.call.options import Options
from polyce.implementations import registry
from polyce.implementations.cupy import plan as cupy_plan
from polyce.testing.dtypes import dtype as named

pytestmark = pytest.mark.only("cupy-dispatch")

DTYPES = ("float16", "bfloat16", "float32", "float64")


@pytest.fixture
def shell() -> Any:
    """Make a CuPy array of any shape without allocating."""
    import cupy

    apart = itertools.count(1)

    def make(shape: tuple[int, ...], dtype: Any = np.float64, device: int = 0) -> Any:
        # On a page of its own, away from other arrays.
        memory = cupy.cuda.UnownedMemory(next(apart) << 32, 1 << 32, None, device_id=device)
        return cupy.ndarray(shape, dtype, memptr=cupy.cuda.MemoryPointer(memory, 0))

    return make


class Launch(NamedTuple):
    """A kernel's launch: what it was to be started with."""

    module: Any
    name: str
    device: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    arguments: tuple[Any, ...]


@pytest.fixture
def launches(shell: Any, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Pose as two devices, and record what they are asked to do."""
    import cupy

    from polyce.implementations.cupy import launch as cupy_launch

    done: list[Launch] = []
    entered = [0]

    class Device:
        def __init__(self, device: int = 0) -> None:
            self.id = int(device)

        def __enter__(self) -> None:
            entered.append(self.id)

        def __exit__(self, *_: object) -> None:
            entered.pop()

    class Module:
        def __init__(self, **options: Any) -> None:
            # It accepts its argument, or raises.
            self.real = RawModule(**options)
            self.options = options["options"]

        def get_function(self, name: str) -> Any:
            def kernel(grid: Any, block: Any, arguments: Any) -> None:
                done.append(Launch(self, name, entered[-1], grid, block, tuple(arguments)))

            return kernel

    def empty(shape: Any, dtype: Any = float, order: str = "C") -> Any:
        return shell(shape, dtype, entered[-1])

    RawModule = cupy.RawModule
    # Cached kernels would record into other tests' lists; cached choices are from without a device.
    monkeypatch.setattr(cupy_launch, "_kernels", {})
    monkeypatch.setattr(registry, "_choices", {})
    monkeypatch.setattr(cupy, "RawModule", Module)
    monkeypatch.setattr(cupy, "empty", empty)
    monkeypatch.setattr(cupy, "empty_like", lambda like: empty(like.shape, like.dtype))
    monkeypatch.setattr(cupy.cuda, "Device", Device)
    # An array's own device is a C class that cannot be replaced.
    monkeypatch.setattr(
        find.named("cupy"),
        "computing",
        lambda operands: Device(operands["input"].data.device_id),
    )
    monkeypatch.setattr(cupy.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: entered[-1])
    return done


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_problem_of_a_call(shell: Any, dtype: str) -> None:
    dtype = named(dtype)
    described, operands = problem.describe(shell((4, 5, 2), dtype), shell((4, 2), np.int16))
    assert described.backend == "cupy"
    assert described.device == "cuda"
    assert (described.kind, described.axis, described.row_shape) == ("index", 1, (4, 2))
    assert described.result_dtype == np.dtype(dtype)
    assert described.arithmetic_dtype == np.dtype("float64" if dtype == "float64" else "float32")
    assert described.row_dtype == np.dtype("float64")
    assert not described.check_labels
    assert type(operands.logits).__module__.startswith("cupy")
    assert described.xp.__name__ == "array_api_compat.cupy"


def test_validate_true_checks_on_the_device(shell: Any) -> None:
    described, _ = problem.describe(
        shell((4, 5), np.float32), shell((4,), np.int64), options=Options(validate=True)
    )
    assert described.check_labels


def test_explain_names_library_and_device(shell: Any) -> None:
    text = str(polyce.explain(shell((4, 5), np.float32), shell((4,), np.int64)))
    first, *rows = text.splitlines()
    assert first == "cross_entropy on cupy / cuda: logits float32 (4, 5), target int64 (4,)"
    assert rows[-1] == "  reference  yes  <- runs"


def test_without_a_device_cupy_says_so_and_the_reference_is_chosen(shell: Any) -> None:
    arrays = shell((4, 5), np.float32), shell((4, 5), np.float16)
    described, _ = problem.describe(*arrays)
    assert described.kind == "probability"
    assert registry.select(described).name == "reference"
    reason = "CuPy finds no CUDA or ROCm device"
    assert f"  cupy       no   {reason}" in str(polyce.explain(*arrays)).splitlines()
    with pytest.raises(ValueError, match=reason):
        polyce.cross_entropy(*arrays, implementation="cupy")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", ["uint8", "int64", "float32"])
def test_with_a_device_cupy_is_chosen(
    shell: Any, launches: list[Launch], dtype: str, target: str
) -> None:
    labels = shell((4, 5) if target == "float32" else (4,), target)
    told = polyce.explain(shell((4, 5), named(dtype)), labels)
    assert told.chosen == "cupy"
    assert "  cupy       yes  <- runs" in str(told).splitlines()


def accepted(argument: Any) -> int:
    """Return how many bytes CuPy's launch takes for an argument; older CuPys take the same."""
    import cupy
    from cupy._core import _scalar

    # CuPy 13 passes None and bools differently, so polyce must not use them.
    assert argument is not None
    assert not isinstance(argument, bool)
    if isinstance(argument, cupy.ndarray | cupy.cuda.MemoryPointer):
        return 8
    if isinstance(argument, np.ndarray):
        cupy.cuda.function.CNumpyArray(argument)
        assert argument.size == 1
        return argument.nbytes
    assert type(argument) in (int, float) or isinstance(argument, np.number)
    # Before CuPy 14, Python code cannot create a CScalar.
    made = _scalar.CScalar(argument) if hasattr(_scalar.CScalar, "dtype") else np.array(argument)
    return made.dtype.itemsize


def parameters(kernel: str) -> list[str]:
    """Return the types of a kernel's parameters."""
    found = re.search(rf"^{kernel}\(([^)]*)\) *{{", cupy_plan.source(), re.MULTILINE)
    assert found, kernel
    return [" ".join(each.split()[:-1]) for each in found[1].split(",")]


CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("index", {}),
    "rows": ("index", {"reduction": "none"}),
    "sum": ("index", {"reduction": "sum", "label_smoothing": 0.1}),
    "number": ("index", {"normalizer": 7.0, "z_loss": 0.1}),
    "probabilities": ("probability", {"logit_softcap": 5.0, "return_stats": True}),
}


@pytest.mark.parametrize("shape", [(8, 10), (64, 4096), (2, 200_001)])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_launches_are_what_cupy_takes(
    shell: Any, launches: list[Launch], dtype: str, call: str, shape: tuple[int, int]
) -> None:
    kind, options = CALLS[call]
    logits = shell(shape, named(dtype))
    target = shell(
        shape if kind == "probability" else shape[:1], dtype if kind != "index" else "i8"
    )
    # Converting a weight would need a device.
    arithmetic = "float64" if dtype == "float64" else "float32"
    weight, sample = shell(shape[1:], arithmetic), shell(shape[:1], np.float64)
    for more in ({}, {"weight": weight, "sample_weight": sample}):
        polyce.cross_entropy(logits, target, **options, **more)
        polyce.cross_entropy_with_grad(logits, target, **options, **more)
    assert {launch.device for launch in launches} == {0}
    for launch in launches:
        wanted = parameters(launch.name)
        assert len(launch.arguments) == len(wanted), launch.name
        for argument, kind in zip(launch.arguments, wanted, strict=True):
            size = accepted(argument)
            assert "Call" in kind or size == 8, (launch.name, kind)
            assert isinstance(argument, float) == (kind == "double"), (launch.name, kind)
        assert all(isinstance(n, int) and n > 0 for n in (*launch.grid, *launch.block))
        assert len(launch.grid) <= 3
        assert launch.grid[0] < 2**31
        assert max(launch.grid[1:], default=1) <= 65535
        assert f"-DBLOCK={launch.block[0]}" in launch.module.options


def test_a_call_runs_on_the_device_of_its_arrays(shell: Any, launches: list[Launch]) -> None:
    logits, labels = shell((8, 10), np.float32, 1), shell((8,), np.int64, 1)
    loss, grad = polyce.cross_entropy_with_grad(logits, labels)
    assert {launch.device for launch in launches} == {1}
    assert (loss.data.device_id, grad.data.device_id) == (1, 1)
    del launches[:]
    polyce.cross_entropy(shell((8, 10), np.float32), shell((8,), np.int64))
    assert {launch.device for launch in launches} == {0}


def test_arrays_of_two_devices_are_refused(shell: Any) -> None:
    with pytest.raises(TypeError, match="on <CUDA Device 0> and target on <CUDA Device 1>"):
        polyce.cross_entropy(shell((4, 5), np.float32), shell((4,), np.int64, 1))


def test_another_byte_order_is_not_read_as_the_processor_s(
    shell: Any, launches: list[Launch]
) -> None:
    # CuPy makes no such array, but allows such a view.
    logits, labels = shell((4, 5), np.float32), shell((4,), np.int64)
    for arguments in ((logits.view(">f4"), labels), (logits, labels.view(">i8"))):
        with pytest.raises(TypeError, match="bytes in this processor's order"):
            polyce.cross_entropy(*arguments)
    assert launches == []


def test_cupy_s_own_compiler_takes_the_text(shell: Any, launches: list[Launch]) -> None:
    from cupy.cuda.compiler import _NVRTCProgram

    polyce.cross_entropy_with_grad(shell((64, 4096), np.float32), shell((64,), np.int64))
    (module,) = {launch.module for launch in launches if launch.name == "forward_backward"}
    added = ("-ftz=true", "-arch=sm_90", "--device-as-default-execution-space")
    program = _NVRTCProgram(module.real.code, "polyce.cu", method="cubin")
    log = io.StringIO()
    cubin, _ = program.compile(module.options + added, log)
    assert cubin.startswith(b"\x7fELF")
    assert log.getvalue() == ""


@pytest.mark.parametrize(
    ("input", "target", "error", "match"),
    [
        (((4, 5), "f4"), ((3,), "i8"), ValueError, r"shape \(4,\).*got int64 \(3,\)"),
        (((4, 5), "f4"), ((4,), "f4"), TypeError, "must be an integer dtype, got float32"),
        (((4, 5), "i4"), ((4,), "i8"), TypeError, r"real floating point.*got int32 \(4, 5\)"),
        (((), "f4"), ((), "i8"), ValueError, "at least one axis"),
    ],
    ids=["size", "float-labels", "integer-logits", "no-axis"],
)
def test_errors_are_raised_before_the_device_is_needed(
    shell: Any, input: Any, target: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        polyce.cross_entropy(shell(*input), shell(*target))


def test_numpy_companions_are_refused_with_the_way_to_convert(shell: Any) -> None:
    with pytest.raises(TypeError, match=r"input is cupy and target is numpy.*cupy\.asarray"):
        polyce.cross_entropy(shell((4, 5), np.float32), np.zeros(4, np.int64))


def test_every_function_that_is_called_exists_in_cupy_s_namespace() -> None:
    import array_api_compat.cupy as xp

    package = Path(polyce.__file__).parent
    # These serve every library; each other file of arrays/ is for one library.
    rooms = (package / room for room in ("formula", "call", "linear"))
    files = [package / "arrays/library.py", *(file for room in rooms for file in room.glob("*.py"))]
    called = {
        name
        for file in files
        for name in re.findall(r"\bxp\.([a-z_0-9]+)\(", file.read_text(encoding="utf-8"))
    }
    assert {"take_along_axis", "log1p", "where", "matmul"} <= called
    assert [name for name in sorted(called) if not hasattr(xp, name)] == []


def test_python_m_polyce_shows_cupy() -> None:
    from polyce.explain import versions

    assert find.installed("cupy")
    (line,) = (line for line in versions().splitlines() if line.startswith("cupy"))
    assert line.split()[1][0].isdigit()
