"""What every process of a group runs for test_sharded.py on its shard of a linear head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

import polyce
import polyce.torch
from sharded_checks import cut, same_everywhere, shard_of, sharded_target

ROWS, CLASSES, FEATURES = (4, 5), 13, 6
LIMITS = {torch.float64: (1e-11, 1e-13), torch.float32: (2e-5, 1e-6), torch.bfloat16: (0.03, 0.01)}


def given(dtype: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    labels = torch.randint(0, CLASSES, ROWS)
    labels[0, 1] = labels[3, 3] = -100
    hidden = torch.randn(*ROWS, FEATURES)
    return {
        "input": hidden.to(dtype),
        "linear_weight": torch.randn(CLASSES, FEATURES).to(dtype),
        "linear_bias": torch.randn(CLASSES).to(dtype),
        "labels": labels,
        "soft": torch.rand(*ROWS, CLASSES),
        "sparse": polyce.SparseTarget(torch.randint(0, CLASSES, (*ROWS, 2)), torch.rand(*ROWS, 2)),
        "teacher": polyce.TeacherLogits(torch.randn(*ROWS, CLASSES), 0.5),
    }


NAMES = ("input", "linear_weight", "linear_bias")


def losses() -> None:
    torch.manual_seed(0)
    calls: list[tuple[str, Any, dict[str, Any]]] = [
        ("labels", torch.float64, {}),
        ("labels", torch.float32, {"reduction": "none", "chunk_size": 7}),
        ("labels", torch.bfloat16, {"label_smoothing": 0.1, "chunk_size": 7}),
        ("labels", torch.float64, {"return_stats": True, "weight": torch.rand(CLASSES)}),
        ("labels", torch.float32, {"return_stats": ("rank", "lse"), "chunk_size": 7}),
        ("soft", torch.float64, {"return_stats": ("brier", "lse"), "chunk_size": 7}),
        ("soft", torch.float64, {"reduction": "sum", "sample_weight": torch.rand(ROWS)}),
        ("sparse", torch.float32, {"z_loss": 0.1, "chunk_size": 3}),
        ("teacher", torch.float64, {"logit_softcap": 5.0, "chunk_size": 6}),
    ]
    for seed, (kind, dtype, options) in enumerate(calls):
        tensors = given(dtype)
        if kind == "labels":
            tensors["input"][0, 1] = torch.nan
        whole = [tensors[name].clone().requires_grad_() for name in NAMES]
        want = polyce.linear_cross_entropy(
            *whole[:2], tensors[kind], linear_bias=whole[2], **options
        )
        head, where = shard_of(tensors["linear_weight"], 0, seed)
        bias, _ = shard_of(tensors["linear_bias"], 0, seed)
        own = [a.clone().requires_grad_() for a in (tensors["input"], head, bias)]
        logits = torch.zeros(*ROWS, CLASSES)
        with CommDebugMode() as forward:
            found = polyce.torch.linear_cross_entropy(
                *own[:2],
                sharded_target(tensors[kind], logits, 2, seed),
                linear_bias=own[2],
                **where,
                **options,
            )
        asked = options.get("return_stats", ())
        twice = kind == "teacher" or asked not in ((), True)
        assert forward.get_total_counts() == 1 + twice
        rtol, atol = LIMITS[dtype]
        limits = {"rtol": rtol, "atol": atol}
        if "return_stats" in options:
            for name in ("lse", "entropy", "prediction", "correct") if asked is True else asked:
                pair = (getattr(stats, name) for stats in (found[1], want[1]))
                torch.testing.assert_close(*pair, equal_nan=True, **limits)
            want, found = (
                loss + (stats.lse.nan_to_num() * 0.1).sum() for loss, stats in (want, found)
            )
        torch.testing.assert_close(found, want, **limits)
        same_everywhere(found)
        want.sum().backward()
        with CommDebugMode() as backward:
            found.sum().backward()
        assert backward.get_total_counts() == 1
        start, width = cut(CLASSES, seed)
        expected = [a.grad for a in whole]
        expected[1:] = [a[start : start + width] for a in expected[1:]]
        for leaf, grad in zip(own, expected, strict=True):
            torch.testing.assert_close(leaf.grad, grad, equal_nan=True, **limits)


def values() -> None:
    tensors = given(torch.float64)
    head, where = shard_of(tensors["linear_weight"], 0, 1)
    leaf = tensors["input"].clone().requires_grad_()
    index = tensors["labels"]
    found = polyce.torch.linear_log_prob(leaf, head, index, reduce_input_grad=False, **where)
    want = polyce.linear_log_prob(tensors["input"], tensors["linear_weight"], index)
    torch.testing.assert_close(found, want)
    with CommDebugMode() as backward:
        found.sum().backward()
    assert backward.get_total_counts() == 0
    dist.all_reduce(leaf.grad)
    whole = tensors["input"].clone().requires_grad_()
    polyce.linear_log_prob(whole, tensors["linear_weight"], index).sum().backward()
    torch.testing.assert_close(leaf.grad, whole.grad)
    empty = polyce.torch.linear_cross_entropy(leaf[:0], head, index[:0], reduction="none", **where)
    assert empty.shape == (0, ROWS[1])


def module() -> None:
    """The module has a head of this process's classes."""
    group, rank, count = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    tensors = given(torch.float64)
    kind, hidden = polyce.torch.LinearCrossEntropyLoss, tensors["input"]
    start, width = cut(CLASSES, 1)
    own = kind(
        *(FEATURES, CLASSES), bias=True, dtype=torch.float64, z_loss=0.1,
        group=group, class_start=start, width=width,
    )  # fmt: skip
    whole = kind(FEATURES, CLASSES, bias=True, dtype=torch.float64, z_loss=0.1)
    with torch.no_grad():
        for head, span in ((whole, slice(None)), (own, slice(start, start + width))):
            head.linear.weight.copy_(tensors["linear_weight"][span])
            head.linear.bias.copy_(tensors["linear_bias"][span])
    torch.testing.assert_close(own(hidden, tensors["labels"]), whole(hidden, tensors["labels"]))
    equal = kind(FEATURES, 3 * count, group=group, reduce_input_grad=False)
    assert (equal.class_start, *equal.linear.weight.shape) == (3 * rank, 3, FEATURES)
    assert equal(torch.zeros(2, FEATURES), torch.tensor([0, 3 * count - 1])).isfinite()
    for text, more in {
        "must be a multiple of": {"group": group},
        "given together": {"group": group, "width": 3},
        "got no group": {"class_start": 0, "width": 3},
    }.items():
        with pytest.raises(ValueError, match=text):
            kind(FEATURES, 3 * count + 1, **more)
    with pytest.raises(ValueError, match="leave a gap"):
        kind(FEATURES, 3 * count + 1, group=group, class_start=3 * rank, width=3)(
            torch.zeros(2, FEATURES), torch.tensor([0, 1])
        )


def compiled() -> None:
    """In one graph, with the collective in it."""
    tensors = given(torch.float64)
    head, where = shard_of(tensors["linear_weight"], 0, 2)
    hidden, labels = tensors["input"], tensors["labels"]

    def loss(weight: Any) -> Any:
        return polyce.torch.linear_cross_entropy(hidden, weight, labels, chunk_size=7, **where)

    values, grads = [], []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = head.clone().requires_grad_()
        values.append(function(leaf))
        values[-1].backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*grads)


def bad_calls() -> None:
    tensors, group = given(torch.float32), dist.group.WORLD
    head, where = shard_of(tensors["linear_weight"], 0, 1)
    hidden, labels = tensors["input"], tensors["labels"]

    def refuses(kind: type[Exception], text: str, target: Any, **more: Any) -> None:
        with pytest.raises(kind, match=text):
            polyce.torch.linear_cross_entropy(hidden, head, target, **(where | more))

    bad = labels.clone()
    bad[2, 2] = CLASSES
    refuses(IndexError, r"labels must lie in 0 to 12 .*got 13 at position \(2, 2\)", bad)
    with pytest.raises(IndexError, match="index must lie in 0 to 12"):
        polyce.torch.linear_log_prob(hidden, head, bad, **where)
    refuses(ValueError, "leave a gap", labels, num_classes=CLASSES + 1)
    refuses(ValueError, "leave a gap", bad, num_classes=CLASSES + 1)
    refuses(TypeError, "got a TeacherHead", polyce.TeacherHead(hidden, head))
    refuses(TypeError, "must be a torch.distributed.ProcessGroup", labels, group="tp")
    refuses(ValueError, "must be sharded as input is", torch.rand(*ROWS, CLASSES + 1))
    leaf = head.clone().requires_grad_()
    loss = polyce.torch.linear_cross_entropy(hidden, leaf, labels, **where)
    with pytest.raises(RuntimeError, match="one gradient, without a graph"):
        torch.autograd.grad(loss, leaf, create_graph=True)
    assert group is where["group"]
