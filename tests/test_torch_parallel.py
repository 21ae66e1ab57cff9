"""A loss in several threads and processes at once, as run by torch's own wrappers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import polyce

pytestmark = pytest.mark.only("torch")


@pytest.mark.only("torch", "torch-cuda")
def test_threads_may_share_the_loss(torch: Any) -> None:
    # As DataParallel does: one module, a thread for each replica, one backward pass through all.
    loss = polyce.CrossEntropyLoss(label_smoothing=0.1)
    shards = [
        (torch.randn(64, 5, dtype=torch.float64).requires_grad_(), torch.randint(0, 5, (64,)))
        for _ in range(8)
    ]

    def gradient(shard: tuple[Any, Any]) -> Any:
        return torch.autograd.grad(loss(*shard), shard[0])[0]

    with ThreadPoolExecutor(4) as pool:
        losses = list(pool.map(lambda shard: loss(*shard), shards))
        torch.stack(losses).sum().backward()
        gradients = list(pool.map(gradient, shards))
    for (logits, _), want in zip(shards, gradients, strict=True):
        torch.testing.assert_close(logits.grad, want, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("way", ["native", "reference", "module"])
def test_data_parallel_without_devices(torch: Any, way: str) -> None:
    import polyce.torch

    loss: Any = polyce.CrossEntropyLoss(implementation=way)
    if way == "module":
        loss = polyce.torch.CrossEntropyLoss()

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 5)

        def forward(self, features: Any, target: Any) -> Any:
            return loss(self.linear(features), target)

    model = Model()
    features, target = torch.randn(6, 4), torch.randint(5, (6,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it is superseded
        value = torch.nn.DataParallel(model)(features, target)
    value.backward()
    want = torch.nn.functional.cross_entropy(model.linear(features), target)
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(
        model.linear.weight.grad, torch.autograd.grad(want, model.linear.weight)[0]
    )


WORKER = """
import datetime, json, os, sys, torch, torch.distributed as dist, polyce.torch
rank, path, inplace = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=60))
torch.manual_seed(0)
features, target = torch.randn(8, 4, dtype=torch.float64), torch.randint(70, (8,))
model = torch.nn.Linear(4, 70).double()
parallel = torch.nn.parallel.DistributedDataParallel(model)
criterion = polyce.torch.CrossEntropyLoss(inplace_backward=inplace)
optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
own = slice(4 * rank, 4 * rank + 4)
for _ in range(2):
    optimiser.zero_grad()
    criterion(parallel(features[own]), target[own]).backward()
    optimiser.step()
if rank == 0:
    print(json.dumps([parameter.tolist() for parameter in model.parameters()]), flush=True)
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # torch's threads abort one interpreter in ten that ends by itself, whatever the loss
"""


@pytest.mark.slow("torch")
@pytest.mark.skipif(sys.platform != "linux", reason="the name of the loopback differs elsewhere")
@pytest.mark.parametrize("inplace", [False, True])
def test_two_processes_step_as_one(torch: Any, tmp_path: Path, inplace: bool) -> None:
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path / "store"), str(inplace)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        found = [worker.communicate(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], found
    torch.manual_seed(0)
    features, target = torch.randn(8, 4, dtype=torch.float64), torch.randint(70, (8,))
    model = torch.nn.Linear(4, 70).double()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(features), target).backward()
        optimiser.step()
    got = [torch.tensor(values, dtype=torch.float64) for values in json.loads(found[0][0])]
    want = [parameter.detach() for parameter in model.parameters()]
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
