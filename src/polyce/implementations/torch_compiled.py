"""Calls that torch.compile traces: an operator for each function, reached by little Python.

torch guards all that it reads while it traces Python, and checks that at every call of the graph.
So all that is traced is the way to an operator for the whole call. What that computes, in the
kernels' operators or in the operations of the reference, is decided when torch takes the operator
apart, where nothing is guarded but sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from polyce.call.options import check_stats
from polyce.call.problem import Operands, Problem, describe
from polyce.formula.stats import Stats
from polyce.graphs import torch_calls, torch_rows
from polyce.implementations import registry, torch_ops
from polyce.implementations.contract import Implementation

_PLAIN = (torch.Tensor, torch.nn.Parameter, type(None))


@torch.compiler.assume_constant_result
def _circumstances() -> str:
    """Return what the choice of a path depends on besides the call and `use`.

    It is an argument of the operators for the sake of torch's caches on disk, which other processes
    read.
    """
    preferred = registry.preference()
    able = [path.name for path in registry.TABLE if path.unavailable() is None]
    return f"{', '.join(able)}; preferred {preferred and preferred.name}"


@torch.compiler.assume_constant_result
def _takes_operators() -> bool:
    return not (torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active())


def takes(*arrays: Any) -> bool:
    """Tell whether a call on these arrays, while torch compiles, may be an operator.

    Not so for exports, transforms and forward mode, which need torch's own operations.
    """
    for array in arrays:
        if type(array) not in _PLAIN:
            return False
    return forward_ad._current_level < 0 and _takes_operators()


def cross_entropy(
    input: Any,
    target: Any,
    weight: Any,
    sample_weight: Any,
    normalizer: Any,
    options: tuple[Any, ...],
    return_stats: Any,
    validate: bool | None,
    implementation: str | None,
) -> Any:
    """Call the operator for `polyce.cross_entropy`."""
    stats = None if return_stats is False else check_stats(return_stats)
    loss, *found = torch.ops.polyce.cross_entropy.default(
        input,
        target,
        weight,
        sample_weight,
        _tensor(normalizer, input),
        *options,
        None if stats is None else ",".join(stats),
        validate,
        implementation or registry.forced_in_graphs(),
        _circumstances(),
    )
    return loss if stats is None else (loss, _named(stats, found))


def cross_entropy_with_grad(
    input: Any,
    target: Any,
    weight: Any,
    sample_weight: Any,
    normalizer: Any,
    grad_output: Any,
    options: tuple[Any, ...],
    return_stats: Any,
    validate: bool | None,
    implementation: str | None,
) -> Any:
    """Call the operator for `polyce.cross_entropy_with_grad`."""
    stats = None if return_stats is False else check_stats(return_stats)
    loss, grad, *found = torch.ops.polyce.cross_entropy_with_grad.default(
        input,
        target,
        weight,
        sample_weight,
        _tensor(normalizer, input),
        _tensor(grad_output, input),
        *options,
        None if stats is None else ",".join(stats),
        validate,
        implementation or registry.forced_in_graphs(),
        _circumstances(),
    )
    return (loss, grad) if stats is None else (loss, grad, _named(stats, found))


def _tensor(number: Any, like: Any) -> Any:
    """Return a number as a tensor: as an operator's argument it would be a constant of the graph.

    A number that changes with every batch is a factor of a product instead.
    """
    if number is None or isinstance(number, torch.Tensor):
        return number
    dtype = torch.float32 if like.device.type == "mps" else torch.float64
    return torch.ones((), dtype=dtype, device=like.device) * number


def _named(names: tuple[str, ...], found: list[Any]) -> Stats:
    values = dict(zip((*(name for name in Stats._fields[:-1] if name in names), Stats._fields[-1]), found))
    return Stats(**{name: values.get(name) for name in Stats._fields})


def _described(
    tensors: tuple[Any, ...], grad_output: Any, settings: tuple[Any, ...]
) -> tuple[Problem, Operands, Implementation]:
    *options, validate, implementation, _ = settings
    problem, operands = describe(
        *tensors,
        options=torch_ops.options_of(tuple(options))._replace(validate=validate),
        grad_output=grad_output,
    )
    problem = problem._replace(check_labels=False, is_compiling=not problem.is_concrete)
    if implementation is None:
        return problem, operands, registry.select_within(problem)
    return problem, operands, registry.select(problem, implementation)


def _cross_entropy(*arguments: Any) -> list[Any]:
    problem, operands, chosen = _described(arguments[:5], None, arguments[5:])
    if problem.is_compiling and chosen.torch_kernels is not None:
        torch_rows.check(operands)
        kernels = torch_ops.kernels(chosen.name)
        loss, found = torch_calls.cross_entropy(kernels, problem, operands)
    else:
        loss, found = chosen.cross_entropy(problem, operands)
    return [loss, *(array for array in found or () if array is not None)]


def _cross_entropy_with_grad(*arguments: Any) -> list[Any]:
    problem, operands, chosen = _described(arguments[:5], arguments[5], arguments[6:])
    operands = torch_rows.detach(operands)
    if problem.is_compiling and chosen.torch_kernels is not None:
        loss, grad, found = torch_ops.with_grad(chosen.name, problem, operands)
    else:
        loss, grad, found = chosen.cross_entropy_with_grad(problem, operands, None)
    return [loss, grad, *(array for array in found or () if array is not None)]


_SETTINGS = f"{torch_ops.OPTIONS}, bool? validate, str? implementation, str circumstances"
torch_ops.LIBRARY.define(f"cross_entropy({torch_ops.TENSORS}, {_SETTINGS}) -> Tensor[]")
torch_ops.LIBRARY.define(
    f"cross_entropy_with_grad({torch_ops.TENSORS}, Tensor? grad_output, {_SETTINGS}) -> Tensor[]"
)
torch_ops.LIBRARY.impl("cross_entropy", _cross_entropy, "CompositeImplicitAutograd")
torch_ops.LIBRARY.impl(
    "cross_entropy_with_grad", _cross_entropy_with_grad, "CompositeImplicitAutograd"
)
