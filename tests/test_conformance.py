"""The one grid, on every backend, against the exact answers."""

from __future__ import annotations

import pytest

import polyce
from conftest import FULL
from polyce.testing import GROUPS, check_implementation
from polyce.testing.backends import Backend

# The backends with an implementation of their own.
OWN = {"dask-rows": "dask"}


@pytest.mark.only("numpy", "strict", "torch", "torch-cuda", "jax-x32", "jax-x64", "cupy")
@pytest.mark.parametrize("group", GROUPS)
def test_grid(backend: Backend, group: str) -> None:
    print(check_implementation("reference", backend, groups=[group]))


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
@pytest.mark.parametrize("name", ["dask", "reference"])
def test_grid_on_dask(name: str, chunks: str, group: str) -> None:
    # dask takes a tenth of a second for each case: the hardest cuts get them all, but for the
    # many special values, and the others a few.
    whole = FULL or chunks == "dask-classes"
    dtypes = None if FULL or (whole and group != "special") else ["float32"]
    report = check_implementation(name, chunks, groups=[group], dtypes=dtypes, few_shapes=not whole)
    print(report)


def test_the_choice_is_the_backend_s_own_path_or_the_reference(backend: Backend) -> None:
    import numpy as np

    logits = backend.asarray(np.zeros((2, 3), np.float32))
    target = backend.asarray(np.zeros(2, np.int32))
    assert polyce.explain(logits, target).chosen == OWN.get(backend.name, "reference")
