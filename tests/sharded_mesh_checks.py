"""What every process of a group runs for test_sharded.py on meshes: DTensors of logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import polyce
import polyce.torch

ROWS, CLASSES, MORE = 5, 7, 3
R = Replicate()


def meshes() -> list[tuple[Any, tuple[Any, ...], Any]]:
    """Return meshes with the placements of logits, and those of the rows' numbers."""
    count = dist.get_world_size()
    line = init_device_mesh("cpu", (count,))
    found = [
        (line, (Shard(1),), (R,)),
        (line, (Shard(2),), (Shard(1),)),
        (line, (R,), (R,)),
    ]
    if count % 2 == 0:
        plane = init_device_mesh("cpu", (2, count // 2), mesh_dim_names=("dp", "tp"))
        found += [
            (plane, (Shard(0), Shard(1)), (Shard(0), R)),
            (plane, (Shard(1), Shard(2)), (R, Shard(1))),
            (plane, (Shard(0), Shard(2)), (Shard(0), Shard(1))),
            (plane, (R, Shard(1)), (R, R)),
        ]
    return found


def tensors() -> dict[str, Any]:
    """Return what all processes have alike."""
    torch.manual_seed(0)
    labels = torch.randint(0, CLASSES, (ROWS, MORE))
    labels[0, 0] = labels[3] = -100
    return {
        "logits": torch.randn(ROWS, CLASSES, MORE, dtype=torch.float64),
        "labels": labels,
        "soft": torch.rand(ROWS, CLASSES, MORE, dtype=torch.float64),
        "index": torch.randint(0, CLASSES, (ROWS, 2, MORE)),
        "probability": torch.rand(ROWS, 2, MORE, dtype=torch.float64),
        "weight": torch.rand(CLASSES, dtype=torch.float64),
        "sample_weight": torch.rand(ROWS, MORE, dtype=torch.float64),
    }


def same(found: Any, want: Any) -> None:
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-14, equal_nan=True)


def losses() -> None:
    given = tensors()
    for mesh, placements, of_rows in meshes():
        own = {
            name: distribute_tensor(given[name], mesh, where)
            for name, where in (
                ("labels", of_rows),
                ("sample_weight", of_rows),
                ("soft", placements),
            )
        }
        sparse = polyce.SparseTarget(given["index"], given["probability"])
        weighed = {"weight": given["weight"], "sample_weight": given["sample_weight"]}
        smooth = {"label_smoothing": 0.1, "z_loss": 0.01}
        divided = {"normalizer": torch.tensor(3.0)}
        calls: list[tuple[Any, Any, dict[str, Any], dict[str, Any]]] = [
            (given["labels"], given["labels"], {}, {}),
            (given["labels"], own["labels"], {}, {"return_stats": True}),
            (given["labels"], given["labels"], weighed, smooth),
            (given["soft"], own["soft"], {}, {"return_stats": "correct"}),
            (sparse, sparse, divided, {}),
        ]
        for target, own_target, arrays, options in calls:
            here = arrays | {name: a for name, a in own.items() if name in arrays}
            for reduction in ("mean",) if "normalizer" in arrays else ("mean", "sum", "none"):
                whole = given["logits"].clone().requires_grad_()
                leaf = distribute_tensor(given["logits"], mesh, placements).requires_grad_()
                more = options | {"reduction": reduction}
                want = polyce.cross_entropy(whole, target, **arrays, **more)
                found = polyce.cross_entropy(leaf, own_target, **here, **more)
                if isinstance(want, tuple):
                    for name, stat in found[1]._asdict().items():
                        if stat is not None:
                            assert stat.placements == of_rows
                            same(stat.full_tensor(), getattr(want[1], name))
                    want, found = want[0], found[0]
                assert found.placements == (of_rows if reduction == "none" else (R,) * mesh.ndim)
                same(found.full_tensor(), want)
                want.sum().backward()
                found.sum().backward()
                assert leaf.grad.placements == placements
                same(leaf.grad.full_tensor(), whole.grad)


def gradients() -> None:
    given, with_grad = tensors(), polyce.cross_entropy_with_grad
    rows = torch.rand(ROWS, MORE, dtype=torch.float64)
    labels, options = given["labels"], {"reduction": "none", "return_stats": "lse"}
    for mesh, placements, of_rows in meshes():
        own = distribute_tensor(given["logits"], mesh, placements)
        for more in ({}, {"grad_output": 0.5}):
            want, found = (with_grad(x, labels, **more) for x in (given["logits"], own))
            assert found[1].placements == placements
            for a, b in zip(found, want, strict=True):
                same(a.full_tensor(), b)
        own_rows = distribute_tensor(rows, mesh, of_rows)
        want = with_grad(
            given["logits"], labels, **options, grad_output=rows, grad_stats={"lse": rows}
        )
        found = with_grad(own, labels, **options, grad_output=own_rows, grad_stats={"lse": rows})
        assert not any(a.requires_grad for a in (*found[:2], found[2].lse))
        for a, b in zip((*found[:2], found[2].lse), (*want[:2], want[2].lse), strict=True):
            same(a.full_tensor(), b)
    with pytest.raises(ValueError, match="out must be None where input is a DTensor"):
        with_grad(own, labels, out=own)
    with pytest.raises(ValueError, match="grad_output must have the shape of the rows"):
        with_grad(own, labels, reduction="none", grad_output=1.0)


def values() -> None:
    given = tensors()
    for mesh, placements, of_rows in meshes():
        leaf = distribute_tensor(given["logits"], mesh, placements).requires_grad_()
        whole = given["logits"].clone().requires_grad_()
        labels = given["labels"]
        pairs = [
            (polyce.entropy(leaf), polyce.entropy(whole)),
            (polyce.log_prob(leaf, labels), polyce.log_prob(whole, labels)),
            (polyce.log_prob(leaf, given["index"]), polyce.log_prob(whole, given["index"])),
        ]
        for (found, want), where in zip(pairs, (of_rows, of_rows, None), strict=True):
            assert where is None or found.placements == where
            same(found.full_tensor(), want)
            found.square().sum().backward()
            want.square().sum().backward()
        same(leaf.grad.full_tensor(), whole.grad)


def heads() -> None:
    """Linear heads: rows as the hidden states lie, classes as the weight does."""
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, MORE, 4, dtype=torch.float64)
    weight, bias = (torch.randn(CLASSES, *s, dtype=torch.float64) for s in ((4,), ()))
    given = tensors()
    count = dist.get_world_size()
    line = init_device_mesh("cpu", (count,))
    places = [(line, (R,), (Shard(0),)), (line, (Shard(1),), (R,))]
    if count % 2 == 0:
        plane = init_device_mesh("cpu", (2, count // 2))
        places += [(plane, (Shard(0), R), (R, Shard(0))), (plane, (R, Shard(0)), (Shard(0), R))]
    for mesh, of_hidden, of_weight in places:
        for options in ({"return_stats": True}, {"reduction": "sum"}, {"reduction": "none"}):
            whole = [a.clone().requires_grad_() for a in (hidden, weight, bias)]
            own = [
                distribute_tensor(a, mesh, where).requires_grad_()
                for a, where in ((hidden, of_hidden), (weight, of_weight), (bias, of_weight))
            ]
            want, found = (
                polyce.linear_cross_entropy(
                    *arrays[:2], given["labels"], linear_bias=arrays[2], **options
                )
                for arrays in (whole, own)
            )
            if "return_stats" in options:
                same(found[1].entropy.full_tensor(), want[1].entropy)
                want, found = want[0], found[0]
            same(found.full_tensor(), want)
            want.sum().backward()
            found.sum().backward()
            for leaf, expected in zip(own, whole, strict=True):
                assert leaf.grad.placements == leaf.placements
                same(leaf.grad.full_tensor(), expected.grad)
        found = polyce.linear_log_prob(*own[:2], given["labels"])
        same(found.full_tensor(), polyce.linear_log_prob(*whole[:2], given["labels"]))
    both = [distribute_tensor(a, line, [Shard(0)]) for a in (hidden, weight)]
    with pytest.raises(ValueError, match="rows of input or classes of linear_weight"):
        polyce.linear_cross_entropy(*both, given["labels"])


def collectives() -> None:
    """One for classes, one for a mean over each axis of rows; none backward."""
    given = tensors()
    for mesh, placements, _ in meshes():
        leaf = distribute_tensor(given["logits"], mesh, placements).requires_grad_()
        with CommDebugMode() as forward:
            loss = polyce.cross_entropy(leaf, given["labels"])
        with CommDebugMode() as backward:
            loss.backward()
        assert forward.get_total_counts() == sum(p != R for p in placements)
        assert backward.get_total_counts() == 0


def bad_calls() -> None:
    given, count = tensors(), dist.get_world_size()
    line = init_device_mesh("cpu", (count,))
    other = init_device_mesh("cpu", (1, count))
    logits = distribute_tensor(given["logits"], line, [Shard(1)])

    def refuses(text: str, *arrays: Any, kind: type[Exception] = ValueError) -> None:
        with pytest.raises(kind, match=text):
            polyce.cross_entropy(*arrays)

    partial = DTensor.from_local(given["logits"], line, [Partial()])
    refuses("input must be sharded or replicated", partial, given["labels"])
    labels = distribute_tensor(given["labels"], other, [R, R])
    refuses("must lie on one mesh", logits, labels)
    refuses("target must be placed as input is", logits, given["soft"])
    whole = distribute_tensor(given["logits"], line, [R])
    soft = distribute_tensor(given["soft"], line, [Shard(1)])
    refuses("target must be placed as input is", whole, soft)
    refuses("one process, got a DTensor", given["logits"], soft, kind=TypeError)
    twice = distribute_tensor(given["logits"], other, [Shard(1), Shard(1)])
    refuses("over one axis of a mesh", twice, given["labels"])
    # A label that only some processes have: nobody waits, and all raise.
    bad = given["labels"].clone()
    bad[-1, -1] = CLASSES
    rows = distribute_tensor(given["logits"], line, [Shard(0)])
    refuses("labels must lie in 0 to 6", rows, bad, kind=IndexError)
    refuses(r"labels must lie in 0 to 6.* at position \(4, 2\)", logits, bad, kind=IndexError)


def against_loss_parallel() -> None:
    """torch's own loss takes three collectives."""
    from torch.distributed.tensor.parallel import loss_parallel

    count = dist.get_world_size()
    mesh = init_device_mesh("cpu", (count,))
    torch.manual_seed(0)
    logits, labels = torch.randn(8, 4 * count), torch.randint(0, 4 * count, (8,))
    leaf = distribute_tensor(logits, mesh, [Shard(1)]).requires_grad_()
    with loss_parallel(), CommDebugMode() as theirs:
        want = torch.nn.functional.cross_entropy(leaf, labels)
        want.backward()
    grad, leaf.grad = leaf.grad.full_tensor(), None
    with CommDebugMode() as ours:
        found = polyce.cross_entropy(leaf, labels)
        found.backward()
    torch.testing.assert_close(found.full_tensor(), want.full_tensor())
    torch.testing.assert_close(leaf.grad.full_tensor(), grad)
    assert (ours.get_total_counts(), theirs.get_total_counts()) == (1, 3)


def compiled() -> None:
    """In one graph, with the collectives in it."""
    from sharded_checks import shard_of

    given = tensors()
    labels, logits = given["labels"], given["logits"]
    whole = logits.clone().requires_grad_()
    shard, where = shard_of(whole, 1, 1)
    want = polyce.cross_entropy(whole, labels, label_smoothing=0.1)
    want.backward()

    def of_shard(x: Any) -> Any:
        return polyce.torch.cross_entropy(x, labels, label_smoothing=0.1, **where)

    def of_mesh(x: Any) -> Any:
        return polyce.cross_entropy(x, labels, label_smoothing=0.1)

    leaf = shard.detach().clone().requires_grad_()
    found = torch.compile(of_shard, fullgraph=True, backend="aot_eager")(leaf)
    found.backward()
    same(found, want)
    same(leaf.grad, shard_of(whole.grad, 1, 1)[0])
    # Of so many logits a whole call would be a kernel's.
    leaf = torch.zeros(*shard.shape[:1], 2**12, *shard.shape[2:]).requires_grad_()
    where = {"group": where["group"]}
    torch.compile(of_shard, fullgraph=True, backend="aot_eager")(leaf).backward()
    assert leaf.grad.isfinite().all()
    mesh, placements, _ = meshes()[-2]
    leaf = distribute_tensor(logits, mesh, placements).requires_grad_()
    found = torch.compile(of_mesh, fullgraph=True, backend="aot_eager")(leaf)
    found.backward()
    same(found.full_tensor(), want)
    same(leaf.grad.full_tensor(), whole.grad)


def model() -> None:
    """A small model with FSDP and tensor parallel takes the steps that one process takes."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    count = dist.get_world_size()
    if count % 2:
        return
    mesh = init_device_mesh("cpu", (2, count // 2), mesh_dim_names=("dp", "tp"))
    features, classes, rows = 6, 10, 8
    torch.manual_seed(0)
    inputs, labels = torch.randn(rows, features), torch.randint(0, classes, (rows,))
    labels[1] = labels[2] = -100  # so that the halves' denominators differ

    def build() -> Any:
        torch.manual_seed(1)
        return torch.nn.Sequential(
            torch.nn.Linear(features, features),
            torch.nn.Tanh(),
            torch.nn.Linear(features, classes),
        )

    def train(model: Any, loss: Any) -> Any:
        optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(2):
            optimiser.zero_grad()
            value = loss(model)
            value.backward()
            optimiser.step()
        return value

    single = build()
    want = train(single, lambda model: polyce.cross_entropy(model(inputs), labels))
    sharded = build()
    column = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(sharded, mesh["tp"], {"2": column})
    fully_shard(sharded, mesh=mesh["dp"])
    half = rows // 2
    own = slice(half * mesh.get_local_rank("dp"), half * (mesh.get_local_rank("dp") + 1))
    total = (labels != -100).sum()

    def loss(model: Any) -> Any:
        logits = model(inputs[own])
        # FSDP takes the mean of the gradients of its processes.
        return polyce.cross_entropy(logits, labels[own], normalizer=total / 2)

    found = train(sharded, loss).full_tensor()
    dist.all_reduce(found)
    torch.testing.assert_close(found / count, want)
    for one, other in zip(sharded.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(one.full_tensor(), other)
