"""What would run, and why not something else; what is installed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from polyce import arrays, outputs, registry
from polyce.autograd import rules
from polyce.functional import cross_entropy, cross_entropy_with_grad
from polyce.implementations import native
from polyce.options import current_reduction
from polyce.problem import Operands, Problem, describe

# Import name and the distributions that bring it, of all that polyce works with.
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
    """Which implementation a call would run, and what speaks against each of the others.

    Printing it shows one line for each implementation.
    """

    call: str
    """The call in short: function, library, device, dtypes and shapes."""
    chosen: str
    """Name of the implementation that would run."""
    reasons: dict[str, tuple[str, ...]]
    """For each implementation, by preference, the reasons against it; none means that it can."""

    def __str__(self) -> str:
        """Give a line for the call and one for each implementation."""
        width = max(len(name) for name in self.reasons)
        lines = [self.call]
        for name, reasons in self.reasons.items():
            verdict = "no   " + "; ".join(reasons) if reasons else "yes"
            runs = "  <- runs" if name == self.chosen else ""
            lines.append(f"  {name:<{width}}  {verdict}{runs}")
        return "\n".join(lines)

    __repr__ = __str__


def explain(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    axis: int | None = None,
    sample_weight: Any = None,
    normalizer: Any = None,
    z_loss: float = 0.0,
    logit_scale: float | None = None,
    logit_softcap: float | None = None,
    return_stats: bool | str | Sequence[str] = False,
    validate: bool | None = None,
    implementation: str | None = None,
    grad_output: Any = None,
    out: Any = None,
    function: Callable[..., Any] | None = None,
) -> Explanation:
    """Tell which implementation a call would run, and why not the others; computes nothing.

    Parameters
    ----------
    input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        As for `cross_entropy`.
    axis, sample_weight, normalizer, z_loss, logit_scale, logit_softcap, return_stats
        As for `cross_entropy_with_grad`.
    validate, implementation, grad_output, out
        As for `cross_entropy_with_grad`.
    function : callable, optional
        The function that the call is of: `cross_entropy`, the default, which stands for that of
        ``polyce.torch`` too, or `cross_entropy_with_grad`.

    Returns
    -------
    Explanation
        Prints a line for each implementation.

    Raises
    ------
    TypeError, ValueError
        As the call itself would, but for labels, which are not looked at.

    Examples
    --------
    >>> import numpy as np
    >>> import polyce
    >>> print(polyce.explain(np.zeros((8, 10)), np.zeros(8, np.int64)))  # doctest: +ELLIPSIS
    cross_entropy on numpy / cpu: logits float64 (8, 10), target int64 (8,)
      dask       no   ...arrays numpy is not served (dask)
      native     yes  <- runs
      triton     no   ...arrays numpy is not served (torch)
      cupy       no   ...arrays numpy is not served (cupy); device cpu is not served (cuda)
      reference  yes
    """
    # Which has been imported, if it is what was passed.
    for_torch = sys.modules.get("polyce.torch")
    if for_torch is not None and function is for_torch.cross_entropy:
        function = cross_entropy
    if function not in (None, cross_entropy, cross_entropy_with_grad):
        raise ValueError(
            "function must be polyce.cross_entropy or polyce.cross_entropy_with_grad, "
            f"got {function!r}; the other functions have one implementation"
        )
    name = cross_entropy.__name__ if function is None else function.__name__
    problem, operands = describe(
        input,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=current_reduction(size_average, reduce, reduction),
        label_smoothing=label_smoothing,
        axis=axis,
        sample_weight=sample_weight,
        normalizer=normalizer,
        z_loss=z_loss,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        return_stats=return_stats,
        validate=validate,
        grad_output=grad_output,
    )
    if function is not cross_entropy_with_grad:
        rules(problem.backend).check(operands)
    if out is not None:
        outputs.check(problem, operands, out)
    return Explanation(
        call=_call(name, problem, operands),
        chosen=registry.select(problem, implementation).name,
        reasons={row.name: row.reasons(problem) for row in registry.TABLE},
    )


def _call(name: str, problem: Problem, operands: Operands) -> str:
    parts = [
        f"logits {problem.logits_dtype_name} {problem.shape}",
        f"target {problem.target_dtype} {tuple(operands.target.shape)}",
    ]
    if operands.weight is not None:
        parts.append(f"weight {arrays.dtype_name(operands.weight)}")
    if operands.sample_weight is not None:
        parts.append(f"sample_weight {arrays.dtype_name(operands.sample_weight)}")
    for option in ("label_smoothing", "z_loss", "logit_scale", "logit_softcap"):
        if option in problem.options:
            parts.append(f"{option} {getattr(problem, option):g}")
    if problem.stats is not None:
        parts.append(f"stats {', '.join(problem.stats)}")
    return f"{name} on {problem.backend} / {problem.device}: {', '.join(parts)}"


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
    """Give the text that `show_versions` prints."""
    import platform

    import polyce

    rows: list[tuple[str, str | None]] = [
        ("polyce", polyce.__version__),
        ("python", platform.python_version()),
    ]
    for module, distributions in _LIBRARIES.items():
        found = [_version(name) for name in distributions]
        version = next((one for one in found if one), None)
        if version is None and arrays.installed(module):
            version = "installed, version unknown"
        rows.append((module, version))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {version or 'not installed'}" for name, version in rows]

    lines.append("")
    lines.append("implementations, in order of preference")
    width = max(len(row.name) for row in registry.TABLE)
    for row in registry.TABLE:
        reason = row.unavailable()
        lines.append(f"  {row.name:<{width}}  {'no   ' + reason if reason else 'yes'}")
    if native.unavailable() is None:
        core = native.core()
        others = [name for name in core.isas() if name != core.isa()]
        also = f" (here too: {', '.join(others)})" if others else ""
        lines.append(f"native core  {core.isa()}{also}, {core.get_num_threads()} threads")
    preferred = os.environ.get(registry.VARIABLE)
    lines.append(f"{registry.VARIABLE}  {preferred or 'not set'}")
    return "\n".join(lines)


def _version(distribution: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
