"""A CUDA or ROCm device through torch, with Triton's kernels; or a CPU that interprets them."""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import array_api_compat.torch as xp
import torch
from torch.autograd import DeviceType

import polyce
import polyce.torch
from polyce.testing import Backend, get_backend

from .device import REHEARSED_BYTES, Call, Device, NotHereError, Timed, host_seconds, lacking

# A kernel that writes this much keeps the device busy while the host runs ahead; it is also more
# than any device's cache holds.
_FLUSHED_BYTES = 2**29
_TICKS = 10_000_000
# So many ticks, about two milliseconds, are more than the host takes for a call.
_AHEAD = 4_000_000
_CPU = torch.device("cpu")


def device() -> Device:
    """Return torch's current device."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        is_there = torch.cuda.is_available()
    if not is_there:
        # A driver that is too old for this torch is only warned about.
        why = "".join(f": {str(each.message).splitlines()[0]}" for each in told)
        raise NotHereError(f"torch {torch.__version__} finds no CUDA or ROCm device{why}")
    place = torch.device("cuda", torch.cuda.current_device())
    return dataclasses.replace(
        _on(place),
        synchronize=functools.partial(torch.cuda.synchronize, place),
        seconds=functools.partial(_seconds, place),
        whole_seconds=functools.partial(_whole_seconds, place),
        graph_seconds=functools.partial(_graph_seconds, place),
        free_bytes=functools.partial(_free_bytes, place),
        extra_bytes=functools.partial(_extra_bytes, place),
        launches=_launches,
        side_stream=_side_stream,
        keep_busy=functools.partial(torch.cuda._sleep, _TICKS),
        without_waiting=_without_waiting,
        captured=_captured,
        device_count=torch.cuda.device_count,
        current_device=torch.cuda.current_device,
        device_of=lambda tensor: tensor.device.index,
        moved=lambda tensor, number: tensor.to(torch.device("cuda", number)),
        facts=functools.partial(_facts, place),
        selector=functools.partial(_selector, place),
    )


def rehearsal() -> Device:
    """Return a CPU in a device's place, with kernels in Triton's interpreter."""
    return dataclasses.replace(_on(_CPU), rehearses=True, unchecked={"validate": False})


def _on(place: torch.device) -> Device:
    """Return what a GPU and a CPU have in common, and a CPU's version of the rest."""
    return Device(
        library="torch",
        path="triton",
        rehearses=False,
        is_rocm=torch.version.hip is not None,
        unchecked={},
        xp=xp,
        backend=_backend(place),
        full=lambda shape, value, name: torch.full(
            shape, value, dtype=getattr(torch, name), device=place
        ),
        normal=functools.partial(_normal, place),
        around_one=functools.partial(_around_one, place),
        labels=functools.partial(_labels, place),
        address=lambda tensor: tensor.data_ptr(),
        alone=_alone,
        loss_and_grad=_loss_and_grad,
        # A CPU has run everything when a call returns.
        synchronize=lambda: None,
        seconds=host_seconds,
        whole_seconds=host_seconds,
        graph_seconds=lacking("CUDA graphs"),
        free_bytes=lambda: REHEARSED_BYTES,
        extra_bytes=_uncounted,
        launches=_interpreted,
        side_stream=lacking("streams"),
        keep_busy=lacking("streams"),
        without_waiting=lacking("device to wait for"),
        captured=lacking("CUDA graphs"),
        device_count=lacking("devices"),
        current_device=lacking("devices"),
        device_of=lacking("devices"),
        moved=lacking("devices"),
        facts=lacking("device to describe"),
        selector=lacking("clocks"),
        versions=lambda: {"CUDA": str(torch.version.cuda), "ROCm": str(torch.version.hip)},
    )


def _backend(place: torch.device) -> Backend:
    backend = get_backend("torch")

    def asarray(array: Any) -> Any:
        tensor = backend.asarray(array)
        if tensor.numel() == 0:
            return tensor.to(place)
        # `to` alone would close the gaps between strided elements.
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        extent = 1 + sum((n - 1) * step for n, step in steps)
        memory = torch.as_strided(tensor, (extent,), (1,)).to(place)
        return torch.as_strided(memory, tensor.shape, tensor.stride())

    return dataclasses.replace(backend, asarray=asarray)


def _generator(place: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(place).manual_seed(seed)


def _normal(place: torch.device, tensor: Any, scale: float, seed: int) -> Any:
    return tensor.normal_(0.0, scale, generator=_generator(place, seed))


def _around_one(place: torch.device, shape: tuple[int, ...], name: str, seed: int) -> Any:
    drawn = torch.rand(shape, device=place, generator=_generator(place, seed))
    return (drawn + 0.5).to(getattr(torch, name))


def _labels(place: torch.device, shape: tuple[int, ...], classes: int, name: str, seed: int) -> Any:
    kind, generator = getattr(torch, name), _generator(place, seed)
    return torch.randint(classes, shape, dtype=kind, device=place, generator=generator)


def _alone(*operands: Any, **options: Any) -> Any:
    with torch.no_grad():
        return polyce.cross_entropy(*operands, implementation="triton", **options)


def _loss_and_grad(
    logits: Any, *operands: Any, grad_output: Any = None, in_place: bool = False, **options: Any
) -> tuple[Any, Any]:
    leaf = logits.detach().requires_grad_()
    options["implementation"] = "triton"
    if in_place:
        loss = polyce.torch.cross_entropy(leaf, *operands, inplace_backward=True, **options)
    else:
        loss = polyce.cross_entropy(leaf, *operands, **options)
    cotangent = torch.ones_like(loss) if grad_output is None else grad_output
    (grad,) = torch.autograd.grad(loss, leaf, cotangent)
    return loss.detach(), grad


def _seconds(place: torch.device, timed: Timed) -> float:
    """Time a call behind a sleep of the device, which lasts until the host has launched it."""
    state = timed.prepare()
    _flushed(place).zero_()
    torch.cuda._sleep(_AHEAD)
    return _between_events(lambda: timed.call(state))


def _between_events(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = call()
    end.record()
    end.synchronize()
    del result
    return float(start.elapsed_time(end)) / 1e3


def _whole_seconds(place: torch.device, timed: Timed) -> float:
    state = timed.prepare()
    _flushed(place).zero_()
    torch.cuda.synchronize(place)
    start = time.perf_counter()
    result = timed.call(state)
    torch.cuda.synchronize(place)
    taken = time.perf_counter() - start
    del result
    return taken


def _graph_seconds(place: torch.device, timed: Timed, count: int) -> list[float]:
    state = timed.prepare()
    # The results live as long as the graph that writes them.
    graph, _results = _graph(lambda: timed.call(state))
    taken = []
    for _ in range(count):
        _flushed(place).zero_()
        torch.cuda._sleep(_AHEAD)
        taken.append(_between_events(graph.replay))
    return taken


@functools.cache
def _flushed(place: torch.device) -> torch.Tensor:
    """Make memory that is large enough to flush the device's caches when it is written."""
    size = min(_FLUSHED_BYTES, _free_bytes(place) // 16)
    return torch.empty(size, dtype=torch.int8, device=place)


def _free_bytes(place: torch.device) -> int:
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(place)[0])


def _extra_bytes(place: torch.device, timed: Timed) -> int | None:
    state = timed.prepare()
    torch.cuda.synchronize(place)
    torch.cuda.reset_peak_memory_stats(place)
    before = torch.cuda.memory_allocated(place)
    result = timed.call(state)
    torch.cuda.synchronize(place)
    del result
    return int(torch.cuda.max_memory_allocated(place)) - before


def _launches(timed: Timed) -> list[str] | None:
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    # No kernels at all means that the driver does not allow profiling.
    return _profiled(timed, kinds) or None


def _uncounted(timed: Timed) -> None:
    """Run the call, without a count: torch does not count CPU memory."""
    timed.call(timed.prepare())


def _interpreted(timed: Timed) -> None:
    """Run the profiler nevertheless; it does not see interpreted kernels."""
    _profiled(timed, [torch.profiler.ProfilerActivity.CPU])


def _profiled(timed: Timed, kinds: list[Any]) -> list[str]:
    state = timed.prepare()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=kinds) as profile:
        timed.call(state)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == DeviceType.CUDA]


@contextmanager
def _side_stream() -> Iterator[None]:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        yield
    side.synchronize()


def _without_waiting(call: Call) -> None:
    # It compiles what it needs.
    call()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _captured(call: Call) -> tuple[Any, Call]:
    graph, results = _graph(call)

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return results, replay


def _graph(call: Call) -> tuple[Any, Any]:
    """Capture a call, and return the graph and the results that it will write."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def _facts(place: torch.device) -> dict[str, Any]:
    known = torch.cuda.get_device_properties(place)
    names = ("name", "major", "minor", "total_memory", "multi_processor_count", "L2_cache_size")
    found = {name: getattr(known, name, None) for name in (*names, "gcnArchName")}
    return found | {"devices": torch.cuda.device_count()}


def _selector(place: torch.device) -> list[str]:
    uuid = getattr(torch.cuda.get_device_properties(place), "uuid", None)
    return [] if uuid is None else ["-i", f"GPU-{uuid}"]
