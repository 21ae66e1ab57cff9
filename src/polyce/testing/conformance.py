"""Run the conformance grid through an implementation, on an array library."""

from __future__ import annotations

import importlib
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .backends import Backend, get_backend
from .case import STATS, Case, arrange
from .dtypes import Array, missing
from .expected_values import Expected, expectations
from .grid import cases
from .tolerances import accuracy, compare, grad_tolerance, loss_tolerance, stats_tolerances

SHOWN = 20
"""How many failures are written out."""
INCOMING = ("grad_output", "grad_lse", "grad_entropy")
"""The arrays of a case that only the gradient takes."""


@dataclass(frozen=True)
class Report:
    """Which cases of the grid ran.

    Attributes
    ----------
    implementation : str or None
        The implementation asked for; None left the choice to polyce.
    backend : str
        The array library.
    ran : mapping
        How many cases ran, by group.
    left_out : mapping
        The names of the cases that did not run, by reason. A reason without names is for cases
        that could not be built.
    """

    implementation: str | None
    backend: str
    ran: Mapping[str, int]
    left_out: Mapping[str, tuple[str, ...]]

    def __str__(self) -> str:
        """Return a few lines that say what ran, and what did not and why."""
        groups = ", ".join(f"{group} {count}" for group, count in self.ran.items())
        what = f"{self.implementation or 'default'} on {self.backend}"
        lines = [f"{what}: {sum(self.ran.values())} cases right ({groups})"]
        lines += [
            f"  left out {len(names) or 'all'}: {reason}" for reason, names in self.left_out.items()
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Functions:
    """The functions under test, by default polyce's own.

    Attributes
    ----------
    cross_entropy, cross_entropy_with_grad : callable
        They are called like polyce's functions, with arrays by position or by name.
    log_prob, entropy : callable or None
        Likewise, for the cases of the group values.
    """

    cross_entropy: Callable[..., Any]
    cross_entropy_with_grad: Callable[..., Any]
    log_prob: Callable[..., Any] | None = None
    entropy: Callable[..., Any] | None = None


def check_implementation(
    name: str | None,
    backend: str | Backend | None = None,
    *,
    groups: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    few_shapes: bool = False,
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
    functions: Functions | None = None,
    leave_out: Callable[[Case], str] | None = None,
) -> Report:
    """Check that an implementation gives the exact answers, and raise if it does not.

    Every case of the grid goes through `polyce.cross_entropy` and `polyce.cross_entropy_with_grad`.
    Values, nans, dtypes, shapes and the kind of array are checked, also those of the stats if a
    case asks for some, and that the arrays passed in are unchanged. The cases of the group values
    go through `polyce.log_prob` and `polyce.entropy` too. For an implementation that takes no
    cotangents of stats, cases with such cotangents check the loss alone. Cases that ask for stats
    or have kinds of target that the implementation does not take are left out.

    Parameters
    ----------
    name : str or None
        Passed as ``implementation=``; None leaves the choice to polyce.
    backend : str or Backend, optional
        The array library: a name from `BACKENDS`, or your own converters. By default NumPy, or a
        library that the implementation takes if it does not take NumPy, such as torch for 'triton'.
    groups, dtypes, few_shapes
        Which part of the grid to run, see `cases`.
    wrap : callable, optional
        Applied to the function of the call's arrays alone before it is called, such as
        `jax.jit`. Everything else about the call is fixed inside that function.
    functions : Functions, optional
        What to call in place of polyce's functions.
    leave_out : callable, optional
        Returns the reason why a case is not for this implementation, or an empty string. The
        report lists these reasons.

    Returns
    -------
    Report
        What ran, and what was left out and why.

    Raises
    ------
    AssertionError
        If any case fails; with the first failures in numbers, and how many there are.
    ValueError
        For an unknown backend, group or dtype, or if no case ran.
    """
    if backend is None:
        backend = "numpy" if name is None or functions else _default_backend(name)
    library = get_backend(backend) if isinstance(backend, str) else backend
    called = functions or _polyce_functions()
    ran: Counter[str] = Counter()
    left_out: dict[str, list[str]] = {}
    if dtypes is None:
        left_out = {f"{dtype}: {why}": [] for dtype, why in missing().items()}
    failures: list[str] = []
    failed = 0
    for case in cases(groups, dtypes, few_shapes=few_shapes):
        given, reason = _given(case, library)
        reason = reason or (leave_out(case) if leave_out else "") or not_served(name, case)
        if reason:
            left_out.setdefault(reason, []).append(case.name)
            continue
        ran[case.group] += 1
        with_gradient = takes_grad_stats(name) or not case.has_grad_stats
        if not with_gradient:
            left_out.setdefault("no gradient: it takes no grad_stats", []).append(case.name)
        found = _failures(case, given, library, called, name, wrap, with_gradient=with_gradient)
        failed += bool(found)
        failures += found
    names = {reason: tuple(names) for reason, names in left_out.items()}
    report = Report(name, library.name, dict(ran), names)
    if failures:
        lines = [f"{name or 'default'} on {library.name}: {failed} of {ran.total()} cases fail"]
        lines += [f"  {failure}" for failure in failures[:SHOWN]]
        if len(failures) > SHOWN:
            lines.append(f"  ... and {len(failures) - SHOWN} more failures")
        raise AssertionError("\n".join(lines))
    if not ran:
        raise ValueError(f"no case of the grid ran: {report}")
    return report


def _default_backend(name: str) -> str:
    """Return NumPy, or the first library of an implementation that does not take it."""
    taken = _path(name).backends
    return "numpy" if taken is None or "numpy" in taken else str(min(taken))


def _path(name: str) -> Any:
    return importlib.import_module("polyce.implementations.registry").find(name)


def _polyce() -> Any:
    return importlib.import_module("polyce")


def not_served(name: str | None, case: Case) -> str:
    """Return that an implementation serves no such target or stats, or an empty string."""
    path = None if name is None else _path(name)
    if path is not None and path.kinds is not None and case.kind not in path.kinds:
        return f"{name} takes no target of kind {case.kind}"
    if path is not None and path.stats is not None and not path.stats.issuperset(case.stats_names):
        return f"{name} has no stats but {', '.join(sorted(path.stats))}"
    return ""


def takes_grad_stats(name: str | None) -> bool:
    """Tell whether an implementation takes cotangents of stats; for None there is one that does."""
    return name is None or bool(_path(name).takes_grad_stats)


def _polyce_functions() -> Functions:
    polyce = _polyce()
    return Functions(
        polyce.cross_entropy, polyce.cross_entropy_with_grad, polyce.log_prob, polyce.entropy
    )


def _given(case: Case, library: Backend) -> tuple[dict[str, Array], str]:
    """Return a case's arrays in dtypes that the library has, or the reason why it cannot."""
    given = {}
    for key, array in case.arrays.items():
        given[key], reason = library.expressible(array)
        if reason:
            return {}, reason
    return given, ""


def _failures(
    case: Case,
    given: Mapping[str, Array],
    library: Backend,
    functions: Functions,
    name: str | None,
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]] | None,
    *,
    with_gradient: bool,
) -> list[str]:
    """Run one case, and return what is wrong with it."""
    layouts = {
        "input": case.layout, "target": case.target_layout, "sample_weight": case.target_layout,
        "target_probability": case.target_layout,
    }  # fmt: skip
    arrays = {
        key: library.asarray(arrange(array, layouts.get(key, "plain")))
        for key, array in given.items()
    }
    options = dict(case.options) | ({} if name is None else {"implementation": name})
    with_grad = dict(options)
    if "grad_output" not in arrays and case.grad_output is not None:
        with_grad["grad_output"] = case.grad_output

    failures: list[str] = []

    def attempt(step: Callable[[], Any]) -> Any:
        """Return the step's result, or record why there is none and return None."""
        result, failure = outcome(step, library)
        if failure:
            failures.append(f"{case.name}: {failure}")
        return result

    def check_arguments() -> None:
        for key, array in arrays.items():
            if library.to_numpy(array).tobytes() != given[key].tobytes():
                raise AssertionError(f"{key}: the call changed its argument")

    def check(
        function: Callable[..., Any],
        names: Sequence[str],
        arrays: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        """Call a function and check all that it returns, by the names of its results."""
        returned = attempt(partial(call_by_name, function, arrays, options, wrap))
        if returned is None:
            return
        names = (*names, "stats") if case.asks_for_stats else names
        results = (returned,) if len(names) == 1 else returned
        if not isinstance(results, tuple) or len(results) != len(names):
            failures.append(f"{case.name}: {type(returned).__name__} is not ({', '.join(names)})")
            return
        checks = {"grad": _check_grad, "stats": check_stats}
        for what, result in zip(names, results, strict=True):
            attempt(partial(checks.get(what, _check_loss), case, library, result, what))

    forward = {key: array for key, array in arrays.items() if key not in INCOMING}
    check(functions.cross_entropy, ["cross_entropy"], forward, options)
    attempt(check_arguments)
    if failures:
        # The gradient's failures would repeat these, or come from modified arrays.
        return failures
    if with_gradient:
        names = ["loss of cross_entropy_with_grad", "grad"]
        check(functions.cross_entropy_with_grad, names, arrays, with_grad)
        attempt(check_arguments)
    values = {"log_prob": functions.log_prob, "entropy": functions.entropy}
    for what, value in values.items():
        if case.group != "values" or value is None:
            continue
        for expected in expectations(case, what):
            of_value = {"input": arrays["input"]}
            if expected.index is not None:
                of_value["index"] = library.asarray(expected.index)
            more = expected.options | ({} if name is None else {"implementation": name})
            found = attempt(partial(call_by_name, value, of_value, more, wrap))
            if found is not None:
                attempt(partial(_check_value, expected, library, found, what))
        attempt(check_arguments)
    return failures


def outcome(step: Callable[[], Any], library: Backend) -> tuple[Any, str]:
    """Return a step's result and an empty string, or None and what it raised."""
    try:
        with warnings.catch_warnings():
            if library.quiet:
                warnings.simplefilter("error", RuntimeWarning)
            return step(), ""
    except AssertionError as error:
        return None, str(error) or "AssertionError"
    # Whatever it is, one case has failed, and the others still have to run.
    except Exception as error:  # noqa: BLE001
        return None, f"{type(error).__name__}: {error}"


def call_by_name(
    function: Callable[..., Any],
    arrays: Mapping[str, Any],
    options: Mapping[str, Any],
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]] | None,
) -> Any:
    """Call a function with arrays by name; wrap it as a function of the arrays alone.

    With an array named target_probability the target is a `SparseTarget`, with an option named
    teacher_scale it is `TeacherLogits`, or with an array named teacher_weight a `TeacherHead`.
    """
    names = tuple(arrays)

    def of_arrays(*values: Any) -> Any:
        given = dict(zip(names, values, strict=True))
        of_stats = {
            name: given.pop(f"grad_{name}")
            for name in ("lse", "entropy")
            if f"grad_{name}" in given
        }
        more = {"grad_stats": of_stats} if of_stats else {}
        call = dict(options)
        if "target_probability" in given:
            probability = given.pop("target_probability")
            given["target"] = _polyce().SparseTarget(given["target"], probability)
        elif "teacher_scale" in call:
            scale, target = call.pop("teacher_scale"), given["target"]
            given["target"] = _polyce().TeacherLogits(target, scale)
            if "teacher_weight" in given:
                head = given.pop("teacher_weight"), given.pop("teacher_bias", None)
                given["target"] = _polyce().TeacherHead(target, *head, scale)
        return function(**given, **call, **more)

    return (wrap(of_arrays) if wrap else of_arrays)(*arrays.values())


def _check_loss(case: Case, library: Backend, loss: Any, what: str) -> None:
    dtype = case.answer.loss_dtype
    tolerance = loss_tolerance(case.answer, dtype.name, accuracy(dtype.name, library.name))
    compare(_converted(library, loss, what), case.answer.loss, tolerance, dtype=dtype, what=what)


def _check_grad(case: Case, library: Backend, grad: Any, what: str) -> None:
    dtype = case.logits.dtype
    tolerance = grad_tolerance(case.answer, dtype.name, accuracy(dtype.name, library.name))
    compare(_converted(library, grad, what), case.answer.grad, tolerance, dtype=dtype, what=what)


def check_stats(case: Case, library: Backend, stats: Any, what: str) -> None:
    """Check the stats that were asked for, that there are no others, and which rows count."""
    if getattr(stats, "_fields", None) != (*STATS, "valid"):
        raise AssertionError(f"{what}: {type(stats).__name__} is not ({', '.join(STATS)}, valid)")
    exact = case.answer.stats
    arithmetic = np.dtype("float64" if case.answer.loss_dtype == np.float64 else "float32")
    allowed = stats_tolerances(case.answer, accuracy(arithmetic.name, library.name))
    for name, found in zip(stats._fields, stats, strict=True):
        if name not in (*case.stats_names, "valid"):
            if found is not None:
                raise AssertionError(f"{name}: {type(found).__name__} was not asked for")
            continue
        got, want = _converted(library, found, name), getattr(exact, name)
        if name in allowed:
            compare(got, want, allowed[name], dtype=arithmetic, what=name)
        else:
            _check_equal(got, want, name)


def _check_value(expected: Expected, library: Backend, result: Any, what: str) -> None:
    tolerance = expected.tolerance(accuracy(expected.dtype.name, library.name))
    got = _converted(library, result, what)
    compare(got, expected.values, tolerance, dtype=expected.dtype, what=what)


def _check_equal(got: Array, want: Array, what: str) -> None:
    """Raise unless numbers or truth values are the same; integers may have any width."""
    if got.dtype != want.dtype and not (got.dtype.kind == want.dtype.kind == "i"):
        raise AssertionError(f"{what}: dtype {got.dtype}, expected {want.dtype}")
    if got.shape != want.shape:
        raise AssertionError(f"{what}: shape {got.shape}, expected {want.shape}")
    if not np.array_equal(got, want):
        raise AssertionError(f"{what}: got {got.tolist()}, expected {want.tolist()}")


def _converted(library: Backend, result: Any, what: str) -> Array:
    if not library.owns(result):
        raise AssertionError(f"{what}: {type(result).__name__} is not an array of {library.name}")
    return library.to_numpy(result)
