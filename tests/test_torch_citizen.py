"""A loss among torch's own: graphs, hooks, modes, layouts, processes and memory."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import polyce
from polyce import rows

pytestmark = pytest.mark.only("torch")

Loss = Callable[..., Any]


def by_module(x: Any, target: Any, weight: Any = None, **options: Any) -> Any:
    import polyce.torch

    return polyce.torch.CrossEntropyLoss(weight, **options)(x, target)


WAYS: dict[str, Loss] = {
    "native": lambda *a, **o: polyce.cross_entropy(*a, **o, implementation="native"),
    "reference": lambda *a, **o: polyce.cross_entropy(*a, **o, implementation="reference"),
    "module": by_module,
}


@pytest.fixture(params=WAYS)
def loss(request: pytest.FixtureRequest) -> Loss:
    """The loss by one of its ways."""
    return WAYS[request.param]


def data(torch: Any, kind: str = "index", shape: tuple[int, ...] = (6, 70)) -> tuple[Any, Any]:
    x = torch.randn(shape).requires_grad_()
    if kind == "probability":
        return x, torch.softmax(torch.randn(shape), 1)
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    target.view(-1)[1] = -100
    return x, target


KINDS = pytest.mark.parametrize("kind", ["index", "probability"])


@KINDS
def test_a_graph_that_is_kept_serves_again(torch: Any, loss: Loss, kind: str) -> None:
    x, target = data(torch, kind)
    value = loss(x, target)
    (once,) = torch.autograd.grad(value, x, retain_graph=True)
    (again,) = torch.autograd.grad(value, x)
    assert torch.equal(once, again)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(value, x)


def test_gradients_accumulate(torch: Any, loss: Loss) -> None:
    grads = []
    for function in (torch.nn.functional.cross_entropy, loss):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 70)
        for _ in range(3):
            target = torch.randint(70, (5,))
            (function(model(torch.randn(5, 4)), target) / 3).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(grads[1], grads[0])


@KINDS
@pytest.mark.parametrize("cotangent", ["expanded", "strided", "zero", "nan", "infinite"])
def test_any_cotangent_of_the_rows(torch: Any, loss: Loss, kind: str, cotangent: str) -> None:
    x, target = data(torch, kind)
    g = {
        "expanded": torch.rand(1).expand(6),
        "strided": torch.rand(12)[::2],
        "zero": torch.zeros(6),
        "nan": torch.tensor([1.0, 2.0, math.nan, 0.0, 1.0, -1.0]),
        "infinite": torch.tensor([1.0, 2.0, math.inf, 0.0, 1.0, -1.0]),
    }[cotangent]
    grads = []
    for function in (torch.nn.functional.cross_entropy, loss):
        found = torch.autograd.grad(function(x, target, reduction="none"), x, g)[0]
        if cotangent == "infinite":
            # torch forms inf - inf on the way.
            found = torch.where(torch.isfinite(found), found, 0.0)
        grads.append(found)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("way", WAYS)
def test_only_the_gradients_that_are_asked_for_are_computed(
    torch: Any, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from polyce import autograd_torch
    from polyce.implementations import native

    ran: list[str] = []

    def spy(module: Any, name: str, note: Callable[..., str]) -> None:
        function = getattr(module, name)

        def noted(*arguments: Any, **options: Any) -> Any:
            ran.append(note(*arguments, **options))
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, noted)

    spy(native, "run", lambda *_, backward=False, **__: "logits" if backward else "forward")
    spy(rows, "backward", lambda *_: "logits")
    spy(autograd_torch, "target_gradients", lambda *a: f"{a[4][0]:d}{a[4][1]:d}")
    for leaf in (True, False):
        x, target = data(torch, "probability")
        weight = torch.rand(70).requires_grad_()
        operands = {"x": x, "target": target.requires_grad_(), "weight": weight}
        if not leaf:
            operands = {key: tensor * 1 for key, tensor in operands.items()}
        for names, want in (
            (["x"], ["logits"]),
            (["target"], ["10"]),
            (["weight"], ["01"]),
            (["target", "weight"], ["11"]),
            (["x", "target"], ["10", "logits"]),
        ):
            value = WAYS[way](*operands.values())
            ran.clear()
            torch.autograd.grad(value, [operands[name] for name in names])
            assert sorted(ran) == want


def test_deterministic_algorithms(torch: Any, loss: Loss) -> None:
    x, target = data(torch, shape=(6, 70, 3))
    weight = torch.rand(70)
    answers = []
    for is_on in (False, True):
        torch.use_deterministic_algorithms(is_on)
        try:
            value = loss(x, target, weight, label_smoothing=0.1)
            answers.append((value.detach(), *torch.autograd.grad(value, x)))
        finally:
            torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(answers[1], answers[0], rtol=0.0, atol=0.0)


@KINDS
def test_hooks_for_saved_tensors(torch: Any, loss: Loss, kind: str) -> None:
    x, target = data(torch, kind)
    want = torch.autograd.grad(loss(x, target), x)
    hooks = torch.autograd.graph.saved_tensors_hooks
    for context in (
        hooks(lambda tensor: tensor, lambda tensor: tensor),
        hooks(lambda tensor: tensor.clone(), lambda tensor: tensor),
        hooks(lambda tensor: tensor, lambda tensor: tensor.clone()),
        torch.autograd.graph.save_on_cpu(),
    ):
        with context:
            value = loss(x, target)
        for keep in (True, False):
            got = torch.autograd.grad(value, x, retain_graph=keep)
            torch.testing.assert_close(got, want, rtol=0.0, atol=0.0)
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        loss(x, target)


def saved_by(torch: Any, call: Callable[[], Any]) -> list[tuple[int, ...]]:
    sizes: list[tuple[int, ...]] = []

    def pack(tensor: Any) -> Any:
        sizes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sizes


@pytest.mark.parametrize("classes", [10, 300])
def test_nothing_of_the_logits_size_is_saved_but_the_logits(
    torch: Any, loss: Loss, classes: int
) -> None:
    x, target = data(torch, shape=(6, classes))
    weight, large = torch.rand(classes), (6, classes)
    for options in ({}, {"weight": weight}, {"label_smoothing": 0.1, "reduction": "none"}):
        sizes = saved_by(torch, lambda o=options: loss(x, target, **o))
        assert sizes.count(large) == 1
        assert all(math.prod(size) <= max(24, classes) for size in sizes if size != large)
    target = torch.softmax(torch.randn(large), 1)
    assert saved_by(torch, lambda: loss(x, target)).count(large) == 2


@pytest.mark.parametrize("inplace", [False, True])
def test_a_module_saves_the_logits_and_a_few_numbers(torch: Any, inplace: bool) -> None:
    import polyce.torch

    x, target = data(torch, shape=(6, 300))
    module = polyce.torch.CrossEntropyLoss(inplace_backward=inplace)
    assert saved_by(torch, lambda: module(x, target)) == [(6, 300), (6,), (6, 4)]


@KINDS
def test_modes_without_a_gradient(torch: Any, loss: Loss, kind: str) -> None:
    x, target = data(torch, kind)
    want = loss(x, target).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            value = loss(x, target)
            made = x * 1
            assert loss(made, target) == want
        assert not value.requires_grad
        assert value == want
        assert value.is_inference() == (mode is torch.inference_mode)
    assert loss(made, target) == want


@KINDS
def test_layouts_of_the_logits(torch: Any, loss: Loss, kind: str) -> None:
    image = torch.randn(2, 7, 3, 4)
    layouts = {
        "channels last": image.contiguous(memory_format=torch.channels_last),
        "expanded rows": image[:1].expand(2, 7, 3, 4),
        "expanded classes": image[:, :1].expand(2, 7, 3, 4),
        "expanded inside": image[:, :, :, :1].expand(2, 7, 3, 4),
        "transposed": image.transpose(0, 1),
        "steps": torch.randn(4, 14, 3, 8)[::2, 1::2, :, ::2],
        "flipped": image.flip(1)[:, :, 1:],
    }
    for name, logits in layouts.items():
        _, target = data(torch, kind, tuple(logits.shape))
        answers = []
        for function in (torch.nn.functional.cross_entropy, loss):
            leaf = logits.detach().requires_grad_()
            value = function(leaf, target)
            answers.append((value.detach(), *torch.autograd.grad(value, leaf)))
        torch.testing.assert_close(answers[1], answers[0], msg=lambda text, n=name: f"{n}: {text}")
        base = image.clone().requires_grad_()
        if name == "expanded rows":
            grads = [
                torch.autograd.grad(function(base[:1].expand(2, 7, 3, 4), target), base)[0]
                for function in (torch.nn.functional.cross_entropy, loss)
            ]
            torch.testing.assert_close(grads[1], grads[0])


def test_data_parallel_without_devices(torch: Any, loss: Loss) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 5)

        def forward(self, features: Any, target: Any) -> Any:
            return loss(self.linear(features), target)

    model = Model()
    features, target = torch.randn(6, 4), torch.randint(5, (6,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it superseded
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


MEBIBYTE = 2**20
LOGITS = 32 * MEBIBYTE
PEAK = """
import json, sys, torch, polyce.torch

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

def step(x, t):
    criterion(x, t).backward()

criterion = polyce.torch.CrossEntropyLoss(inplace_backward=sys.argv[1] == "True")
x, t = torch.ones(1024, 8192), torch.zeros(1024, dtype=torch.int64)
step(x[:64].clone().requires_grad_(), t[:64])  # what is loaded or started once is there now
x.requires_grad_()
before = peak()
step(x, t)
print(json.dumps(peak() - before))
"""


@pytest.mark.same_everywhere
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="this system does not tell of peak memory"
)
@pytest.mark.parametrize(("inplace", "arrays"), [(False, 1), (True, 0)])
def test_peak_memory_of_a_step(inplace: bool, arrays: int) -> None:
    command = [sys.executable, "-c", PEAK, str(inplace)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    growth = float(json.loads(done.stdout))
    assert (arrays - 0.1) * LOGITS < growth + 4 * MEBIBYTE
    assert growth < arrays * LOGITS + 4 * MEBIBYTE
