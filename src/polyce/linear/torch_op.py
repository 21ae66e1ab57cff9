"""A call as a torch operator, which torch.compile puts into its graph.

torch passes an operator nothing but its arguments, so they describe the call again. It returns the
loss, the sums of the gradients wanted, and a factor still to be applied to these; an absent result
is an empty tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from polyce.graphs import torch_state
from polyce.implementations import torch_ops
from polyce.linear import compute
from polyce.linear.call import NONE, Gradients, HeadCall, describe


class _HeadSettings(NamedTuple):
    """What the operator takes besides tensors, in the order of its schema."""

    wanted: Gradients
    options: tuple[Any, ...]
    result_dtype: Any
    chunk_size: int | None
    implementation: str | None

    @classmethod
    def of(cls, values: Sequence[Any]) -> _HeadSettings:
        """Read the values, in the order of the schema."""
        of_input, of_weight, of_bias, *options, result_dtype, chunk_size, implementation = values
        wanted = Gradients(of_input, of_weight, of_bias)
        return cls(wanted, tuple(options), result_dtype, chunk_size, implementation)

    def values(self) -> tuple[Any, ...]:
        """Return the values that `of` reads."""
        return (
            *self.wanted,
            *self.options,
            self.result_dtype,
            self.chunk_size,
            self.implementation,
        )


class _Tensors(NamedTuple):
    """The tensors of a call, as the operator takes them; or a flag for each."""

    input: Any
    linear_weight: Any
    linear_bias: Any
    target: Any
    weight: Any
    sample_weight: Any
    normalizer: Any
    grad_output: Any

    @property
    def differentiated(self) -> Gradients:
        """Return those by which the operator differentiates."""
        return Gradients(self.input, self.linear_weight, self.linear_bias)


class _Arguments(NamedTuple):
    """What the operator takes; or a flag for each, such as whether it needs a gradient."""

    tensors: _Tensors
    settings: _HeadSettings

    @classmethod
    def of(cls, values: Sequence[Any]) -> _Arguments:
        """Read the values, in the order of the schema."""
        count = len(_Tensors._fields)
        return cls(_Tensors(*values[:count]), _HeadSettings.of(values[count:]))

    def values(self) -> tuple[Any, ...]:
        """Return the values that `of` reads."""
        return *self.tensors, *self.settings.values()


_SCHEMA = (
    "linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, "
    "Tensor? weight, Tensor? sample_weight, Tensor? normalizer, Tensor? grad_output, "
    f"bool wants_input, bool wants_weight, bool wants_bias, {torch_ops.OPTIONS}, "
    "ScalarType result_dtype, int? chunk_size, str? implementation) "
    "-> (Tensor loss, Tensor d_input, Tensor d_weight, Tensor d_bias, Tensor factor)"
)


def loss(call: HeadCall) -> Any:
    """Compute the loss of a call as part of a graph."""
    given = (call.operands.logits, *call.head)
    wanted = NONE
    if call.whole.options.reduction != "none":
        wanted = Gradients(*map(torch_state.needs_gradient, given))
    return _operator(*_arguments(call, wanted).values())[0]


def loss_and_gradients(call: HeadCall, wanted: Gradients) -> tuple[Any, Gradients]:
    """Compute the loss and the gradients wanted as parts of a graph, without derivatives."""
    result, *sums, factor = _operator(*_arguments(call, wanted).values())
    return result, _finished(wanted, (call.operands.logits, *call.head), sums, factor, None)


def _arguments(call: HeadCall, wanted: Gradients) -> _Arguments:
    whole, operands = call.whole, call.operands

    def factor(tensor: Any) -> Any:
        """Return a factor of the product in the dtype that it is multiplied in."""
        # The autocast that is on now may be off when the operator runs.
        dtype = None if tensor is None else whole.library.factor_dtype(tensor.dtype, tensor)
        is_cast = dtype is not None and dtype != tensor.dtype
        return tensor.to(dtype) if is_cast else tensor

    tensors = _Tensors(
        input=factor(operands.logits),
        linear_weight=factor(call.head.weight),
        linear_bias=factor(call.head.bias),
        target=operands.target,
        weight=operands.weight,
        sample_weight=operands.sample_weight,
        normalizer=_tensor(operands.normalizer, call),
        grad_output=_tensor(operands.grad_output, call),
    )
    options = torch_ops.flat(whole)
    settings = _HeadSettings(wanted, options, whole.result_dtype, call.chunk_size, call.name)
    return _Arguments(tensors, settings)


def _tensor(number: Any, call: HeadCall) -> Any:
    """Return a number as a tensor, which does not become a constant of the graph."""
    if not isinstance(number, float):
        return number
    device = call.operands.logits.device
    return torch.ones((), dtype=call.whole.row_dtype, device=device) * number


def _described(arguments: _Arguments) -> HeadCall:
    """Describe the call that the operator's arguments belong to."""
    tensors, settings = arguments
    call = describe(
        **tensors._asdict(),
        options=torch_ops.options_of(settings.options),
        chunk_size=settings.chunk_size,
        implementation=settings.implementation,
    )
    return replace(call, whole=call.whole._replace(result_dtype=settings.result_dtype))


def _compute(*values: Any) -> tuple[Any, ...]:
    arguments = _Arguments.of(values)
    call, wanted = _described(arguments), arguments.settings.wanted
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


def _imagine(*values: Any) -> tuple[Any, ...]:
    """Return results without values, in the form of `_compute`."""
    arguments = _Arguments.of(values)
    torch_ops.check_imagined(*arguments.tensors)
    call, wanted = _described(arguments), arguments.settings.wanted
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
    tensors, ctx.settings = _Arguments.of(inputs)
    ctx.save_for_backward(*tensors, *sums)


def _differentiate(ctx: Any, cotangent: Any, *_: Any) -> tuple[Any, ...]:
    *tensors, d_input, d_weight, d_bias, factor = ctx.saved_tensors
    sums = [d_input, d_weight, d_bias]
    arguments = _Arguments(_Tensors(*tensors), ctx.settings)
    wanted = _Arguments.of(ctx.needs_input_grad).tensors.differentiated
    if torch_ops.options_of(ctx.settings.options).reduction == "none":
        # Computed again, each row's scaled by its own cotangent.
        arguments = _Arguments(
            arguments.tensors._replace(grad_output=cotangent),
            ctx.settings._replace(wanted=wanted),
        )
        _, *sums, factor = _operator(*arguments.values())
        cotangent = None
    found = _finished(wanted, arguments.tensors.differentiated, sums, factor, cotangent)
    if found.input is not None:
        counted = compute.select_counted(_described(arguments), found.input)
        found = found._replace(input=counted)
    return *found, *(None,) * (len(ctx.needs_input_grad) - len(found))


_LIBRARY = torch.library.Library("polyce", "FRAGMENT")
_LIBRARY.define(_SCHEMA)
_LIBRARY.impl("linear_cross_entropy", _compute, "CompositeExplicitAutograd")
torch.library.register_fake("polyce::linear_cross_entropy", _imagine, lib=_LIBRARY)
torch.library.register_autograd(
    "polyce::linear_cross_entropy", _differentiate, setup_context=_keep, lib=_LIBRARY
)

_operator = torch.ops.polyce.linear_cross_entropy.default
