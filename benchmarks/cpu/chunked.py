"""Measure dask, by its own path and by the reference: seconds, memory and number of tasks.

`python -m benchmarks.cpu.reference --only dask dask-memory dask-cluster dask-tasks` runs it all.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from typing import Any

from .. import measure, shapes
from ..measure import Row
from . import by_hand

PATHS = ("dask", "reference")
CUTS = ("rows", "classes")
OURS = ("loss", "loss and gradient")


def cuts(shape: tuple[int, int], chunk: int) -> dict[str, tuple[int, int]]:
    """Return chunks of this many whole rows, and chunks as large that cut the classes too."""
    return {"rows": (chunk, shape[1]), "classes": (8 * chunk, -(-shape[1] // 8))}


def results(
    case: str, logits: Any, labels: Any, path: str | None = None, whole: bool = False
) -> tuple[Any, ...]:
    """Return the lazy results of one case, with the gradient reduced so that it need not stay."""
    import polyce

    if case == "logits alone":
        return (abs(logits).max(),)
    if case == "loss by hand":
        return (by_hand.dask_loss(logits, labels),)
    if case == "loss":
        return (polyce.cross_entropy(logits, labels, implementation=path),)
    loss, grad = polyce.cross_entropy_with_grad(logits, labels, implementation=path)
    return loss, grad if whole else abs(grad).max()


def seconds(shape: tuple[int, int], chunk: int) -> list[Row]:
    """Time both paths in turn, each case in a fresh process."""
    return [
        row
        for source, cut, case in itertools.product(("made", "in memory"), CUTS, OURS)
        for row in measure.fresh(
            time_case,
            source=source,
            cut=cut,
            case=case,
            shape=shape,
            chunk=chunk,
        )
    ]


def time_case(
    source: str, cut: str, case: str, shape: tuple[int, int], chunk: int, rounds: int = 3
) -> list[Row]:
    """Time one case, with logits made chunk by chunk or sliced from memory."""
    import dask
    import dask.array as da

    chunks = cuts(tuple(shape), chunk)[cut]
    if source == "made":
        logits, labels = by_hand.lazy_problem(tuple(shape), chunks)
    else:
        whole, whole_labels = shapes.problem(tuple(shape))
        logits = da.from_array(whole, chunks=chunks, name="logits")
        labels = da.from_array(whole_labels, chunks=chunks[0])

    def run(case: str, path: str | None = None) -> Callable[[], Any]:
        return lambda: dask.compute(*results(case, logits, labels, path))

    peers = {"reference": (run(case, "reference"), 1 / 1.5 if cut == "rows" else None)}
    if case == "loss":
        peers["by hand"] = (run("loss by hand"), None)
    with dask.config.set(scheduler="threads", num_workers=2):
        name = f"{case} {shape[0]}x{shape[1]} {source} by {chunks[0]}x{chunks[1]}"
        return measure.against(name, run(case, "dask"), peers, budget=0.0, rounds=rounds)


def memory(shape: tuple[int, int], chunk: int) -> list[Row]:
    """Measure the growth of dask computations, each in a fresh process."""
    cases: list[tuple[str, str | None]] = [("logits alone", None), ("loss by hand", None)]
    cases += [(case, path) for path in PATHS for case in OURS]
    rows = []
    for count, cut, (case, path) in itertools.product((shape[0] // 4, shape[0]), CUTS, cases):
        facts: Row = {"case": case, "path": path, "cut": cut}
        used = (count, shape[1])
        grown = measure.fresh(grow, shape=used, chunk=chunk, **facts)
        if grown is None:
            raise LookupError("this system does not tell a process's peak memory")
        gigabytes = grown["bytes"] / 1e9
        row = facts | {"logits": f"{used[0]}x{used[1]}", "time_s": grown["seconds"]}
        rows.append(
            row | {"growth_GB": gigabytes} | measure.judge(gigabytes, 0.5 if path else None)
        )
    return rows


def grow(
    case: str, path: str | None, cut: str, shape: tuple[int, int], chunk: int
) -> dict[str, float] | None:
    """Measure the growth of one computation, on two threads."""
    import dask

    def lazy(shape: tuple[int, int], chunk: int) -> tuple[Any, ...]:
        problem = by_hand.lazy_problem(shape, cuts(shape, chunk)[cut])
        return results(case, *problem, path)

    with dask.config.set(scheduler="threads", num_workers=2):
        # The first computation imports modules and starts threads, which is not to be measured.
        dask.compute(*lazy((32, 16), 2))
        large = lazy(tuple(shape), chunk)
        return measure.peak_growth(lambda: dask.compute(*large))


def cluster(shape: tuple[int, int], chunk: int) -> list[Row]:
    """Time loss and gradient on a worker process with one thread, and measure its peak memory."""
    return [
        measure.fresh(on_worker, path=path, cut=cut, shape=shape, chunk=chunk)
        for cut, path in itertools.product(CUTS, PATHS)
    ]


def on_worker(path: str, cut: str, shape: tuple[int, int], chunk: int) -> Row:
    """Run loss and gradient on a fresh worker."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as local,
        Client(local) as client,
    ):
        chunks = cuts(tuple(shape), chunk)[cut]
        lazy = results("loss and gradient", *by_hand.lazy_problem(tuple(shape), chunks), path)
        start = time.perf_counter()
        client.gather(client.compute(lazy))
        seconds = time.perf_counter() - start
        (memory,) = client.run(measure.memory).values()
    row = {"case": f"loss and gradient {shape[0]}x{shape[1]}", "cut": cut, "path": path}
    gigabytes = memory["VmHWM"] / 1e9
    return row | {"time_s": seconds, "peak_GB": gigabytes} | measure.judge(gigabytes, 0.5)


def tasks(shape: tuple[int, int], chunk: int) -> list[Row]:
    """Count dask's tasks and time how long the graph takes to make, for more and more chunks."""
    found = []
    for cut, case, share in itertools.product(CUTS, OURS, (8, 4, 2, 1)):
        whole = (shape[0] // share, shape[1])
        counts = {}
        for path in ("reference", "dask"):
            logits, labels = by_hand.lazy_problem(whole, cuts(whole, chunk)[cut])
            start = time.perf_counter()
            # What a caller does with the gradient is not polyce's.
            lazy = results(case, logits, labels, path, whole=True)
            described = time.perf_counter() - start
            counts[path] = _count(lazy)
            pieces = math.prod(logits.numblocks)
            row = {"case": f"{case} {whole[0]}x{whole[1]}", "cut": cut, "path": path}
            row |= {"chunks": pieces, "tasks to run": counts[path]}
            row |= {"per chunk": counts[path] / pieces, "describe_s": described}
            if path == "dask":
                ratio = counts["dask"] / counts["reference"]
                row |= {"ratio": ratio} | measure.judge(ratio, 0.25 if cut == "rows" else None)
            found.append(row)
    return found


class _Counted(Exception):
    """Raised to carry the number of tasks that dask was about to run."""


def _count(lazy: tuple[Any, ...]) -> int:
    """Count the tasks for all results together: dask.optimize would fuse each result's alone."""
    import dask

    def scheduler(graph: Any, keys: Any, **options: Any) -> Any:
        raise _Counted(len(graph.__dask_graph__()))

    try:
        dask.compute(*lazy, scheduler=scheduler)
    except _Counted as counted:
        return int(counted.args[0])
    raise RuntimeError("dask has not asked its scheduler")
