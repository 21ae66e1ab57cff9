"""The conformance grid on every backend, against the exact answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest

import polyce
from conftest import FEW, FULL
from cupy_calls import SPLIT, settings
from polyce.testing import GROUPS, Case, cases, check_implementation
from polyce.testing.backends import Backend, get_backend
from polyce.testing.selection import representative
from triton_checks import PARTS, changed

# The backends with an implementation of their own.
OWN = {"cupy": "cupy", "dask-rows": "dask", "numpy": "native", "torch": "native"}


def few(
    group: str, floats: Sequence[str], most: int | None = None, largest: float = math.inf
) -> Callable[[Case], str]:
    """Leave out large cases, and those that add no new trait to the cases chosen for a group."""
    small = [case for case in cases([group], floats) if case.logits.size <= largest]
    chosen = {case.name for case in representative(small, most)}
    return lambda case: "" if case.name in chosen else "not among the few that stand for its group"


@pytest.mark.only("numpy", "strict", "torch", "torch-cuda", "jax-x32", "jax-x64")
@pytest.mark.parametrize("group", GROUPS)
def test_grid(backend: Backend, group: str) -> None:
    # jax compiles each case anew.
    most = 12 if backend.name == "jax" else None
    leave_out = few(group, backend.floats, most) if FEW else None
    print(check_implementation("reference", backend, groups=[group], leave_out=leave_out))


@pytest.mark.only("jax-x32", "jax-x64")
def test_grid_under_jit(backend: Backend) -> None:
    import jax

    groups = None if FULL else ["options"]
    leave_out = None if FULL else few("options", ["float32"])
    report = check_implementation(
        "reference",
        backend,
        groups=groups,
        dtypes=["float32"],
        few_shapes=True,
        leave_out=leave_out,
        wrap=jax.jit,
    )
    print(report)


@pytest.mark.slow("torch")
@pytest.mark.only("torch")
@pytest.mark.parametrize("name", ["native", "reference"])
@pytest.mark.parametrize("group", GROUPS)
def test_grid_under_another_default_device(backend: Backend, group: str, name: str) -> None:
    import torch

    def elsewhere(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arrays: Any) -> Any:
            with torch.device("meta"):
                return function(*arrays)

        return call

    leave_out = None if FULL else few(group, backend.floats)
    print(check_implementation(name, backend, groups=[group], leave_out=leave_out, wrap=elsewhere))


@pytest.mark.only("triton", "torch-cuda")
@pytest.mark.parametrize("group", GROUPS)
def test_grid_on_triton(backend: Backend, backend_name: str, stands_in: bool, group: str) -> None:
    # The interpreter takes tens of milliseconds for each case, and seconds for long rows.
    everything = FULL or (backend_name == "torch-cuda" and not stands_in)
    leave_out = None if everything else few(group, backend.floats, largest=10_000)
    print(check_implementation("triton", backend, groups=[group], leave_out=leave_out))


@pytest.mark.only("torch-cuda")
@pytest.mark.parametrize("group", GROUPS)
def test_grid_on_triton_with_rows_in_parts(backend: Backend, group: str) -> None:
    leave_out = few(group, backend.floats, 10, largest=10_000)
    with changed(PARTS):
        print(check_implementation("triton", backend, groups=[group], leave_out=leave_out))


EMULATED = pytest.mark.slow("cupy-emulated")
# Cases of a group in a plain run of tests: the emulator compiles each combination of macros.
FEWEST = 5


@pytest.mark.only("cupy", "cupy-emulated")
@pytest.mark.parametrize(
    ("name", "most", "group"),
    [
        *product(["cupy"], [FEWEST], GROUPS),
        *(pytest.param("cupy", 18, group, marks=EMULATED) for group in GROUPS),
        *(pytest.param("reference", None, group, marks=EMULATED) for group in GROUPS),
    ],
)
def test_grid_on_cupy(
    backend: Backend, backend_name: str, name: str, most: int | None, group: str
) -> None:
    everything = most != FEWEST and (FULL or backend_name == "cupy")
    leave_out = None if everything else few(group, backend.floats, most)
    print(check_implementation(name, backend, groups=[group], leave_out=leave_out))


@pytest.mark.only("cupy")
@pytest.mark.parametrize("group", GROUPS)
def test_grid_on_cupy_with_rows_in_parts(backend: Backend, group: str) -> None:
    leave_out = few(group, backend.floats, 10, largest=10_000)
    with settings(**SPLIT):
        print(check_implementation("cupy", backend, groups=[group], leave_out=leave_out))


CHUNKS = ("dask", "dask-rows", "dask-classes")
# Only the hardest chunks for the reference, since the dask path comes before it.
WAYS = [
    *product(["dask"], CHUNKS),
    *(
        pytest.param("reference", chunks, marks=pytest.mark.slow("dask"))
        for chunks in (CHUNKS if FULL else CHUNKS[-1:])
    ),
]


@pytest.mark.only("dask")
@pytest.mark.parametrize(("name", "chunks"), WAYS)
@pytest.mark.parametrize("group", GROUPS)
def test_grid_on_dask(group: str, name: str, chunks: str) -> None:
    # dask takes a tenth of a second for each case; the reference makes hundreds of tasks for one.
    most = 10 if name == "reference" else 20
    leave_out = None if FULL else few(group, get_backend(chunks).floats, most)
    print(check_implementation(name, chunks, groups=[group], leave_out=leave_out))


def test_the_choice_is_the_backend_s_own_path_or_the_reference(
    backend: Backend, backend_name: str
) -> None:
    import numpy as np

    logits = backend.asarray(np.zeros((2, 3), np.float32))
    target = backend.asarray(np.zeros(2, np.int32))
    own = "triton" if backend_name == "torch-cuda" else OWN.get(backend.name, "reference")
    assert polyce.explain(logits, target).chosen == own
