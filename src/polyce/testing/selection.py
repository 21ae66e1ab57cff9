"""A few cases that represent the grid, for libraries that are slow on each."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

from .case import Case


def traits(case: Case) -> set[tuple[str, ...]]:
    """Return what a case tries: each word of its name, and each pair of properties of its call.

    Parameters
    ----------
    case : Case
        A case of the grid.
    """
    words = {(case.group, word) for word in case.name.split("/")}
    properties = {case.kind, *(f"{name}:{array.dtype}" for name, array in case.arrays.items())}
    properties |= {f"{key}:{value}" for key, value in case.options.items() if key != "ignore_index"}
    return words | set(combinations(sorted(properties), 2))


def representative(cases: Iterable[Case], most: int | None = None) -> list[Case]:
    """Choose cases that between them have every trait that any of the cases has.

    Parameters
    ----------
    cases : iterable of Case
        What to choose from.
    most : int, optional
        Stop after this many; cases with the most traits not seen before come first.

    Returns
    -------
    list of Case
        Always the same for the same cases.
    """
    left = {case: traits(case) for case in cases}
    wanted = set().union(*left.values())
    chosen: list[Case] = []
    while wanted and (most is None or len(chosen) < most):
        best = max(left, key=lambda case: len(left[case] & wanted))
        wanted -= left.pop(best)
        chosen.append(best)
    return chosen
