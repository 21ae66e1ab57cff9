"""One call on a linear head: its problem, how it is cut, and what computes a chunk's losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from polyce.arrays import dtypes
from polyce.call.options import Options
from polyce.call.problem import Head, Operands, Problem, describe_anew
from polyce.formula import targets
from polyce.formula.stats import Stats
from polyce.implementations import registry
from polyce.implementations.contract import Implementation
from polyce.linear import chunks
from polyce.linear.chunks import Chunks


class Gradients(NamedTuple):
    """One entry each for the hidden states, the head's weight and its bias."""

    input: Any
    linear_weight: Any
    linear_bias: Any


NONE = Gradients(False, False, False)


@dataclass(frozen=True)
class HeadCall:
    """One call on a linear head, with its rows in one axis."""

    whole: Problem
    """The problem of all logits, in the shape of the call."""
    operands: Operands
    """As given, with `input` in place of the logits."""
    head: Head
    chunk_size: int | None
    """Rows of a chunk, if the caller chooses."""
    name: str | None
    """Name of the implementation, if the caller chooses."""
    plan: Any = None
    """What the target means, a `targets.Plan`, once `planned` has read it."""

    @property
    def chunks(self) -> Chunks:
        """Return how the rows are cut."""
        return chunks.choose(self.whole, self.features, self.chunk_size)

    @property
    def implementation(self) -> Implementation:
        """Return the implementation for the losses of a chunk's logits and their gradient."""
        return registry.select(self.part(self.chunks.rows), self.name)

    def planned(self) -> HeadCall:
        """Read the target; raises IndexError for a bad label where labels are checked."""
        # Of a sparse target all is read: it is small, and may hold a bad label.
        read = targets.plan if self.whole.kind == "sparse" else targets.plan_rows
        return replace(self, plan=read(self.whole, self.operands))

    def detached(self, detach: Callable[..., Any]) -> HeadCall:
        """Return the call with its arrays cut from any graph."""
        return replace(self, operands=detach(self.operands), head=detach(self.head))

    def without_arrays(self) -> HeadCall:
        """Return the call without its arrays, with the name of its implementation."""
        name = self.implementation.name
        nothing = Operands(*(None,) * 6)
        return replace(self, operands=nothing, head=Head(None), name=name, plan=None)

    @property
    def hidden(self) -> Any:
        """Return the hidden states, (rows, features)."""
        return self._flat(self.operands.logits, self.features)

    @property
    def target(self) -> Any:
        """Return the labels, (rows,), or what else the target holds, (rows, any number)."""
        target = self.operands.target
        return self._flat(target, *(() if self.whole.kind == "index" else target.shape[-1:]))

    @property
    def teacher(self) -> Head | None:
        """Return the teacher's head; None if the target is something else."""
        weight, bias = self.operands.teacher_weight, self.operands.teacher_bias
        return None if weight is None else Head(weight, bias)

    @property
    def sample_weight(self) -> Any:
        """Return the sample weights, (rows,), or None."""
        weight = self.operands.sample_weight
        return weight if weight is None else self._flat(weight)

    @property
    def features(self) -> int:
        """Return F, the length of a hidden state."""
        return self.operands.logits.shape[-1]

    @property
    def sum_dtype(self) -> Any:
        """Return the dtype that gradients are summed in: float64 for float64, else float32."""
        name = "float64" if dtypes.name_of(self.whole.logits_dtype) == "float64" else "float32"
        return self.whole.library.float_dtype(name)

    @property
    def rounds_gradient(self) -> bool:
        """Tell whether the gradient of the logits is held in 16 bits, for 16-bit products."""
        dtype = self.whole.logits_dtype
        if self.whole.library.rounds_gradients:
            dtype = self.operands.logits.dtype
        return dtypes.name_of(dtype) in ("float16", "bfloat16")

    def product_options(self, factor: Any) -> Mapping[str, Any]:
        """Return the options of the library's matrix product, given a factor as it came."""
        is_narrow = dtypes.dtype_name(factor) in ("float16", "bfloat16")
        return {} if is_narrow else self.whole.library.exact_products

    @property
    def scales_sums(self) -> bool:
        """Tell whether a factor of the gradients is applied after they are summed."""
        return self.rounds_gradient and self.whole.options.reduction != "none"

    def _flat(self, array: Any, *rest: int) -> Any:
        shape = (math.prod(self.whole.row_shape), *rest)
        return array if array.ndim == len(shape) else self.whole.xp.reshape(array, shape)

    @property
    def counted(self) -> Any:
        """Return which rows count, (rows,), or None if all do."""
        counted = self.plan.counted
        return counted if counted is None else self._flat(counted[..., 0])

    def of_rows(self, cotangents: Mapping[str, Any]) -> Operands:
        """Return the operands that are cut with the rows, all rows in one axis.

        Hidden states stand in the logits' place, those of a teacher's head in its logits'.
        """
        operands = Operands(self.hidden, self.target, None, self.sample_weight, None, None)
        probability = self.operands.target_probability
        if probability is not None:
            probability = self._flat(probability, self.whole.entries)
        return operands._replace(target_probability=probability, **cotangents)

    def cotangents(self) -> tuple[dict[str, Any], Any]:
        """Compute the gradients by each row's loss and stats, and a factor still to be applied.

        The gradients are (rows,), in the row dtype, by the names of their operands; that of the
        losses is left out for 1. The factor is None for 1. A gradient of logits that is held in
        16 bits is not scaled by the mean's denominator, since small entries would become 0: that
        belongs to the factor. With stats, so does the size of all the gradients given here.
        """
        if self.scales_sums and not self.whole.grad_stats:
            return {}, self._scale_of_sums()
        scale = targets.cotangent(self.whole, self.plan, self.operands.grad_output)
        if not isinstance(scale, float) and scale.ndim:
            scale = self._flat(scale[..., 0])
        found = {"grad_output": scale + self._zeros()}
        for name in self.names_of_cotangents[1:]:
            own = self.whole.library.cast(getattr(self.operands, name), self.whole.row_dtype)
            found[name] = self._flat(own)
        return self._normalized(found) if self.scales_sums else (found, None)

    @property
    def names_of_cotangents(self) -> tuple[str, ...]:
        """Return the names of the operands that are gradients by losses and by stats."""
        return ("grad_output", *(f"grad_{name}" for name in self.whole.grad_stats))

    def _normalized(self, cotangents: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """Divide cotangents by the largest of all, and return that number too."""
        xp, counted = self.whole.xp, self.counted
        if not self.chunks.total:
            return cotangents, 1.0
        sizes = [abs(array) for array in cotangents.values()]
        if counted is not None:
            sizes = [xp.where(counted, size, 0.0) for size in sizes]
        largest = xp.max(xp.stack(sizes))
        largest = xp.where(xp.isfinite(largest) & (largest > 0.0), largest, 1.0)
        return {name: array / largest for name, array in cotangents.items()}, largest

    def _scale_of_sums(self) -> Any:
        """Compute the gradient of the result by each row's loss, as one number for all rows.

        It is 0 if no row counts or there are no classes, although the mean over nothing divides
        by 0.
        """
        xp, counted = self.whole.xp, self.plan.counted
        if self.whole.is_empty:
            return 0.0
        scale = targets.cotangent(self.whole, self.plan, self.operands.grad_output)
        if counted is None:
            return scale
        nothing = xp.sum(self._zeros())
        return xp.where(xp.any(counted), nothing + scale, nothing)

    def _zeros(self) -> Any:
        """Return a 0 for each row, (rows,), on the device of the call's arrays."""
        xp = self.whole.xp
        zeros = xp.sum(xp.zeros_like(self.hidden[:, : min(self.features, 1)]), axis=1)
        return self.whole.library.cast(zeros, self.whole.row_dtype)

    def part(self, rows: int) -> Problem:
        """Return the problem of a chunk's logits, whose rows are not checked again nor reduced."""
        return self.whole._replace(
            shape=(rows, self.whole.classes),
            axis=1,
            row_shape=(rows,),
            options=self.whole.options._replace(reduction="none"),
            check_labels=False,
            normalized=False,
            result_dtype=self.whole.row_dtype,
            is_compiling=False,
        )

    def reduce(self, rows: Any) -> Any:
        """Reduce the losses of all rows, (rows,), to the call's result."""
        rows = self.whole.xp.reshape(rows, (*self.whole.row_shape, 1))
        return targets.reduce(self.whole, self.plan, rows)

    def shaped(self, stats: Stats | None) -> Stats | None:
        """Return the stats of all rows, (rows,) each, in the shape of the call's rows."""
        if stats is None:
            return None
        xp, shape = self.whole.xp, self.whole.row_shape
        return Stats(*(array if array is None else xp.reshape(array, shape) for array in stats))


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
    grad_output: Any = None,
    grad_stats: Any = None,
) -> HeadCall:
    """Check the arguments of a call on a linear head, and describe it."""
    size = chunks.check_chunk_size(chunk_size)
    whole, operands, head = describe_anew(
        Head(linear_weight, linear_bias),
        input,
        target,
        weight,
        sample_weight,
        normalizer,
        options,
        grad_output=grad_output,
        grad_stats=grad_stats,
    )
    return HeadCall(whole, operands, head, size, implementation)


def without_gradient(kind: str, operands: Operands) -> dict[str, Any]:
    """Return what a head's loss has no gradient of, or its tangents, by the caller's names."""
    of_target = {"target": operands.target}
    if kind == "sparse":
        of_target = {"target.probability": operands.target_probability}
    elif operands.teacher_weight is not None:
        of_target = {
            "target.input": operands.target,
            "target.linear_weight": operands.teacher_weight,
            "target.linear_bias": operands.teacher_bias,
        }
    elif kind == "teacher":
        of_target = {"target.logits": operands.target}
    return {**of_target, "weight": operands.weight, "sample_weight": operands.sample_weight}


def taking_stats(name: str | None) -> str | None:
    """Return the name of the path for cotangents of stats, where this one computed the loss."""
    takes = name is None or registry.find(name).takes_grad_stats
    return name if takes else "reference"


def check_wrt(wrt: Any) -> Gradients:
    """Read which gradients are wanted from their names."""
    names = (wrt,) if isinstance(wrt, str) else wrt
    if not isinstance(names, Sequence):
        raise TypeError(
            f"wrt must be a tuple of names, got {wrt!r}; there are {', '.join(Gradients._fields)}"
        )
    for name in names:
        if name not in Gradients._fields:
            raise ValueError(
                f"wrt takes the names {', '.join(Gradients._fields)}, got {name!r}; leave it out "
                "or correct it"
            )
    return Gradients(*(name in names for name in Gradients._fields))
