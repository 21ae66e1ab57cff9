"""Calls that torch.compile traces: an operator for each function, reached by little Python.

torch guards all that it reads while it traces Python, and checks that at every call of the graph.
So all that is traced is the way to an operator for the whole call. What that computes, in the
kernels' operators or in the operations of the reference, is decided when torch takes the operator
apart, where nothing is guarded but sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from polyce.call import checks
from polyce.call import target as of_target
from polyce.call.options import check_stats
from polyce.call.problem import Operands, Problem, describe
from polyce.call.target import SparseTarget, TeacherHead, TeacherLogits
from polyce.graphs import torch_calls, torch_rows
from polyce.implementations import registry, torch_ops
from polyce.implementations.contract import Implementation

_PLAIN = (torch.Tensor, torch.nn.Parameter)


@torch.compiler.assume_constant_result
def _circumstances() -> str:
    """Return what the choice of a path depends on besides the call and `use`, "" for no operators.

    It is an argument of the operators for the sake of torch's caches on disk, which other processes
    read.
    """
    if torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active():
        return ""
    preferred = registry.preference()
    able = [path.name for path in registry.TABLE if path.unavailable() is None]
    return f"{', '.join(able)}; preferred: {preferred and preferred.name}"


def takes(arrays: tuple[Any, ...], options: tuple[Any, ...]) -> bool:
    """Tell whether a call that torch.compile traces, as given, can be an operator.

    `options` has the fields of that record; the record itself would be guarded. Exports, transforms
    and forward mode need torch's own operations; some arguments an operator would misread.
    """
    logits, target, weight, sample_weight, _ = arrays
    if type(target) not in _PLAIN:
        if type(target) is TeacherHead:
            return False  # it is refused there
        if type(target) is TeacherLogits and not _is_number(target.scale):
            return False
        if not all(type(array) in _PLAIN for array in of_target.arrays(target).values()):
            return False
    for array in (weight, sample_weight):
        if array is not None and type(array) not in _PLAIN:
            return False
    axis, ignore_index, reduction, label_smoothing, z_loss, logit_scale, logit_softcap, *_ = options
    return (
        type(logits) in _PLAIN
        and (axis is None or type(axis) is int)
        and type(ignore_index) is int
        and type(reduction) is str
        and _is_number(label_smoothing)
        and _is_number(z_loss)
        and (logit_scale is None or _is_number(logit_scale))
        and (logit_softcap is None or _is_number(logit_softcap))
        and forward_ad._current_level < 0
        and _circumstances() != ""
    )


def _is_number(option: Any) -> bool:
    return type(option) is float or type(option) is int


def cross_entropy(
    arrays: tuple[Any, ...], options: tuple[Any, ...], implementation: str | None
) -> Any:
    """Call the operator for `polyce.cross_entropy`."""
    loss, stats, found = _call(_loss_operator, arrays, (), options, implementation)
    return loss if stats is None else (loss, torch_ops.stats_from(stats, found))


def cross_entropy_with_grad(
    arrays: tuple[Any, ...], options: tuple[Any, ...], implementation: str | None, grad_output: Any
) -> Any:
    """Call the operator for `polyce.cross_entropy_with_grad`."""
    cotangents = (_as_tensor("grad_output", grad_output, arrays[0]),)
    loss, stats, (grad, *found) = _call(
        _loss_and_gradient_operator, arrays, cotangents, options, implementation
    )
    return (loss, grad) if stats is None else (loss, grad, torch_ops.stats_from(stats, found))


def _call(
    operator: Any,
    arrays: tuple[Any, ...],
    cotangents: tuple[Any, ...],
    options: tuple[Any, ...],
    implementation: str | None,
) -> tuple[Any, tuple[str, ...] | None, list[Any]]:
    """Call an operator; return the loss, the names of the stats, and what else it has found."""
    logits, target, weight, sample_weight, normalizer = arrays
    first, probability, scale = target, None, None
    # What a plain target need not look at is not guarded either.
    if type(target) not in _PLAIN:
        first, probability = (*of_target.arrays(target).values(), None)[:2]
        scale = target.scale if type(target) is TeacherLogits else None
    *others, return_stats, validate = options
    stats = None if return_stats is False else check_stats(return_stats)
    loss, *found = operator(
        logits,
        first,
        weight,
        sample_weight,
        _as_tensor("normalizer", normalizer, logits),
        probability,
        scale,
        *cotangents,
        *others,
        stats if stats is None else ",".join(stats),
        validate,
        implementation or registry.forced_in_graphs(),
        _circumstances(),
    )
    return loss, stats, found


def _as_tensor(name: str, given: Any, like: Any) -> Any:
    """Return a number as a tensor; None stays None.

    It may change with every batch: as an operator's argument it would become a constant of the
    graph, as a factor of a product it does not.
    """
    if given is None:
        return None
    number, array = checks.number_or_array(name, given)
    if number is None:
        return array
    dtype = torch.float32 if like.device.type == "mps" else torch.float64
    return torch.ones((), dtype=dtype, device=like.device) * number


def _described(
    tensors: tuple[Any, ...], grad_output: Any, settings: tuple[Any, ...]
) -> tuple[Problem, Operands, Implementation]:
    *options, validate, implementation, _ = settings
    asked = torch_ops.options_of(tuple(options))._replace(validate=validate)
    logits, target, weight, sample_weight, normalizer, probability, scale = tensors
    if probability is not None:
        target = SparseTarget(target, probability)
    elif scale is not None:
        target = TeacherLogits(target, scale)
    problem, operands = describe(
        logits, target, weight, sample_weight, normalizer, asked, grad_output=grad_output
    )
    # Outside of a trace the operator is called by a compiler that runs torch's graph as it is.
    problem = problem._replace(
        check_labels=problem.check_labels and validate is True,
        is_compiling=not problem.is_concrete,
    )
    if implementation is None:
        return problem, operands, registry.select_within(problem)
    return problem, operands, registry.select(problem, implementation)


def _refused_while_traced(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Let torch.compile leave a call that raises to Python, which raises the same error.

    Only a TypeError about an argument makes it do so.
    """

    def run(logits: Any, *others: Any) -> Any:
        try:
            return operator(logits, *others)
        except (TypeError, ValueError) as error:
            if type(logits) in _PLAIN:
                raise
            raise TypeError(f"an argument is refused: {error}") from error

    return run


def _cross_entropy(*arguments: Any) -> list[Any]:
    problem, operands, chosen = _described(arguments[:7], None, arguments[7:])
    if problem.is_compiling and chosen.torch_kernels is not None:
        torch_rows.check(problem, operands)
        kernels = torch_ops.kernels(chosen.name)
        loss, found = torch_calls.cross_entropy(kernels, problem, operands)
    else:
        loss, found = chosen.cross_entropy(problem, operands)
    return [loss, *(array for array in found or () if array is not None)]


def _cross_entropy_with_grad(*arguments: Any) -> list[Any]:
    problem, operands, chosen = _described(arguments[:7], arguments[7], arguments[8:])
    operands = torch_rows.detach(operands)
    if problem.is_compiling and chosen.torch_kernels is not None:
        loss, grad, found = torch_ops.with_grad(chosen.name, problem, operands)
    else:
        loss, grad, found = chosen.cross_entropy_with_grad(problem, operands, None)
    return [loss, grad, *(array for array in found or () if array is not None)]


_TENSORS = f"{torch_ops.TENSORS}, Tensor? target_probability, float? teacher_scale"
_SETTINGS = f"{torch_ops.OPTIONS}, bool? validate, str? implementation, str circumstances"
torch_ops.LIBRARY.define(f"cross_entropy({_TENSORS}, {_SETTINGS}) -> Tensor[]")
torch_ops.LIBRARY.define(
    f"cross_entropy_with_grad({_TENSORS}, Tensor? grad_output, {_SETTINGS}) -> Tensor[]"
)
for _name, _run in (
    ("cross_entropy", _cross_entropy),
    ("cross_entropy_with_grad", _cross_entropy_with_grad),
):
    torch_ops.LIBRARY.impl(_name, _refused_while_traced(_run), "CompositeImplicitAutograd")
_loss_operator = torch.ops.polyce.cross_entropy.default
_loss_and_gradient_operator = torch.ops.polyce.cross_entropy_with_grad.default
