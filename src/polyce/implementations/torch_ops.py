"""The kernels as torch operators, which torch.compile puts into its graph.

torch passes an operator nothing but its arguments, so they describe the whole call again. One
operator returns the loss, the stats and what the backward pass needs, the other the gradient of the
logits. An operator always returns as many tensors as it declares: an absent one is empty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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


class _CallSettings(NamedTuple):
    """What both operators take besides tensors."""

    options: tuple[Any, ...]
    """As `flat` returns them."""
    result_dtype: Any
    implementation: str

    @classmethod
    def of(cls, values: Sequence[Any]) -> _CallSettings:
        """Read the values, in the order of the schemas."""
        *options, result_dtype, implementation = values
        return cls(tuple(options), result_dtype, implementation)

    def values(self) -> tuple[Any, ...]:
        """Return the values that `of` reads."""
        return *self.options, self.result_dtype, self.implementation


class _Tensors(NamedTuple):
    """The tensors of a call, as both operators take them; or a flag for each."""

    logits: Any
    target: Any
    weight: Any
    sample_weight: Any
    normalizer: Any


def _split(values: Sequence[Any]) -> tuple[_Tensors, Sequence[Any]]:
    """Return the tensors that values begin with, and the rest."""
    count = len(_Tensors._fields)
    return _Tensors(*values[:count]), values[count:]


class _ForwardArguments(NamedTuple):
    """What `cross_entropy` takes; or a flag for each, such as whether it needs a gradient."""

    tensors: _Tensors
    keep: Any
    settings: _CallSettings

    @classmethod
    def of(cls, values: Sequence[Any]) -> _ForwardArguments:
        """Read the values, in the order of the schema."""
        tensors, (keep, *settings) = _split(values)
        return cls(tensors, keep, _CallSettings.of(settings))


class _BackwardArguments(NamedTuple):
    """What `cross_entropy_backward` takes; or a flag for each."""

    cotangent: Any
    tensors: _Tensors
    saved: Saved
    settings: _CallSettings

    @classmethod
    def of(cls, values: Sequence[Any]) -> _BackwardArguments:
        """Read the values, in the order of the schema."""
        cotangent, *others = values
        tensors, (rows, denominator, *settings) = _split(others)
        return cls(cotangent, tensors, Saved(rows, denominator), _CallSettings.of(settings))


_SETTINGS = f"{OPTIONS}, ScalarType result_dtype, str implementation"
_TENSORS = "Tensor logits, Tensor target, Tensor? weight, Tensor? sample_weight, Tensor? normalizer"
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
    tensors, settings = _arguments(implementation, problem.with_options(stats=None), operands)
    grad = _backward_operator(cotangent, *tensors, rows, denominator, *settings.values())
    return loss, grad, found


def _forward(
    implementation: str, problem: Problem, operands: Operands, keep: bool
) -> tuple[Any, Stats | None, Any, Any]:
    tensors, settings = _arguments(implementation, problem, operands)
    loss, *entries, rows, denominator = _operator(*tensors, keep, *settings.values())
    if problem.options.stats is None:
        return loss, None, rows, denominator
    wanted = (*(name in problem.options.stats for name in Stats._fields[:-1]), True)
    found = Stats(*(a if is_on else None for a, is_on in zip(entries, wanted, strict=True)))
    return loss, found, rows, denominator


def _arguments(
    implementation: str, problem: Problem, operands: Operands
) -> tuple[_Tensors, _CallSettings]:
    logits, target, weight, sample_weight, normalizer, _ = operands
    if isinstance(normalizer, float):
        # It may change with every batch: as an operator's argument a number would become a constant
        # of the graph, as a factor of a product it does not.
        one = torch.ones((), dtype=problem.row_dtype, device=logits.device)
        normalizer = one * normalizer
    settings = _CallSettings(flat(problem), problem.result_dtype, implementation)
    return _Tensors(logits, target, weight, sample_weight, normalizer), settings


def _described(
    tensors: _Tensors, settings: _CallSettings, cotangent: Any = None
) -> tuple[Problem, Operands]:
    """Describe the call that an operator's arguments belong to."""
    logits, target, weight, sample_weight, normalizer = tensors
    options = options_of(settings.options)
    problem, operands = describe(logits, target, weight, sample_weight, options=options)
    # The autocast that was on when the call was traced may be off now.
    problem = problem._replace(
        result_dtype=settings.result_dtype, normalized=normalizer is not None
    )
    return problem, operands._replace(normalizer=normalizer, grad_output=cotangent)


def _kernels(settings: _CallSettings) -> Kernels:
    kernels = registry.find(settings.implementation).torch_kernels
    if kernels is None:
        raise ValueError(
            "the operators of polyce run an implementation that has kernels for torch, got "
            f"{settings.implementation!r}; call polyce.cross_entropy instead"
        )
    return kernels()


def _compute(*arguments: Any) -> tuple[Any, ...]:
    tensors, keep, settings = _ForwardArguments.of(arguments)
    problem, operands = _described(tensors, settings)
    loss, found, saved = _kernels(settings).forward(problem, operands, keep)
    return _filled(tensors.logits, loss, found, saved)


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
    tensors, keep, settings = _ForwardArguments.of(arguments)
    check_imagined(*tensors)
    problem, _ = _described(tensors, settings)
    logits, rows = tensors.logits, problem.row_shape

    def empty(shape: tuple[int, ...], dtype: Any) -> Any:
        return logits.new_empty(shape, dtype=dtype)

    loss = empty(rows if problem.options.reduction == "none" else (), problem.result_dtype)
    saved = Saved()
    if keep:
        keeps = _kernels(settings).keeps(problem)
        saved = Saved(
            rows=empty((math.prod(rows), 4), torch.float64) if keeps.rows else None,
            denominator=empty((), torch.float64) if keeps.denominator else None,
        )
    return _filled(logits, loss, stats.unfilled(problem, empty), saved)


def _compute_gradient(*arguments: Any) -> Any:
    cotangent, tensors, saved, settings = _BackwardArguments.of(arguments)
    problem, operands = _described(tensors, settings, cotangent)
    saved = Saved(*(tensor if tensor.numel() else None for tensor in saved))
    return _kernels(settings).backward(problem, operands, saved, None)


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


def with_none(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    """Return the gradients of an operator's first arguments, and None for each of the others."""
    return *grads, *(None,) * (len(ctx.needs_input_grad) - len(grads))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, *found, rows, denominator = output
    ctx.mark_non_differentiable(*found, rows, denominator)
    ctx.set_materialize_grads(False)
    tensors, _, settings = _ForwardArguments.of(inputs)
    ctx.save_for_backward(*tensors, rows, denominator)
    without_stats = options_of(settings.options)._replace(stats=None)[:-1]
    ctx.settings = settings._replace(options=without_stats)


def _differentiate(ctx: Any, cotangent: Any, *_: Any) -> tuple[Any, ...]:
    *tensors, rows, denominator = ctx.saved_tensors
    needed = _ForwardArguments.of(ctx.needs_input_grad).tensors
    grad = of_target = of_weight = None
    if needed.logits:
        settings = ctx.settings.values()
        grad = _backward_operator(cotangent, *tensors, rows, denominator, *settings)
    if needed.target or needed.weight:
        problem, operands = _described(_Tensors(*tensors), ctx.settings, cotangent)
        needs = needed.target, needed.weight
        of_target, of_weight = torch_calls.target_gradients(problem, operands, needs)
    return with_none(ctx, grad, of_target, of_weight)


def _keep_all(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    cotangent, tensors, _, ctx.settings = _BackwardArguments.of(inputs)
    ctx.save_for_backward(cotangent, *tensors)


def _differentiate_again(ctx: Any, cotangent: Any) -> tuple[Any, ...]:
    """Differentiate the gradient, computed again in torch operations."""
    saved, flags = ctx.saved_tensors, _BackwardArguments.of(ctx.needs_input_grad)
    first, *tensors = saved
    needs = (flags.cotangent, *flags.tensors)
    wanted = [tensor for tensor, needed in zip(saved, needs, strict=True) if needed]
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        problem, operands = _described(_Tensors(*tensors), ctx.settings, first)
        grad = torch_calls.gradient(problem, operands)
        found = iter(
            torch.autograd.grad(grad, wanted, cotangent, create_graph=graph, allow_unused=True)
        )
    return with_none(ctx, *(next(found) if needed else None for needed in needs))


# By hand instead of `torch.library.custom_op`, whose checks at each call take as long as describing
# the call, and half of a small kernel's time.
_LIBRARY = torch.library.Library("polyce", "FRAGMENT")
_LIBRARY.define(
    f"cross_entropy({_TENSORS}, bool keep, {_SETTINGS}) "
    f"-> ({_FOUND}, Tensor rows, Tensor denominator)"
)
_LIBRARY.define(
    f"cross_entropy_backward(Tensor cotangent, {_TENSORS}, Tensor rows, Tensor denominator, "
    f"{_SETTINGS}) -> Tensor"
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
