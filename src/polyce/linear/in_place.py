"""Chunk after chunk in one buffer, for libraries whose arrays can be written.

A chunk's logits are overwritten by their gradient. Then, one block of classes after the other, the
gradient is multiplied back, and the next chunk's logits take its place: so a block of the weight is
read from memory once for each chunk, not twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np

from polyce.call.problem import Operands
from polyce.linear.call import Gradients, HeadCall
from polyce.linear.memory import Products, of_arrays


def _of_torch() -> Products:
    from polyce.linear import torch_memory

    return torch_memory.PRODUCTS


def _of_cupy() -> Products:
    import cupy

    return of_arrays(cupy)


PRODUCTS: dict[str, Callable[[], Products]] = {
    "numpy": lambda: of_arrays(np),
    "torch": _of_torch,
    "cupy": _of_cupy,
}
"""The products of each library that this is for."""


class _Chunk(NamedTuple):
    """The rows of one chunk."""

    places: Any
    """Where the rows are among all rows: a slice, or row numbers."""
    hidden: Any
    operands: Operands
    """What the losses depend on besides the logits."""


def run(call: HeadCall, wanted: Gradients, cotangent: Any) -> tuple[Any, Gradients]:
    """Compute the losses of all rows, and the gradients wanted, in the dtype of their sums.

    `cotangent`, (rows,), is the gradient with respect to the rows' losses; None for 1.
    """
    own = PRODUCTS[call.whole.backend]()
    whole, cut, classes = call.whole, call.chunks, call.whole.classes
    implementation = call.implementation
    hidden, features = call.hidden, call.features

    def empty(shape: tuple[int, ...], dtype: Any = call.sum_dtype) -> Any:
        return own.empty(shape, dtype, hidden)

    kept = _kept(call, own)
    total = cut.total if kept is None else int(kept.shape[0])
    rows = empty((cut.total,), whole.row_dtype)
    shapes = Gradients((cut.total, features), (classes, features), (classes,))
    found = Gradients(
        *(empty(shape) if want else None for shape, want in zip(shapes, wanted, strict=True))
    )
    if kept is not None or not total or not classes:
        for array in (rows, *found):
            if array is not None:
                array[...] = 0.0
    of_input = None
    if wanted.input and cut.by_class:
        of_input = empty((features, cut.rows)).T
    elif wanted.input and kept is not None:
        of_input = empty((cut.rows, features))
    back = _Back(
        own,
        wanted,
        found,
        of_input=of_input,
        ones=empty((1, cut.rows), whole.logits_dtype) if wanted.linear_bias else None,
        scratch=(
            empty((max(cut.rows, cut.classes) * max(features, 1),))
            if own.has_scratch and any(wanted) and (cut.count > 1 or cut.classes < classes)
            else None
        ),
    )
    if back.ones is not None:
        back.ones[...] = 1.0
    buffer = empty((cut.rows * classes,), whole.logits_dtype)
    bias = call.head.bias
    bias = bias if bias is None else whole.library.cast(bias, whole.logits_dtype)

    def logits(chunk: _Chunk) -> Any:
        count = chunk.hidden.shape[0]
        flat = buffer[: count * classes]
        return flat.reshape((classes, count)).T if cut.by_class else flat.reshape((count, classes))

    chunks = _chunks(call, own, kept, cut.spans(total), cotangent)
    for number, (chunk, ahead) in enumerate(pairwise(chain((None,), chunks, (None,)))):
        grad = None
        if chunk is not None:
            part = call.part(chunk.hidden.shape[0])
            operands = chunk.operands._replace(logits=logits(chunk))
            if any(wanted):
                rows[chunk.places], grad, _ = implementation.cross_entropy_with_grad(
                    part, operands, operands.logits
                )
            else:
                rows[chunk.places], _ = implementation.cross_entropy(part, operands)
        if grad is None and ahead is None:
            continue
        for block in cut.blocks(classes):
            weight = whole.library.cast(call.head.weight[block], whole.logits_dtype)
            if grad is not None and chunk is not None:
                back.add(chunk, grad[:, block], weight, block, first=number == 1)
            if ahead is not None:
                part_bias = None if bias is None else bias[block]
                own.multiply(ahead.hidden, weight.T, part_bias, logits(ahead)[:, block])
        if chunk is not None and grad is not None:
            back.place(chunk)
    return rows, found


class _Back(NamedTuple):
    """The products that lead back from a chunk's gradient, and where they go."""

    own: Products
    wanted: Gradients
    found: Gradients
    of_input: Any
    """Memory for one chunk, if its rows are scattered, or laid out otherwise, in the whole."""
    ones: Any
    scratch: Any

    def add(self, chunk: _Chunk, grad: Any, weight: Any, block: slice, *, first: bool) -> None:
        """Multiply the gradient of a block of classes, and add the products up."""
        add, count, grad = self.own.add_product, chunk.hidden.shape[0], self.own.packed(grad)
        if self.wanted.input:
            add(grad, weight, self._input(chunk), block.start == 0, self.scratch)
        if self.wanted.linear_weight:
            add(grad.T, chunk.hidden, self.found.linear_weight[block], first, self.scratch)
        if self.wanted.linear_bias:
            ones = self.ones[:, :count]
            add(ones, grad, self.found.linear_bias[None, block], first, self.scratch)

    def place(self, chunk: _Chunk) -> None:
        """Put the gradient of a chunk's hidden states where it belongs."""
        if self.of_input is not None:
            self.found.input[chunk.places] = self._input(chunk)

    def _input(self, chunk: _Chunk) -> Any:
        if self.of_input is None:
            return self.found.input[chunk.places]
        return self.of_input[: chunk.hidden.shape[0]]


def _kept(call: HeadCall, own: Products) -> Any:
    """Return the numbers of the rows that count; None if all do, or if looking would wait."""
    counted = call.counted
    if counted is None or not call.whole.library.is_at_hand(counted):
        return None
    kept = own.nonzero(counted)
    return None if kept.shape[0] == counted.shape[0] else kept


def _chunks(
    call: HeadCall, own: Products, kept: Any, spans: list[slice], cotangent: Any
) -> Iterator[_Chunk]:
    whole, hidden, target = call.whole, call.hidden, call.target
    sample_weight = call.sample_weight
    # A mask on an accelerator is not looked at, but 0 times an infinity would be nan.
    counted = None if kept is not None else call.counted
    for span in spans:
        places = span if kept is None else kept[span]
        states = whole.library.cast(hidden[places], whole.logits_dtype)
        if counted is not None:
            states = whole.xp.where(counted[places][:, None], states, 0.0)
        states = own.packed(states)
        yield _Chunk(
            places,
            states,
            Operands(
                logits=None,
                target=target[places],
                weight=call.operands.weight,
                sample_weight=None if sample_weight is None else sample_weight[places],
                normalizer=None,
                grad_output=None if cotangent is None else cotangent[places],
            ),
        )
