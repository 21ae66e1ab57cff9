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
from polyce.graphs.torch_calls import Kernels, Saved
from polyce.implementations import registry

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


class _Tensors(NamedTuple):
    """The tensors of a call, as the operators take them."""

    logits: Any
    target: Any
    weight: Any
    sample_weight: Any
    normalizer: Any

    @classmethod
    def of(cls, operands: Operands) -> _Tensors:
        """Take them from the operands."""
        return cls(*operands[:-1])


TENSORS = "Tensor logits, Tensor target, Tensor? weight, Tensor? sample_weight, Tensor? normalizer"


class _Described(NamedTuple):
    problem: Problem
    implementation: str


def _described(text: str, tensors: _Tensors) -> _Described:
    """Describe the call that an operator's arguments belong to."""
    call = _Call(*ast.literal_eval(text))
    options = options_of(call.options)
    logits, target, weight, sample_weight, normalizer = tensors
    problem, _ = describe(logits, target, weight, sample_weight, options=options)
    # The autocast that was on when the call was traced may be off now.
    return _Described(
        problem._replace(
            result_dtype=getattr(torch, call.result_dtype), normalized=normalizer is not None
        ),
        call.implementation,
    )


_MOST_KNOWN = 1024
_known: dict[tuple[Any, ...], _Described] = {}


def _found(text: str, tensors: _Tensors) -> _Described:
    """Return what `_described` does, of a call on memory, which may repeat an earlier one."""
    key = (text, *((t.shape, t.dtype, t.device) if t is not None else None for t in tensors))
    found = _known.get(key)
    if found is None:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        found = _known[key] = _described(text, tensors)
    return found


def _kernels(implementation: str) -> Kernels:
    kernels = registry.find(implementation).torch_kernels
    if kernels is None:
        raise ValueError(
            "the operators of polyce run an implementation that has kernels for torch, got "
            f"{implementation!r}; call polyce.cross_entropy instead"
        )
    return kernels()


def _forward(*arguments: Any) -> list[Any]:
    *given, keep, text = arguments
    tensors = _Tensors(*given)
    problem, implementation = _found(text, tensors)
    operands = Operands(*tensors, None)
    loss, found, saved = _kernels(implementation).forward(problem, operands, keep)
    return [loss, *(a for a in (*(found or ()), *saved) if a is not None)]


def _backward(cotangent: Any, *arguments: Any) -> Any:
    *given, rows, denominator, text = arguments
    tensors = _Tensors(*given)
    problem, implementation = _found(text, tensors)
    operands = Operands(*tensors, cotangent)
    saved = Saved(rows, denominator)
    return _kernels(implementation).backward(problem, operands, saved, None)


def _forward_backward(*arguments: Any) -> list[Any]:
    *given, cotangent, text = arguments
    tensors = _Tensors(*given)
    problem, implementation = _found(text, tensors)
    operands = Operands(*tensors, cotangent)
    path = registry.find(implementation)
    loss, grad, found = path.cross_entropy_with_grad(problem, operands, None)
    return [loss, grad, *(a for a in found or () if a is not None)]


def _imagined(text: str, tensors: _Tensors) -> tuple[_Described, Any, list[Any]]:
    check_imagined(*tensors)
    described = _described(text, tensors)
    problem = described.problem

    def empty(shape: tuple[int, ...], dtype: Any) -> Any:
        return tensors.logits.new_empty(shape, dtype=dtype)

    by_rows = problem.options.reduction == "none"
    loss = empty(problem.row_shape if by_rows else (), problem.result_dtype)
    found = stats.unfilled(problem, empty) or ()
    return described, loss, [a for a in found if a is not None]


def _imagine(*arguments: Any) -> list[Any]:
    *given, keep, text = arguments
    tensors = _Tensors(*given)
    (problem, implementation), loss, found = _imagined(text, tensors)
    saved = []
    if keep:
        keeps = _kernels(implementation).keeps(problem)
        shapes = Saved((math.prod(problem.row_shape), 4), ())
        saved = [
            tensors.logits.new_empty(shape, dtype=torch.float64)
            for shape, is_kept in zip(shapes, keeps, strict=True)
            if is_kept
        ]
    return [loss, *found, *saved]


def _imagine_gradient(cotangent: Any, logits: Any, *arguments: Any) -> Any:
    tensors = (argument for argument in arguments if isinstance(argument, torch.Tensor))
    check_imagined(cotangent, logits, *tensors)
    return torch.empty_like(logits)


def _imagine_both(*arguments: Any) -> list[Any]:
    *given, _, text = arguments
    tensors = _Tensors(*given)
    _, loss, found = _imagined(text, tensors)
    return [loss, torch.empty_like(tensors.logits), *found]


def check_imagined(*tensors: Any) -> None:
    """Refuse tensors with values together with one on the meta device, which has none."""
    plain = [tensor for tensor in tensors if type(tensor) is torch.Tensor]
    if len({tensor.device.type == "meta" for tensor in plain}) > 1:
        raise TypeError(
            "all tensors must lie on one device, but some are on meta and others are not; "
            "move them first"
        )


def with_none(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    """Return the gradients of an operator's first arguments, and None for each of the others."""
    return *grads, *(None,) * (len(ctx.needs_input_grad) - len(grads))


# By hand instead of `torch.library.custom_op`, whose checks at each call take as long as a small
# call. A list has as many results as there are; a tensor for what is absent would cost time.
LIBRARY = torch.library.Library("polyce", "FRAGMENT")
LIBRARY.define(f"forward({TENSORS}, bool keep, str call) -> Tensor[]")
LIBRARY.define(
    f"backward(Tensor cotangent, {TENSORS}, Tensor? rows, Tensor? denominator, str call) -> Tensor"
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


def _stats_from(problem: Problem, values: list[Any]) -> Stats | None:
    """Name the stats that a list of results begins with, and take them out of it."""
    names = problem.options.stats
    if names is None:
        return None
    return Stats(
        *(values.pop(0) if name in names else None for name in Stats._fields[:-1]), values.pop(0)
    )


def kernels(implementation: str) -> Kernels:
    """Return a path's kernels as calls of operators."""
    own = _kernels(implementation)

    def forward(problem: Problem, operands: Operands, keep: bool) -> tuple[Any, Any, Saved]:
        text = text_of(problem, implementation)
        loss, *rest = _operators.forward.default(*_Tensors.of(operands), keep, text)
        found = _stats_from(problem, rest)
        keeps = own.keeps(problem) if keep else Saved(False, False)
        return loss, found, Saved(*(rest.pop(0) if is_kept else None for is_kept in keeps))

    def backward(problem: Problem, operands: Operands, saved: Saved, out: Any) -> Any:
        text = text_of(problem, implementation)
        tensors = _Tensors.of(operands)
        return _operators.backward.default(operands.grad_output, *tensors, *saved, text)

    return Kernels(implementation, forward, backward, own.keeps)


def with_grad(
    implementation: str, problem: Problem, operands: Operands
) -> tuple[Any, Any, Stats | None]:
    """Compute loss, gradient and stats by an operator."""
    loss, grad, *rest = _operators.forward_backward.default(
        *_Tensors.of(operands), operands.grad_output, text_of(problem, implementation)
    )
    return loss, grad, _stats_from(problem, rest)
