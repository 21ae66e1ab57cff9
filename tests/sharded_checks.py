"""What every process of a group runs for test_sharded.py: each holds a shard of the classes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import polyce
import polyce.torch
from polyce.testing import cases, check_implementation
from polyce.testing.case import Case
from polyce.testing.conformance import Functions
from polyce.testing.selection import representative

FULL = os.environ.get("POLYCE_FULL") == "1"


def cut(classes: int, seed: int) -> tuple[int, int]:
    """Return first class and width of this process's shard: even, uneven or empty ones."""
    count, rng = dist.get_world_size(), np.random.default_rng(seed)
    if classes % count == 0 and seed % 3 == 0:
        edges = np.arange(count + 1) * (classes // count)
    else:
        edges = np.sort(rng.integers(0, classes + 1, count - 1))
        edges = np.concatenate([[0], edges, [classes]])
    # Not always in the order of the processes.
    place = int(rng.permutation(count)[dist.get_rank()]) if seed % 2 else dist.get_rank()
    return int(edges[place]), int(edges[place + 1] - edges[place])


def shard_of(whole: Any, axis: int | None, seed: int) -> tuple[Any, dict[str, Any]]:
    """Return this process's shard of a tensor, and the arguments that say which it is."""
    axis = min(1, whole.ndim - 1) if axis is None else axis
    start, width = cut(whole.shape[axis], seed)
    found = whole.narrow(axis, start, width)
    return found, {
        "group": dist.group.WORLD,
        "class_start": start,
        "num_classes": whole.shape[axis],
    }


def sharded_target(target: Any, input: Any, axis: int | None, seed: int) -> Any:
    """Return a target with probabilities and teachers cut as the logits are."""
    if isinstance(target, polyce.TeacherLogits):
        return target._replace(logits=shard_of(target.logits, axis, seed)[0])
    is_soft = isinstance(target, torch.Tensor) and target.is_floating_point()
    if is_soft and target.shape == input.shape:
        return shard_of(target, axis, seed)[0]
    return target


def same_everywhere(*tensors: Any) -> None:
    """Check that all processes have the same bits."""
    own = [bytes(t.detach().contiguous().view(-1).view(torch.uint8).tolist()) for t in tensors]
    all_of_them: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_of_them, own)
    assert all(other == own for other in all_of_them)


def whole_gradient(own: Any, whole: Any, axis: int | None, seed: int) -> Any:
    """Return the gradient of all classes from those of the shards."""
    total = torch.zeros(whole.shape, dtype=torch.float64)
    shard_of(total, axis, seed)[0].copy_(own)
    dist.all_reduce(total)
    return total.to(own.dtype)


class Sharded:
    """The functions of polyce on whole tensors, of which each process takes its shard."""

    def __init__(self) -> None:
        self.calls = 0

    def cross_entropy(
        self, input: Any, target: Any, *, axis: int | None = None, **more: Any
    ) -> Any:
        self.calls += 1
        shard, where = shard_of(input, axis, self.calls)
        target = sharded_target(target, input, axis, self.calls)
        found = polyce.torch.cross_entropy(shard, target, axis=axis, **where, **more)
        loss, stats = found if isinstance(found, tuple) else (found, ())
        same_everywhere(loss, *(a for a in stats if a is not None))
        return found

    def with_grad(
        self,
        input: Any,
        target: Any,
        *,
        axis: int | None = None,
        grad_output: Any = None,
        grad_stats: Any = None,
        **more: Any,
    ) -> Any:
        self.calls += 1
        leaf = input.detach().requires_grad_()
        shard, where = shard_of(leaf, axis, self.calls)
        target = sharded_target(target, input, axis, self.calls)
        found = polyce.torch.cross_entropy(shard, target, axis=axis, **where, **more)
        loss, stats = found if isinstance(found, tuple) else (found, None)
        cotangent = torch.ones_like(loss) if grad_output is None else torch.as_tensor(grad_output)
        flows = [(loss, cotangent.to(loss.dtype))]
        for name, of_stat in (grad_stats or {}).items():
            stat = getattr(stats, name)
            flows.append((stat, torch.as_tensor(of_stat).to(stat.dtype)))
        outputs, cotangents = zip(*flows, strict=True)
        (own,) = torch.autograd.grad(outputs, shard, cotangents)
        grad = whole_gradient(own, input, axis, self.calls)
        return (loss, grad) if stats is None else (loss, grad, stats)

    def log_prob(self, input: Any, index: Any, *, axis: int | None = None, **more: Any) -> Any:
        self.calls += 1
        shard, where = shard_of(input, axis, self.calls)
        found = polyce.torch.log_prob(shard, index, axis=axis, **where, **more)
        same_everywhere(found)
        return found

    def entropy(self, input: Any, *, axis: int | None = None, **more: Any) -> Any:
        self.calls += 1
        shard, where = shard_of(input, axis, self.calls)
        found = polyce.torch.entropy(shard, axis=axis, **where, **more)
        same_everywhere(found)
        return found


def left_out(chosen: set[str]) -> Callable[[Case], str]:
    return lambda case: "" if case.name in chosen else "not among the chosen"


def grid(most: int | None, groups: list[str] | None = None) -> None:
    chosen = {case.name for case in representative(cases(groups), most)}
    own = Sharded()
    functions = Functions(own.cross_entropy, own.with_grad, own.log_prob, own.entropy)
    report = check_implementation(
        None, "torch", groups=groups, functions=functions, leave_out=left_out(chosen)
    )
    assert sum(report.ran.values()) > len(chosen) // 2


def one_collective() -> None:
    from torch.distributed.tensor.debug import CommDebugMode

    shard = torch.randn(6, 5).requires_grad_()
    labels = torch.randint(0, 5, (6,))
    dist.broadcast(labels, 0)
    soft = torch.rand(6, 5)
    calls = {
        1: [(labels, {}), (labels, {"return_stats": True}), (soft, {"label_smoothing": 0.1})],
        2: [(polyce.TeacherLogits(soft), {}), (labels, {"return_stats": "rank"})],
    }
    for count, given in calls.items():
        for target, options in given:
            with CommDebugMode() as forward:
                loss = polyce.torch.cross_entropy(shard, target, group=dist.group.WORLD, **options)
                loss = loss[0] if isinstance(loss, tuple) else loss
            with CommDebugMode() as backward:
                loss.backward()
            assert forward.get_total_counts() == count
            assert backward.get_total_counts() == 0


BYTES = {
    "labels": ({}, 12),
    "entropy": ({"return_stats": "entropy"}, 24),
    "smoothing": ({"label_smoothing": 0.1}, 20),
    "both": ({"label_smoothing": 0.1, "return_stats": "entropy"}, 28),
}


def bytes_of_a_row() -> None:
    from polyce.sharded import exchange

    sent: list[int] = []
    inner = exchange.gather

    def counted(call: Any, words: Any) -> Any:
        sent.append(words.nbytes - exchange.HEADER * words.itemsize)
        return inner(call, words)

    exchange.gather = counted
    shard, labels = torch.zeros(100, 5), torch.zeros(100, dtype=torch.int64)
    try:
        for options, most in BYTES.values():
            sent.clear()
            polyce.torch.cross_entropy(shard, labels, group=dist.group.WORLD, **options)
            assert sent == [100 * most]
        sent.clear()
        polyce.torch.cross_entropy(shard, torch.full((100, 5), 0.1), group=dist.group.WORLD)
        assert sent == [2400]
    finally:
        exchange.gather = inner


def bad_calls() -> None:
    group, rank, count = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    shard, labels = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)

    def refuses(kind: type[Exception], text: str, *tensors: Any, **given: Any) -> None:
        with pytest.raises(kind, match=text):
            polyce.torch.cross_entropy(*(tensors or (shard, labels)), **given)

    whole = {"group": group, "class_start": 4 * rank, "num_classes": 4 * count}
    # What only some processes can see by themselves: nobody waits.
    torn = {
        "overlap, got": {"class_start": 3 * rank},
        "overlap": {"class_start": 0},
        "leave a gap": {"num_classes": 4 * count + 1},
        "must lie within": {"class_start": 4 * rank + 1},
        "name the same num_classes": {"num_classes": 4 * count + rank},
    }
    for text, changed in torn.items():
        refuses(ValueError, text, **(whole | changed))
        with pytest.raises(ValueError, match=text):
            polyce.torch.cross_entropy(shard, labels + 4 * count - 1, **(whole | changed))
    narrow = shard[:, : 3 if rank else 4]
    refuses(ValueError, "must be of equal width", narrow, labels, group=group)
    bad = torch.tensor([0, 4 * count, 0])
    refuses(
        IndexError, rf"labels must lie in 0 to .* got {4 * count} at position", shard, bad, **whole
    )
    refuses(ValueError, "given together", group=group, num_classes=4)
    refuses(
        TypeError, "class_start must be an integer", group=group, class_start=0.0, num_classes=4
    )
    refuses(ValueError, "no group", class_start=0, num_classes=4)
    refuses(TypeError, "must be a torch.distributed.ProcessGroup", group="tp")
    alone = dist.new_group([0])
    if rank:
        refuses(ValueError, "one that this process is in", group=alone)
    soft = torch.zeros(3, 4 * count)
    refuses(ValueError, "must be sharded as input is", shard, soft, group=group)
    refuses(ValueError, "one entry for each of the", shard, labels, torch.ones(4), group=group)
    refuses(ValueError, "leave one of them out", group=group, inplace_backward=True)
    refuses(
        TypeError,
        "requires grad; pass target",
        shard,
        torch.zeros(3, 4).requires_grad_(),
        group=group,
    )
    refuses(ValueError, "cannot serve this call", group=group, implementation="dask")
    leaf = shard.clone().requires_grad_()
    loss = polyce.torch.cross_entropy(leaf, labels, group=group)
    with pytest.raises(RuntimeError, match="one gradient, without a graph"):
        torch.autograd.grad(loss, leaf, create_graph=True)
    one = labels[0]
    transformed: list[Callable[[], Any]] = [
        lambda: torch.func.grad(lambda x: polyce.torch.cross_entropy(x, labels, group=group))(
            shard
        ),
        lambda: torch.func.jvp(
            lambda x: polyce.torch.entropy(x, group=group), (shard,), (torch.ones_like(shard),)
        ),
        lambda: torch.func.vmap(lambda x: polyce.torch.log_prob(x, one, group=group))(shard),
        lambda: torch.func.vmap(
            lambda x: polyce.torch.linear_cross_entropy(x, torch.ones(4, 4), one, group=group)
        )(shard),
    ]
    for call in transformed:
        with pytest.raises(ValueError, match="a backward pass only"):
            call()
    with pytest.raises(RuntimeError, match="one gradient, without a graph"):
        torch.autograd.grad(loss, leaf, torch.ones(2), is_grads_batched=True)


def ranges() -> None:
    """What looks at the ranges and what does not find the same faults."""
    from polyce.sharded import exchange

    good = [
        [[0, 3, 5, 9], [3, 2, 5, 9]],
        [[2, 3, 5, 9], [0, 2, 5, 9], [2, 0, 5, 9]],
        [[0, 0, 0, 9]],
    ]
    bad = {
        "overlap": [[0, 3, 5, 9], [2, 3, 5, 9]],
        "leave a gap": [[0, 2, 5, 9], [3, 2, 5, 9]],
        "gap": [[0, 3, 5, 9], [3, 1, 5, 9]],
        "within the 5": [[0, 3, 5, 9], [3, 3, 5, 9]],
        "within": [[-1, 3, 5, 9], [2, 3, 5, 9]],
        "equal width": [[0, 3, 6, 9], [2, 2, 4, 9]],
        "the same in every process": [[0, 3, 5, 9], [3, 2, 5, 6]],
    }
    for found in good:
        exchange.check_ranges(found)
        assert not exchange._is_torn(torch.tensor(found))
    for text, found in bad.items():
        assert exchange._is_torn(torch.tensor(found))
        with pytest.raises(ValueError, match=text):
            exchange.check_ranges(found)


def unlooked_at() -> None:
    """What nobody looks at makes nans, of the rows that count."""
    group, rank, count = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    leaf = torch.randn(3, 4).requires_grad_()
    labels = torch.tensor([0, -100, 4 * count])
    losses = polyce.torch.cross_entropy(leaf, labels, group=group, reduction="none", validate=False)
    losses.sum().backward()
    assert losses.isnan().tolist() == [False, False, True]
    assert leaf.grad.isnan().all(1).tolist() == [False, False, True]
    leaf.grad = None
    losses = polyce.torch.cross_entropy(
        leaf, labels, group=group, class_start=3 * rank, num_classes=4 * count,
        reduction="none", validate=False,
    )  # fmt: skip
    losses.sum().backward()
    assert losses.isnan().tolist() == [True, False, True]
    assert (leaf.grad[1] == 0.0).all()


def values() -> None:
    """Gradients of log-probabilities and of the entropy, and rows of which nothing is asked."""
    group, rank, count = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    whole = 10.0 * torch.randn(2, 4 * count, 5, dtype=torch.float64)
    whole[0, 0, 0] += 60.0
    whole[1, 0, 4] = torch.inf
    some = torch.randint(0, whole.shape[1], (2, 3, 5))
    some[0, :, 0], some[1, :, 1], some[1, :, 4] = torch.tensor([0, 3, 0]), -100, -100
    own, leaf = slice(4 * rank, 4 * rank + 4), whole.clone().requires_grad_()
    shard = whole[:, own].clone().requires_grad_()
    given: dict[str, list[tuple[Any, ...]]] = {
        "log_prob": [(some,), (some[:, 0],), (some[:, :0],)],
        "entropy": [()],
    }
    for name, calls in given.items():
        for more in calls:
            want = getattr(polyce, name)(leaf, *more)
            found = getattr(polyce.torch, name)(shard, *more, group=group)
            torch.testing.assert_close(found, want, rtol=1e-13, atol=1e-40, equal_nan=True)
            same_everywhere(found)
            cotangent = torch.randn(want.shape, dtype=torch.float64)
            dist.broadcast(cotangent, 0)
            (expected,) = torch.autograd.grad(want, leaf, cotangent)
            (grad,) = torch.autograd.grad(found, shard, cotangent)
            torch.testing.assert_close(
                grad, expected[:, own], rtol=1e-12, atol=1e-35, equal_nan=True
            )
    for bad in (torch.tensor([[4 * count]]), torch.tensor([4 * count])):
        flat = torch.zeros(1, 4)
        with pytest.raises(IndexError, match="index must lie in 0 to"):
            polyce.torch.log_prob(flat, bad, group=group)
        with pytest.raises(ValueError, match="overlap"):
            polyce.torch.log_prob(flat, bad, group=group, class_start=0, num_classes=4 * count)
        assert polyce.torch.log_prob(flat, bad, group=group, validate=False).isnan().all()
    with pytest.raises(ValueError, match="index must have the shape"):
        polyce.torch.log_prob(flat, torch.zeros(2, 2, dtype=torch.int64), group=group)


def module() -> None:
    """The module keeps group and range."""
    group, rank = dist.group.WORLD, dist.get_rank()
    shard, labels = torch.zeros(2, 4), torch.tensor([0, 1])
    where = {"group": group, "class_start": 4 * rank, "num_classes": 4 * dist.get_world_size()}
    loss = polyce.torch.CrossEntropyLoss(z_loss=0.1, **where)(shard, labels)
    assert loss == polyce.torch.cross_entropy(shard, labels, z_loss=0.1, **where)


def citizen() -> None:
    """Hooks for saved tensors, checkpoints, and several backward passes."""
    from torch.utils.checkpoint import checkpoint

    group, rank = dist.group.WORLD, dist.get_rank()
    torch.manual_seed(0)
    whole = torch.randn(5, 4 * dist.get_world_size(), dtype=torch.float64)
    labels = torch.randint(0, whole.shape[1], (5,))
    expected = whole.clone().requires_grad_()
    polyce.cross_entropy(expected, labels, label_smoothing=0.1).backward()
    own = slice(4 * rank, 4 * rank + 4)
    leaf = whole[:, own].clone().requires_grad_()

    def loss(x: Any) -> Any:
        return polyce.torch.cross_entropy(x, labels, label_smoothing=0.1, group=group)

    def check(value: Any, **how: Any) -> None:
        (found,) = torch.autograd.grad(value, leaf, **how)
        torch.testing.assert_close(found, expected.grad[:, own], rtol=1e-13, atol=1e-15)

    once = loss(leaf)
    check(once, retain_graph=True)
    check(once)
    with torch.autograd.graph.save_on_cpu():
        check(loss(leaf))
    check(checkpoint(loss, leaf, use_reentrant=False))
    with torch.no_grad():
        assert not loss(leaf).requires_grad
    divisor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    value = polyce.torch.cross_entropy(leaf, labels, group=group, normalizer=divisor)
    (found,) = torch.autograd.grad(value, divisor)
    torch.testing.assert_close(found, -value.detach() / 2.0)
