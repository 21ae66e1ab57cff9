"""dask arrays of CuPy chunks: a block runs the CUDA kernels, as a call on the chunk would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# In a separate process, in which `cupy` is the emulated CuPy.
SCRIPT = """
import cupy
import dask.array as da
from polyce.testing import Backend, cases, check_implementation
from polyce.testing.selection import representative


def asarray(array):
    chunks = [-(-size // 2) if axis == 0 and array.ndim > 1 else -1
              for axis, size in enumerate(array.shape)]
    return da.from_array(cupy.asarray(array), chunks=chunks, asarray=False)


backend = Backend(
    "dask",
    asarray,
    lambda array: cupy.asnumpy(array.compute(scheduler="sync")),
    lambda result: isinstance(result, da.Array) and isinstance(result._meta, cupy.ndarray),
    floats=("float32", "float64"),
)
few = {case.name for case in representative(list(cases(["combined", "stats"])), 12)}
report = check_implementation(
    "dask", backend, groups=["combined", "stats"], dtypes=["float32", "float64"],
    leave_out=lambda case: "" if case.name in few else "not among the few",
)
print(sum(report.ran.values()), *sorted({launch.name for launch in cupy.emulation.launches}))
"""


@pytest.mark.slow("dask")
@pytest.mark.only("dask")
def test_a_block_of_cupy_s_runs_cupy_s_kernels() -> None:
    emulation = str(Path(__file__).with_name("emulation"))
    path = os.pathsep.join(filter(None, (emulation, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert not done.returncode, done.stderr
    ran, *kernels = done.stdout.split()
    assert int(ran) > 5
    assert {"forward", "forward_backward"} <= set(kernels)
