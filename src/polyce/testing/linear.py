"""The loss of a linear head on the conformance grid, and on cases with exact answers of their own.

`grid_functions` sends the grid through a head whose weight is the identity. `check_linear` runs
`linear_cases`, whose inputs are small integers times powers of two: their logits are exact in every
dtype, so that `exact_answer` of the logits holds for the head too.
"""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np

from .backends import Backend, get_backend
from .case import Case, arrange
from .conformance import (
    INCOMING,
    SHOWN,
    Functions,
    Report,
    call_by_name,
    check_stats,
    not_served,
    outcome,
    takes_grad_stats,
)
from .dtypes import FORMATS, Array, Floats
from .linear_cases import LinearCase, linear_cases
from .tolerances import accuracy, compare, loss_tolerance

GRADIENTS = ("input", "linear_weight", "linear_bias")
"""What `wrt` may name."""
PARTED = ("sizes/5x6x7/chunk-4/", "options/everything/mean/index/float32")
"""Prefixes of the names of cases that are called for every subset of the gradients."""
MOST_CLASSES = 1200
"""The grid's rows with more classes would need an identity of hundreds of megabytes."""


def grid_functions(chunks: int | None = None, *, teacher_heads: bool = False) -> Functions:
    """Return functions that compute the grid's calls by a linear head.

    A case's logits are the hidden states and the weight is the identity, so that the products are
    exact. ``polyce.testing.linear.leave_out`` names the cases for which they are not. If a row has
    several classes, each takes a call of its own.

    A teacher's logits are passed as such, or, with `teacher_heads`, in the same way as hidden
    states of its head.

    Parameters
    ----------
    chunks : int, optional
        How many chunks to cut the rows into; by default polyce chooses.
    teacher_heads : bool
        Whether a `TeacherLogits` becomes a `TeacherHead`.
    """
    polyce = importlib.import_module("polyce")

    def size(hidden: Any) -> int | None:
        rows = math.prod(hidden.shape[:-1])
        return chunks and max(1, -(-rows // chunks))

    def as_head(input: Any, target: Any, axis: int | None) -> Any:
        hidden, head, target, back = _as_head(input, target, axis)
        if teacher_heads and isinstance(target, polyce.TeacherLogits):
            states, identity, *_ = _as_head(target.logits, target.logits, -1)
            target = polyce.TeacherHead(states, identity, scale=target.scale)
        return hidden, head, target, back

    def cross_entropy(
        input: Any, target: Any, weight: Any = None, *, axis: int | None = None, **options: Any
    ) -> Any:
        hidden, head, moved, _ = as_head(input, target, axis)
        return polyce.linear_cross_entropy(
            hidden, head, moved, weight=weight, chunk_size=size(hidden), **options
        )

    def cross_entropy_with_grad(
        input: Any, target: Any, weight: Any = None, *, axis: int | None = None, **options: Any
    ) -> Any:
        hidden, head, moved, back = as_head(input, target, axis)
        loss, (grad, *rest), *stats = polyce.linear_cross_entropy_with_grad(
            hidden, head, moved, weight=weight, chunk_size=size(hidden), wrt=GRADIENTS[:1],
            **options,
        )  # fmt: skip
        if rest != [None, None]:
            raise AssertionError("there are gradients that were not asked for")
        return loss, back(grad), *stats

    def log_prob(input: Any, index: Any, *, axis: int | None = None, **options: Any) -> Any:
        hidden, head, index, back = _as_head(input, index, axis)
        given = {"chunk_size": size(hidden)} | options
        if index.ndim < hidden.ndim:
            return polyce.linear_log_prob(hidden, head, index, **given)
        several = range(index.shape[-1])
        found = [polyce.linear_log_prob(hidden, head, index[..., k], **given) for k in several]
        return back(_namespace(hidden).stack(found, axis=-1))

    return Functions(cross_entropy, cross_entropy_with_grad, log_prob)


def _namespace(array: Any) -> Any:
    library, _ = importlib.import_module("polyce.arrays.find").of(input=array)
    return library.xp


def _as_head(
    logits: Any, target: Any, axis: int | None
) -> tuple[Any, Any, Any, Callable[[Any], Any]]:
    """Return hidden states, weight and target for a call's logits, and how to move its gradient."""
    find = importlib.import_module("polyce.arrays.find")
    library, _ = find.of(input=logits)
    xp = library.xp
    rank = logits.ndim
    at = (min(1, rank - 1) if axis is None else axis) % rank
    order = (*(i for i in range(rank) if i != at), at)
    where = library.device(logits)
    beside = {} if where is None else {"device": where}
    if library.name == "cubed":
        beside["spec"] = logits.spec
    classes = xp.arange(logits.shape[at], **beside)
    head = library.cast(classes[:, None] == classes[None, :], logits.dtype)
    if at == rank - 1:
        return logits, head, target, lambda grad: grad

    def moved(part: Any) -> Any:
        return xp.permute_dims(part, order) if getattr(part, "ndim", 0) == rank else part

    # Only those beside class indices and probabilities are tuples.
    target = type(target)(*map(moved, target)) if isinstance(target, tuple) else moved(target)
    inverse = tuple(order.index(i) for i in range(rank))
    return (
        xp.permute_dims(logits, order), head, target, lambda grad: xp.permute_dims(grad, inverse)
    )  # fmt: skip


def leave_out(case: Case, narrow: Sequence[str] = (), *, teacher_heads: bool = False) -> str:
    """Return why a case of the grid cannot be computed by a head, or an empty string.

    Parameters
    ----------
    case : Case
        A case of the grid.
    narrow : sequence of str
        Names of the dtypes in which the gradient of the logits is rounded before it is multiplied.
        That of a mean or a sum is scaled afterwards and so rounded twice. The tolerances of
        `check_linear` allow for that, those of the grid do not.
    teacher_heads : bool
        As for `grid_functions`.
    """
    if teacher_heads and not np.isfinite(case.target.astype(np.float64)).all():
        return "an infinity times 0 is nan in the product that makes the teacher's logits"
    if case.logits.dtype.name in narrow and case.options.get("reduction") != "none":
        return "the gradient is rounded twice"
    rank, axis = case.logits.ndim, case.options.get("axis")
    at = (min(1, rank - 1) if axis is None else axis) % rank
    if case.logits.shape[at] > MOST_CLASSES:
        return f"more than {MOST_CLASSES} classes take a large identity"
    counted = np.expand_dims(case.answer.stats.valid, at)
    if not np.all(np.isfinite(case.logits.astype(np.float64)) | ~counted):
        return "an infinity times 0 is nan in the product that makes the logits"
    grad = case.answer.grad
    lost = np.isnan(grad).all(axis=at, keepdims=True)
    if np.any((~np.isfinite(grad) | FORMATS[case.logits.dtype.name].overflows(abs(grad))) & ~lost):
        return "an infinity times 0 is nan in the product with the gradient"
    return ""


def check_linear(
    name: str | None,
    backend: str | Backend | None = None,
    *,
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
    chosen: Callable[[LinearCase], bool] | None = None,
) -> Report:
    """Check that a linear head gives the exact answers, and raise if it does not.

    Every one of `linear_cases` goes through `polyce.linear_cross_entropy` and
    `polyce.linear_cross_entropy_with_grad`. Values, nans, dtypes, shapes and the kind of array are
    checked, and that the arrays passed in are unchanged. Some are also called for every subset of
    the gradients.

    Parameters
    ----------
    name : str or None
        Passed as ``implementation=``; None leaves the choice to polyce.
    backend : str or Backend, optional
        The array library: a name from `BACKENDS`, or your own converters. NumPy by default.
    wrap : callable, optional
        Applied to the function of the call's arrays alone before it is called, such as `jax.jit`.
    chosen : callable, optional
        Tells whether to run a case. All of them by default.

    Returns
    -------
    Report
        What ran, and what was left out and why.

    Raises
    ------
    AssertionError
        If any case fails; with the first failures in numbers, and how many there are.
    ValueError
        If no case ran.
    """
    library = get_backend(backend or "numpy") if isinstance(backend, str | None) else backend
    ran: Counter[str] = Counter()
    left_out: dict[str, list[str]] = {}
    failures: list[str] = []
    for case in linear_cases():
        plain = case.of_logits
        given, reason = {}, "" if chosen is None or chosen(case) else "not chosen"
        reason = reason or not_served(name, plain)
        if plain.has_grad_stats and not takes_grad_stats(name):
            reason = reason or "it takes no grad_stats"
        for key, array in case.arrays.items():
            given[key], missing = library.expressible(array)
            reason = reason or missing
        if reason:
            left_out.setdefault(reason, []).append(case.name)
            continue
        ran[case.of_logits.group] += 1
        if failure := _failure(case, given, library, name, wrap):
            failures.append(f"{case.name}: {failure}")
    report = Report(
        name, library.name, dict(ran), {reason: tuple(names) for reason, names in left_out.items()}
    )
    if failures:
        what = f"{name or 'default'} on {library.name}"
        lines = [f"{what}: {len(failures)} of {ran.total()} cases fail"]
        lines += [f"  {failure}" for failure in failures[:SHOWN]]
        raise AssertionError("\n".join(lines))
    if not ran:
        raise ValueError(f"no case ran: {report}")
    return report


def _failure(
    case: LinearCase,
    given: Mapping[str, Array],
    library: Backend,
    name: str | None,
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]] | None,
) -> str:
    """Run one case, and return the first thing that is wrong with it."""
    polyce = importlib.import_module("polyce")
    plain = case.of_logits
    layouts = dict.fromkeys(("input", "linear_weight"), plain.layout)
    layouts |= dict.fromkeys(("target", "sample_weight"), plain.target_layout)
    arrays = {
        key: library.asarray(arrange(array, layouts.get(key, "plain")))
        for key, array in given.items()
    }
    options = {key: value for key, value in plain.options.items() if key != "axis"}
    options |= {"chunk_size": case.chunk_size} | ({} if name is None else {"implementation": name})
    forward = {key: array for key, array in arrays.items() if key not in INCOMING}
    with_grad = dict(options)
    if "grad_output" not in arrays and plain.grad_output is not None:
        with_grad["grad_output"] = plain.grad_output
    product = _product_dtype(library, arrays["input"], case.input.dtype.name)
    calls: list[tuple[Any, Mapping[str, Any], Mapping[str, Any], Sequence[str] | None]]
    calls = [(polyce.linear_cross_entropy, forward, options, None)]
    for size in range(4) if case.name.startswith(PARTED) else (3,):
        for wrt in combinations(GRADIENTS, size):
            asked = with_grad | {"wrt": wrt}
            calls.append((polyce.linear_cross_entropy_with_grad, arrays, asked, wrt))

    def check(function: Any, taken: Any, kept: Any, part: Any) -> None:
        _check(case, library, product, call_by_name(function, taken, kept, wrap), part)
        for key, array in arrays.items():
            if library.to_numpy(array).tobytes() != given[key].tobytes():
                raise AssertionError(f"{key}: the call changed its argument")

    for function, taken, kept, part in calls:
        _, failure = outcome(partial(check, function, taken, kept, part), library)
        if failure:
            return f"{function.__name__}, wrt={part}: {failure}"
    return ""


def _check(
    case: LinearCase, library: Backend, product: str, returned: Any, part: Sequence[str] | None
) -> None:
    """Check a loss and, unless `part` is None, the gradients named in it."""
    plain, answer, dtype = case.of_logits, case.of_logits.answer, case.of_logits.answer.loss_dtype
    if plain.asks_for_stats:
        *returned, stats = returned
        check_stats(plain, library, stats, "stats")
        returned = returned[0] if part is None else returned
    loss, gradients = (returned, ()) if part is None else returned
    allowed = loss_tolerance(answer, dtype.name, accuracy(dtype.name, library.name))
    _compare(library, loss, answer.loss, allowed, dtype, "loss")
    if part is None:
        return
    tolerances = case.tolerances(library.name, product)
    for what, got in zip(GRADIENTS, gradients, strict=True):
        if what not in part or what not in tolerances:
            if got is not None:
                raise AssertionError(f"d_{what}: {type(got).__name__} was not asked for")
            continue
        want = case.gradients[what]
        _compare(library, got, want, tolerances[what], case.input.dtype, f"d_{what}")


def _compare(
    library: Backend, got: Any, want: Floats, allowed: Floats, dtype: np.dtype[Any], what: str
) -> None:
    if not library.owns(got):
        raise AssertionError(f"{what}: {type(got).__name__} is not an array of {library.name}")
    compare(library.to_numpy(got), want, allowed, dtype=dtype, what=what)


def _product_dtype(library: Backend, array: Any, name: str) -> str:
    """Return the dtype in which the gradient of the logits is multiplied, which may be 16 bits."""
    if name in ("float32", "float64"):
        return name
    on_torch = library.name == "torch" and (name == "bfloat16" or array.device.type != "cpu")
    return name if on_torch or library.name == "jax" else "float32"
