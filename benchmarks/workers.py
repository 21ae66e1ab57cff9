"""Processes that keep running and do one thing after another."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

from .measure import installed

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
# In bfloat16 every row loss may be off by half a unit in the last place, 2⁻⁹ of it, and so may a
# sum in bfloat16, and the largest entry of a gradient, since every logit's gradient is rounded.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


@contextlib.contextmanager
def worker(threads: int, huge_pages: bool = False) -> Iterator[ProcessPoolExecutor]:
    """Keep a fresh process that runs one function at a time."""
    # torch reads it when it starts.
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
