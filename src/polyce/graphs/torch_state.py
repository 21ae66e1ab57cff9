"""What torch is doing around a call: compiling, transforming, and which tensors need gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import forward_ad


def needs_gradient(tensor: Any) -> bool:
    """Tell whether a tensor, if there is one, requires a gradient."""
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def is_traced_without_rules() -> bool:
    """Tell whether a trace drops rules: in an export, or in transforms under torch.compile."""
    return torch.compiler.is_compiling() and (torch.compiler.is_exporting() or is_transformed())


def is_transformed() -> bool:
    """Tell whether a torch.func transform or a level of forward mode is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def asked_for(ctx: Any) -> Sequence[bool]:
    """Tell which gradients this backward pass must compute: of logits, target, class weights.

    ctx.needs_input_grad only says which could be asked for.
    """
    if torch.compiler.is_compiling():
        return ctx.needs_input_grad
    nodes = [node for node, _ in ctx.next_functions]
    return [node is not None and _is_run(node) for node in (*nodes, None)]


def _is_run(node: Any) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:
        return True  # raised for leaves that torch.autograd.grad is asked for


def mark_stats(ctx: Any, stats: Sequence[Any], sources: int = 1) -> None:
    """Tell autograd which stats, lse and entropy first, have a gradient; absent ones are None.

    They depend on the first `sources` inputs: on the logits, or on what these are made of.
    """
    without_gradient = stats[2:] if any(ctx.needs_input_grad[:sources]) else stats
    ctx.mark_non_differentiable(*(array for array in without_gradient if array is not None))
    # Most stats are only looked at, and most losses of an entropy are not.
    ctx.set_materialize_grads(False)


def needs_operations(cotangent: Any) -> bool:
    """Tell whether a gradient will be differentiated or is batched, which kernels cannot do."""
    return torch.is_grad_enabled() or is_transformed() or _is_batched(cotangent)


def _is_batched(cotangent: Any) -> bool:
    """Tell whether is_grads_batched is on, which uses an older vmap than torch.func's."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._functorch.is_legacy_batchedtensor(cotangent))
