"""Tables about implementations, array libraries and tolerances, read from the code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from polyce.implementations import registry
from polyce.implementations.contract import Implementation
from polyce.testing import ACCURACY, BACKENDS, get_backend


def rows(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def support() -> str:
    """Return a row for each implementation: what it declares, and whether it can run here."""
    head = (
        *("", "libraries", "devices", "dtypes of the logits", "targets", "options", "stats"),
        "here",
    )
    return rows(head, map(_support_row, registry.TABLE))


def _support_row(row: Implementation) -> list[str]:
    declared = (row.backends, row.devices, row.dtypes, row.kinds, row.options, row.stats)
    cells = ["all" if served is None else ", ".join(sorted(served)) for served in declared]
    return [f"`{row.name}`", *cells, row.unavailable() or "yes"]


def libraries() -> str:
    """Return a row for each array library that the conformance grid knows."""
    head = ("", "dtypes of the logits", "dtypes of class indices", "left out")
    return rows(head, map(_library_row, BACKENDS))


def _library_row(name: str) -> list[str]:
    try:
        backend = get_backend(name)
    except ImportError:
        return [name, "not installed where this page was built", "", ""]
    left_out: dict[str, list[str]] = {}
    for dtype, why in backend.notes.items():
        left_out.setdefault(why, []).append(dtype)
    notes = "; ".join(f"{', '.join(dtypes)}: {why}" for why, dtypes in left_out.items())
    return [name, ", ".join(backend.floats), ", ".join(backend.integers), notes]


def tolerances() -> str:
    """Return `polyce.testing.ACCURACY` as a table, and one more for each group of fields in it."""
    rules = {key: asdict(rule) for key, rule in ACCURACY.items()}
    parts = [_rules(rules)]
    for name, value in next(iter(rules.values())).items():
        if isinstance(value, dict):
            group = {key: rule[name] for key, rule in rules.items()}
            parts.append(f"`{name}`:\n\n{_rules(group)}")
    return "\n\n".join(parts)


def _rules(rules: Mapping[tuple[str | None, str], Mapping[str, Any]]) -> str:
    names = [name for name, value in next(iter(rules.values())).items() if type(value) is not dict]
    body = [
        [library or "all others", dtype, *(_number(rule[name]) for name in names)]
        for (library, dtype), rule in rules.items()
    ]
    return rows(("library", "result dtype", *(f"`{name}`" for name in names)), body)


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
