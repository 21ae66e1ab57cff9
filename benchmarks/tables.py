"""Print a run of the CPU benchmark as Markdown."""

from __future__ import annotations

from typing import Any

import measure
from measure import Row

# Column of the table: what is compared, and which contender of polyce.
COLUMNS = {
    "forward, NumPy": ("forward", "polyce NumPy"),
    "forward, torch": ("forward", "polyce torch"),
    "with gradient, NumPy": ("gradient", "polyce NumPy"),
    "with gradient, NumPy, `out=`": ("gradient", "polyce NumPy out="),
    "with gradient, torch autograd": ("gradient", "polyce torch"),
}

Times = dict[tuple[Any, ...], Row]


def show(found: dict[str, Any], key: str) -> None:
    """Print all tables, with the medians or the bests of the times."""
    facts = found["environment"]
    versions = ", ".join(" ".join(each) for each in facts["versions"].items())
    load = facts.get("load before the run", "unknown")
    print(
        f"{facts['processor']}, {facts['instruction set']}, load before the run {load}; {versions}"
    )
    print(f"Times are the {'bests' if key == 'best_s' else 'medians'}.\n")
    times = by_case(found)
    for dtype, threads in settings(found):
        for huge_pages in (False, True):
            with_what = ", torch with THP_MEM_ALLOC_ENABLE=1" if huge_pages else ""
            print(f"Times as fast as torch eager: {dtype}, {count(threads)}{with_what}\n")
            print_table(*against_torch(times, found["shapes"], dtype, threads, huge_pages, key))
    print("Times as long as reading the logits once, and as copying them\n")
    print_table(*bounds(found))
    print("Growth of the process at its peak, in multiples of the logits\n")
    print_table(*memory(found))
    print("Largest error of a float32 row loss, in units in the last place\n")
    print_table(*errors(found))


def by_case(found: dict[str, Any]) -> Times:
    """Give the times by shape, dtype, threads, huge pages, what and contender."""
    keys = ("shape", "dtype", "threads", "huge_pages", "what", "contender")
    return {tuple(row[key] for key in keys): row for row in found["times"]}


def settings(found: dict[str, Any]) -> list[tuple[str, int]]:
    """Give the dtypes and numbers of threads of a run."""
    return list(dict.fromkeys((row["dtype"], row["threads"]) for row in found["times"]))


def count(threads: int) -> str:
    """Write a number of threads."""
    return "1 thread" if threads == 1 else f"{threads} threads"


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Print a table in Markdown."""
    for line in [header, ["---"] * len(header), *rows]:
        print("|", " | ".join(line), "|")
    print()


def against_torch(
    times: Times, shapes: dict[str, Any], dtype: str, threads: int, huge_pages: bool, key: str
) -> tuple[list[str], list[list[str]]]:
    """Compare polyce with torch eager on each shape, in words too where polyce is slower."""
    rows = []
    for shape in shapes:
        line = [shape]
        for what, contender in COLUMNS.values():
            theirs = times.get((shape, dtype, threads, huge_pages, what, "torch eager"))
            # NumPy asks for huge pages itself, so it was measured only once.
            own = huge_pages and contender == "polyce torch"
            ours = times.get((shape, dtype, threads, own, what, contender))
            line.append(faster(theirs, ours, key))
        theirs = [
            times.get((shape, dtype, threads, huge_pages, what, "torch eager"))
            for what in ("forward", "gradient")
        ]
        line.append(" / ".join(measure.text("_s", row and row[key]) for row in theirs))
        rows.append(line)
    return ["logits", *COLUMNS, "torch eager, forward / with gradient"], rows


def faster(theirs: Row | None, ours: Row | None, key: str) -> str:
    """Say how many times as fast polyce is."""
    if theirs is None or ours is None:
        return ""
    ratio = theirs[key] / ours[key]
    return f"{ratio:.3g}" if ratio >= 1 else f"{ratio:.2f}, polyce is slower"


def bounds(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Compare polyce with what it takes to read, and to copy, the logits."""
    names = [name for name in found["ratios"][0] if "/" in name]
    rows = [
        [row["shape"], row["dtype"], str(row["threads"]), *(f"{row[name]:.2f}" for name in names)]
        for row in found["ratios"]
    ]
    return ["logits", "dtype", "threads", *names], rows


def memory(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Give the growth of each contender."""
    grown = {
        (row["contender"], row["what"]): f"{row['bytes'] / row['logits']:.2f}"
        for row in found["memory"]
    }
    rows = [
        [name, grown.get((name, "forward"), ""), grown.get((name, "gradient"), "")]
        for name in dict.fromkeys(name for name, _ in grown)
    ]
    shape = found["memory"][0]["shape"] if found["memory"] else "not told by this system"
    return [shape, "forward", "with gradient"], rows


def errors(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Give the largest errors, of random / confident rows."""
    largest = {
        (row["shape"], row["contender"], row["rows"]): f"{row['max_ulp']:.2g}"
        for row in found["errors"]
        if row["dtype"] == "float32"
    }
    names = list(dict.fromkeys(name for _, name, _ in largest))
    rows = [
        [shape]
        + [
            f"{largest[shape, name, 'random']} / {largest[shape, name, 'confident']}"
            for name in names
        ]
        for shape in found["shapes"]
    ]
    return ["random / confident rows", *names], rows
