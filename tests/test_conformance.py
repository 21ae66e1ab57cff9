"""The one grid, on every backend, against the exact answers."""

from __future__ import annotations

import pytest

import polyce
from conftest import FULL
from polyce.testing import GROUPS, check_implementation
from polyce.testing.backends import Backend


@pytest.mark.only("numpy", "strict", "torch", "torch-cuda", "cupy")
@pytest.mark.parametrize("group", GROUPS)
def test_grid(backend: Backend, group: str) -> None:
    print(check_implementation("reference", backend, groups=[group]))


@pytest.mark.only("jax-x32", "jax-x64")
@pytest.mark.parametrize("group", GROUPS)
def test_grid_on_jax(backend: Backend, group: str) -> None:
    print(check_implementation("reference", backend, groups=[group], few_shapes=not FULL))


@pytest.mark.only("jax-x32", "jax-x64")
def test_grid_under_jit(backend: Backend) -> None:
    import jax

    groups = None if FULL else ["options"]
    report = check_implementation(
        "reference", backend, groups=groups, dtypes=["float32"], few_shapes=True, wrap=jax.jit
    )
    print(report)


@pytest.mark.only("dask")
@pytest.mark.parametrize("chunks", ["dask", "dask-rows", "dask-classes"])
@pytest.mark.parametrize("group", GROUPS)
def test_grid_on_dask(chunks: str, group: str) -> None:
    if FULL:
        print(check_implementation("reference", chunks, groups=[group]))
    else:
        dtypes = ["float32"]
        print(
            check_implementation(
                "reference", chunks, groups=[group], dtypes=dtypes, few_shapes=True
            )
        )


def test_the_choice_is_the_reference(backend: Backend) -> None:
    import numpy as np

    logits = backend.asarray(np.zeros((2, 3), np.float32))
    target = backend.asarray(np.zeros(2, np.int32))
    assert polyce.explain(logits, target).chosen == "reference"
