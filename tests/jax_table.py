"""The parts of the table in tests/test_jax_table.py: cases, their numbers, a textbook's formula.

It does not import polyce.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

ROWS, CLASSES, FEATURES = 4, 4, 3
IGNORED = -1

FUNCTIONS = ("cross_entropy", "linear_cross_entropy", "nll_loss", "log_softmax")
DERIVATIVES = ("grad", "vjp", "jvp", "linearize", "jacfwd", "jacrev", "hessian")
WAYS = ("eager", "jit", "disable_jit", "shard_map", "explicit", "automatic", "export")
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"label_smoothing": 0.1},
    {"weight": np.array([0.5, 1.0, 2.0, 1.5])},
    {"sample_weight": np.array([1.0, 0.0, 2.0, 0.5])},
    {"z_loss": 0.01, "logit_scale": 1.5},
    {"logit_softcap": 3.0, "return_stats": True},
    {
        "label_smoothing": 0.1,
        "weight": np.array([0.5, 1.0, 2.0, 1.5]),
        "sample_weight": np.array([1.0, 0.5, 2.0, 0.5]),
        "z_loss": 0.01,
        "logit_scale": 1.5,
        "logit_softcap": 3.0,
        "return_stats": ("correct", "entropy"),
    },
)
TARGETS = (
    ("index", "none"),
    ("index", "mean"),
    ("index", "sum"),
    ("index", "normalizer"),
    ("probability", "none"),
    ("probability", "mean"),
    ("probability", "sum"),
)
# They include 8-bit labels, NumPy's labels, and classes spread over the devices of a mesh.
LAYOUTS = ("matrix", "images", "last", "ignored", "narrow", "numpy", "classes")
TAKEN = {
    "cross_entropy": {name for options in OPTIONS for name in options},
    "linear_cross_entropy": {name for options in OPTIONS for name in options},
    "nll_loss": {"weight", "sample_weight"},
    "log_softmax": {"logit_scale", "logit_softcap"},
}


class Case(NamedTuple):
    """One cell of the table, and the function that it calls."""

    function: str
    derivative: str
    way: str
    options: dict[str, Any]
    kind: str
    reduction: str
    layout: str

    def __str__(self) -> str:
        """Return the case's name in the tests."""
        return "-".join((*self[:3], *self[4:], ",".join(self.options) or "plain"))


def cases(function: str, turns: int) -> Iterator[Case]:
    """Return, for each turn, 49 cases in which any two columns have all of their pairs.

    Seven is prime, so the Latin squares d + k w of k = 1, 2, 3, … are orthogonal to each other.
    With only one turn it is every third of them.
    """
    for turn, d, w in itertools.product(range(turns), range(7), range(7)):
        if turns == 1 and (d + w) % 3:
            continue
        option, target, layout = ((d + k * w) % 7 for k in range(turn + 1, turn + 4))
        options = {k: v for k, v in OPTIONS[option].items() if k in TAKEN[function]}
        kind, reduction = TARGETS[target]
        if function == "nll_loss":
            kind = "index"
        yield Case(function, DERIVATIVES[d], WAYS[w], options, kind, reduction, LAYOUTS[layout])


class Numbers(NamedTuple):
    """The arrays of a case, by the names of the arguments."""

    moving: dict[str, Any]
    """The arguments that derivatives are taken with respect to."""
    fixed: dict[str, Any]
    tangents: dict[str, Any]
    cotangent: Any


def numbers(case: Case) -> Numbers:
    """Draw a case's arrays; the tangents and the cotangent have no special values."""
    rng = np.random.default_rng(0)
    inner = (2,) if case.layout in ("images", "last") else ()
    rows = (ROWS, *inner)
    fixed: dict[str, Any] = {}
    if case.function == "linear_cross_entropy":
        moving = {
            "input": rng.standard_normal((*rows, FEATURES)),
            "linear_weight": rng.standard_normal((CLASSES, FEATURES)),
            "linear_bias": rng.standard_normal(CLASSES),
        }
    else:
        logits = np.log(rng.dirichlet(np.ones(CLASSES), rows))
        moving = {"input": np.moveaxis(logits, -1, class_axis(case))}
    if case.function != "log_softmax":
        # Class weights have a derivative where probabilities have one.
        along_target = moving if is_soft(case) and case.function == "cross_entropy" else fixed
        along_target["target"] = _target(rng, case, rows)
        if "weight" in case.options:
            along_target["weight"] = case.options["weight"]
        if "sample_weight" in case.options:
            each = case.options["sample_weight"].reshape(ROWS, *(1 for _ in inner))
            fixed["sample_weight"] = np.broadcast_to(each, rows)
        if case.reduction == "normalizer":
            moving["normalizer"] = np.array(3.0)
    tangents = {
        name: np.cos(1.0 + np.arange(a.size)).reshape(a.shape) for name, a in moving.items()
    }
    result = rows if case.reduction == "none" else ()
    result = moving["input"].shape if case.function == "log_softmax" else result
    cotangent = np.sin(1.0 + np.arange(math.prod(result))).reshape(result)
    return Numbers(moving, fixed, tangents, cotangent)


def _target(rng: Any, case: Case, rows: tuple[int, ...]) -> Any:
    if is_soft(case):
        return np.moveaxis(rng.dirichlet(np.ones(CLASSES), rows), -1, class_axis(case))
    labels = rng.integers(0, CLASSES, rows)
    if case.layout == "ignored":
        labels[1] = IGNORED
    return labels.astype(np.int8 if case.layout == "narrow" else np.int32)


def is_soft(case: Case) -> bool:
    return case.kind == "probability"


def class_axis(case: Case) -> int:
    is_image = case.layout == "images" and case.function != "linear_cross_entropy"
    return 1 if is_image else -1


def textbook(jax: Any, case: Case, arrays: dict[str, Any]) -> Any:
    """Compute the textbook's formula, in plain operations of jax."""
    jnp, options = jax.numpy, case.options
    x = arrays["input"]
    if "linear_weight" in arrays:
        x = x @ arrays["linear_weight"].T + arrays["linear_bias"]
    axis = class_axis(case)
    x = options.get("logit_scale", 1.0) * jnp.moveaxis(x, axis, -1)
    cap = options.get("logit_softcap")
    x = x if cap is None else cap * jnp.tanh(x / cap)
    if case.function == "log_softmax":
        return jnp.moveaxis(x - jax.scipy.special.logsumexp(x, -1, keepdims=True), -1, axis)
    target = arrays["target"]
    weight = arrays.get("weight", jnp.ones(CLASSES, x.dtype))
    count = arrays.get("sample_weight", jnp.ones(x.shape[:-1], x.dtype))
    at_label = jnp.ones(x.shape[:-1], x.dtype)
    if case.kind == "index":
        count = jnp.where(target == IGNORED, 0.0, count)
        target = jax.nn.one_hot(target, CLASSES, dtype=x.dtype)
        at_label = (target * weight).sum(-1)
    else:
        target = jnp.moveaxis(target, axis, -1)
    if case.function == "nll_loss":
        losses = -(weight * target * x).sum(-1)
    else:
        smoothing = options.get("label_smoothing", 0.0)
        lse = jax.scipy.special.logsumexp(x, -1)
        spread = weight * ((1.0 - smoothing) * target + smoothing / CLASSES)
        losses = (spread * (lse[..., None] - x)).sum(-1)
        losses = losses + options.get("z_loss", 0.0) * at_label * lse**2
    losses = count * losses
    if case.reduction in ("none", "sum"):
        return losses if case.reduction == "none" else losses.sum()
    return losses.sum() / arrays.get("normalizer", (count * at_label).sum())


def derivative(jax: Any, case: Case, function: Any) -> Any:
    """Return the function that computes the case's derivative of a function of arrays."""

    def scalar(moving: Any, fixed: Any, cotangent: Any) -> Any:
        return (function(moving | fixed) * cotangent).sum()

    def compute(moving: Any, fixed: Any, tangents: Any, cotangent: Any) -> Any:
        def of(moving: Any) -> Any:
            return function(moving | fixed)

        match case.derivative:
            case "grad":
                return jax.value_and_grad(scalar)(moving, fixed, cotangent)
            case "vjp":
                value, pull = jax.vjp(of, moving)
                return value, pull(cotangent)
            case "jvp":
                return jax.jvp(of, (moving,), (tangents,))
            case "linearize":
                value, push = jax.linearize(of, moving)
                return value, push(tangents)
            case "jacfwd":
                return jax.jacfwd(of)(moving)
            case "jacrev":
                return jax.jacrev(of)(moving)
        return hessian(moving, fixed, cotangent)

    def hessian(moving: Any, fixed: Any, cotangent: Any) -> Any:
        # Only with respect to the input: blocks for all pairs of arguments take long to compile.
        def gradient(one: Any) -> Any:
            return jax.grad(scalar)(moving | {"input": one}, fixed, cotangent)

        return jax.jacfwd(gradient)(moving["input"])

    return compute
