"""The door for torch's tensors: what must hold at a call, and the loss on torch's graph."""

from __future__ import annotations

import itertools
import operator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.autograd import forward_ad

from polyce.call.problem import Problem
from polyce.graphs import torch_calls
from polyce.implementations.native.core import core
from polyce.implementations.native.run import saved_shape
from polyce.implementations.native.torch import KERNELS, TORCH

# Found once: each look into a module takes its time.
_fill_node, _answer_backward = core().fill_node, core().answer_backward
_is_traced = torch.compiler.is_dynamo_compiling


class _Loss(torch.autograd.Function):
    """A loss that the core has computed, with the node that `torch_calls` would make for it."""

    forward = staticmethod(_fill_node)

    @staticmethod
    def backward(ctx: Any, cotangent: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        if not _is_traced():
            _, _, normalizer = ctx.call
            grad = _answer_backward(ctx.kept, saved, normalizer, cotangent, None)
            if grad is not None:
                return grad, None, None, None
        return torch_calls.gradients(ctx, saved, cotangent)


class _LossInPlace(torch.autograd.Function):
    """The same whose backward pass writes the gradient over the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Any, target: Any, weight: Any, made: tuple[Any, ...]) -> Any:
        ctx.address, ctx.is_written = logits.data_ptr(), False
        return _fill_node(ctx, logits, target, weight, made)

    @staticmethod
    def backward(ctx: Any, cotangent: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        if not ctx.is_written and not _is_traced():
            _, _, normalizer = ctx.call
            grad = _answer_backward(ctx.kept, saved, normalizer, cotangent, ctx.address)
            if grad is not None:
                ctx.is_written = True
                return grad, None, None, None
        return torch_calls.gradients(ctx, saved, cotangent)


# torch's own of that name asks first whether a transform is active, which the core has done; and
# whether the function has a `vjp` instead of a `backward`.
_apply = super(torch.autograd.Function, _Loss).apply
_apply_in_place = super(torch.autograd.Function, _LossInPlace).apply
_Loss._backward_cls.apply = _Loss.backward
_LossInPlace._backward_cls.apply = _LossInPlace.backward


# What torch is asked at every call, and the answer: as `arrays.plain.plain_key` asks, and whether
# anything sees or changes torch's functions.
_WANTED = {
    "_len_torch_dispatch_stack": 0,
    "_len_torch_function_stack": 0,
    "_is_tracing": False,
    "_are_functorch_transforms_active": False,
}


def open_torch(own: ModuleType) -> bool:
    """Let the core answer calls on tensors; False where this torch has no way for it."""
    functions = SimpleNamespace(
        UntypedStorage=torch.UntypedStorage,
        empty_like=torch.empty_like,
        # What compiled graphs call takes half the time.
        empty_strided=getattr(torch._C._dynamo.guards, "_empty_strided_cpu", _empty_strided),
        is_autocast_enabled=torch.is_autocast_enabled,
        is_grad_enabled=torch.is_grad_enabled,
        written=TORCH.written,
    )
    # These are torch's own and not promised: without one of them calls go the whole way.
    is_known = all(hasattr(torch._C, name) for name in _WANTED)
    is_known = is_known and hasattr(torch.compiler, "_is_compiling_flag")
    if not is_known or not own.open_torch(torch.Tensor, functions):
        return False
    for name, answer in _WANTED.items():
        own.expect_answer(True, getattr(torch._C, name), answer)
    own.expect(True, vars(forward_ad), "_current_level", -1)
    own.expect(True, vars(torch.compiler), "_is_compiling_flag", False)
    return True


def kept(problem: Problem) -> dict[str, Any]:
    """Return what the core keeps of a call on tensors besides the kernels' part."""
    by_rows = problem.options.reduction == "none"
    return {
        "like_loss": _laid_out(problem.row_shape if by_rows else (), problem.result_dtype),
        "like_grad": _laid_out(problem.shape, problem.logits_dtype),
        "like_saved": _laid_out(saved_shape(problem), torch.float64),
        "apply": _apply_in_place if problem.inplace_backward else _apply,
        "rule": (KERNELS, problem, None),
    }


def _laid_out(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """Return shape, strides and dtype of a contiguous tensor."""
    steps = itertools.accumulate((max(size, 1) for size in shape[:0:-1]), operator.mul, initial=1)
    return tuple(shape), tuple(steps)[::-1][-len(shape) :] if shape else (), dtype


def _empty_strided(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")
