"""Kernels compiled before they are needed, by processes side by side that share a cache on disk.

Triton's are compiled on CPU tensors that nothing is computed with: a driver that only records
stands in for the device's own. CuPy compiles on the device. Whatever goes wrong here is found
again where the kernels run, so it is only noted.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence

from .cases import Case
from .device import Device, find
from .ledger import NOT_HERE, RIGHT, Ledger, Row, Step

# Processes at most: each holds a library, and CuPy's a context on the device.
_MOST = 16
_SECONDS = 3.0
_ALL = "kernels are compiled"
# The binaries that this process would have launched.
_launched: list[str] = []


def steps(library: str, rehearse: bool, turn: Sequence[int] | None) -> Iterator[Step]:
    """Yield the step that starts the processes, or the steps of one of them."""
    if turn is None:
        yield Step(_ALL, 1.0, functools.partial(_all, library, rehearse), True)
        return
    from . import smoke

    device = _recorded(rehearse) if library == "torch" else find(library, rehearse)
    number, count = turn
    for step in [*smoke.steps(device), *_timed(device)][number::count]:
        yield Step(f"compile {step.name}", _SECONDS, functools.partial(_noted, step), True)
    if library == "torch":
        yield Step(f"kernels of process {number}", 0.0, _counted, True)


def _all(library: str, rehearse: bool) -> Iterator[Row]:
    ledger = Ledger.of_this_process()
    if ledger is None:
        raise RuntimeError("a part's process has a ledger")
    target = _target() if library == "torch" and not rehearse else _REHEARSED
    count = min(_MOST, os.cpu_count() or 1)
    command = [sys.executable, "-m", "gpu.part", "compile", "--library", library]
    command += ["--rehearse"] if rehearse else []
    running = [
        subprocess.Popen(
            [*command, "--turn", str(number), str(count)], env=os.environ | {TARGET: target}
        )
        for number in range(count)
    ]
    for process in running:
        process.wait()
    for step in ledger.unfinished():
        if step != _ALL:
            ledger.end(step, {"status": NOT_HERE, "reason": "the process that compiled has ended"})
    yield {"status": RIGHT, "processes": count, "target": target}


def _counted() -> Iterator[Row]:
    yield {"status": RIGHT, "launches": len(_launched), "kernels": len(set(_launched))}


def _noted(step: Step) -> Iterator[Row]:
    """Run a step for what it compiles."""
    try:
        for _ in step.run() or ():
            pass
    except Exception as error:  # noqa: BLE001  (results mean nothing here)
        yield {"status": RIGHT, "note": f"{type(error).__name__}: {str(error)[:200]}"}
    if recorder := sys.modules.get("recorder"):
        launched = recorder.RECORDERS[os.environ[TARGET]].launched
        _launched.extend(launch.hash for launch in launched)
        launched.clear()


# Names the architecture that Triton compiles for.
TARGET = "POLYCE_GPU_TARGET"
_REHEARSED = "sm_90"


def _target() -> str:
    """Name the architecture of torch's current device."""
    import torch

    find("torch", False)
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(torch.cuda.current_device()).gcnArchName).split(
            ":"
        )[0]
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def _recorded(rehearse: bool) -> Device:
    """Return a CPU whose calls go to Triton's kernels, which are compiled and not run."""
    os.environ["TRITON_INTERPRET"] = "0"
    import torch

    from polyce.implementations.triton import path
    from recorder import record

    from . import on_torch

    record(os.environ[TARGET])
    # So that the path takes tensors on a CPU, as it does where it is interpreted.
    path.interprets = lambda: True
    path._was_imported_to_compile = lambda: False
    return dataclasses.replace(
        on_torch.rehearsal(),
        rehearses=rehearse,
        full=lambda shape, value, name: torch.empty(shape, dtype=getattr(torch, name)),
        normal=lambda tensor, scale, seed: tensor,
        free_bytes=lambda: 2**40,
    )


def _timed(device: Device) -> Iterator[Step]:
    """Yield a step for each call that is timed."""
    from benchmarks.gpu.times import session_cases

    def call(case: Case) -> None:
        from .arrays import arranged

        # Where the device is real, kernels do not depend on the number of rows.
        dims = case.dims if device.library == "torch" else (2, *case.dims[1:])
        logits = arranged(device, dims, case)
        labels = device.backend.asarray(_zeros((dims[0], *dims[2:])))
        device.alone(logits, labels)
        device.loss_and_grad(logits, labels)
        device.loss_and_grad(logits, labels, in_place=True)

    for case in session_cases(device):
        yield Step(f"times: {case.name}", _SECONDS, functools.partial(call, case))


def _zeros(shape: tuple[int, ...]) -> object:
    import numpy as np

    return np.zeros(shape, np.int64)
