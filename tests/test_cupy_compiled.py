"""The cupy kernels compiled for NVIDIA's GPUs: few registers, none spilled, 16-byte loads.

This needs no GPU and no CuPy: NVRTC is called as CuPy would call it, with the options that the path
plans for calls of many kinds.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import nvrtc
from conftest import FULL
from polyce.call.options import STATS, Options
from polyce.call.problem import describe
from polyce.call.target import SparseTarget, TeacherLogits
from polyce.implementations.cupy import plan as cupy_plan
from polyce.implementations.cupy.plan import LaunchKey, Layout, PartKey
from polyce.testing.dtypes import dtype

pytestmark = pytest.mark.only("cupy-compile")

DTYPES = ("float16", "bfloat16", "float32", "float64")
# Long rows of an odd length, and rows with less than 16 bytes for each thread.
SHAPES = ((4, 50257), (300, 10))
# What else is passed: arrays and options.
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 0.1, "logit_softcap": 30.0, "return_stats": True}
BESIDE = {"label_smoothing": 0.1, "return_stats": STATS}
# The gradients that flow into stats are an array for each.
VALUED = {"return_stats": True, "grad_stats": ("lse", "entropy")}
CALLS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("int64", {}),
    ("uint8", {"label_smoothing": 0.1}),
    ("int32", {"logit_softcap": 30.0}),
    ("int64", {"return_stats": True}),
    ("int64", EVERYTHING),
    ("same", {}),
    ("same", {"logit_softcap": 30.0}),
    ("same", {"return_stats": True}),
    ("same", EVERYTHING),
    ("float32", {}),
    ("int64", BESIDE),
    ("same", {**BESIDE, "return_stats": ("top_probability", "brier"), "logit_softcap": 30.0}),
    ("int64", VALUED),
    ("int64", {**VALUED, **BESIDE, "logit_softcap": 30.0}),
    ("same", {**VALUED, "logit_softcap": 30.0}),
    ("sparse int64", {}),
    ("sparse int32", EVERYTHING),
    ("sparse uint8", {**VALUED, "logit_softcap": 30.0}),
    ("teacher same", {}),
    ("teacher float32", {"label_smoothing": 0.1}),
    ("teacher same", EVERYTHING),
    ("teacher same", {**VALUED, "logit_softcap": 30.0}),
)
# Most registers of a thread with which four blocks of 256 share a multiprocessor's 65536; two in
# float64.
FEW, MANY = 64, 128
# For stats beside the target and for entries three blocks of 256, for a teacher two. In float64,
# with a softcap or a teacher, all registers that there are.
BESIDE_FEW, ALL = 80, 255
READING = {"forward", "forward_backward", "state_of_part", "gradient_of_part"}
WRITING = {"forward_backward", "backward", "gradient_of_part"}


def planned(
    shape: tuple[int, int],
    name: str,
    target: str,
    options: dict[str, Any],
    *,
    in_parts: bool = False,
) -> dict[str, tuple[str, ...]]:
    """Return what each kernel of a call is compiled with."""
    logits = np.empty(shape, dtype(name))
    kind, _, stored = target.rpartition(" ")
    stored = name if stored == "same" else stored
    narrow = (shape[0], 3) if kind == "sparse" else shape[:1]
    held = np.empty(narrow if "int" in stored else shape, dtype(stored))
    given: Any = held
    if kind == "sparse":
        given = SparseTarget(held, np.empty(narrow, dtype(name)))
    elif kind == "teacher":
        given = TeacherLogits(held, 0.5)
    options = {"validate": False} | options
    of_stats = {name: np.empty(shape[0]) for name in options.pop("grad_stats", ())} or None
    problem, _ = describe(logits, given, options=Options.taken_from(options), grad_stats=of_stats)
    layout = Layout(logits.strides, 0, logits.itemsize)
    probabilities = None if "int" in stored else Layout(held.strides, 0, held.itemsize)
    part = PartKey(0, shape[1], bool(of_stats)) if in_parts else None
    key = LaunchKey(layout, probabilities, layout, None, None, None, False, part)
    return cupy_plan.plan(problem, key).options


def texts() -> list[tuple[str, tuple[str, ...], int]]:
    """Return each kernel, with every set of options, for every architecture."""
    found = {}
    for shape, name, (target, options) in itertools.product(SHAPES, DTYPES, CALLS):
        for kernel, macros in planned(shape, name, target, options).items():
            found[macros] = kernel
    for name, (target, options) in itertools.product(("bfloat16", "float64"), CALLS):
        for kernel, macros in planned(SHAPES[0], name, target, options, in_parts=True).items():
            found[macros] = kernel
    return [
        (kernel, macros, architecture)
        for macros, kernel in found.items()
        for architecture in nvrtc.ARCHITECTURES
    ]


def covering(every: list[tuple[str, tuple[str, ...], int]]) -> list[Any]:
    """Choose a few in which any two settings that occur together in a kernel still do."""
    pairs = [
        {(kernel, *two) for two in itertools.combinations((*macros, architecture), 2)}
        for kernel, macros, architecture in every
    ]
    chosen, wanted = [], set().union(*pairs)
    while wanted:
        best = max(range(len(every)), key=lambda i: len(pairs[i] & wanted))
        wanted -= pairs[best]
        chosen.append(every[best])
    return chosen


def cases() -> list[Any]:
    every = texts()
    chosen = every if FULL else covering(every)
    return [pytest.param(*case, id=told(*case)) for case in chosen]


def told(kernel: str, macros: tuple[str, ...], architecture: int) -> str:
    values = dict(macro[2:].split("=") for macro in macros if macro.startswith("-D"))
    left_out = {"KERNEL", "BLOCK", "REAL", "WIDTH"}
    words = (
        name.lower() if value == "1" else value.lower()
        for name, value in values.items()
        if name not in left_out and value != "0"
    )
    block, width = f"block_{values['BLOCK']}", f"width_{values['WIDTH']}"
    return "-".join((kernel, *words, block, width, f"sm_{architecture}"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "macros" in metafunc.fixturenames:
        # Only where these tests run, since every run collects this file.
        wanted = metafunc.config.getoption("--backend") == "cupy-compile"
        metafunc.parametrize(("kernel", "macros", "architecture"), cases() if wanted else [])


def limit(macros: tuple[str, ...]) -> int:
    """Return how many registers a thread of a kernel may have."""
    on = {macro for macro in ("BESIDE", "VALUED", "SPARSE", "TEACHER") if f"-D{macro}=1" in macros}
    if "-DREAL=FLOAT64" in macros:
        rare = "-DSOFTCAP=1" in macros and on & {"BESIDE", "VALUED"}
        return ALL if rare or "TEACHER" in on else MANY
    if "TEACHER" in on:
        return MANY
    return BESIDE_FEW if on & {"BESIDE", "SPARSE"} else FEW


def test_compiled(kernel: str, macros: tuple[str, ...], architecture: int) -> None:
    found = nvrtc.compiled(cupy_plan.source(), architecture, (*macros, "--fmad=false"))
    assert found.warnings == ()
    assert found.kernels.keys() == {kernel}
    used = found.kernels[kernel]
    probabilities = any(macro.startswith("-DTARGET=") and "FLOAT" in macro for macro in macros)
    assert used.registers <= limit(macros)
    assert (used.spilled, used.stack) == (0, 0)
    loads, stores = nvrtc.widths(found.ptx)
    # Probabilities, or a softcap, leave registers for fewer loads at once.
    if "-DWIDTH=1" not in macros and "-DSOFTCAP=1" not in macros and not probabilities:
        assert kernel not in READING or 16 in loads
        assert kernel not in WRITING or 16 in stores
        if "-DLOGITS=BFLOAT16" in macros and kernel in WRITING:
            # Two numbers at once, where the architecture rounds to them.
            assert ("cvt.rn.bf16x2.f32" in found.ptx) == (architecture >= 80)
    assert nvrtc.generic(found.ptx) == []
    assert nvrtc.narrow_products(found.ptx) == []


SPILLING = """
__device__ INLINED void spill(double* x) {
  double kept[40];
  for (int i = 0; i < 40; i++) kept[i] = x[i];
  __syncthreads();
  for (int i = 0; i < 40; i++) x[i + threadIdx.x] = exp(kept[39 - i]) * kept[i];
}
extern "C" __global__ void __launch_bounds__(1024, 2) spilling(double* x) { spill(x); }
"""
ONE_BY_ONE = """
extern "C" __global__ void one_by_one(const float* x, float* y, int columns) {
  __shared__ float shared[32];
  float sum = 0;
  int begin = blockIdx.x * columns;
  for (int i = 0; i < columns; i++) sum += x[begin + i];
  *(columns > 9 ? shared : y) = sum;
  __syncthreads();
  y[1] = shared[threadIdx.x];
}
"""


@pytest.mark.parametrize("inlined", ["__forceinline__", "__noinline__"])
def test_spilled_registers_are_seen(inlined: str) -> None:
    used = nvrtc.compiled(SPILLING, 90, (f"-DINLINED={inlined}",)).kernels["spilling"]
    assert used.registers <= 32
    assert used.spilled > 0
    assert used.stack > 0


def test_narrow_accesses_and_addresses_are_seen() -> None:
    found = nvrtc.compiled(ONE_BY_ONE, 90)
    assert nvrtc.widths(found.ptx) == ({4}, {4})
    assert len(nvrtc.generic(found.ptx)) == 1
    assert len(nvrtc.narrow_products(found.ptx)) == 1


def test_a_warning_is_seen() -> None:
    found = nvrtc.compiled("static __device__ int unused() { return 1; }", 90)
    assert "unused" in found.warnings[0]


def test_a_text_that_does_not_compile_says_why() -> None:
    with pytest.raises(nvrtc.CompileError, match=r"polyce\.cu\(1\): error: .*nothing"):
        nvrtc.compiled("__global__ void k() { nothing(); }", 90)
