"""One backend per run: `pytest --backend=NAME`, numpy by default.

The library asked for must be there: a missing one is an error, not a skip. A test marked
`only("torch")` is left out of every other backend's run; one without the marker runs on all but
those in MARKED_ONLY.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import on_devices
import polyce
from polyce.testing.backends import Backend, get_backend

# What --backend calls a run, and which arrays the tests without a marker get there.
BACKENDS = {
    "numpy": "numpy",
    "strict": "array-api-strict",
    "torch": "torch",
    "torch-cuda": "torch",
    "jax-x32": "jax",
    "jax-x64": "jax",
    "jax-gpu": "jax",
    # jax's calls compiled for a GPU, by the plugin that runs them there.
    "jax-compile": "jax",
    "dask": "dask-rows",
    "cupy": "cupy",
    # CuPy's kernels on an emulated CuPy, on a CPU; and compiled for GPUs.
    "cupy-emulated": "cupy",
    "cupy-compile": None,
    # CuPy without a device can make no array but an empty shell.
    "cupy-dispatch": None,
    "ndonnx": "ndonnx",
    "cubed": "cubed",
    "mlx": "mlx",
    "mparray": "mparray",
    "marray": "marray",
    # The libraries whose arrays are refused.
    "refused": None,
    # What `polyce score` reads and writes with, and the libraries whose figures it must agree with.
    "score": "numpy",
    # Triton's kernels in its interpreter, on a CPU; and compiled for GPUs, launched on a recorder.
    "triton": "torch",
    "triton-compile": "torch",
}
# The second tier: libraries that are served through the standard alone, most of them slowly. Only
# the grid and their own tests run on them.
TIER_2 = ("ndonnx", "cubed", "mlx", "mparray", "marray")
# These backends run only the tests that name them.
MARKED_ONLY = (
    "cupy-emulated",
    "cupy-compile",
    "cupy-dispatch",
    "jax-compile",
    "refused",
    "score",
    "triton",
    "triton-compile",
    *TIER_2,
)
FULL = os.environ.get("POLYCE_FULL") == "1"
# jax compiles each case anew. Tests that do not depend on its 64-bit types run without them; tests
# that check more digits run with them.
ANY_WIDTH = ("jax-x32", "jax-x64") if FULL else ("jax-x32",)
BY_DIGITS = ("jax-x32", "jax-x64") if FULL else ("jax-x64",)
# For another Python or NumPy, which are much the same, and for jax, which compiles each case.
FEW = os.environ.get("POLYCE_FEW") == "1" and not FULL


def one_of_each(names: Mapping[str, Any], kind: Callable[[Any], Any]) -> list[str]:
    """Choose the first name of each kind of thing; all with POLYCE_FULL=1."""
    first = {kind(thing): name for name, thing in reversed(names.items())}
    return [name for name, thing in names.items() if FULL or first[kind(thing)] == name]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", choices=BACKENDS, default="numpy", help="array library to test")
    parser.addoption(
        "--slow",
        choices=("with", "without", "only"),
        default="with",
        help="whether to run the tests that take long on the library, of those that it has",
    )
    parser.addoption(
        "--stand-in",
        action="store_true",
        help="run a GPU's backend on a CPU that takes its place; see tests/on_devices.py",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "only(*backends): leave the test out of other runs")
    config.addinivalue_line("markers", "slow(*backends): it takes long there; on all without any")
    config.addinivalue_line("markers", "tests_of_tests: leave the test out of runs with few cases")
    config.addinivalue_line("markers", "labels_read: leave the test out where labels are not")
    config.addinivalue_line("markers", "same_everywhere: likewise, the core does not see Python")
    name, stand_in = config.getoption("--backend"), config.getoption("--stand-in")
    if name == "triton":
        # Read when Triton is first imported; so interpreter and compiler need a process each.
        os.environ["TRITON_INTERPRET"] = "1"
    if name == "cupy-emulated":
        sys.path.insert(0, str(Path(__file__).with_name("emulation")))
    if name.startswith("jax"):
        # Before jax starts: a mesh needs several devices, and a CPU can pose as them.
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=4"
        # Devices that wait for each other hold a thread each, and XLA's pool has only as many as
        # there are devices or cores. If the next call's tasks take some of them, calls outside of
        # jit may wait for ever.
        os.environ.setdefault("PJRT_NPROC", "16")
        if name == "jax-compile":
            os.environ["JAX_PLATFORMS"] = "cpu"
            # It would try kernels on the GPU, which is not there.
            os.environ["XLA_FLAGS"] += " --xla_gpu_autotune_level=0"
        import jax

        jax.config.update("jax_enable_x64", name == "jax-x64")
    if name in on_devices.DEVICES:
        on_devices.begin(name, stand_in)
    elif stand_in:
        names = ", ".join(on_devices.DEVICES)
        raise pytest.UsageError(f"--stand-in is for the backends of GPUs ({names}), not {name}")
    if os.environ.get("TRITON_INTERPRET") == "1" and name in ("triton", "torch-cuda"):
        add_tiles_up_by_halves()


def add_tiles_up_by_halves() -> None:
    """Make Triton's interpreter sum pairwise as threads do, not one number after another."""
    from triton.runtime.interpreter import ReduceOps

    def by_halves(self: Any, tile: Any) -> Any:
        values = tile.handle.data
        # A power of two, along the first axis, which is the only one that the kernels sum along.
        while half := len(values) // 2:
            values = values[:half] + values[half:]
        return self.to_tensor(values[0], tile.dtype)

    ReduceOps.sum = by_halves


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    name, part = config.getoption("--backend"), config.getoption("--slow")
    names = {name, on_devices.DEVICES.get(name)}
    marked_only = MARKED_ONLY if FULL else (*MARKED_ONLY, "jax-x64")
    kept, left_out = [], []
    for item in items:
        if FEW and any(map(item.get_closest_marker, ("tests_of_tests", "same_everywhere"))):
            left_out.append(item)
            continue
        marker = item.get_closest_marker("only")
        wanted = name not in marked_only if marker is None else names & {*marker.args}
        if item.get_closest_marker("labels_read") is not None:
            wanted = wanted and name not in on_devices.DEVICES
        if part != "with":
            wanted = wanted and is_slow(item, names) == (part == "only")
        (kept if wanted else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


def is_slow(item: pytest.Item, names: set[str | None]) -> bool:
    """Tell whether a test is marked as taking long on a library."""
    marks = item.iter_markers("slow")
    return any(not mark.args or names & {*mark.args} for mark in marks)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    on_devices.begin_test()
    try:
        return (yield)
    finally:
        if item.config.getoption("--backend") in on_devices.DEVICES:
            on_devices.end_test(item)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.getoption("--backend") in on_devices.DEVICES:
        on_devices.summarize(terminalreporter)


@pytest.fixture(scope="session")
def backend_name(pytestconfig: pytest.Config) -> str:
    """The name that --backend gave."""
    return str(pytestconfig.getoption("--backend"))


@pytest.fixture(scope="session")
def stands_in(pytestconfig: pytest.Config) -> bool:
    """Whether a CPU takes the place of the backend's GPU."""
    return bool(pytestconfig.getoption("--stand-in"))


@pytest.fixture(scope="session")
def backend(backend_name: str, stands_in: bool) -> Backend:
    """The converters of the library under test."""
    found = get_backend(str(BACKENDS[backend_name]))
    if backend_name == "torch-cuda" and not stands_in:
        from_numpy = found.asarray

        def on_device(array: Any) -> Any:
            # Copied with the memory between the elements: .cuda() alone would close the gaps.
            # Not on the default device, which is the GPU's: it is copied there with its gaps.
            tensor = from_numpy(array)
            size = tensor.untyped_storage().nbytes() // tensor.element_size()
            memory = tensor.as_strided((size,), (1,), 0).cuda()
            return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

        found = dataclasses.replace(found, asarray=on_device)
    return forgetful(found) if found.name == "jax" else found


def forgetful(jax_backend: Backend) -> Backend:
    """Clear jax's cache of compiled functions now and then.

    Each function that XLA compiles takes some of the memory mappings that a process may have, 65530
    on Linux, and the process crashes when it needs one more.
    """
    import jax

    count = itertools.count(1)

    def asarray(array: Any) -> Any:
        if next(count) % 1000 == 0:
            jax.clear_caches()
        return jax_backend.asarray(array)

    return dataclasses.replace(jax_backend, asarray=asarray)


@pytest.fixture(scope="session")
def looks_at_labels(backend_name: str) -> bool:
    """Whether labels are looked at unasked: those of plain arrays on a CPU are."""
    return not (backend_name in on_devices.DEVICES or backend_name in ("dask", "cupy-emulated"))


@pytest.fixture(autouse=True)
def no_preference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the caller's environment from choosing the implementation."""
    monkeypatch.delenv("POLYCE_IMPLEMENTATION", raising=False)


@pytest.fixture
def torch() -> Any:
    """torch itself, seeded; only the tests marked for it have it installed."""
    import torch

    torch.manual_seed(0)
    return torch


@pytest.fixture
def empty_door(backend: Backend) -> Iterator[None]:
    """Begin with a door that is open on the library, but knows no call."""
    from door_calls import forget

    polyce.cross_entropy(backend.asarray(np.zeros((2, 3))), backend.asarray(np.zeros(2, np.int64)))
    forget()
    yield
    forget()


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Count the calls that go the whole way."""
    from door_calls import Ways

    for_torch = sys.modules.get("polyce.torch.functional")
    return Ways(monkeypatch, *([] if for_torch is None else [for_torch]))
