"""Calls that fail and what their errors say: the records that the error tests are made of."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest

import polyce
from polyce.testing.backends import Backend


def of_class(loss: Any, *arrays: Any, **options: Any) -> Any:
    """Pass what belongs to a batch to the call, and everything else to the constructor."""
    batch = {key: options.pop(key) for key in ("sample_weight", "normalizer") if key in options}
    return loss(*arrays[2:], **options)(*arrays[:2], **batch)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "cross_entropy": polyce.cross_entropy,
    "cross_entropy_with_grad": polyce.cross_entropy_with_grad,
    "CrossEntropyLoss": lambda *arrays, **options: of_class(
        polyce.CrossEntropyLoss, *arrays, **options
    ),
    # The options of the function with the most arguments.
    "explain": partial(polyce.explain, function=polyce.cross_entropy_with_grad),
    "nll_loss": polyce.nll_loss,
    "NLLLoss": lambda *arrays, **options: of_class(polyce.NLLLoss, *arrays, **options),
    "log_softmax": lambda logits, _, **options: polyce.log_softmax(logits, **options),
}
NLL = ("nll_loss", "NLLLoss")
LOGS = ("log_softmax",)
SOFT = tuple(name for name in FUNCTIONS if name not in (*NLL, *LOGS))
LOSSES = (*SOFT, *NLL)
GRAD = ("cross_entropy_with_grad",)
OUT = (*GRAD, "explain")
# The functions that read the labels.
READERS = tuple(name for name in LOSSES if name != "explain")

X = np.linspace(-2, 2, 15, dtype=np.float32).reshape(3, 5)
X3 = np.linspace(-2, 2, 40, dtype=np.float32).reshape(2, 5, 4)
T = np.array([1, 0, 4], dtype=np.int32)
P = np.full((3, 5), 0.2, dtype=np.float32)


@dataclass(frozen=True)
class Rule:
    """What one error says; {} stands for what came."""

    error: type[Exception]
    says: str
    functions: tuple[str, ...] = LOSSES


ALL = (*LOSSES, *LOGS)
SCALED = (*SOFT, *LOGS)
RULES = {
    "rank": Rule(ValueError, "input must have at least one axis, .*got {}; pass shape", ALL),
    "indices": Rule(
        ValueError,
        "target must hold class indices of shape {}, .*got {} for input .*; remove or add axes",
    ),
    "other axis": Rule(
        ValueError,
        "target must hold class indices of shape {}, .*got {} for input .*; pass axis={} if the",
    ),
    "counts": Rule(
        ValueError,
        "target must hold class indices of shape {}, .*got {} for input [^;]*; "
        "there are {} rows, but {} labels: pass one label for each row$",
    ),
    "not for nll": Rule(
        ValueError,
        "target must hold class indices of shape {}, got {} for .*one-hot .* are for cross_entropy",
        NLL,
    ),
    "swapped": Rule(
        TypeError,
        "input must be real floating point .*, got {}; are input and target swapped, .* is {}[?]$",
    ),
    "integers": Rule(
        TypeError, "target .* holds class indices and must be an integer dtype, got {}; cast it"
    ),
    "probabilities": Rule(
        TypeError,
        "a target of the logits' shape .* class probabilities and must be real .*, got {}; for "
        "class indices drop the class axis, or cast it to a float dtype$",
        SOFT,
    ),
    "logits": Rule(TypeError, "input must be real floating point .*, got {}; convert it", ALL),
    "weight shape": Rule(ValueError, "weight must be 1-D .* 5 classes, got shape {}; pass shape"),
    "weight dtype": Rule(TypeError, "weight must be real numbers, got {}; convert it"),
    "no array": Rule(
        TypeError,
        "{} must be an array of an array-API .*, got {}; convert it .*, with numpy.asarray, torch.",
    ),
    "no array, method": Rule(
        TypeError, "{} must be an array of an array-API .*, got .*{}; convert it with {}$"
    ),
    "no plain array": Rule(TypeError, "{} must be a plain array, got numpy.*{}, .*; pass numpy"),
    "missing": Rule(TypeError, "{} must be an array, got None; pass the logits"),
    "ignore_index": Rule(TypeError, "ignore_index must be an integer, got {}; leave it at -100"),
    "ignore_index range": Rule(
        ValueError, "ignore_index is for class indices, got {} with .*; leave it negative", SOFT
    ),
    "smoothing": Rule(TypeError, "label_smoothing must be a real number, got .*{}; pass a", SOFT),
    "smoothing range": Rule(
        ValueError, "label_smoothing must lie between 0 and 1, got {}; 0 turns smoothing off", SOFT
    ),
    "reduction": Rule(
        ValueError, "reduction must be 'none', 'mean' or 'sum', got {}; pass one of the three"
    ),
    "axis": Rule(TypeError, "axis must be an integer or None, got {}; name the class axis", ALL),
    "axis range": Rule(ValueError, "axis must lie within the 2 axes .*, got {}; use -2 to 1", ALL),
    "validate": Rule(TypeError, "validate must be True, False or None, got {}; None is usual"),
    "no values": Rule(ValueError, "validate=True needs .* traced or lazy.*; leave validate at"),
    "labels": Rule(
        IndexError, r"labels must lie in 0 to 4 \(5 classes\), got {}; give .* ignore_index"
    ),
    "labels of one column": Rule(
        IndexError, "with one column of logits every label is 0, got {}; for a binary loss pass two"
    ),
    "implementation": Rule(
        ValueError, "implementation must be one of .*reference.*, got {}; see polyce.explain", SOFT
    ),
    "library": Rule(
        TypeError,
        "all arrays must .* one library, but input is {} and {} is {}; convert {} with {}",
    ),
    "device": Rule(TypeError, "all arrays must lie .*, but input is on .* and {} on {}; move {}"),
    "grad_output": Rule(
        ValueError, "grad_output must have .* shape {} for reduction {}, got shape {}; pass", GRAD
    ),
    "grad_output rows": Rule(
        ValueError, "grad_output must have the shape of the rows {} .* the number {}; pass", GRAD
    ),
    "sample_weight shape": Rule(
        ValueError, "sample_weight must have one entry for each row, of shape {}, got shape {}; re"
    ),
    "sample_weight dtype": Rule(TypeError, "sample_weight must be real .*, got {}; convert it"),
    "normalizer reduction": Rule(
        ValueError, "normalizer is what reduction 'mean' divides by, got reduction {}; leave"
    ),
    "normalizer shape": Rule(ValueError, "normalizer must be .* 0-d array, got shape {}; pass"),
    "normalizer dtype": Rule(TypeError, "normalizer must be real .*, got {}; convert it"),
    "normalizer number": Rule(
        TypeError, "normalizer must be a real number or an array, got {}; leave it at None"
    ),
    "z_loss": Rule(TypeError, "z_loss must be a real number, got .*{}; pass a Python", SOFT),
    "z_loss range": Rule(ValueError, "z_loss must be finite and at least 0, got {}; 0 turns", SOFT),
    "scale": Rule(TypeError, "{} must be a real number, got .*{}; a scale that is learned", SCALED),
    "scale range": Rule(
        ValueError, "{} must lie between 1e-15 and 1e15, got {}; None turns", SCALED
    ),
    "stats": Rule(ValueError, "return_stats takes the names lse, .*, got {}; leave it out", SOFT),
    "stats kind": Rule(TypeError, "return_stats must be True, False or .*, got {}; there", SOFT),
    "out dtype": Rule(TypeError, "out must have input's dtype float32, got {}; pass empty", OUT),
    "out shape": Rule(ValueError, r"out must have input's shape \(3, 5\), got {}; pass empty", OUT),
    "grad_output dtype": Rule(TypeError, "grad_output must be real .*, got {}; convert it", GRAD),
}


@dataclass(frozen=True, eq=False)
class Bad:
    """A call that fails: the rule it breaks, what the error says came, and the arguments.

    NumPy arrays become the backend's.
    """

    rule: str
    came: tuple[str, ...]
    arguments: dict[str, Any]
    functions: tuple[str, ...]

    @property
    def match(self) -> str:
        return "^" + RULES[self.rule].says.format(*map(re.escape, self.came))


def bad(rule: str, *came: str, on: tuple[str, ...] = (), **arguments: Any) -> Bad:
    return Bad(rule, came, arguments, on or RULES[rule].functions)


def ints(*shape: int) -> Any:
    return np.zeros(shape, dtype=np.int32)


def floats(*shape: int) -> Any:
    return np.zeros(shape, dtype=np.float32)


def check(backend: Backend, call: Bad, name: str, **more: Any) -> None:
    """Make the call, by default and by the reference, and check that both say the same."""
    _check_once(backend, call, name, more)
    with polyce.use("reference"):
        _check_once(backend, call, name, more)


def _check_once(backend: Backend, call: Bad, name: str, more: dict[str, Any]) -> None:
    """Make the call, and check the error and that the arrays are unchanged."""
    before = {"input": X, "target": T} | call.arguments | more
    given = {
        key: backend.asarray(value.copy()) if type(value) is np.ndarray else value
        for key, value in before.items()
    }
    names = [key for key in ("input", "target", "weight") if key in given]
    options = {key: value for key, value in given.items() if key not in names}
    with pytest.raises(RULES[call.rule].error, match=call.match):
        FUNCTIONS[name](*(given[key] for key in names), **options)
    for key, value in given.items():
        if type(before[key]) is np.ndarray:
            np.testing.assert_array_equal(backend.to_numpy(value), before[key])


def table(*calls: Bad) -> pytest.MarkDecorator:
    rows = [
        pytest.param(call, name, id=f"{call.rule}-{'-'.join(call.came)}-{name}".replace(" ", "_"))
        for call in calls
        for name in call.functions
    ]
    return pytest.mark.parametrize(("call", "name"), rows)
