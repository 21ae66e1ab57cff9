"""Processes of torch.distributed on one machine, which run functions of the tests together."""

from __future__ import annotations

import datetime
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SECONDS = 600
"""For how long a process may take over one function, its start included."""


class Processes:
    """Some processes of one group, which wait to be told what to run."""

    def __init__(self, count: int, folder: Path) -> None:
        here = Path(__file__).parent
        paths = [str(here), *(p for p in sys.path if p)]
        environment = os.environ | {
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(paths),
        }
        self.workers = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), str(count), str(folder / "store")],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(count)
        ]
        self.pool = ThreadPoolExecutor(count)

    def run(self, check: str, **arguments: Any) -> None:
        """Run a check in every process, and raise what any of them has raised."""
        for worker in self.workers:
            worker.stdin.write(json.dumps([check, arguments]) + "\n")
            worker.stdin.flush()
        answers = [self.pool.submit(worker.stdout.readline) for worker in self.workers]
        told = [answer.result(SECONDS) for answer in answers]
        assert all(told), f"a process has ended: {[worker.poll() for worker in self.workers]}"
        failures = [failure for failure in map(json.loads, told) if failure]
        assert not failures, "\n".join(failures)

    def close(self) -> None:
        """End the processes."""
        for worker in self.workers:
            worker.kill()
            worker.communicate()
        self.pool.shutdown(cancel_futures=True)


def answer(function: Callable[..., None], arguments: dict[str, Any]) -> str:
    """Return what a check has raised, or an empty string."""
    try:
        function(**arguments)
    except BaseException:  # noqa: BLE001 - the test that waits for it raises it
        return traceback.format_exc()
    return ""


def main(rank: str, count: str, store: str) -> None:
    import torch
    import torch.distributed as dist

    # What a check prints must not be taken for an answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=int(rank),
        world_size=int(count),
        timeout=datetime.timedelta(seconds=SECONDS // 5),
    )
    for line in sys.stdin:
        check, arguments = json.loads(line)
        module, _, name = check.partition(".")
        found = getattr(importlib.import_module(module), name)
        print(json.dumps(answer(found, arguments)), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
