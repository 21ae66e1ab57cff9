"""Print a run of the CPU benchmark as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .. import tables
from ..tables import Table, Times
from .peers import FLOOR, ON_HUGE_PAGES

# Less than this part of the other's speed is called slower.
SLOWER = 0.97
WHATS = {"forward": "forward", "gradient": "with gradient"}


class Column(NamedTuple):
    """What is compared: a contender of polyce, and one that takes so many times as long."""

    title: str
    threads: int
    what: str
    ours: str
    theirs: str


# Each contender of polyce, on so many threads.
OURS = {
    "forward, NumPy": ("forward", "polyce NumPy"),
    "forward, torch": ("forward", "polyce torch"),
    "with gradient, NumPy": ("gradient", "polyce NumPy"),
    "with gradient, NumPy, `out=`": ("gradient", "polyce NumPy out="),
    "with gradient, torch autograd": ("gradient", "polyce torch"),
    "in place, torch autograd": ("gradient", "polyce in place"),
}
# What is compared, and the memory operation that bounds it.
BOUNDS = {
    "forward, NumPy": ("forward", "polyce NumPy", FLOOR),
    "forward, torch": ("forward", "polyce torch", FLOOR),
    "gradient into `out=`": ("gradient", "polyce NumPy out=", FLOOR),
    "with gradient, torch autograd": ("gradient", "polyce torch", FLOOR),
    "forward / np.max": ("forward", "polyce NumPy", "np.max"),
    "gradient into `out=` / np.copyto": ("gradient", "polyce NumPy out=", "np.copyto"),
}


def show(found: dict[str, Any], key: str) -> None:
    """Print all tables, with the medians or the best of the times."""
    print(f"instruction set {found['environment']['instruction set']}")
    tables.print_head(found, key)
    times = calmest(found)
    again = sum(row["attempt"] > 0 for row in times.values())
    print(f"{again} of {len(times)} times are of a later attempt than the first.")
    others = [row["others"] for row in times.values() if row["others"] is not None]
    if others:
        print(f"Other programs kept at most {max(others):.2f} processors busy meanwhile.")
    print()
    settings = tables.settings(found)
    for dtype in dict.fromkeys(dtype for dtype, _ in settings):
        for title, columns in comparisons(sorted({threads for _, threads in settings})).items():
            table = against(times, found["shapes"], dtype, columns, key)
            if table is not None:
                print(f"Times as fast as {title}: {dtype}\n")
                tables.print_table(*table)
    for dtype, threads in settings:
        print(f"Times as long as {FLOOR} of the logits: {dtype}, {tables.count(threads)}\n")
        tables.print_table(*beside_bounds(times, found["shapes"], dtype, threads, key))
    print("Growth of the process at its peak, in multiples of the logits\n")
    rows = [
        row
        | {"times": f"{row['bytes'] / row['logits']:.2f}"}
        | {"case": f"{row['shape']}, {WHATS[row['what']]}"}
        for row in found["memory"]
    ]
    tables.print_table(*tables.crossed(rows, "case", "times", ""))


def calmest(found: dict[str, Any]) -> Times:
    """Return the times by what they are of, each from the attempt that was disturbed least."""
    # The last of a kind is kept.
    return tables.by_case(sorted(found["times"], key=lambda row: -row["unrest"]))


def comparisons(counts: Sequence[int]) -> dict[str, list[Column]]:
    """Return the columns of each table by what polyce is compared with."""

    def across(ours: str, theirs: str) -> list[Column]:
        return [
            Column(f"{tables.count(threads)}, {title}", threads, what, ours, theirs)
            for threads in counts
            for what, title in WHATS.items()
        ]

    of_all = {
        f"torch eager, {tables.count(threads)}": [
            Column(title, threads, *each, "torch eager") for title, each in OURS.items()
        ]
        for threads in counts
    }
    huge = across(ON_HUGE_PAGES["polyce torch"], ON_HUGE_PAGES["torch eager"])
    return {
        "torch eager, on its tensors": across("polyce torch", "torch eager"),
        **of_all,
        "torch eager, both with THP_MEM_ALLOC_ENABLE=1": huge,
        "torch compiled, both": across("polyce compiled", "torch compiled"),
        "torch eager, the reference": across("polyce reference", "torch eager"),
        "jax, both under jit": across("polyce jax", "jax jit"),
    }


def against(
    times: Times, shapes: Iterable[str], dtype: str, columns: Sequence[Column], key: str
) -> Table | None:
    """Compare polyce with another on each shape, and tell what it comes to."""
    lines: list[list[str]] = []
    ratios: dict[Column, list[float]] = {column: [] for column in columns}
    for shape in shapes:
        line, theirs, spreads = [shape], {}, [0.0]
        for column in columns:
            case = (shape, dtype, column.threads, column.what)
            one, own = times.get((*case, column.theirs)), times.get((*case, column.ours))
            line.append("")
            if one and own:
                ratios[column].append(one[key] / own[key])
                line[-1] = written(ratios[column][-1])
                theirs[column.threads, column.what] = one
                spreads += [one["spread"], own["spread"]]
        if theirs:
            lines.append(
                [*line, tables.seconds(theirs.values(), key), f"{100 * max(spreads):.0f} %"]
            )
    if not lines:
        return None
    means = [
        f"{statistics.geometric_mean(found):.2f}" if found else "" for found in ratios.values()
    ]
    slower = [
        f"{sum(ratio < SLOWER for ratio in found)} of {len(found)}" for found in ratios.values()
    ]
    lines += [
        ["geometric mean", *means, "", ""],
        ["slower by more than 3 %", *slower, "", ""],
    ]
    titles = [column.title for column in columns]
    return ["logits", *titles, f"{columns[0].theirs} takes", "spread, at most"], lines


def written(ratio: float) -> str:
    """Write how many times as fast polyce is, in words too where it is slower."""
    number = f"{ratio:.2f}" if ratio < 10 else f"{ratio:.3g}"
    return number if ratio >= SLOWER else f"{number}, slower"


def beside_bounds(times: Times, shapes: Iterable[str], dtype: str, threads: int, key: str) -> Table:
    """Compare polyce with one exponential of each logit, and with reading and copying them."""
    lines = []
    for shape in shapes:
        case = (shape, dtype, threads)
        line = [shape, tables.seconds([times.get((*case, "forward", FLOOR))], key)]
        for what, ours, bound in BOUNDS.values():
            own, least = times.get((*case, what, ours)), times.get((*case, what, bound))
            line.append(f"{own[key] / least[key]:.2f}" if own and least else "")
        lines.append(line)
    return ["logits", FLOOR, *BOUNDS], lines
