"""A call as a torch operator, which torch.compile puts into its graph.

torch passes an operator nothing but its arguments, so they describe the call again. It returns the
loss, the sums of the gradients wanted, a factor still to be applied to these, and the stats; an
absent result is an empty tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch

from polyce.call.options import STATS_WITH_GRADIENT, Options
from polyce.call.target import SparseTarget, TeacherHead, TeacherLogits
from polyce.formula import stats
from polyce.formula.stats import Stats
from polyce.graphs import torch_calls, torch_state
from polyce.implementations import torch_ops
from polyce.linear import compute
from polyce.linear.call import NONE, Gradients, HeadCall, describe, taking_stats


class _HeadSettings(NamedTuple):
    """What the operator takes besides tensors, in the order of its schema."""

    wanted: Gradients
    options: tuple[Any, ...]
    result_dtype: Any
    teacher_scale: float | None
    """None without a teacher."""
    chunk_size: int | None
    implementation: str | None

    @classmethod
    def of(cls, values: Sequence[Any]) -> _HeadSettings:
        """Read the values, in the order of the schema."""
        of_input, of_weight, of_bias, *options = values[:-4]
        return cls(Gradients(of_input, of_weight, of_bias), tuple(options), *values[-4:])

    def values(self) -> tuple[Any, ...]:
        """Return the values that `of` reads."""
        return *self.wanted, *self.options, *self[2:]


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
    grad_lse: Any
    grad_entropy: Any
    target_probability: Any
    teacher_weight: Any
    teacher_bias: Any

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
    "Tensor? grad_lse, Tensor? grad_entropy, "
    "Tensor? target_probability, Tensor? teacher_weight, Tensor? teacher_bias, "
    f"bool wants_input, bool wants_weight, bool wants_bias, {torch_ops.OPTIONS}, "
    "ScalarType result_dtype, float? teacher_scale, int? chunk_size, str? implementation) "
    "-> (Tensor loss, Tensor d_input, Tensor d_weight, Tensor d_bias, Tensor factor"
    f"{''.join(f', Tensor {name}' for name in Stats._fields)})"
)


class _Results(NamedTuple):
    """What the operator returns, or the gradients that flow into it."""

    loss: Any
    sums: Gradients
    factor: Any
    stats: Stats

    @classmethod
    def of(cls, values: Sequence[Any]) -> _Results:
        """Read the values, in the order of the schema."""
        result, d_input, d_weight, d_bias, factor, *of_rows = values
        return cls(result, Gradients(d_input, d_weight, d_bias), factor, Stats(*of_rows))

    def values(self) -> tuple[Any, ...]:
        """Return the values that `of` reads."""
        return self.loss, *self.sums, self.factor, *self.stats

    def stats_of(self, call: HeadCall) -> Stats | None:
        """Return the stats that a call asks for."""
        asked = stats.unfilled(call.whole, lambda shape, dtype: dtype)
        if asked is None:
            return None
        pairs = zip(asked, self.stats, strict=True)
        return Stats(*(None if dtype is None else array for dtype, array in pairs))


def _run(arguments: _Arguments) -> _Results:
    return _Results.of(_operator(*arguments.values()))


def loss(call: HeadCall) -> tuple[Any, Stats | None]:
    """Compute the loss and the stats of a call as part of a graph."""
    given = (call.operands.logits, *call.head)
    wanted = NONE
    if call.whole.options.reduction != "none":
        wanted = Gradients(*map(torch_state.needs_gradient, given))
    found = _run(_arguments(call, wanted))
    return found.loss, found.stats_of(call)


def loss_and_gradients(call: HeadCall, wanted: Gradients) -> tuple[Any, Gradients, Stats | None]:
    """Compute loss, gradients wanted and stats as parts of a graph, without derivatives."""
    found, given = _run(_arguments(call, wanted)), (call.operands.logits, *call.head)
    gradients = _finished(wanted, given, found.sums, found.factor, None)
    return found.loss, gradients, found.stats_of(call)


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
        target=operands.target if call.teacher is None else factor(operands.target),
        weight=operands.weight,
        sample_weight=operands.sample_weight,
        normalizer=_tensor(operands.normalizer, call),
        grad_output=_tensor(operands.grad_output, call),
        grad_lse=operands.grad_lse,
        grad_entropy=operands.grad_entropy,
        target_probability=operands.target_probability,
        teacher_weight=factor(operands.teacher_weight),
        teacher_bias=factor(operands.teacher_bias),
    )
    scale = whole.teacher_scale if whole.kind == "teacher" else None
    settings = _HeadSettings(
        wanted, torch_ops.flat(whole), whole.result_dtype, scale, call.chunk_size, call.name
    )
    return _Arguments(tensors, settings)


def _tensor(number: Any, call: HeadCall) -> Any:
    """Return a number as a tensor, which does not become a constant of the graph."""
    if not isinstance(number, float):
        return number
    device = call.operands.logits.device
    return torch.ones((), dtype=call.whole.row_dtype, device=device) * number


def _described(arguments: _Arguments) -> HeadCall:
    """Describe the call that the operator's arguments belong to."""
    (tensors, settings), of_stats = arguments, {}
    given = tensors._asdict() | {"target": _target(arguments)}
    for name in ("target_probability", "teacher_weight", "teacher_bias"):
        del given[name]
    for name in STATS_WITH_GRADIENT:
        array = given.pop(f"grad_{name}")
        if array is not None:
            of_stats[name] = array
    call = describe(
        **given,
        options=torch_ops.options_of(settings.options),
        chunk_size=settings.chunk_size,
        implementation=settings.implementation,
        grad_stats=of_stats or None,
    )
    return replace(call, whole=call.whole._replace(result_dtype=settings.result_dtype))


def _target(arguments: _Arguments) -> Any:
    """Return the target as the caller passed it."""
    tensors, scale = arguments.tensors, arguments.settings.teacher_scale
    if tensors.target_probability is not None:
        return SparseTarget(tensors.target, tensors.target_probability)
    if tensors.teacher_weight is not None:
        return TeacherHead(
            tensors.target, tensors.teacher_weight, tensors.teacher_bias, cast(float, scale)
        )
    return tensors.target if scale is None else TeacherLogits(tensors.target, scale)


def _compute(*values: Any) -> tuple[Any, ...]:
    arguments = _Arguments.of(values)
    call, wanted = _described(arguments), arguments.settings.wanted
    if any(wanted):
        result, sums, factor, of_rows = compute.loss_and_sums(call, wanted)
    else:
        (result, of_rows), sums, factor = compute.loss(call), Gradients(None, None, None), None
    return _filled(call, result, sums, factor, of_rows)


def _filled(
    call: HeadCall, result: Any, sums: Gradients, factor: Any, of_rows: Stats | None
) -> tuple[Any, ...]:
    """Return results in the operator's form, with an empty tensor for what is absent."""
    like = call.operands.logits
    if isinstance(factor, float):
        factor = like.new_full((), factor, dtype=call.whole.row_dtype)
    found = _Results(result, sums, factor, of_rows or Stats(*(None,) * len(Stats._fields)))
    return tuple(like.new_empty(0) if array is None else array for array in found.values())


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
    result = like.new_empty(shape, dtype=whole.result_dtype)
    of_rows = stats.unfilled(whole, lambda shape, dtype: like.new_empty(shape, dtype=dtype))
    return _filled(call, result, sums, factor, of_rows)


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
    tensors, ctx.settings = _Arguments.of(inputs)
    found = _Results.of(output)
    asked = torch_ops.options_of(ctx.settings.options).stats or ()
    names = [name for name in STATS_WITH_GRADIENT if name in asked]
    others = [a for name, a in found.stats._asdict().items() if name not in names]
    ctx.mark_non_differentiable(*found.sums, found.factor, *others)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *found.sums, found.factor)


def _differentiate(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
    flowing = _Results.of(cotangents)
    cotangent, of_stats = flowing.loss, (flowing.stats.lse, flowing.stats.entropy)
    flows_into_stats = any(array is not None for array in of_stats)
    if cotangent is None and not flows_into_stats:
        return (None,) * len(ctx.needs_input_grad)
    *tensors, d_input, d_weight, d_bias, factor = ctx.saved_tensors
    sums = Gradients(d_input, d_weight, d_bias)
    arguments = _Arguments(_Tensors(*tensors), ctx.settings)
    wanted = _Arguments.of(ctx.needs_input_grad).tensors.differentiated
    options = Options(*ctx.settings.options)
    if options.reduction == "none" or flows_into_stats:
        # Computed again, each row's scaled by its own cotangents.
        again = _run(_with_cotangents(arguments, wanted, cotangent, *of_stats))
        sums, factor, cotangent = again.sums, again.factor, None
    found = _finished(wanted, arguments.tensors.differentiated, sums, factor, cotangent)
    if found.input is not None:
        counted = compute.select_counted(_described(arguments), found.input)
        found = found._replace(input=counted)
    return *found, *(None,) * (len(ctx.needs_input_grad) - len(found))


def _with_cotangents(
    arguments: _Arguments, wanted: Gradients, cotangent: Any, of_lse: Any, of_entropy: Any
) -> _Arguments:
    """Return the arguments for the gradients of loss and stats, and for no stats but these."""
    call = _described(arguments)
    operands = call.operands._replace(grad_output=cotangent)
    whole, operands = torch_calls.with_stats(call.whole, operands, of_lse, of_entropy)
    names = whole.grad_stats
    tensors = arguments.tensors._replace(
        grad_output=operands.grad_output, grad_lse=of_lse, grad_entropy=of_entropy
    )
    options = torch_ops.flat(whole.with_options(stats=names or None))
    implementation = arguments.settings.implementation
    return _Arguments(
        tensors,
        arguments.settings._replace(
            wanted=wanted,
            options=options,
            implementation=taking_stats(implementation) if names else implementation,
        ),
    )


_LIBRARY = torch.library.Library("polyce", "FRAGMENT")
_LIBRARY.define(_SCHEMA)
_LIBRARY.impl("linear_cross_entropy", _compute, "CompositeExplicitAutograd")
torch.library.register_fake("polyce::linear_cross_entropy", _imagine, lib=_LIBRARY)
torch.library.register_autograd(
    "polyce::linear_cross_entropy", _differentiate, setup_context=_keep, lib=_LIBRARY
)

_operator = torch.ops.polyce.linear_cross_entropy.default
