"""The loss of a linear head on a mesh: hidden states, head or both are DTensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from polyce.call import checks
from polyce.call.options import Options
from polyce.call.problem import Operands, Problem
from polyce.call.target import TeacherHead
from polyce.formula.stats import Stats
from polyce.linear import torch_sharded
from polyce.linear.call import Gradients, HeadCall, describe
from polyce.sharded import dtensors
from polyce.sharded.call import check_untransformed
from polyce.sharded.layout import Layout, check_placements, whole


def loss(
    of_rows_here: Callable[[HeadCall], tuple[Any, Any]],
    input: Any,
    linear_weight: Any,
    target: Any,
    *,
    linear_bias: Any,
    weight: Any,
    sample_weight: Any,
    normalizer: Any,
    options: Options,
    chunk_size: int | None,
    implementation: str | None,
    label_name: str = "labels",
) -> tuple[Any, Stats | None]:
    """Compute the loss and the stats, as DTensors.

    `of_rows_here` computes a call on rows whose classes are all in this process.
    """
    if isinstance(target, TeacherHead):
        raise TypeError(
            "a head on a mesh takes the logits of a teacher, got a TeacherHead; pass TeacherLogits "
            "placed as the student's logits are"
        )
    _check_whole(
        *(input, linear_weight, target),
        linear_bias=linear_bias,
        weight=weight,
        sample_weight=sample_weight,
        normalizer=normalizer,
        options=options,
        label_name=label_name,
    )
    layout = _layout_of(input, linear_weight, linear_bias)
    of_head = tuple(Shard(0) if p.is_shard(layout.axis) else Replicate() for p in layout.placements)
    weight_here, bias_here = (
        _summed(layout, layout.local(name, array, of_head))
        for name, array in (("linear_weight", linear_weight), ("linear_bias", linear_bias))
    )
    arrays = dtensors.arguments(layout, target, weight, sample_weight, normalizer)
    hidden, own_target = layout.local("input", input, layout.of_entries), arrays[0]
    names = ("weight", "sample_weight", "normalizer")
    more: dict[str, Any] = {
        "linear_bias": bias_here,
        **dict(zip(names, arrays[1:], strict=True)),
        "options": options,
        "chunk_size": chunk_size,
        "implementation": implementation,
    }
    where = layout.shard
    if where is None:
        call = describe(hidden, weight_here, own_target, **more)
        call = replace(call, whole=call.whole._replace(label_name=label_name))

        def run(problem: Problem, operands: Operands) -> tuple[Any, Any]:
            return of_rows_here(replace(call, whole=problem, operands=operands))

        return dtensors.reduced(layout, call.whole, call.operands, run)
    head = torch_sharded.describe(
        hidden, weight_here, own_target, **more, **where, label_name=label_name
    )

    def run_shard(problem: Problem, operands: Operands) -> tuple[Any, Any]:
        own = replace(head.call, whole=problem, operands=operands)
        return torch_sharded.run(replace(head, call=own))

    return dtensors.reduced(layout, head.call.whole, head.call.operands, run_shard)


def loss_and_gradients(
    of_rows_here: Callable[[HeadCall], tuple[Any, Any]],
    input: Any,
    linear_weight: Any,
    target: Any,
    wanted: Gradients,
    *,
    linear_bias: Any,
    weight: Any,
    sample_weight: Any,
    normalizer: Any,
    options: Options,
    grad_output: Any,
    grad_stats: Any,
    **more: Any,
) -> tuple[Any, list[Any], Stats | None]:
    """Compute the loss, the gradients that are wanted and the stats, none of them on a graph."""
    _check_whole(
        *(input, linear_weight, target),
        linear_bias=linear_bias,
        weight=weight,
        sample_weight=sample_weight,
        normalizer=normalizer,
        options=options,
        **dtensors.whole_cotangents(grad_output, grad_stats),
    )
    layout = _layout_of(input, linear_weight, linear_bias)
    head = Gradients(*(dtensors.detached(a) for a in (input, linear_weight, linear_bias)))
    leaves = [
        a.requires_grad_() for a, want in zip(head, wanted, strict=True) if want and a is not None
    ]
    others = map(dtensors.detached, (target, weight, sample_weight, normalizer))
    target, weight, sample_weight, normalizer = others

    def run() -> tuple[Any, Stats | None]:
        return loss(
            *(of_rows_here, head.input, head.linear_weight, target),
            linear_bias=head.linear_bias,
            weight=weight,
            sample_weight=sample_weight,
            normalizer=normalizer,
            options=options,
            **more,
        )

    result, grads, stats = dtensors.with_gradients(
        layout, leaves, run, options, grad_output, grad_stats
    )
    found = iter(grads)
    return result, [next(found) if a is not None and a.requires_grad else None for a in head], stats


def _check_whole(
    input: Any,
    linear_weight: Any,
    target: Any,
    *,
    options: Options,
    label_name: str = "labels",
    **more: Any,
) -> None:
    """Check a call as that of whole arrays, as `dtensors.check_whole` does."""
    check_untransformed()
    call = describe(
        *map(whole, (input, linear_weight, target)),
        **{name: whole(given) for name, given in more.items()},
        options=options,
        chunk_size=None,
        implementation=None,
    )
    problem = call.whole._replace(label_name=label_name)
    dtensors.check_whole_labels(problem, call.operands, target)


def _layout_of(input: Any, weight: Any, bias: Any) -> Layout:
    """Return how the logits lie: their rows as the hidden states, their classes as the head."""
    shape = checks.product_shape(input, weight, bias)
    axis = len(shape) - 1
    found = {"input": input, "linear_weight": weight}
    meshes = {name: a.device_mesh for name, a in found.items() if isinstance(a, DTensor)}
    mesh = next(iter(meshes.values()))
    if any(other != mesh for other in meshes.values()):
        raise ValueError(
            f"all DTensors must lie on one mesh, but input is on {meshes['input']} and "
            f"linear_weight on {meshes['linear_weight']}; redistribute one of them"
        )
    everywhere = (Replicate(),) * mesh.ndim
    for name in meshes:
        check_placements(name, found[name])
    of_input, of_weight = (
        tuple(array.placements) if name in meshes else everywhere for name, array in found.items()
    )
    placements = []
    for own, of_head in zip(of_input, of_weight, strict=True):
        if own.is_shard(axis) or of_head.is_shard(1) or (own.is_shard() and of_head.is_shard()):
            raise ValueError(
                "each axis of the mesh must shard rows of input or classes of linear_weight, got "
                f"placements {of_input} of input and {of_weight} of linear_weight; redistribute one"
            )
        placements.append(Shard(axis) if of_head.is_shard() else own)
    return Layout(mesh, tuple(placements), shape, axis)


def _summed(layout: Layout, array: Any) -> Any:
    """Return the array with a gradient that is summed over the processes that share the rows."""
    if array is None or not layout.row_groups:
        return array
    return _Summed.apply(array, layout.row_groups)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, array: Any, groups: list[Any]) -> Any:
        ctx.groups = groups
        return array.view_as(array)

    @staticmethod
    def backward(ctx: Any, cotangent: Any) -> tuple[Any, ...]:
        ops = torch.ops._c10d_functional
        for group in ctx.groups:
            cotangent = ops.wait_tensor(ops.all_reduce(cotangent, "sum", group.group_name))
        return cotangent, None
