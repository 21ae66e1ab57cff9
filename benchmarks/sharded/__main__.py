"""Time the loss of classes over processes beside torch's `loss_parallel`, with the gradient.

python -m benchmarks.sharded [--processes N] [--rows N] [--classes N]

Each process holds `classes` logits of every row and runs on one thread. The two contenders take
turns; a turn begins when all processes are there, and takes as long as the slowest of them. Also
printed is the processor time of one process, of which waiting for others is no part.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

TURNS = 7


def main() -> None:
    """Start the processes, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=32064, help="those of one process")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        work(given)
        return
    with tempfile.TemporaryDirectory() as folder:
        own = [sys.executable, "-m", "benchmarks.sharded", "--store", f"{folder}/store"]
        own += [f"--{name}={getattr(given, name)}" for name in ("processes", "rows", "classes")]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        started = [
            subprocess.Popen([*own, f"--rank={rank}"], env=environment)
            for rank in range(given.processes)
        ]
        if any(process.wait() for process in started):
            sys.exit("a process has failed")


def work(given: argparse.Namespace) -> None:
    """Time both contenders in one of the processes; the first prints."""
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.parallel import loss_parallel

    import polyce.torch

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{given.store}",
        rank=given.rank,
        world_size=given.processes,
    )
    mesh = dist.init_device_mesh("cpu", (given.processes,))
    labels = torch.randint(given.processes * given.classes, (given.rows,), generator=seeded(0))
    shard = torch.randn(given.rows, given.classes, generator=seeded(given.rank + 1))
    shard.requires_grad_()

    def ours() -> Any:
        polyce.torch.cross_entropy(shard, labels, group=dist.group.WORLD).backward()

    def torchs() -> Any:
        logits = DTensor.from_local(shard, mesh, [Shard(1)], run_check=False)
        with loss_parallel():
            torch.nn.functional.cross_entropy(logits, labels).backward()

    contenders = {"polyce": ours, "torch loss_parallel": torchs}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for turn in range(TURNS + 1):
        for name, step in contenders.items():
            shard.grad = None
            dist.barrier()
            times = timed(step)
            slowest = torch.tensor(times[0])
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            if turn:  # the first warms up
                found[name].append((slowest.item(), times[1]))
    if given.rank == 0:
        print(f"{given.processes} processes of {given.rows}x{given.classes} float32, medians")
        for name, rows in found.items():
            wall, own = (statistics.median(column) * 1e3 for column in zip(*rows, strict=True))
            print(f"{name}: {wall:.0f} ms, of a process {own:.0f} ms of processor time")
    dist.destroy_process_group()


def seeded(seed: int) -> Any:
    """Return a generator of random numbers."""
    import torch

    return torch.Generator().manual_seed(seed)


def timed(step: Callable[[], Any]) -> tuple[float, float]:
    """Return what a step takes, by the clock and of this process's processor, in seconds."""
    start, own = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - start, time.process_time() - own


if __name__ == "__main__":
    main()
