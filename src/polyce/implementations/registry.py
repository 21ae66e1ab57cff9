"""The implementations, in order of preference, and which of them serves a problem.

To add one, write a file or a folder here that ends in its `PATH`, and add that to `TABLE`.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from polyce.arrays.plain import is_compiling
from polyce.call.problem import Problem
from polyce.formula import rows
from polyce.implementations import reference
from polyce.implementations.contract import Implementation, OfParts
from polyce.implementations.cupy import path as cupy
from polyce.implementations.dask import path as dask
from polyce.implementations.native import path as native
from polyce.implementations.native.core import warn_of_missing_core
from polyce.implementations.triton import path as triton

VARIABLE = "POLYCE_IMPLEMENTATION"


def select_within(problem: Problem) -> Implementation:
    """Choose the implementation of a part of a call, where `use` does not apply."""
    return _unforced(problem, preference())


def select_of_parts(problem: Problem) -> OfParts:
    """Choose what computes rows whose classes lie in several parts, each as this problem says."""
    preferred = preference()
    named = () if preferred is None else (preferred,)
    for path in (*named, *TABLE):
        found = path.of_parts
        if found is not None and path.serves(problem) and _can_trace(found, problem):
            return found
    raise ValueError("no implementation can read parts of these rows; see polyce.explain")


def _can_trace(of_parts: OfParts, problem: Problem) -> bool:
    """Tell whether torch.compile, if it traces this call, can trace what reads its parts.

    Kernels of whole calls are operators in the graph; those of parts are not.
    """
    return of_parts.is_traceable or not problem.is_compiling


TABLE: tuple[Implementation, ...] = (
    dask.path(dask.Select(select_within, select_of_parts)),
    native.PATH,
    triton.PATH,
    cupy.PATH,
    reference.PATH,
)

_forced: ContextVar[str | None] = ContextVar("polyce.use", default=None)
# The same for code that torch.compile traces: it cannot read a context variable, but it can read a
# thread-local and recompiles when that has changed.
_forced_in_graphs = threading.local()


@contextlib.contextmanager
def use(implementation: str) -> Iterator[None]:
    """Run every call inside the `with` block, of this thread or task, by one implementation.

    Parameters
    ----------
    implementation : str
        Name of the implementation, as `polyce.explain` lists them. The innermost block wins;
        the argument ``implementation=`` of a call overrides it.

    Raises
    ------
    ValueError
        If no implementation has that name; and by the calls inside that it cannot serve.

    Notes
    -----
    A function compiled by ``torch.compile`` sees the thread, not the task: where tasks of one
    thread overlap, it takes the choice of the task that entered or left a block last.

    Examples
    --------
    >>> import numpy as np
    >>> import polyce
    >>> with polyce.use("reference"):
    ...     float(polyce.cross_entropy(np.zeros((2, 4)), np.array([0, 3])))
    1.3862943611198906
    """
    find(implementation)
    if is_compiling():
        before = getattr(_forced_in_graphs, "name", None)
        _forced_in_graphs.name = implementation
        try:
            yield
        finally:
            _forced_in_graphs.name = before
        return
    before = _forced.get()
    _force(implementation)
    try:
        yield
    finally:
        _force(before)


def _force(name: str | None) -> None:
    # No token to reset: a generator may be closed in another context than it was started in.
    _forced.set(name)
    _forced_in_graphs.name = name


def forced_in_graphs() -> str | None:
    """Return the choice of the innermost `use`, as torch.compile can read it."""
    return getattr(_forced_in_graphs, "name", None)


def _forced_while_tracing(problem: Problem) -> str | None:
    """Return the choice of the innermost `use` for arrays that may be traced."""
    if problem.backend == "torch" and is_compiling():
        return forced_in_graphs()
    return _forced.get()


def find(name: str) -> Implementation:
    """Return an implementation by name; ValueError if there is none."""
    found = _named(name)
    if found is None:
        raise ValueError(
            f"implementation must be one of {_known()}, got {name!r}; see polyce.explain"
        )
    return found


def _named(name: str) -> Implementation | None:
    for path in TABLE:
        if path.name == name:
            return path
    return None


def _known() -> str:
    return ", ".join(path.name for path in TABLE)


def select(problem: Problem, name: str | None = None) -> Implementation:
    """Choose the implementation of a call.

    The argument decides, else the innermost `use`; both raise if that path cannot serve. Else the
    path that the environment variable names, if it can serve, else the first in the table that can.
    """
    preferred = preference()
    if name is None:
        name = _forced_for(problem)
    if name is None:
        return _unforced(problem, preferred)
    chosen = find(name)
    _check(chosen, chosen.reasons(problem))
    return chosen


def select_of_shard(problem: Problem, name: str | None = None) -> OfParts:
    """Choose what computes the part of the rows that a process holds; who decides is as above."""
    if name is None:
        name = _forced_for(problem)
    if name is None:
        return select_of_parts(problem)
    chosen = find(name)
    _check(chosen, chosen.reasons(problem))
    if chosen.of_parts is None:
        raise _refusal(chosen, "it reads whole rows only")
    if not _can_trace(chosen.of_parts, problem):
        raise _refusal(chosen, "torch.compile cannot trace how it reads classes in parts")
    return chosen.of_parts


def _forced_for(problem: Problem) -> str | None:
    """Return the choice of the innermost `use`."""
    return _forced.get() if problem.is_concrete else _forced_while_tracing(problem)


def _check(chosen: Implementation, reasons: tuple[str, ...]) -> None:
    if reasons:
        raise _refusal(chosen, *reasons)


def _refusal(chosen: Implementation, *reasons: str) -> ValueError:
    return ValueError(
        f"implementation {chosen.name!r} cannot serve this call: {'; '.join(reasons)}; "
        "leave implementation at None to run one that can"
    )


def select_log_softmax(problem: Problem) -> Callable[..., Any]:
    """Choose what computes log(softmax(logits)): the first path that has it and can serve.

    A path that `use` or the environment variable names comes before the others.
    """
    preferred = preference()
    wanted = _forced_for(problem)
    if wanted is None and preferred is not None:
        wanted = preferred.name
    named = [path for path in TABLE if path.name == wanted]
    for path in (*named, *TABLE):
        if path.log_softmax is not None and path.serves(problem):
            return path.log_softmax
    return rows.log_softmax


def is_path_named() -> bool:
    """Tell whether `use` or the environment variable names a path."""
    return _forced.get() is not None or preference() is not None


def preference() -> Implementation | None:
    """Return the path that the environment variable names, None if it is not set."""
    preferred = os.environ.get(VARIABLE)
    if not preferred:
        return None
    found = _named(preferred)
    if found is None:
        raise ValueError(
            f"{VARIABLE} must be one of {_known()}, got {preferred!r}; leave it out for the first "
            "of them that can serve"
        )
    return found


# The choice for problems met before: asking every path takes as long as a small call.
_MOST_KNOWN = 1024
_choices: dict[Problem, tuple[tuple[Implementation, ...], Implementation]] = {}


def _unforced(problem: Problem, preferred: Implementation | None) -> Implementation:
    if preferred is not None and not preferred.reasons(problem):
        return preferred
    if not problem.is_concrete:
        return _first(problem)
    table, chosen = _choices.get(problem, (None, None))
    if chosen is None or table is not TABLE:
        if len(_choices) >= _MOST_KNOWN:
            _choices.clear()
        chosen = _first(problem)
        if chosen is reference.PATH and native.lacks_only_the_core(problem):
            warn_of_missing_core()
        _choices[problem] = TABLE, chosen
    return chosen


def _first(problem: Problem) -> Implementation:
    for path in TABLE:
        if path.serves(problem):
            return path
    raise ValueError("no implementation can serve this call; see polyce.explain for the reasons")
