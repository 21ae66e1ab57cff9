"""A GPU through one array library: everything that these tests and the benchmarks ask of it.

`on_torch.py` and `on_cupy.py` fill in the record, one for each library. Without a GPU the record
describes a stand-in with tiny arrays: Triton's interpreter, or the emulated CuPy. What a machine
lacks raises `NotHereError`, with the reason.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from polyce.testing import Backend

EMULATION = Path(__file__).parents[1] / "emulation"
LIBRARIES = ("torch", "cupy")
# Set for a process that a memory checker watches: a memory pool would hand out pieces of large
# blocks, which the checker would take for one allocation.
UNPOOLED = "POLYCE_GPU_UNPOOLED"
# The free memory that a stand-in reports, so that arrays stay tiny.
REHEARSED_BYTES = 2**24


class NotHereError(Exception):
    """Something cannot be checked or measured here; the message is the reason."""


class Timed(NamedTuple):
    """A call to time."""

    prepare: Callable[[], Any]
    """Runs before the call, untimed, and returns its argument."""
    call: Callable[[Any], Any]


Call = Callable[[], Any]


@dataclass(frozen=True)
class Device:
    """A device or its stand-in.

    Attributes
    ----------
    library, path : str
        The array library, and the implementation that runs its kernels.
    rehearses, is_rocm : bool
        Whether it is a stand-in; whether it belongs to ROCm.
    unchecked : mapping
        Options with which labels are not checked, as by default on a GPU.
    xp : module
        The library's namespace from array-api-compat.
    backend : Backend
        The conformance grid's converters, to arrays on the device and back.
    full : callable
        Takes shape, value and a dtype's name, and returns an array.
    normal : callable
        Fills an array with normal numbers of some scale, and returns it.
    around_one : callable
        Takes shape, a dtype's name and a seed, and returns numbers from 0.5 to 1.5.
    labels : callable
        Takes shape, number of classes, a dtype's name and a seed, and returns labels.
    address : callable
        Where an array begins in memory.
    alone, loss_and_grad : callable
        The loss by `path`, and loss and gradient as the library's users get them. The latter
        takes `grad_output` and `in_place` beside the options.
    synchronize : callable
        Waits until everything has run, which is when errors of the device are raised.
    seconds : callable
        Times one call on the device, with cold caches, without what the host takes to launch it.
    whole_seconds : callable
        Times one call from an idle device to an idle device, the host's part included.
    graph_seconds : callable
        Times a call, some number of times, as a graph that has been captured before.
    free_bytes : callable
        Free memory, counting what the library keeps for later.
    extra_bytes : callable
        By how much the memory in use grows at most during a call; None if nothing counts it.
    launches : callable
        Names of the kernels that a call launches, copies and fills included; None if the driver
        does not allow profiling.
    side_stream : callable
        A context in which calls go to a separate stream; at its end all have finished.
    keep_busy : callable
        Keeps the current stream busy for a while, so that what follows runs later.
    without_waiting : callable
        Runs a call twice, and raises if the host waits for the device during the second one.
    captured : callable
        Captures a call in a graph; returns its results, and a function that runs the graph and
        waits.
    device_count, current_device, device_of, moved : callable
        How many devices there are, which one is current, an array's device, a copy on another.
    facts, selector, versions : callable
        A description, nvidia-smi's arguments that select it, and the versions of its drivers.
    """

    library: str
    path: str
    rehearses: bool
    is_rocm: bool
    unchecked: Mapping[str, Any]
    xp: Any
    backend: Backend
    full: Callable[[tuple[int, ...], float, str], Any]
    normal: Callable[[Any, float, int], Any]
    around_one: Callable[[tuple[int, ...], str, int], Any]
    labels: Callable[[tuple[int, ...], int, str, int], Any]
    address: Callable[[Any], int]
    alone: Callable[..., Any]
    loss_and_grad: Callable[..., tuple[Any, Any]]
    synchronize: Callable[[], None]
    seconds: Callable[[Timed], float]
    whole_seconds: Callable[[Timed], float]
    graph_seconds: Callable[[Timed, int], list[float]]
    free_bytes: Callable[[], int]
    extra_bytes: Callable[[Timed], int | None]
    launches: Callable[[Timed], list[str] | None]
    side_stream: Callable[[], AbstractContextManager[None]]
    keep_busy: Callable[[], None]
    without_waiting: Callable[[Call], None]
    captured: Callable[[Call], tuple[Any, Call]]
    device_count: Callable[[], int]
    current_device: Callable[[], int]
    device_of: Callable[[Any], int]
    moved: Callable[[Any, int], Any]
    facts: Callable[[], dict[str, Any]]
    selector: Callable[[], list[str]]
    versions: Callable[[], dict[str, str]]


def find(library: str, rehearse: bool) -> Device:
    """Return a library's device, or its stand-in; NotHereError says why there is none."""
    if library == "torch":
        interprets = os.environ.get("TRITON_INTERPRET") == "1"
        if interprets and not rehearse:
            raise NotHereError("TRITON_INTERPRET=1 runs kernels on a CPU: unset it for a device")
        # Triton reads it when it is imported.
        os.environ["TRITON_INTERPRET"] = str(int(rehearse))
        from . import on_torch

        return on_torch.rehearsal() if rehearse else on_torch.device()
    if rehearse and str(EMULATION) not in sys.path:
        # Ahead of a CuPy that is installed.
        sys.path.insert(0, str(EMULATION))
    from . import on_cupy

    return on_cupy.rehearsal() if rehearse else on_cupy.device()


def is_lost() -> bool:
    """Tell whether an error of the device, such as a bad address, has ended its use here."""
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    try:
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        if cupy is not None and cupy.cuda.is_available():
            cupy.cuda.Device().synchronize()
    except RuntimeError:
        return True
    return False


def lacking(what: str) -> Callable[..., Any]:
    """Return a function that raises: a stand-in lacks what it would need."""

    def refuse(*_: Any) -> Any:
        raise NotHereError(f"a rehearsal on a CPU has no {what}")

    return refuse


def host_seconds(timed: Timed) -> float:
    """Time one call by the host's clock, for a stand-in."""
    state = timed.prepare()
    start = time.perf_counter()
    timed.call(state)
    return time.perf_counter() - start
