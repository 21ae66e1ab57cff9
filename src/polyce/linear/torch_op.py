"""A call as a torch operator, which torch.compile puts into its graph.

torch passes an operator nothing but its arguments, so they describe the call again. It returns the
loss, the sums of the gradients wanted, and a factor still to be applied to these; an absent result
is an empty tensor.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from polyce.graphs import torch_state
from polyce.implementations import torch_ops
from polyce.linear import compute
from polyce.linear.call import NONE, Gradients, HeadCall, describe


class _Asked(NamedTuple):
    """What the operator takes besides tensors, in the order of its schema."""

    wanted: Gradients
    options: tuple[Any, ...]
    result_dtype: Any
    chunk_size: int | None
    implementation: str | None

    @classmethod
    def of(cls, values: tuple[Any, ...]) -> _Asked:
        """Read the arguments after the tensors."""
        wanted, rest = values[:_PARAMETERS], values[_PARAMETERS:]
        options, rest = rest[: torch_ops.OPTION_COUNT], rest[torch_ops.OPTION_COUNT :]
        return cls(Gradients(*wanted), options, *rest)

    def values(self) -> tuple[Any, ...]:
        """Return the arguments that `of` reads."""
        return *self.wanted, *self.options, *self[2:]


_SCHEMA = (
    "linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, "
    "Tensor? weight, Tensor? sample_weight, Tensor? normalizer, Tensor? grad_output, "
    f"bool wants_input, bool wants_weight, bool wants_bias, {torch_ops.OPTIONS}, "
    "ScalarType result_dtype, int? chunk_size, str? implementation) "
    "-> (Tensor loss, Tensor d_input, Tensor d_weight, Tensor d_bias, Tensor factor)"
)
_COUNT = 8
_PARAMETERS = 3


def loss(call: HeadCall) -> Any:
    """Compute the loss of a call as part of a graph."""
    given = (call.operands.logits, *call.head)
    wanted = NONE
    if call.whole.options.reduction != "none":
        wanted = Gradients(*map(torch_state.needs_gradient, given))
    return _operator(*_arguments(call, wanted))[0]


def loss_and_gradients(call: HeadCall, wanted: Gradients) -> tuple[Any, Gradients]:
    """Compute the loss and the gradients wanted as parts of a graph, without derivatives."""
    result, *sums, factor = _operator(*_arguments(call, wanted))
    return result, _finished(wanted, (call.operands.logits, *call.head), sums, factor, None)


def _arguments(call: HeadCall, wanted: Gradients) -> tuple[Any, ...]:
    whole, operands = call.whole, call.operands
    parameters = []
    for tensor in (operands.logits, *call.head):
        # The autocast that is on now may be off when the operator runs.
        dtype = None if tensor is None else whole.library.factor_dtype(tensor.dtype, tensor)
        is_cast = dtype is not None and dtype != tensor.dtype
        parameters.append(tensor.to(dtype) if is_cast else tensor)
    normalizer, cotangent = (
        _tensor(number, call) for number in (operands.normalizer, operands.grad_output)
    )
    asked = _Asked(wanted, torch_ops.flat(whole), whole.result_dtype, call.chunk_size, call.name)
    rest = (operands.target, operands.weight, operands.sample_weight, normalizer, cotangent)
    return *parameters, *rest, *asked.values()


def _tensor(number: Any, call: HeadCall) -> Any:
    """Return a number as a tensor, which does not become a constant of the graph."""
    if not isinstance(number, float):
        return number
    device = call.operands.logits.device
    return torch.ones((), dtype=call.whole.row_dtype, device=device) * number


def _described(arguments: tuple[Any, ...]) -> tuple[HeadCall, Gradients]:
    """Describe the call that the operator's arguments belong to."""
    hidden, linear_weight, linear_bias, target, *rest = arguments[:_COUNT]
    weight, sample_weight, normalizer, cotangent = rest
    asked = _Asked.of(arguments[_COUNT:])
    call = describe(
        hidden,
        linear_weight,
        target,
        linear_bias=linear_bias,
        weight=weight,
        sample_weight=sample_weight,
        normalizer=normalizer,
        options=torch_ops.options_of(asked.options),
        chunk_size=asked.chunk_size,
        implementation=asked.implementation,
        grad_output=cotangent,
    )
    call = replace(call, whole=call.whole._replace(result_dtype=asked.result_dtype))
    return call, asked.wanted


def _compute(*arguments: Any) -> tuple[Any, ...]:
    call, wanted = _described(arguments)
    if not any(wanted):
        return compute.loss(call), *_filled(call, Gradients(None, None, None), None)
    result, sums, factor = compute.loss_and_sums(call, wanted)
    return result, *_filled(call, sums, factor)


def _filled(call: HeadCall, sums: Gradients, factor: Any) -> list[Any]:
    """Return results in the operator's form, with an empty tensor for what is absent."""
    like = call.operands.logits
    if isinstance(factor, float):
        factor = like.new_full((), factor, dtype=call.whole.row_dtype)
    return [like.new_empty(0) if array is None else array for array in (*sums, factor)]


def _imagine(*arguments: Any) -> tuple[Any, ...]:
    """Return results without values, in the form of `_compute`."""
    torch_ops.check_imagined(*arguments[:_COUNT])
    call, wanted = _described(arguments)
    like, whole = call.operands.logits, call.whole
    rows = math.prod(whole.row_shape)
    shapes = ((rows, call.features), (whole.classes, call.features), (whole.classes,))
    sums = Gradients(
        *(
            like.new_empty(shape, dtype=call.sum_dtype) if is_wanted else None
            for shape, is_wanted in zip(shapes, wanted, strict=True)
        )
    )
    is_scaled = any(wanted) and call.scales_sums
    factor = like.new_empty((), dtype=whole.row_dtype) if is_scaled else None
    shape = whole.row_shape if whole.options.reduction == "none" else ()
    return like.new_empty(shape, dtype=whole.result_dtype), *_filled(call, sums, factor)


def _finished(
    wanted: Gradients, given: tuple[Any, ...], sums: Any, factor: Any, cotangent: Any
) -> Gradients:
    """Return the gradients wanted, by torch operations, since the sums must not be overwritten."""
    scales = [scale for scale in (factor, cotangent) if scale is not None and scale.numel()]

    def finished(array: Any, like: Any) -> Any:
        for scale in scales:
            array = array * scale.to(array.dtype)
        return array.reshape(like.shape).to(like.dtype)

    return Gradients(
        *(
            finished(array, like) if is_wanted else None
            for is_wanted, like, array in zip(wanted, given, sums, strict=True)
        )
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, *sums = output
    ctx.mark_non_differentiable(*sums)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:_COUNT], *sums)
    ctx.asked = _Asked.of(inputs[_COUNT:])


def _differentiate(ctx: Any, cotangent: Any, *_: Any) -> tuple[Any, ...]:
    arguments, (*sums, factor) = ctx.saved_tensors[:_COUNT], ctx.saved_tensors[_COUNT:]
    asked, given = ctx.asked, arguments[:_PARAMETERS]
    wanted = Gradients(*ctx.needs_input_grad[:_PARAMETERS])
    if torch_ops.options_of(asked.options).reduction == "none":
        # Computed again, each row's scaled by its own cotangent.
        arguments = (*arguments[: _COUNT - 1], cotangent)
        _, *sums, factor = _operator(*arguments, *asked._replace(wanted=wanted).values())
        cotangent = None
    found = _finished(wanted, given, sums, factor, cotangent)
    if found.input is not None:
        found = found._replace(
            input=compute.select_counted(_described((*arguments, *asked.values()))[0], found.input)
        )
    return *found, *(None,) * (_COUNT - _PARAMETERS + len(asked.values()))


_LIBRARY = torch.library.Library("polyce", "FRAGMENT")
_LIBRARY.define(_SCHEMA)
_LIBRARY.impl("linear_cross_entropy", _compute, "CompositeExplicitAutograd")
torch.library.register_fake("polyce::linear_cross_entropy", _imagine, lib=_LIBRARY)
torch.library.register_autograd(
    "polyce::linear_cross_entropy", _differentiate, setup_context=_keep, lib=_LIBRARY
)

_operator = torch.ops.polyce.linear_cross_entropy.default
