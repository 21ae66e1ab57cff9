"""The kernels as torch operators, which the graphs of torch.compile call.

An operator gets the tensors of a call and a text with the rest. The problem that both describe is
found once, so that a repeated call of a graph goes to the kernels. The operators have no
derivative: `torch_calls` puts them in their place on torch's graph while torch traces.
"""

from __future__ import annotations

import ast
import math
from typing import Any, NamedTuple, get_type_hints

import torch

from polyce.arrays import dtypes
from polyce.call.options import Options
from polyce.call.problem import Operands, Problem, describe
from polyce.formula import stats
from polyce.formula.stats import Stats
from polyce.graphs import torch_calls
from polyce.graphs.torch_calls import Kernels, Saved
from polyce.implementations import registry
from polyce.implementations.contract import Implementation

# The options as a schema writes them, without the last: a graph never checks labels.
_TYPES: dict[Any, str] = {
    int: "int",
    str: "str",
    float: "float",
    int | None: "int?",
    float | None: "float?",
    Any: "str?",  # the stats, with commas between their names
}
_KINDS = list(get_type_hints(Options).items())[:-1]
OPTIONS = ", ".join(f"{_TYPES[kind]} {name}" for name, kind in _KINDS)


def flat(problem: Problem) -> tuple[Any, ...]:
    """Return a problem's options as the operators take them."""
    options = problem.options
    stats = None if options.stats is None else ",".join(options.stats)
    return options._replace(axis=problem.axis, stats=stats)[:-1]


def options_of(given: tuple[Any, ...]) -> Options:
    """Return the options that an operator was given."""
    options = Options(*given)._replace(validate=False)
    stats = options.stats
    return options._replace(stats=stats is not None and tuple(filter(None, stats.split(","))))


class _Call(NamedTuple):
    """What an operator is told besides its tensors."""

    options: tuple[Any, ...]
    """As `flat` returns them."""
    result_dtype: str
    implementation: str


def text_of(problem: Problem, implementation: str) -> str:
    """Write down what an operator is told besides its tensors."""
    return repr(tuple(_Call(flat(problem), dtypes.name_of(problem.result_dtype), implementation)))


TENSORS = "Tensor logits, Tensor target, Tensor? weight, Tensor? sample_weight, Tensor? normalizer"


class _Described(NamedTuple):
    """What is found once of the calls that an operator's text and the tensors' facts describe."""

    problem: Problem
    kernels: Kernels
    path: Implementation


def _describe(text: str, *tensors: Any) -> _Described:
    """Describe the call that an operator's arguments belong to."""
    call = _Call(*ast.literal_eval(text))
    logits, target, weight, sample_weight, normalizer = tensors
    options = options_of(call.options)
    problem, _ = describe(logits, target, weight, sample_weight, options=options)
    # The autocast that was on when the call was traced may be off now.
    problem = problem._replace(
        result_dtype=getattr(torch, call.result_dtype), normalized=normalizer is not None
    )
    path = registry.find(call.implementation)
    return _Described(problem, _kernels_of(path), path)


_MOST_KNOWN = 1024
_known: dict[tuple[Any, ...], _Described] = {}


def _known_call(text: str, *tensors: Any) -> _Described:
    """Return what `_describe` does, for tensors in memory, from an earlier call if there is one."""
    key = (text, *[t if t is None else (t.shape, t.dtype, t.device) for t in tensors])
    found = _known.get(key)
    if found is None:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        found = _known[key] = _describe(text, *tensors)
    return found


def _kernels_of(path: Implementation) -> Kernels:
    if path.torch_kernels is None:
        raise ValueError(
            "the operators of polyce run an implementation that has kernels for torch, got "
            f"{path.name!r}; call polyce.cross_entropy instead"
        )
    kernels: Kernels = path.torch_kernels()
    return kernels


# Each argument is named, since reading them from a tuple would take longer.


def _forward(
    logits: Any,
    target: Any,
    weight: Any,
    sample_weight: Any,
    normalizer: Any,
    keep: bool,
    text: str,
) -> list[Any]:
    problem, kernels, _ = _known_call(text, logits, target, weight, sample_weight, normalizer)
    operands = Operands(logits, target, weight, sample_weight, normalizer, None)
    loss, found, saved = kernels.forward(problem, operands, keep)
    if found is None and not keep:
        return [loss]
    return [loss, *(array for array in (*(found or ()), *saved) if array is not None)]


def _backward(
    cotangent: Any,
    logits: Any,
    target: Any,
    weight: Any,
    sample_weight: Any,
    normalizer: Any,
    rows: Any,
    denominator: Any,
    text: str,
    grad_lse: Any = None,
    grad_entropy: Any = None,
) -> Any:
    problem, kernels, _ = _known_call(text, logits, target, weight, sample_weight, normalizer)
    operands = Operands(logits, target, weight, sample_weight, normalizer, cotangent)
    if grad_lse is not None or grad_entropy is not None:
        problem, operands = torch_calls.with_stats(problem, operands, grad_lse, grad_entropy)
    return kernels.backward(problem, operands, Saved(rows, denominator), None)


def _forward_backward(
    logits: Any,
    target: Any,
    weight: Any,
    sample_weight: Any,
    normalizer: Any,
    cotangent: Any,
    text: str,
) -> list[Any]:
    problem, _, path = _known_call(text, logits, target, weight, sample_weight, normalizer)
    operands = Operands(logits, target, weight, sample_weight, normalizer, cotangent)
    loss, grad, found = path.cross_entropy_with_grad(problem, operands, None)
    return [loss, grad, *(array for array in found or () if array is not None)]


def _imagine(
    logits: Any,
    target: Any,
    weight: Any,
    sample_weight: Any,
    normalizer: Any,
    keep: bool,
    text: str,
) -> list[Any]:
    """Return results without values, in the form of `_forward`."""
    tensors = (logits, target, weight, sample_weight, normalizer)
    check_imagined(*tensors)
    problem, kernels, _ = _describe(text, *tensors)

    def empty(shape: tuple[int, ...], dtype: Any) -> Any:
        return logits.new_empty(shape, dtype=dtype)

    by_rows = problem.options.reduction == "none"
    loss = empty(problem.row_shape if by_rows else (), problem.result_dtype)
    saved = Saved()
    if keep:
        keeps = kernels.keeps(problem)
        saved = Saved(
            rows=empty((math.prod(problem.row_shape), 4), keeps.rows) if keeps.rows else None,
            denominator=empty((), torch.float64) if keeps.denominator else None,
        )
    found = stats.unfilled(problem, empty) or ()
    return [loss, *(array for array in (*found, *saved) if array is not None)]


def _imagine_gradient(cotangent: Any, logits: Any, *arguments: Any, **of_stats: Any) -> Any:
    given = (*arguments, *of_stats.values())
    tensors = (argument for argument in given if isinstance(argument, torch.Tensor))
    check_imagined(cotangent, logits, *tensors)
    return torch.empty_like(logits)


def _imagine_both(*arguments: Any) -> list[Any]:
    logits, target, weight, sample_weight, normalizer, cotangent, text = arguments
    check_imagined(logits, cotangent)
    loss, *found = _imagine(logits, target, weight, sample_weight, normalizer, False, text)
    return [loss, torch.empty_like(logits), *found]


def check_imagined(*tensors: Any) -> None:
    """Refuse tensors with values together with one on the meta device, which has none."""
    plain = [tensor for tensor in tensors if type(tensor) is torch.Tensor]
    if len({tensor.device.type == "meta" for tensor in plain}) > 1:
        raise TypeError(
            "all tensors must lie on one device, but some are on meta and others are not; "
            "move them first"
        )


# By hand instead of `torch.library.custom_op`, whose checks at each call take as long as a small
# call. A list has as many results as there are; a tensor for what is absent would cost time.
LIBRARY = torch.library.Library("polyce", "FRAGMENT")
LIBRARY.define(f"forward({TENSORS}, bool keep, str call) -> Tensor[]")
LIBRARY.define(
    f"backward(Tensor cotangent, {TENSORS}, Tensor? rows, Tensor? denominator, str call, "
    "Tensor? grad_lse=None, Tensor? grad_entropy=None) -> Tensor"
)
LIBRARY.define(f"forward_backward({TENSORS}, Tensor? cotangent, str call) -> Tensor[]")
for _name, _run, _fake in (
    ("forward", _forward, _imagine),
    ("backward", _backward, _imagine_gradient),
    ("forward_backward", _forward_backward, _imagine_both),
):
    LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"polyce::{_name}", _fake, lib=LIBRARY)

_operators = torch.ops.polyce


def stats_from(names: tuple[str, ...] | None, values: list[Any]) -> Stats | None:
    """Take the stats of these names from the front of a list of results."""
    if names is None:
        return None
    is_there = (*(name in names for name in Stats._fields[:-1]), True)
    return Stats(*[values.pop(0) if there else None for there in is_there])


def kernels(implementation: str) -> Kernels:
    """Return a path's kernels, called as operators."""
    own = _kernels_of(registry.find(implementation))

    def forward(problem: Problem, operands: Operands, keep: bool) -> tuple[Any, Any, Saved]:
        text = text_of(problem, implementation)
        loss, *rest = _operators.forward.default(*operands[:5], keep, text)
        found = stats_from(problem.options.stats, rest)
        keeps = own.keeps(problem) if keep else Saved(False, False)
        return loss, found, Saved(*(rest.pop(0) if is_kept else None for is_kept in keeps))

    def backward(problem: Problem, operands: Operands, saved: Saved, out: Any) -> Any:
        text = text_of(problem, implementation)
        arguments = (operands.grad_output, *operands[:5], *saved, text)
        of_stats = operands[6:8] if problem.grad_stats else ()
        return _operators.backward.default(*arguments, *of_stats)

    return Kernels(implementation, forward, backward, own.keeps, own.takes_grad_stats)


def with_grad(
    implementation: str, problem: Problem, operands: Operands
) -> tuple[Any, Any, Stats | None]:
    """Compute loss, gradient and stats by an operator."""
    loss, grad, *rest = _operators.forward_backward.default(
        *operands[:6], text_of(problem, implementation)
    )
    return loss, grad, stats_from(problem.options.stats, rest)
