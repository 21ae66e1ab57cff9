"""Chunk after chunk in one buffer, for libraries whose arrays can be written.

A chunk's logits are overwritten by their gradient. Then, one block of classes after the other, the
gradient is multiplied back, and the next chunk's logits take its place: so a block of the weight is
read from memory once for each chunk, not twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from polyce.arrays.library import Library
from polyce.call.problem import Head, Operands
from polyce.formula import stats
from polyce.formula.stats import Stats
from polyce.linear.call import Gradients, HeadCall
from polyce.linear.chunks import Chunks
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
    """What the losses depend on besides the logits; the hidden states of a teacher's head."""


def run(
    call: HeadCall, wanted: Gradients, cotangents: Mapping[str, Any]
) -> tuple[Any, Gradients, Stats | None]:
    """Compute the losses of all rows, the gradients wanted, in the dtype of their sums, and stats.

    `cotangents` are those that `HeadCall.cotangents` returns.
    """
    own = PRODUCTS[call.whole.backend]()
    whole, cut, classes = call.whole, call.chunks, call.whole.classes
    implementation = call.implementation
    kept = _kept(call, own)
    total = cut.total if kept is None else int(kept.shape[0])
    rows, found, of_rows = _results(call, own, wanted)
    if kept is not None or not total or not classes:
        for array in (rows, *found):
            if array is not None:
                array[...] = 0.0
        for array in of_rows or ():
            if array is not None:
                array[...] = stats.left_out(whole, array.dtype)
    back = _back(call, own, wanted, found, scattered=kept is not None)
    logits = _logits(call, own, call.head, whole.logits_dtype)
    teacher = None
    if call.teacher is not None:
        teacher = _logits(call, own, call.teacher, whole.teacher_dtype)

    def losses(chunk: _Chunk) -> Any:
        """Compute a chunk's losses; write their gradient over the logits and return it."""
        part = call.part(chunk.hidden.shape[0])
        operands = chunk.operands._replace(logits=logits.of(chunk.hidden))
        if teacher is not None:
            operands = operands._replace(target=teacher.of(operands.target))
        if any(wanted):
            rows[chunk.places], grad, reported = implementation.cross_entropy_with_grad(
                part, operands, operands.logits
            )
        else:
            rows[chunk.places], reported = implementation.cross_entropy(part, operands)
            grad = None
        for array, values in zip(of_rows or (), reported or (), strict=True):
            if array is not None:
                array[chunk.places] = values
        return grad

    chunks = _chunks(call, own, kept, cut.spans(total), cotangents)
    ahead = next(chunks, None)
    if ahead is not None:
        logits.fill(ahead.hidden)
    is_first = True
    while ahead is not None:
        chunk, ahead = ahead, next(chunks, None)
        if teacher is not None:
            teacher.fill(chunk.operands.target)
        grad = losses(chunk)
        if grad is not None or ahead is not None:
            for block, weight in logits.blocks():
                if grad is not None:
                    back.add(chunk, grad[:, block], weight, block, first=is_first)
                if ahead is not None:
                    logits.fill_block(ahead.hidden, weight, block)
        if grad is not None and classes:
            back.place(chunk)
        is_first = False
    return rows, found, of_rows


def _results(
    call: HeadCall, own: Products, wanted: Gradients
) -> tuple[Any, Gradients, Stats | None]:
    """Return memory for the rows' losses, for the gradients wanted, and for the stats."""
    hidden, total = call.hidden, call.chunks.total
    classes, features = call.whole.classes, call.features
    shapes = Gradients((total, features), (classes, features), (classes,))
    rows = own.empty((total,), call.whole.row_dtype, hidden)
    found = Gradients(
        *(
            own.empty(shape, call.sum_dtype, hidden) if want else None
            for shape, want in zip(shapes, wanted, strict=True)
        )
    )
    flat = call.whole._replace(row_shape=(total,))
    return rows, found, stats.unfilled(flat, lambda shape, dtype: own.empty(shape, dtype, hidden))


class _Logits(NamedTuple):
    """The logits of one chunk after the other, in the same memory."""

    own: Products
    library: Library
    cut: Chunks
    head: Head
    """Its bias in the dtype of the logits."""
    buffer: Any

    def of(self, hidden: Any) -> Any:
        """Return the logits of a chunk, whose hidden states are given, (rows, classes)."""
        count, classes = hidden.shape[0], self.head.weight.shape[0]
        flat = self.buffer[: count * classes]
        if self.cut.by_class:
            return flat.reshape((classes, count)).T
        return flat.reshape((count, classes))

    def blocks(self) -> Iterator[tuple[slice, Any]]:
        """Return each block of classes, and the head's weight for it."""
        for block in self.cut.blocks(self.head.weight.shape[0]):
            yield block, self.library.cast(self.head.weight[block], self.buffer.dtype)

    def fill(self, hidden: Any) -> None:
        """Write a chunk's logits."""
        for block, weight in self.blocks():
            self.fill_block(hidden, weight, block)

    def fill_block(self, hidden: Any, weight: Any, block: slice) -> None:
        """Write a chunk's logits of a block of classes, whose weight is given."""
        bias = None if self.head.bias is None else self.head.bias[block]
        self.own.multiply(hidden, weight.T, bias, self.of(hidden)[:, block])


def _logits(call: HeadCall, own: Products, head: Head, dtype: Any) -> _Logits:
    """Return memory for the logits of a head, the student's or a teacher's."""
    library, cut, bias = call.whole.library, call.chunks, head.bias
    buffer = own.empty((cut.rows * call.whole.classes,), dtype, call.hidden)
    bias = bias if bias is None else library.cast(bias, dtype)
    return _Logits(own, library, cut, Head(head.weight, bias), buffer)


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


def _back(
    call: HeadCall, own: Products, wanted: Gradients, found: Gradients, *, scattered: bool
) -> _Back:
    """Return the products for `found`; `scattered` says whether a chunk's rows lie apart there."""
    whole, cut, hidden, features = call.whole, call.chunks, call.hidden, call.features
    of_input = ones = scratch = None
    if wanted.input and cut.by_class:
        of_input = own.empty((features, cut.rows), call.sum_dtype, hidden).T
    elif wanted.input and scattered:
        of_input = own.empty((cut.rows, features), call.sum_dtype, hidden)
    if wanted.linear_bias:
        ones = own.empty((1, cut.rows), whole.logits_dtype, hidden)
        ones[...] = 1.0
    if own.has_scratch and any(wanted) and (cut.count > 1 or cut.classes < whole.classes):
        size = max(cut.rows, cut.classes) * max(features, 1)
        scratch = own.empty((size,), call.sum_dtype, hidden)
    return _Back(own, wanted, found, of_input, ones, scratch)


def _kept(call: HeadCall, own: Products) -> Any:
    """Return the numbers of the rows that count; None if all do, or if looking would wait."""
    counted = call.counted
    if counted is None or not call.whole.library.is_at_hand(counted):
        return None
    kept = own.nonzero(counted)
    return None if kept.shape[0] == counted.shape[0] else kept


def _chunks(
    call: HeadCall, own: Products, kept: Any, spans: list[slice], cotangents: Mapping[str, Any]
) -> Iterator[_Chunk]:
    whole, of_rows = call.whole, call.of_rows(cotangents)
    hidden, *others = of_rows
    # A mask on an accelerator is not looked at, but 0 times an infinity would be nan.
    counted = None if kept is not None else call.counted
    for span in spans:
        places = span if kept is None else kept[span]
        states = whole.library.cast(hidden[places], whole.logits_dtype)
        if counted is not None:
            states = whole.xp.where(counted[places][:, None], states, 0.0)
        states = own.packed(states)
        own_rows = (None if array is None else array[places] for array in others)
        operands = Operands(None, *own_rows)._replace(weight=call.operands.weight)
        if call.teacher is not None:
            target = whole.library.cast(operands.target, whole.teacher_dtype)
            operands = operands._replace(target=own.packed(target))
        yield _Chunk(places, states, operands)
