"""Processes that keep running and time cases in turn.

torch reads THP_MEM_ALLOC_ENABLE when it starts, so its times with huge pages are measured in a
second process, and the two take turns.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from typing import NamedTuple

from .measure import Row, installed

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
# In bfloat16 every row loss may be off by half a unit in the last place, 2⁻⁹ of it, and so may a
# sum in bfloat16, and the largest entry of a gradient, since every logit's gradient is rounded.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


class Size(NamedTuple):
    """How much a run measures."""

    shapes: tuple[str, ...]
    dtypes: tuple[str, ...]
    memory: tuple[str, ...]
    """The logits for which the memory of loss and gradient is measured."""
    thorough: bool
    """Whether one thread is measured too, or the memory of what must be compiled first."""
    visits: int
    """How often each process has a turn at a case."""
    seconds: float
    """Time for the rounds of one visit."""
    rounds: int
    """The least number of rounds of one visit."""


@contextlib.contextmanager
def worker(threads: int, huge_pages: bool = False) -> Iterator[ProcessPoolExecutor]:
    """Keep a fresh process that runs one function at a time."""
    os.environ[HUGE_PAGES] = str(int(huge_pages))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, begin, (threads,)) as process:
        # The process starts, and reads the environment, with the first call.
        process.submit(os.getpid).result()
        yield process


def begin(threads: int) -> None:
    """Set the number of this process's threads, before a library counts processors."""
    import polyce

    if threads == 1 and hasattr(os, "sched_setaffinity"):
        # Nothing else limits jax to one thread; without this function jax uses all of them.
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    polyce.set_num_threads(threads)
    if installed("torch"):
        import torch

        torch.set_num_threads(threads)


# Takes a worker, whether it has huge pages, and its number of turns; returns times by contender.
Ask = Callable[[ProcessPoolExecutor, bool, int], "Future[dict[str, dict[str, float]]]"]


def visit(processes: Mapping[bool, ProcessPoolExecutor], visits: int, ask: Ask) -> list[Row]:
    """Time one case, the processes in turn, and combine the visits to each."""
    taken: dict[tuple[bool, str], list[Row]] = {}
    order = list(processes)
    for turn in range(visits):
        for huge_pages in order:
            times = ask(processes[huge_pages], huge_pages, turn).result()
            for name, seconds in times.items():
                taken.setdefault((huge_pages, name), []).append(seconds)
        order.reverse()
    return [
        {
            "huge_pages": huge_pages,
            "contender": name,
            "median_s": statistics.median(each["median_s"] for each in found),
            "best_s": min(each["best_s"] for each in found),
        }
        for (huge_pages, name), found in taken.items()
    ]
