"""Which implementation would run, and why not another; what is installed."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from polyce.arrays import dtypes, find
from polyce.call import outputs
from polyce.call.index import describe_index
from polyce.call.options import Options, current_reduction, refuse_dim
from polyce.call.problem import Operands, Problem, describe, describe_logits
from polyce.functional import cross_entropy, cross_entropy_with_grad
from polyce.graphs import rules
from polyce.implementations import door, registry
from polyce.implementations.native import core as native
from polyce.linear import call as linear_call
from polyce.linear import chunks, unfused
from polyce.linear.call import HeadCall, check_wrt
from polyce.linear.functional import (
    check,
    linear_cross_entropy,
    linear_cross_entropy_with_grad,
)
from polyce.linear.values import describe_log_prob, linear_log_prob
from polyce.values import any_labels, entropy, log_prob
from polyce.version import __version__

# Import name, and the distributions that provide it, of each library that polyce works with.
_LIBRARIES = {
    "numpy": ("numpy",),
    "array_api_compat": ("array-api-compat",),
    "torch": ("torch",),
    "triton": ("triton", "pytorch-triton-rocm", "pytorch-triton"),
    "jax": ("jax",),
    "dask": ("dask",),
    "cupy": ("cupy", "cupy-cuda12x", "cupy-cuda13x"),
    "array_api_strict": ("array-api-strict",),
    "ndonnx": ("ndonnx",),
    "cubed": ("cubed",),
    "mlx": ("mlx",),
    "mparray": ("mparray",),
    "marray": ("marray",),
    "ml_dtypes": ("ml_dtypes", "ml-dtypes"),
}


@dataclass(frozen=True)
class Explanation:
    """Which implementation a call would run, and the reasons against the others.

    Printing it shows one line for each implementation.
    """

    call: str
    """The call in short: function, library, device, dtypes and shapes."""
    chosen: str
    """Name of the implementation that would run."""
    reasons: dict[str, tuple[str, ...]]
    """For each implementation, by preference, the reasons against it; without any, it can run."""
    chunks: str | None = None
    """How the rows of a linear head are cut, and when all at once would be better; else None."""
    is_kept: bool = False
    """Whether the compiled core then answers calls like it by itself, without another look."""

    def __str__(self) -> str:
        """Return a line for the call, one for each implementation, and what else there is."""
        width = max(len(name) for name in self.reasons)
        lines = [self.call]
        for name, reasons in self.reasons.items():
            verdict = "no   " + "; ".join(reasons) if reasons else "yes"
            runs = "  <- runs" if name == self.chosen else ""
            lines.append(f"  {name:<{width}}  {verdict}{runs}")
        if self.chunks is not None:
            lines.append(f"  {self.chunks}")
        if self.is_kept:
            lines.append("  the core keeps how it is computed, and answers calls like it by itself")
        return "\n".join(lines)

    __repr__ = __str__


def explain(
    *arguments: Any, function: Callable[..., Any] | None = None, **options: Any
) -> Explanation:
    """Tell which implementation a call would run and why not the others; compute nothing.

    Parameters
    ----------
    *arguments, **options
        The arguments of the call, by position and by name.
    function : callable, optional
        The function of the call: `cross_entropy`, the default, which also stands for that of
        ``polyce.torch``; `cross_entropy_with_grad`, `linear_cross_entropy`,
        `linear_cross_entropy_with_grad`, `log_prob`, `entropy` or `linear_log_prob`.

    Returns
    -------
    Explanation
        When printed, it shows a line for each implementation, and whether the core would then
        answer calls like this one by itself. For a linear head it also shows how many rows are
        computed at a time, how much memory their logits take, and when all logits at once would be
        faster.

    Raises
    ------
    TypeError, ValueError
        As the call itself would, but the values of labels are not checked.

    Examples
    --------
    >>> import numpy as np
    >>> import polyce
    >>> print(polyce.explain(np.zeros((8, 10)), np.zeros(8, np.int64)))  # doctest: +ELLIPSIS
    cross_entropy on numpy / cpu: logits float64 (8, 10), target int64 (8,)
      dask       no   ...takes arrays of dask, not numpy
      native     yes  <- runs
      triton     no   ...takes arrays of torch, not numpy
      cupy       no   ...takes arrays of cupy, not numpy; runs on cuda, not cpu
      reference  yes
      the core keeps how it is computed, and answers calls like it by itself
    >>> hidden, head = np.zeros((4096, 64)), np.zeros((50_000, 64))
    >>> labels = np.zeros(4096, np.int64)
    >>> told = polyce.explain(hidden, head, labels, function=polyce.linear_cross_entropy)
    >>> print(told.chunks.partition(";")[0])
    37 chunks of 112 rows: 45 MB of logits at a time, not 1638
    """
    # Imported already, if its function was passed.
    for_torch = sys.modules.get("polyce.torch")
    inner: Callable[..., Any] = cross_entropy if function is None else function
    if for_torch is not None and function is for_torch.cross_entropy:
        inner = cross_entropy
    explained: dict[Callable[..., Any], Callable[..., Explanation]] = {
        cross_entropy: _of_logits,
        cross_entropy_with_grad: _of_logits,
        linear_cross_entropy: _of_head,
        linear_cross_entropy_with_grad: _of_head,
        log_prob: _of_log_prob,
        entropy: _of_entropy,
        linear_log_prob: _of_head_log_prob,
    }
    if inner not in explained:
        raise ValueError(
            f"function must be {', '.join(f'polyce.{one.__name__}' for one in explained)} or left "
            f"out, got {function!r}; the other functions have one implementation"
        )
    call = function or cross_entropy
    bound = inspect.signature(call).bind(*arguments, **options)
    bound.apply_defaults()
    given = bound.arguments
    if given.get("group") is not None:
        raise ValueError(
            "explain tells what computes whole rows, got a group; leave it out, and pass whole rows"
        )
    for name in ("group", "class_start", "num_classes"):
        given.pop(name, None)
    values = tuple(given.values())
    if given.pop("dim", None) is not None:
        raise refuse_dim()
    if "reduce" in given:
        deprecated = given.pop("size_average"), given.pop("reduce")
        given["reduction"] = current_reduction(*deprecated, given["reduction"])
    return explained[inner](inner, values, **given)


def _of_logits(
    function: Callable[..., Any],
    values: tuple[Any, ...],
    *,
    implementation: str | None,
    out: Any = None,
    inplace_backward: bool = False,
    **given: Any,
) -> Explanation:
    options = Options.taken_from(given)
    problem, operands = describe(options=options, **given)
    if function is cross_entropy:
        rules.of(problem.backend).check(problem, operands)
    if inplace_backward:
        outputs.check_inplace(problem, operands)
    if out is not None:
        outputs.check(problem, operands, out)
    logits = f"logits {problem.logits_dtype_name} {problem.shape}"
    chosen = registry.select(problem, implementation)
    return Explanation(
        call=_call(function, problem, operands, [logits]),
        chosen=chosen.name,
        reasons={path.name: path.reasons(problem) for path in registry.TABLE},
        is_kept=door.is_kept(values, problem, chosen),
    )


def _of_log_prob(
    function: Callable[..., Any],
    _: Any,
    *,
    input: Any,
    index: Any,
    implementation: str | None,
    **given: Any,
) -> Explanation:
    options = Options.taken_from(given)
    problem, logits, index = describe_index(input, index, options)
    asked = f"index {problem.target_dtype} {tuple(index.shape)}"
    # One class or K of each row, one loss gives them all, and its path depends on no label.
    return _of_value(function, problem, logits, options, [asked], implementation)


def _of_entropy(
    function: Callable[..., Any],
    _: Any,
    *,
    input: Any,
    implementation: str | None,
    **given: Any,
) -> Explanation:
    options = Options.taken_from(given)._replace(stats="entropy")
    problem, logits = describe_logits(input, options)
    return _of_value(function, problem, logits, options, [], implementation)


def _of_value(
    function: Callable[..., Any],
    problem: Problem,
    logits: Any,
    options: Options,
    asked: list[str],
    implementation: str | None,
) -> Explanation:
    """Explain the call of `cross_entropy` by which a value of the rows is computed."""
    options = options._replace(reduction="none", ignore_index=-100, validate=None)
    inner, _ = describe(logits, any_labels(problem, logits), options=options)
    parts = [f"logits {inner.logits_dtype_name} {inner.shape}", *asked, *_used(inner)]
    return Explanation(
        call=f"{function.__name__} on {inner.backend} / {inner.device}: {', '.join(parts)}",
        chosen=registry.select(inner, implementation).name,
        reasons={path.name: path.reasons(inner) for path in registry.TABLE},
    )


def _of_head(
    function: Callable[..., Any], _: Any, *, wrt: str | Sequence[str] = (), **given: Any
) -> Explanation:
    check_wrt(wrt)
    options = Options.taken_from(given)
    call = linear_call.describe(options=options, **given)
    check(call, on_graph=function is linear_cross_entropy)
    return _of_call_on_head(function, call)


def _of_head_log_prob(function: Callable[..., Any], _: Any, **given: Any) -> Explanation:
    options = Options.taken_from(given)
    return _of_call_on_head(function, describe_log_prob(options=options, **given))


def _of_call_on_head(function: Callable[..., Any], call: HeadCall) -> Explanation:
    whole, head, hidden = call.whole, call.head, call.operands.logits
    parts = [
        f"input {dtypes.dtype_name(hidden)} {tuple(hidden.shape)}",
        f"linear_weight {tuple(head.weight.shape)}",
        *(["linear_bias"] * (head.bias is not None)),
    ]
    if unfused.is_wanted(whole):
        chosen, of_chunks, problem = registry.select(whole, call.name), unfused.WHY, whole
    else:
        cut, problem = call.chunks, call.part(call.chunks.rows)
        chosen, of_chunks = call.implementation, chunks.summary(whole, cut)
    return Explanation(
        call=_call(function, whole, call.operands, parts),
        chosen=chosen.name,
        reasons={path.name: path.reasons(problem) for path in registry.TABLE},
        chunks=of_chunks,
    )


def _call(
    function: Callable[..., Any], problem: Problem, operands: Operands, given: list[str]
) -> str:
    parts = [*given, *_shown_target(problem, operands)]
    if operands.weight is not None:
        parts.append(f"weight {dtypes.dtype_name(operands.weight)}")
    if operands.sample_weight is not None:
        parts.append(f"sample_weight {dtypes.dtype_name(operands.sample_weight)}")
    parts += _used(problem)
    if problem.options.stats is not None:
        parts.append(f"stats {', '.join(problem.options.stats)}")
    return f"{function.__name__} on {problem.backend} / {problem.device}: {', '.join(parts)}"


def _shown_target(problem: Problem, operands: Operands) -> list[str]:
    target = f"{problem.target_dtype} {tuple(operands.target.shape)}"
    if problem.kind == "teacher":
        scale = f"scale {problem.teacher_scale:g}"
        if operands.teacher_weight is None:
            return [f"teacher {target}", scale]
        return [
            f"teacher's input {dtypes.dtype_name(operands.target)} {tuple(operands.target.shape)}",
            f"linear_weight {tuple(operands.teacher_weight.shape)}",
            *(["linear_bias"] * (operands.teacher_bias is not None)),
            scale,
        ]
    if problem.kind == "sparse":
        probability = dtypes.dtype_name(operands.target_probability)
        return [f"sparse target {target} of probability {probability}"]
    return [f"{'index' if problem.label_name == 'index' else 'target'} {target}"]


def _used(problem: Problem) -> list[str]:
    names = [name for name in problem.options.used if name != "return_stats"]
    return [f"{name} {getattr(problem.options, name):g}" for name in names]


def show_versions() -> None:
    """Print the versions of polyce and of the array libraries, and each implementation's state.

    Nothing is imported to find out.

    Examples
    --------
    >>> import polyce
    >>> polyce.show_versions()  # doctest: +ELLIPSIS
    polyce...
    """
    print(versions())


def versions() -> str:
    """Return the text that `show_versions` prints."""
    import platform

    entries: list[tuple[str, str | None]] = [
        ("polyce", __version__),
        ("python", platform.python_version()),
    ]
    for module, distributions in _LIBRARIES.items():
        found = [_version(name) for name in distributions]
        version = next((one for one in found if one), None)
        if version is None and find.installed(module):
            version = "installed, version unknown"
        entries.append((module, version))
    width = max(len(name) for name, _ in entries)
    lines = [f"{name:<{width}}  {version or 'not installed'}" for name, version in entries]

    lines.append("")
    lines.append("implementations, in order of preference")
    width = max(len(path.name) for path in registry.TABLE)
    for path in registry.TABLE:
        reason = path.unavailable()
        lines.append(f"  {path.name:<{width}}  {'no   ' + reason if reason else 'yes'}")
    if native.unavailable() is None:
        lines.append(f"native core  {_core()}")
    lines.append(_preferred())
    return "\n".join(lines)


def _core() -> str:
    try:
        core = native.core()
    except ValueError as problem:  # an environment variable asks for what is not there
        return str(problem)
    others = [name for name in core.isas() if name != core.isa()]
    also = f" (here too: {', '.join(others)})" if others else ""
    return f"{core.isa()}{also}, {core.get_num_threads()} threads"


def _preferred() -> str:
    try:
        found = registry.preference()
    except ValueError as problem:
        return str(problem)
    return f"{registry.VARIABLE}  {'not set' if found is None else found.name}"


def _version(distribution: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
