"""The kernels as torch operators, which torch.compile puts into its graph.

torch passes an operator nothing but its arguments, so they describe the whole call again. One
operator returns the loss, the stats and what the backward pass needs, the other the gradient of the
logits. An operator always returns as many tensors as it declares: an absent one is empty.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, get_type_hints

import torch

from polyce.call.options import Options
from polyce.call.problem import Operands, Problem, describe
from polyce.formula import stats
from polyce.formula.stats import Stats
from polyce.graphs import torch_calls, torch_rows
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
OPTION_COUNT = len(_KINDS)


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


class _Asked(NamedTuple):
    """What both operators take besides tensors."""

    options: tuple[Any, ...]
    """As `flat` returns them."""
    result_dtype: Any
    implementation: str

    def values(self) -> tuple[Any, ...]:
        """Return the values in the order of the schemas."""
        return *self.options, self.result_dtype, self.implementation


_ASKED = f"{OPTIONS}, ScalarType result_dtype, str implementation"
_OPERANDS = (
    "Tensor logits, Tensor target, Tensor? weight, Tensor? sample_weight, Tensor? normalizer"
)
_COUNT = 5
_FOUND = "Tensor loss, Tensor lse, Tensor entropy, Tensor prediction, Tensor correct, Tensor valid"


def cross_entropy(
    implementation: str, problem: Problem, operands: Operands
) -> tuple[Any, Stats | None]:
    """Compute the loss and the stats of one call as part of a graph."""
    torch_rows.check(operands)
    normalizer = operands.normalizer
    if isinstance(normalizer, torch.Tensor) and normalizer.requires_grad:
        summed, operands = torch_calls.without_normalizer(problem, operands)
        total, found = cross_entropy(implementation, summed, operands)
        return (total / normalizer).to(problem.result_dtype), found
    keep = torch.is_grad_enabled() and operands.logits.requires_grad
    loss, found, _, _ = _forward(implementation, problem, operands, keep)
    return loss, found


def cross_entropy_with_grad(
    implementation: str, problem: Problem, operands: Operands
) -> tuple[Any, Any, Stats | None]:
    """Compute the loss, the gradient and the stats of one call as part of a graph."""
    cotangent = operands.grad_output
    loss, found, rows, denominator = _forward(implementation, problem, operands, keep=True)
    if cotangent is None or isinstance(cotangent, float):
        ones = torch.ones(loss.shape, dtype=problem.row_dtype, device=loss.device)
        cotangent = ones if cotangent is None else ones * cotangent
    tensors, asked = _arguments(implementation, problem.with_options(stats=None), operands)
    grad = _backward_operator(cotangent, *tensors, rows, denominator, *asked)
    return loss, grad, found


def _forward(
    implementation: str, problem: Problem, operands: Operands, keep: bool
) -> tuple[Any, Stats | None, Any, Any]:
    tensors, asked = _arguments(implementation, problem, operands)
    loss, *entries, rows, denominator = _operator(*tensors, keep, *asked)
    if problem.options.stats is None:
        return loss, None, rows, denominator
    wanted = (*(name in problem.options.stats for name in Stats._fields[:-1]), True)
    found = Stats(*(a if is_on else None for a, is_on in zip(entries, wanted, strict=True)))
    return loss, found, rows, denominator


def _arguments(
    implementation: str, problem: Problem, operands: Operands
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    logits, target, weight, sample_weight, normalizer, _ = operands
    if isinstance(normalizer, float):
        # It may change with every batch: as an operator's argument a number would become a constant
        # of the graph, as a factor of a product it does not.
        one = torch.ones((), dtype=problem.row_dtype, device=logits.device)
        normalizer = one * normalizer
    asked = _Asked(flat(problem), problem.result_dtype, implementation)
    return (logits, target, weight, sample_weight, normalizer), asked.values()


def _described(
    tensors: tuple[Any, ...], asked: _Asked, cotangent: Any = None
) -> tuple[Problem, Operands]:
    """Describe the call that an operator's arguments belong to."""
    logits, target, weight, sample_weight, normalizer = tensors
    options = options_of(asked.options)
    problem, operands = describe(logits, target, weight, sample_weight, options=options)
    # The autocast that was on when the call was traced may be off now.
    problem = problem._replace(result_dtype=asked.result_dtype, normalized=normalizer is not None)
    return problem, operands._replace(normalizer=normalizer, grad_output=cotangent)


def _kernels(asked: _Asked) -> Kernels:
    kernels = registry.find(asked.implementation).torch_kernels
    if kernels is None:
        raise ValueError(
            "the operators of polyce run an implementation that has kernels for torch, got "
            f"{asked.implementation!r}; call polyce.cross_entropy instead"
        )
    return kernels()


def _asked(values: tuple[Any, ...]) -> _Asked:
    return _Asked(values[:OPTION_COUNT], *values[OPTION_COUNT:])


def _taken(arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], bool, _Asked]:
    return arguments[:_COUNT], arguments[_COUNT], _asked(arguments[_COUNT + 1 :])


def _compute(*arguments: Any) -> tuple[Any, ...]:
    tensors, keep, asked = _taken(arguments)
    problem, operands = _described(tensors, asked)
    loss, found, saved = _kernels(asked).forward(problem, operands, keep)
    return _filled(tensors[0], loss, found, saved)


_DTYPES = (*(torch.float32,) * 2, torch.int64, *(torch.bool,) * 2, *(torch.float64,) * 2)


def _filled(logits: Any, loss: Any, found: Stats | None, saved: Saved) -> tuple[Any, ...]:
    """Return results in the operator's form, with an empty tensor for what is absent."""
    given = (*(found or (None,) * len(Stats._fields)), *saved)
    return loss, *(
        logits.new_empty(0, dtype=dtype) if tensor is None else tensor
        for tensor, dtype in zip(given, _DTYPES, strict=True)
    )


def _imagine(*arguments: Any) -> tuple[Any, ...]:
    """Return results without values, in the form of `_compute`."""
    tensors, keep, asked = _taken(arguments)
    check_imagined(*tensors)
    problem, _ = _described(tensors, asked)
    logits, rows = tensors[0], problem.row_shape

    def empty(shape: tuple[int, ...], dtype: Any) -> Any:
        return logits.new_empty(shape, dtype=dtype)

    loss = empty(rows if problem.options.reduction == "none" else (), problem.result_dtype)
    saved = Saved()
    if keep:
        keeps = _kernels(asked).keeps(problem)
        saved = Saved(
            rows=empty((math.prod(rows), 4), torch.float64) if keeps.rows else None,
            denominator=empty((), torch.float64) if keeps.denominator else None,
        )
    return _filled(logits, loss, stats.unfilled(problem, empty), saved)


def _compute_gradient(cotangent: Any, *arguments: Any) -> Any:
    tensors, asked = arguments[:_COUNT], _asked(arguments[_COUNT + 2 :])
    problem, operands = _described(tensors, asked, cotangent)
    saved = Saved(*(a if a.numel() else None for a in arguments[_COUNT : _COUNT + 2]))
    return _kernels(asked).backward(problem, operands, saved, None)


def _imagine_gradient(cotangent: Any, logits: Any, *arguments: Any) -> Any:
    tensors = (argument for argument in arguments if isinstance(argument, torch.Tensor))
    check_imagined(cotangent, logits, *tensors)
    return torch.empty_like(logits)


def check_imagined(*tensors: Any) -> None:
    """Refuse tensors with values together with one on the meta device, which has none."""
    plain = [tensor for tensor in tensors if type(tensor) is torch.Tensor]
    if len({tensor.device.type == "meta" for tensor in plain}) > 1:
        raise TypeError(
            "all tensors must lie on one device, but some are on meta and others are not; "
            "move them first"
        )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, *found, rows, denominator = output
    ctx.mark_non_differentiable(*found, rows, denominator)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:_COUNT], rows, denominator)
    asked = _asked(inputs[_COUNT + 1 :])
    without_stats = options_of(asked.options)._replace(stats=None)[:-1]
    ctx.asked = asked._replace(options=without_stats)


def _differentiate(ctx: Any, cotangent: Any, *_: Any) -> tuple[Any, ...]:
    needs, saved, asked = ctx.needs_input_grad, ctx.saved_tensors, ctx.asked
    grad = of_target = of_weight = None
    if needs[0]:
        grad = _backward_operator(cotangent, *saved, *asked.values())
    if needs[1] or needs[2]:
        problem, operands = _described(saved[:_COUNT], asked, cotangent)
        of_target, of_weight = torch_calls.target_gradients(problem, operands, needs[1:3])
    return grad, of_target, of_weight, *(None,) * (_COUNT - 2 + len(asked.values()))


def _keep_all(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[: _COUNT + 1])
    ctx.asked = _asked(inputs[_COUNT + 3 :])


def _differentiate_again(ctx: Any, cotangent: Any) -> tuple[Any, ...]:
    """Differentiate the gradient, computed again in torch operations."""
    first, *tensors = ctx.saved_tensors
    wanted = [
        a for a, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False) if needed
    ]
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        problem, operands = _described(tuple(tensors), ctx.asked, first)
        grad = torch_calls.gradient(problem, operands)
        found = iter(
            torch.autograd.grad(grad, wanted, cotangent, create_graph=graph, allow_unused=True)
        )
    grads = [next(found) if needed else None for needed in ctx.needs_input_grad[: _COUNT + 1]]
    return *grads, *(None,) * (2 + len(ctx.asked.values()))


# By hand instead of `torch.library.custom_op`, whose checks at each call take as long as describing
# the call, and half of a small kernel's time.
_LIBRARY = torch.library.Library("polyce", "FRAGMENT")
_LIBRARY.define(
    f"cross_entropy({_OPERANDS}, bool keep, {_ASKED}) "
    f"-> ({_FOUND}, Tensor rows, Tensor denominator)"
)
_LIBRARY.define(
    f"cross_entropy_backward(Tensor cotangent, {_OPERANDS}, Tensor rows, Tensor denominator, "
    f"{_ASKED}) -> Tensor"
)
for _name, _run, _fake, _rule, _save in (
    ("cross_entropy", _compute, _imagine, _differentiate, _keep),
    (
        "cross_entropy_backward",
        _compute_gradient,
        _imagine_gradient,
        _differentiate_again,
        _keep_all,
    ),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"polyce::{_name}", _fake, lib=_LIBRARY)
    torch.library.register_autograd(f"polyce::{_name}", _rule, setup_context=_save, lib=_LIBRARY)

_operator = torch.ops.polyce.cross_entropy.default
_backward_operator = torch.ops.polyce.cross_entropy_backward.default
