"""One case of the conformance grid, and the memory layouts that its arrays can have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from .answers import exact_answer
from .dtypes import Array, is_float
from .oracle import Answer

STATS = ("lse", "entropy", "prediction", "correct", "top_probability", "brier", "rank")
"""What `return_stats` may name."""
USUAL_STATS = STATS[:4]
"""What it stands for as True."""
LAYOUTS = ("plain", "fortran", "strided", "reversed", "broadcast")


@dataclass(frozen=True, eq=False)
class Case:
    """One call of ``cross_entropy_with_grad``, with its exact answer.

    Attributes
    ----------
    name : str
        A readable identity, unique in the grid, without spaces.
    group : str
        The group of the grid that it belongs to.
    logits, target, weight : ndarray
        The arrays of the call; the target is labels, probabilities, the index of a `SparseTarget`
        or the logits of `TeacherLogits`. They are read-only: `arrange` makes the copies to pass.
    options : mapping
        Keyword arguments of the call that are not arrays: reduction, label_smoothing,
        ignore_index, axis, validate, normalizer as a number, z_loss, logit_scale, logit_softcap
        and return_stats; and teacher_scale, the scale of `TeacherLogits`.
    grad_output : ndarray, float or None
        The gradient that flows in.
    grad_lse, grad_entropy : ndarray or None
        The gradients that flow into the stats, `grad_stats` of the call.
    layout, target_layout : str
        The memory layouts in which logits and target are passed, see `arrange`.
    sample_weight, normalizer : ndarray
        More arrays of the call; the normalizer is 0-d.
    target_probability : ndarray
        The probability of a `SparseTarget`.
    """

    name: str
    group: str
    logits: Array
    target: Array
    weight: Array | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    grad_output: Array | float | None = None
    layout: str = "plain"
    target_layout: str = "plain"
    sample_weight: Array | None = None
    normalizer: Array | None = None
    grad_lse: Array | None = None
    grad_entropy: Array | None = None
    target_probability: Array | None = None

    def __post_init__(self) -> None:
        """Make the arrays read-only, since cases share them."""
        for array in self.arrays.values():
            array.flags.writeable = False

    @property
    def arrays(self) -> dict[str, Array]:
        """Return the arrays of the call by the names of their arguments, without absent ones.

        Those of `grad_stats` are `grad_lse` and `grad_entropy`.
        """
        candidates = {
            "input": self.logits,
            "target": self.target,
            "weight": self.weight,
            "sample_weight": self.sample_weight,
            "normalizer": self.normalizer,
            "grad_output": self.grad_output,
            "grad_lse": self.grad_lse,
            "grad_entropy": self.grad_entropy,
            "target_probability": self.target_probability,
        }
        return {name: a for name, a in candidates.items() if isinstance(a, np.ndarray)}

    @property
    def kind(self) -> str:
        """Return what the target holds: "index", "probability", "sparse" or "teacher"."""
        if self.target_probability is not None:
            return "sparse"
        if "teacher_scale" in self.options:
            return "teacher"
        return "probability" if is_float(self.target) else "index"

    @property
    def asks_for_stats(self) -> bool:
        """Tell whether the call returns stats at all."""
        return self.options.get("return_stats", False) is not False

    @property
    def stats_names(self) -> tuple[str, ...]:
        """Return the names of the stats that the call asks for."""
        asked = self.options.get("return_stats", False)
        if isinstance(asked, bool):
            return USUAL_STATS if asked else ()
        return (asked,) if isinstance(asked, str) else tuple(asked)

    @property
    def has_grad_stats(self) -> bool:
        """Tell whether a gradient flows into a stat."""
        return self.grad_lse is not None or self.grad_entropy is not None

    @property
    def shape_key(self) -> str:
        """Return the shapes and dtypes of the call; a compiler compiles once for each of these."""
        return " ".join(
            f"{name}:{'x'.join(map(str, a.shape))}:{a.dtype.name}"
            for name, a in self.arrays.items()
        )

    @cached_property
    def answer(self) -> Answer:
        """Return the exact answer, computed when first asked for."""
        given: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                *("sample_weight", "normalizer", "grad_lse", "grad_entropy"),
                "target_probability",
            )
        }
        given |= {k: v for k, v in self.options.items() if k not in ("validate", "return_stats")}
        return exact_answer(
            self.logits, self.target, self.weight, grad_output=self.grad_output, **given
        )

    def __str__(self) -> str:
        """Return the case's name."""
        return self.name


def arrange(array: Array, layout: str = "plain") -> Array:
    """Return a fresh copy of an array, in the given memory layout.

    Parameters
    ----------
    array : ndarray
        The values.
    layout : str
        "plain" (C order); "fortran" (the first axis is contiguous); "strided" (every second
        element along the last axis of an array twice as long, with nonsense in between);
        "reversed" (negative strides along every axis); "broadcast" (stride 0 along the first
        axis, along which all values have to be the same; read-only as `numpy.broadcast_to`
        makes it).

    Returns
    -------
    ndarray
        The same values, in memory of their own.
    """
    if layout == "plain" or array.ndim == 0:
        return array.copy()
    if layout == "fortran":
        return array.copy(order="F")
    if layout == "strided":
        nonsense = np.nan if is_float(array) else 99
        wide = np.full((*array.shape[:-1], 2 * array.shape[-1]), nonsense, dtype=array.dtype)
        wide[..., ::2] = array
        return wide[..., ::2]
    if layout == "reversed":
        flip = (slice(None, None, -1),) * array.ndim
        return array[flip].copy()[flip]
    if layout == "broadcast":
        if not (array == array[:1]).all():
            raise ValueError("layout broadcast needs the same values along the first axis")
        return np.broadcast_to(array[:1].copy(), array.shape)
    raise ValueError(f"unknown layout {layout!r}; there are {', '.join(LAYOUTS)}")
