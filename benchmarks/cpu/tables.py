"""Print a run of the CPU benchmark as Markdown."""

from __future__ import annotations

from typing import Any

from .. import tables

# For each column of the table: what is compared, and polyce's contender.
COLUMNS = {
    "forward, NumPy": ("forward", "polyce NumPy"),
    "forward, torch": ("forward", "polyce torch"),
    "with gradient, NumPy": ("gradient", "polyce NumPy"),
    "with gradient, NumPy, `out=`": ("gradient", "polyce NumPy out="),
    "with gradient, torch autograd": ("gradient", "polyce torch"),
}
# What is compared, and the memory operation that bounds it.
BOUNDS = {
    "forward / np.max": ("forward", "polyce NumPy", "np.max"),
    "gradient into out= / np.copyto": ("gradient", "polyce NumPy out=", "np.copyto"),
}


def show(found: dict[str, Any], key: str) -> None:
    """Print all tables, with the medians or the best of the times."""
    print(f"instruction set {found['environment']['instruction set']}")
    tables.print_head(found, key)
    times = tables.by_case(found)
    for dtype, threads in tables.settings(found):
        for huge_pages in (False, True):
            with_what = ", torch with THP_MEM_ALLOC_ENABLE=1" if huge_pages else ""
            print(f"Times as fast as torch eager: {dtype}, {tables.count(threads)}{with_what}\n")
            tables.print_table(
                *against_torch(times, found["shapes"], dtype, threads, huge_pages, key)
            )
    print("Times as long as reading the logits once, and as copying them\n")
    tables.print_table(*bounds(times, found["shapes"], tables.settings(found)))
    print("Growth of the process at its peak, in multiples of the logits\n")
    rows = [row | {"times": f"{row['bytes'] / row['logits']:.2f}"} for row in found["memory"]]
    tables.print_table(*tables.crossed(rows, "what", "times", rows[0]["shape"] if rows else ""))


def against_torch(
    times: tables.Times,
    shapes: dict[str, Any],
    dtype: str,
    threads: int,
    huge_pages: bool,
    key: str,
) -> tables.Table:
    """Compare polyce with torch eager on each shape."""
    rows = []
    for shape in shapes:
        case = (shape, dtype, threads)
        theirs = {
            what: times.get((*case, huge_pages, what, "torch eager"))
            for what in ("forward", "gradient")
        }
        line = [shape]
        for what, contender in COLUMNS.values():
            # NumPy asks for huge pages itself, so it was measured only once.
            own = huge_pages and contender == "polyce torch"
            line.append(tables.faster(theirs[what], times.get((*case, own, what, contender)), key))
        rows.append([*line, tables.seconds(theirs.values(), key)])
    return ["logits", *COLUMNS, "torch eager, forward / with gradient"], rows


def bounds(
    times: tables.Times, shapes: dict[str, Any], cases: list[tuple[str, int]]
) -> tables.Table:
    """Compare polyce with the time it takes to read, and to copy, the logits."""
    rows = []
    for dtype, threads in cases:
        for shape in shapes:
            case = (shape, dtype, threads, False)
            line = [shape, dtype, str(threads)]
            for what, ours, bound in BOUNDS.values():
                own, least = times[*case, what, ours], times[*case, what, bound]
                line.append(f"{own['median_s'] / least['median_s']:.2f}")
            rows.append(line)
    return ["logits", "dtype", "threads", *BOUNDS], rows
