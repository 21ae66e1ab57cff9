"""A score in tables, JSON and CSV."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polyce.score.record import Score


def class_lines(table: Any) -> Iterator[str]:
    """Return the lines of the table of classes."""
    names = table.dtype.names
    yield "  ".join(f"{name:>9}" for name in names)
    for row in table:
        cells = (row[name].item() for name in names)
        yield "  ".join(
            f"{cell:>9}" if isinstance(cell, int) else f"{cell:>9.4g}" for cell in cells
        )


def left_out_lines(found: Score) -> Iterator[str]:
    """Return a sentence about each kind of rows that are left out and should not be there."""
    kinds = (
        (found.undefined, found.first_undefined, "no softmax (nan, +inf or nothing but -inf)"),
        (found.bad_labels, found.first_bad_label, "a label that is not a class"),
    )
    for count, place, kind in kinds:
        if count:
            rows = "row has" if count == 1 else "rows have"
            yield f"{count} {rows} {kind}, the first at {place}: left out of every figure"


def write_json(found: Score, path: Path) -> None:
    """Write the figures; null for those that are nan or infinite, which JSON lacks."""
    written: dict[str, Any] = _finite(found.as_dict())
    if found.by_class is not None:
        names = found.by_class.dtype.names
        rows = (dict(zip(names, row.item(), strict=True)) for row in found.by_class)
        written["by_class"] = [_finite(row) for row in rows]
    path.write_text(json.dumps(written, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_csv(found: Score, path: Path) -> None:
    """Write the figures as a line of names and a line of numbers."""
    values = found.as_dict()
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([values.keys(), values.values()])


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
