"""Print a run of the benchmark of linear_cross_entropy as Markdown."""

from __future__ import annotations

import itertools
from typing import Any

from ..measure import Row
from ..tables import Table, by_case, count, crossed, print_head, print_table, settings, text
from .work import CONTENDERS, PRODUCTS, THREADS

UNIT = "torch"
WHATS = {"gradient": "loss and gradients", "forward": "loss"}


def beyond(row: Row) -> float:
    """Return the megabytes that a call took beside its inputs and gradients."""
    return (row["bytes"] - row["gradients"]) / 1e6


def show(found: dict[str, Any], key: str) -> None:
    """Print all tables, with the medians or the best of the times."""
    print_head(found, key)
    rounds = sorted({row["rounds"] for row in found["times"]})
    print(f"They are of {rounds[0]} to {rounds[-1]} rounds.")
    print("Shapes are tokens, features and classes.\n")
    for (dtype, threads), (what, title) in itertools.product(settings(found), WHATS.items()):
        if any((row["dtype"], row["what"]) == (dtype, what) for row in found["times"]):
            print(f"Time / time of {UNIT}: {title}, {dtype}, {count(threads)}\n")
            print_table(*against_torch(found, dtype, what, key))
    if any(row["contender"] == PRODUCTS for row in found["times"]):
        print(f"Time on NumPy / time of its products alone, {count(THREADS)}\n")
        print_table(*against_products(found, key))
    for (dtype, _), (what, title) in itertools.product(settings(found), WHATS.items()):
        rows = [
            row | {"MB": f"{beyond(row):.0f}"}
            for row in found["memory"]
            if (row["dtype"], row["what"]) == (dtype, what)
        ]
        if rows:
            print(f"MB at the peak beside inputs and gradients: {title}, {dtype}\n")
            print_table(*crossed(rows, "shape", "MB", ""))


def against_torch(found: dict[str, Any], dtype: str, what: str, key: str) -> Table:
    """Return each contender's time on each shape as a multiple of torch's, and torch's own."""
    times = by_case(found["times"])
    names = [
        name
        for name in CONTENDERS
        if name not in (UNIT, PRODUCTS)
        and any((dtype, what, name) == (k[1], k[3], k[4]) for k in times)
    ]
    lines = []
    for shape in found["shapes"]:
        case = (shape, dtype, THREADS, what)
        one = times.get((*case, UNIT))
        line = [ratio(times.get((*case, name)), one, key) for name in names]
        lines.append([shape, *line, text("_s", one and one[key])])
    return ["shape", *names, UNIT], lines


def against_products(found: dict[str, Any], key: str) -> Table:
    """Return NumPy's times as multiples of those of the products alone, and these."""
    times = by_case(found["times"])
    names = [
        name
        for name, contender in CONTENDERS.items()
        if contender.library == "numpy" and contender.has_loss
    ]
    lines = []
    for case, one in times.items():
        if case[-1] == PRODUCTS:
            shape, dtype, _, what, _ = case
            line = [ratio(times.get((*case[:-1], name)), one, key) for name in names]
            lines.append([shape, dtype, WHATS[what], *line, text("_s", one[key])])
    return ["shape", "dtype", "what", *names, PRODUCTS], lines


def ratio(row: Row | None, one: Row | None, key: str) -> str:
    """Write a time as a multiple of another."""
    return f"{row[key] / one[key]:.2f}" if row and one else ""
