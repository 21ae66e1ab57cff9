"""The options of a call other than arrays: one record, the checks, torch's deprecated ones."""

from __future__ import annotations

import inspect
import math
import numbers
import operator
import warnings
from typing import Any, NamedTuple

REDUCTIONS = ("none", "mean", "sum")
# The limits of logit_scale and logit_softcap, whatever the dtype: their quotient, and all that the
# formula computes from both, stays well within float32.
SMALLEST, LARGEST = 1e-15, 1e15
STATS = ("lse", "entropy", "prediction", "correct", "top_probability", "brier", "rank")
USUAL_STATS = STATS[:4]
"""What return_stats=True stands for: every path has these, for every kind of target."""
BESIDE_TARGET = STATS[4:]
STATS_WITH_GRADIENT = ("lse", "entropy")


class Options(NamedTuple):
    """The options of a call: as given, or as `checked` returns them."""

    axis: int | None = None
    """The class axis as given; a problem counts it from the front."""
    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    logit_scale: float | None = None
    """None for no scale; a checked 1 is None as well."""
    logit_softcap: float | None = None
    stats: Any = False
    """return_stats as given; once checked, the names that are asked for, or None."""
    validate: bool | None = None

    @classmethod
    def taken_from(cls, given: dict[str, Any]) -> Options:
        """Take the options out of a call's arguments by name."""
        names = {name: "return_stats" if name == "stats" else name for name in cls._fields}
        return cls(**{own: given.pop(name) for own, name in names.items() if name in given})

    def checked(self) -> Options:
        """Check each option and return it in its one form."""
        check_reduction(self.reduction)
        scale = check_positive("logit_scale", self.logit_scale)
        return Options(
            axis=self.axis,
            ignore_index=check_ignore_index(self.ignore_index),
            reduction=self.reduction,
            label_smoothing=check_smoothing(self.label_smoothing),
            z_loss=check_z_loss(self.z_loss),
            logit_scale=None if scale == 1.0 else scale,
            logit_softcap=check_positive("logit_softcap", self.logit_softcap),
            stats=check_stats(self.stats),
            validate=check_validate(self.validate),
        )

    @property
    def used(self) -> tuple[str, ...]:
        """Return the names of the options in use that an implementation may lack."""
        on = {
            "label_smoothing": self.label_smoothing > 0.0,
            "z_loss": self.z_loss > 0.0,
            "logit_scale": self.logit_scale is not None,
            "logit_softcap": self.logit_softcap is not None,
            "return_stats": self.stats is not None,
        }
        return tuple(name for name, is_on in on.items() if is_on)


def check_reduction(reduction: object) -> None:
    """Refuse an unknown reduction."""
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(
            f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}; pass one of the three"
        )


def current_reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """Return the reduction, which torch's deprecated pair size_average and reduce overrides."""
    if size_average is None and reduce is None:
        if reduction == "elementwise_mean":
            warnings.warn(
                "reduction='elementwise_mean' is deprecated. Please use reduction='mean' instead.",
                UserWarning,
                stacklevel=3,
            )
            return "mean"
        return reduction
    if reduce is not None and not reduce:
        reduction = "none"
    elif size_average is not None and not size_average:
        reduction = "sum"
    else:
        reduction = "mean"
    warnings.warn(
        "size_average and reduce args will be deprecated, please use "
        f"reduction='{reduction}' instead.",
        UserWarning,
        stacklevel=3,
    )
    return reduction


def shown(kept: Any, kind: type) -> str:
    """Show the constructor arguments that an object keeps and that are not at their default."""
    found = []
    for name, parameter in inspect.signature(kind).parameters.items():
        # Not kept, so not shown: torch's deprecated pair and a head's shape.
        value = getattr(kept, name, parameter.default)
        if hasattr(value, "shape"):
            found.append(f"{name} of shape {tuple(value.shape)}")
        elif repr(value) != repr(parameter.default):
            found.append(f"{name}={value!r}")
    return ", ".join(found)


def refuse_dim() -> TypeError:
    """Return the error that says what torch's `dim` is called here."""
    return TypeError("dim is not an argument, the class axis is axis=; pass axis instead")


def class_axis(shape: tuple[int, ...], axis: int | None) -> int:
    """Count the class axis from the front; None means torch's: 1, or 0 for one dimension."""
    if not shape:
        raise ValueError(
            "input must have at least one axis, the classes, got a 0-d array; "
            "pass shape (C,), (N, C) or (N, C, d1, ..., dK)"
        )
    if axis is None:
        return min(1, len(shape) - 1)
    if isinstance(axis, bool) or not isinstance(axis, numbers.Integral):
        raise TypeError(f"axis must be an integer or None, got {axis!r}; name the class axis")
    position = operator.index(axis)
    if not -len(shape) <= position < len(shape):
        raise ValueError(
            f"axis must lie within the {len(shape)} axes of input of shape {shape}, got {axis}; "
            f"use {-len(shape)} to {len(shape) - 1}"
        )
    return position % len(shape)


def check_ignore_index(ignore_index: Any) -> int:
    """Refuse an ignore_index that is not an integer."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, numbers.Integral):
        raise TypeError(
            f"ignore_index must be an integer, got {ignore_index!r}; "
            "leave it at -100 to ignore no class"
        )
    return int(ignore_index)


def check_has_effect(ignore_index: int, kind: str) -> None:
    """Refuse a non-negative ignore_index where the target holds no classes."""
    if kind in ("probability", "teacher") and ignore_index >= 0:
        held = "class probabilities" if kind == "probability" else "a teacher's logits"
        raise ValueError(
            f"ignore_index is for class indices, got {ignore_index} with a target of {held}; "
            "leave it negative"
        )


_COMPARED = {
    "rank": {"index": "class indices"},
    "brier": {"index": "class indices", "probability": "class probabilities"},
}
"""The stats that compare a row with its target, and the kinds of target that they are for."""
_KINDS = {
    "probability": "class probabilities",
    "sparse": "a SparseTarget",
    "teacher": "TeacherLogits",
}


def check_have_meaning(stats: tuple[str, ...] | None, kind: str) -> None:
    """Refuse stats that compare a row with another kind of target than they are for."""
    for name in stats or ():
        served = _COMPARED.get(name)
        if served is not None and kind not in served:
            raise ValueError(
                f"return_stats has {name!r} for {' and '.join(served.values())} only, got a target "
                f"of {_KINDS[kind]}; leave the name out"
            )


def check_smoothing(label_smoothing: Any) -> float:
    """Refuse a label_smoothing outside 0 to 1."""
    if not isinstance(label_smoothing, numbers.Real):
        raise TypeError(
            f"label_smoothing must be a real number, got {type(label_smoothing).__qualname__}; "
            "pass a Python float"
        )
    value = float(label_smoothing)
    if not 0.0 <= value <= 1.0:
        raise ValueError(
            f"label_smoothing must lie between 0 and 1, got {label_smoothing}; "
            "0 turns smoothing off"
        )
    return value


def check_z_loss(z_loss: Any) -> float:
    """Refuse a z_loss that is negative or not a finite number."""
    value = _real("z_loss", z_loss, "pass a Python float; 0 turns it off")
    if not 0.0 <= value < math.inf:
        raise ValueError(f"z_loss must be finite and at least 0, got {z_loss}; 0 turns it off")
    return value


def check_positive(name: str, option: Any) -> float | None:
    """Refuse a logit_scale or logit_softcap out of range; None turns it off."""
    if option is None:
        return None
    value = _real(name, option, "a scale that is learned multiplies the logits before the call")
    if not SMALLEST <= value <= LARGEST:
        raise ValueError(f"{name} must lie between 1e-15 and 1e15, got {option}; None turns it off")
    return value


def _real(name: str, option: Any, advice: str) -> float:
    if type(option) is float:
        return option
    if isinstance(option, bool) or not isinstance(option, numbers.Real):
        raise TypeError(f"{name} must be a real number, got {type(option).__qualname__}; {advice}")
    return float(option)


def check_validate(validate: Any) -> bool | None:
    """Refuse a validate that is neither a bool nor None."""
    if validate is not None and not isinstance(validate, bool):
        raise TypeError(f"validate must be True, False or None, got {validate!r}; None is usual")
    return validate


def check_stats(return_stats: Any) -> tuple[str, ...] | None:
    """Read what to report of each row: True for the usual, else names; None here for False."""
    if isinstance(return_stats, bool):
        return USUAL_STATS if return_stats else None
    names = (return_stats,) if isinstance(return_stats, str) else return_stats
    if not isinstance(names, (tuple, list)):
        raise TypeError(
            f"return_stats must be True, False or a tuple of names, got {return_stats!r}; "
            f"there are {', '.join(STATS)}"
        )
    for name in names:
        if name not in STATS:
            raise ValueError(
                f"return_stats takes the names {', '.join(STATS)}, got {name!r}; "
                "leave it out or correct it"
            )
    return tuple(names)
