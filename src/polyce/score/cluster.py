"""Blocks scored on a dask cluster, whose workers read the files themselves."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from polyce.score import files, passes
from polyce.score.passes import Each
from polyce.score.totals import Box, OfBlocks, Question

AHEAD = 2
"""How many tasks each thread of the cluster is given ahead of what has come back."""


@contextmanager
def on_cluster(address: str, logits: str, target: str) -> Iterator[Each]:
    """Connect to a scheduler; the arrays are named as `open_array` takes them."""
    files.need("distributed", "--dask", "distributed")
    from distributed import Client

    for name in (logits, target):
        if files.path_of(name).suffix == ".npz":
            raise ValueError(
                f"{name} must be a file that workers can read in part, got an .npz archive; "
                "save it with numpy.save"
            )
    with Client(address, timeout="30s") as client:

        def each(question: Question, scale: float, given: Iterable[Box]) -> Iterator[OfBlocks]:
            room = AHEAD * max(1, sum(client.nthreads().values()))
            # In order, so that sums have the same bits whichever worker is done first.
            waiting = deque[Any]()
            for some in passes.together(given):
                task = client.submit(_read_and_score, logits, target, question, scale, some)
                waiting.append(task)
                if len(waiting) == room:
                    yield waiting.popleft().result()
            for task in waiting:
                yield task.result()

        yield each


def _read_and_score(
    logits: str, target: str, question: Question, scale: float, some: list[Box]
) -> OfBlocks:
    arrays = files.open_array(logits, "logits"), files.open_array(target, "labels")
    return passes.score_blocks(question, scale, *arrays, some)
