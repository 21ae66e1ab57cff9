"""The loss of a linear head whose classes lie in several processes of torch.

Each process computes its classes' logits for some rows at a time, and reads their states. Those of
all rows are exchanged at once, so that there is one collective however many chunks there are; for
it, the gradient computes the logits a second time. It exchanges nothing but what flows into the
hidden states, which is a sum over all classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from polyce.arrays import find, torch_memory
from polyce.call import checks
from polyce.call.options import Options
from polyce.call.problem import Head, Operands
from polyce.call.target import TeacherHead
from polyce.formula import stats
from polyce.formula.parts import TeacherState, Whole
from polyce.formula.rowgradient import StatsCotangents
from polyce.formula.rowstate import RowState
from polyce.formula.stats import RowStats, Stats
from polyce.formula.targets import Plan
from polyce.graphs import torch_rows, torch_state
from polyce.implementations.contract import OfParts
from polyce.implementations.registry import select_of_shard
from polyce.linear import chunks, torch_rule
from polyce.linear.call import HeadCall
from polyce.linear.call import describe as describe_head
from polyce.linear.torch_memory import PRODUCTS
from polyce.sharded import exchange, functional, rows, states
from polyce.sharded.call import (
    ShardCall,
    check_group,
    check_once,
    check_untransformed,
    of_shape,
    place,
    whole_target,
)


@dataclass(frozen=True)
class ShardedHead:
    """A call on this process's shard of a head."""

    call: HeadCall
    """The call on the whole head; its head and what is sharded beside are this process's."""
    shard: ShardCall
    """All rows in one axis, without a reduction; hidden states stand in the logits' place."""
    name: str | None
    """Name of the implementation, if the caller chooses."""
    reduces: bool
    """Whether the gradient of the hidden states is summed over the processes."""

    def spans(self) -> list[slice]:
        """Return the rows of each chunk."""
        shape = (*self.call.whole.shape[:-1], self.shard.width)
        own = self.call.whole._replace(shape=shape)
        return chunks.choose(own, self.call.features, self.call.chunk_size).spans()

    def chunks(self, counted: Any) -> Iterator[tuple[slice, Any, ShardCall]]:
        """Return rows, hidden states and the call on the logits of each chunk."""
        operands, dtype = self.shard.operands, self.call.whole.logits_dtype
        weight, bias = (a if a is None else a.to(dtype) for a in self.call.head)
        for span in self.spans():
            hidden = operands.logits[span].to(dtype)
            if counted is not None:
                # What does not count may hold anything, and is multiplied by a gradient of 0.
                hidden = hidden.where(counted[span], 0.0)
            logits = torch.nn.functional.linear(hidden, weight, bias)
            own = replace(
                self.shard,
                problem=self.call.part(hidden.shape[0]),
                operands=_cut(operands._replace(logits=None, weight=None), span)._replace(
                    logits=logits, weight=operands.weight
                ),
            )
            yield span, hidden, own


def describe(
    input: Any,
    linear_weight: Any,
    target: Any,
    *,
    linear_bias: Any,
    weight: Any,
    sample_weight: Any,
    normalizer: Any,
    options: Options,
    chunk_size: int | None,
    implementation: str | None,
    group: Any,
    class_start: int | None,
    num_classes: int | None,
    reduce_input_grad: bool = True,
    label_name: str = "labels",
) -> ShardedHead:
    """Check the arguments of a call on a shard of a head, and describe it."""
    check_group(group)
    if isinstance(target, TeacherHead):
        raise TypeError(
            "a head over processes takes the logits of a teacher, got a TeacherHead; pass "
            "TeacherLogits of this process's classes"
        )
    find.of(input=input, linear_weight=linear_weight, linear_bias=linear_bias)
    shape = checks.product_shape(input, linear_weight, linear_bias)
    width = shape[-1]
    start, classes = place(group, width, class_start, num_classes)
    stand_in, kept = whole_target(target, shape, (*shape[:-1], classes))
    call = describe_head(
        input,
        of_shape(linear_weight, (classes, linear_weight.shape[1])),
        stand_in,
        linear_bias=None if linear_bias is None else of_shape(linear_bias, (classes,)),
        weight=weight,
        sample_weight=sample_weight,
        normalizer=normalizer,
        options=options,
        chunk_size=chunk_size,
        implementation=implementation,
    )
    operands = call.operands if kept is None else call.operands._replace(target=kept)
    whole = call.whole
    if label_name != "labels":
        whole = whole._replace(label_name=label_name)
    call = replace(call, whole=whole, operands=operands, head=Head(linear_weight, linear_bias))
    torch_rule.check(call)
    check_untransformed()
    flat = call.of_rows({})._replace(weight=weight)
    shard = ShardCall(call.part(call.chunks.total), flat, group, start, width)
    return ShardedHead(call, shard, implementation, reduce_input_grad)


def run(head: ShardedHead) -> tuple[Any, Stats | None]:
    """Compute the loss of a shard of a head, and the stats, the same in every process."""
    with head.call.whole.library.multiplying(head.call.operands.named()):
        return _loss(head)


def _loss(head: ShardedHead) -> tuple[Any, Stats | None]:
    call, whole, shard = head.call, head.call.whole, head.shard
    if whole.is_empty:
        logits = torch.nn.functional.linear(call.operands.logits, *call.head)
        operands = call.operands._replace(logits=logits)
        return functional.run(replace(shard, problem=whole, operands=operands), head.name)
    try:
        call = call.planned()
    except IndexError:
        exchange.gather_with_ranges(shard, states.nothing(shard))
        raise
    of_parts = select_of_shard(shard.problem, head.name)
    plan = rows.plan_of(shard)
    losses, of_rows, plan = _of_rows(head, plan, of_parts)
    result = call.reduce(losses)
    if of_rows is None:
        return result, None
    return result, call.shaped(stats.finish(shard.problem, plan, of_rows))


def _of_rows(head: ShardedHead, plan: Plan, of_parts: OfParts) -> tuple[Any, RowStats | None, Plan]:
    """Compute the rows' losses and stats, on torch's graph, as `rows.compute` does."""
    arrays = (head.call.operands.logits, *head.call.head)
    call = head.call.detached(torch_rows.detach)
    shard = replace(head.shard, operands=torch_rows.detach(head.shard.operands))
    head = replace(head, call=call, shard=shard)
    whole, plan, teacher = _forward(head, plan, of_parts)
    if not any(map(torch_state.needs_gradient, arrays)):
        return whole.losses, whole.stats, plan
    kept = replace(head, call=call.without_arrays(), shard=shard.without_arrays())
    values, flat = rows.with_gradients(whole), shard.operands
    results = _Loss.apply(
        *(*arrays, kept, of_parts, tuple(values), *values.values()),
        *(flat.target, flat.weight, flat.sample_weight, flat.target_probability),
        *(plan.counted, *(teacher or (None, None)), whole.pivot, *whole.state),
    )
    return *rows.put(values, results, whole.stats), plan


def _forward(
    head: ShardedHead, plan: Plan, of_parts: OfParts
) -> tuple[Whole, Plan, TeacherState | None]:
    shard, problem = head.shard, head.shard.problem
    teacher = rows.teacher_of(shard, of_parts) if problem.kind == "teacher" else None
    if shard.is_read:
        words, pivots = [], []
        for span, _, own in head.chunks(None):
            part = of_parts.read(own.problem, own.operands, own.start, _cut(teacher, span))
            pivots.append(part.pivot)
            words.append(states.encode(own, part).view(len(states.names(problem)), -1))
        sent = torch.cat(words, 1).view(-1)
        whole, plan = rows.join(shard, plan, sent, torch.cat(pivots))
    else:
        whole, plan = rows.join(shard, plan, states.nothing(shard), None)
    return _looking_again(head, whole), plan, teacher


def _looking_again(head: ShardedHead, whole: Whole) -> Whole:
    """Add the stats that look at the logits once the state is known, for which they come again."""
    shard = head.shard
    names = rows.looking_again(shard.problem)
    found: dict[str, list[Any]] = {name: [] for name in names}
    for span, _, own in head.chunks(None) if names and shard.is_read else ():
        here = whole._replace(
            state=_cut(whole.state, span),
            pivot=whole.pivot[span],
            label_logit=None if whole.label_logit is None else whole.label_logit[span],
        )
        for name in names:
            found[name].append(rows.look_again(own, here, name))
    each = {name: torch.cat(own) for name, own in found.items() if own}
    return rows.with_second_looks(shard, whole, each)


def _cut(record: Any, span: slice) -> Any:
    """Return the rows of a chunk of what a named tuple holds of each row."""
    if record is None:
        return None
    return type(record)(*(a if a is None else a[span] for a in record))


class _Loss(torch.autograd.Function):
    """Puts what has been computed on the graph, as that of `rows` does."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Any,
        weight: Any,
        bias: Any,
        head: ShardedHead,
        of_parts: OfParts,
        names: tuple[str, ...],
        *tensors: Any,
    ) -> tuple[Any, ...]:
        count = len(names)
        saved = (input, weight, bias, *tensors[count:])
        ctx.save_for_backward(*saved)
        ctx.kinds = torch_memory.kinds(saved)
        ctx.head, ctx.of_parts, ctx.names = head, of_parts, names
        ctx.absent = (None,) * (3 + len(tensors))
        ctx.set_materialize_grads(False)
        return tuple(tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        given = [array for array in cotangents if array is not None]
        if not given:
            return None, None, None, *ctx.absent
        check_once(*given)
        passed = dict(zip(ctx.names, cotangents, strict=True))
        saved = ctx.saved_tensors
        torch_memory.check_returned(ctx.kinds, saved)
        hidden, weight, bias, target, class_weight, sample_weight, probability, *kept = saved
        counted, top, total, pivot, *state = kept
        operands = Operands(hidden, target, class_weight, sample_weight, None, None)
        operands = torch_rows.detach(operands._replace(target_probability=probability))
        call = replace(ctx.head.call, operands=operands, head=Head(weight.detach(), bias))
        flat = operands._replace(logits=call.hidden)
        head = replace(ctx.head, call=call, shard=replace(ctx.head.shard, operands=flat))
        whole = Whole(None, RowState(*state), pivot, None, None)
        teacher = None if top is None else TeacherState(top, total)
        of_rows = _Passed(passed["losses"], passed.get("lse"), passed.get("entropy"))
        sums = _gradients(
            *(head, ctx.of_parts, ctx.needs_input_grad, counted, whole, of_rows, teacher)
        )
        found = (
            None if a is None else a.to(like.dtype).view(like.shape)
            for a, like in zip(sums, (hidden, weight, bias), strict=True)
        )
        return *found, *ctx.absent


class _Passed(NamedTuple):
    """The gradients that flow into the rows' losses and stats, (rows, 1); None for 0."""

    losses: Any
    lse: Any
    entropy: Any


def _gradients(
    head: ShardedHead,
    of_parts: OfParts,
    wanted: Sequence[bool],
    counted: Any,
    whole: Whole,
    passed: _Passed,
    teacher: TeacherState | None,
) -> list[Any]:
    """Compute the gradients of hidden states, weight and bias, in the dtype of their sums."""
    call, shard = head.call, head.shard
    width, features = call.head.weight.shape
    shapes = ((call.chunks.total, features), (width, features), (1, width))
    make, like = PRODUCTS.empty, call.operands.logits
    sums = [
        make(shape, call.sum_dtype, like).zero_() if want else None
        for shape, want in zip(shapes, wanted, strict=False)
    ]
    of_hidden, of_weight, of_bias = sums
    scale = None
    if call.rounds_gradient:
        passed, scale = _normalized(passed, counted)
    weight = call.head.weight.to(call.whole.logits_dtype)
    for span, hidden, own in head.chunks(counted) if shard.is_read else ():
        losses, *of_stats = _cut(passed, span)
        grad = of_parts.gradient(
            *(own.problem, own.operands, own.start),
            whole._replace(state=_cut(whole.state, span), pivot=whole.pivot[span]),
            0.0 if losses is None else losses,
            StatsCotangents(*of_stats),
            _cut(teacher, span),
        ).to(call.whole.logits_dtype)
        if of_hidden is not None:
            PRODUCTS.add_product(grad, weight, of_hidden[span], True, None)
        if of_weight is not None:
            PRODUCTS.add_product(grad.T, hidden, of_weight, False, None)
        if of_bias is not None:
            of_bias += grad.sum(0, dtype=of_bias.dtype)
    if of_hidden is not None:
        if counted is not None:
            of_hidden = of_hidden.where(counted, 0.0)
        sums[0] = exchange.total(shard, of_hidden) if head.reduces else of_hidden
    return [a if a is None or scale is None else a * scale for a in sums]


def _normalized(passed: _Passed, counted: Any) -> tuple[_Passed, Any]:
    """Divide by the largest of them all, so that 16 bits hold the logits' gradient."""
    sizes = torch.cat([a.abs() for a in passed if a is not None], 1)
    if counted is not None:
        sizes = sizes.where(counted, 0.0)
    largest = sizes.max()
    largest = largest.where(largest.isfinite() & (largest > 0.0), 1.0)
    return _Passed(*(a if a is None else a / largest for a in passed)), largest
