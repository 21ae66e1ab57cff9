"""Tables of measurements: for a terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .measure import Row

# By shape, dtype, threads, what and contender.
Times = dict[tuple[Any, ...], Row]
Table = tuple[list[str], list[list[str]]]


def show(rows: list[Row]) -> None:
    """Print rows as a table, with readable units."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = [[column.removesuffix("_s").replace("_", " ") for column in columns]]
    table += [[text(column, row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    print()


def text(column: str, value: Any) -> str:
    """Write a cell."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if column.endswith("_s"):
        for unit, factor in (("s", 1.0), ("ms", 1e3)):
            if value * factor >= 1.0:
                return f"{value * factor:.3g} {unit}"
        return f"{value * 1e6:.3g} µs"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Print a table in Markdown."""
    for line in [header, ["---"] * len(header), *rows]:
        print("|", " | ".join(line), "|")
    print()


def print_head(found: dict[str, Any], key: str) -> None:
    """Print what the times depend on, and whether the tables show medians or bests."""
    facts = found["environment"]
    versions = ", ".join(" ".join(each) for each in facts["versions"].items())
    loads = [load for load in facts["loads"] if load is not None] or ["unknown"]
    print(f"{facts['processor']}, load {min(loads)} to {max(loads)}; {versions}")
    if facts.get("OPENBLAS_CORETYPE"):
        print(f"NumPy multiplies as for a {facts['OPENBLAS_CORETYPE']} (OPENBLAS_CORETYPE).")
    print(f"Times are the {'bests' if key == 'best_s' else 'medians'}.\n")


def by_case(rows: Iterable[Row]) -> Times:
    """Return the times by what they are of."""
    keys = ("shape", "dtype", "threads", "what", "contender")
    return {tuple(row[key] for key in keys): row for row in rows}


def settings(found: dict[str, Any]) -> list[tuple[str, int]]:
    """Return the dtypes and numbers of threads of a run."""
    return list(dict.fromkeys((row["dtype"], row["threads"]) for row in found["times"]))


def count(threads: int) -> str:
    """Write a number of threads."""
    return "1 thread" if threads == 1 else f"{threads} threads"


def seconds(rows: Iterable[Row | None], key: str) -> str:
    """Write the seconds of several rows side by side."""
    return " / ".join(text("_s", row and row[key]) for row in rows)


def crossed(rows: Sequence[Row], across: str, value: str, corner: str) -> Table:
    """Return a table with a line for each contender and a column for each value of `across`."""
    cells = {(row["contender"], row[across]): row[value] for row in rows}
    columns = list(dict.fromkeys(column for _, column in cells))
    names = dict.fromkeys(name for name, _ in cells)
    lines = [[name, *(cells.get((name, column), "") for column in columns)] for name in names]
    return [corner, *(columns or ["not told by this system"])], lines
