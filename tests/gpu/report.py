"""The closing table of a run on a GPU: at most 40 lines, of which the last is the verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from .ledger import CUT_OFF, NO_TIME, NOT_HERE, OUTCOMES, RIGHT, WRONG, Row

MOST_LINES = 40
_WIDTH = 200
# Lines at most for what is wrong, for reasons why something is not here, and for times.
_WRONG, _NOT_HERE, _TIMES = 6, 4, 12


def table(found: Mapping[str, Sequence[Row]], seconds: float) -> list[str]:
    """Return the lines."""
    lines = [*head(found), *counts(found)]
    lines += reasons(found, WRONG, "wrong", _WRONG)
    lines += reasons(found, NOT_HERE, "reason", _NOT_HERE)
    last = verdict(found, seconds)
    lines += times(found, min(_TIMES, MOST_LINES - len(lines) - 1))
    return [*(line[:_WIDTH] for line in lines), last]


def head(found: Mapping[str, Sequence[Row]]) -> list[str]:
    """Return what the numbers depend on, if a part has told."""
    for row in every(found, "header"):
        device, versions = row["device"], row["versions"]
        name = device.get("name", device.get("not here"))
        power = row["clocks and power"]
        told = ", ".join(" ".join(map(str, each)) for each in versions.items())
        copy = f"copies {row['copy']['gb_per_s']:.4g} GB/s"
        driver = power.get("driver_version", "unknown")
        return [f"{row['date']}, {name}, driver {driver}, {copy}, commit {row['commit']}", told]
    return []


def every(found: Mapping[str, Sequence[Row]], check: str) -> list[Row]:
    """Return all rows of a kind that were right."""
    rows = (row for part in found.values() for row in part)
    return [row for row in rows if row.get("check") == check and row["status"] == RIGHT]


def counts(found: Mapping[str, Sequence[Row]]) -> list[str]:
    """Return how many steps of each part came to which outcome, and how long they took."""
    lines = [f"| part | {' | '.join(OUTCOMES)} | seconds |", "|---" * (len(OUTCOMES) + 2) + "|"]
    for part, rows in found.items():
        ended = [row for row in rows if "ends" in row]
        count = Counter(row["status"] for row in ended)
        took = sum(row.get("took_s", 0.0) for row in ended)
        numbers = " | ".join(str(count[outcome] or "") for outcome in OUTCOMES)
        lines.append(f"| {part} | {numbers} | {took:.1f} |")
    return lines


def reasons(found: Mapping[str, Sequence[Row]], status: str, key: str, most: int) -> list[str]:
    """Return the rows of an outcome, those with the same reason together."""
    told: dict[tuple[str, str], list[str]] = {}
    for part, rows in found.items():
        for row in rows:
            if row["status"] == status:
                reason = " ".join(str(row.get(key, "")).split())
                told.setdefault((part, reason), []).append(row["step"])
    lines = []
    for (part, reason), steps in told.items():
        more = f" and {len(steps) - 1} more" if len(steps) > 1 else ""
        lines.append(f"{status}: {part}: {steps[0]}{more}: {reason}")
    hidden = len(lines) - most
    return lines if hidden <= 0 else [*lines[: most - 1], f"{status}: {hidden + 1} reasons more"]


def times(found: Mapping[str, Sequence[Row]], most: int) -> list[str]:
    """Return polyce's times beside its peers'."""
    of_case: dict[str, dict[str, Row]] = {}
    for part, rows in found.items():
        for row in rows:
            if row["status"] != RIGHT or "median_s" not in row:
                continue
            dims = "x".join(map(str, row.get("dims", ())))
            parts = (part, dims, row.get("dtype"), row.get("what"), row["check"])
            case = " ".join(text for text in parts if text and text != "times")
            of_case.setdefault(case, {})[row["contender"]] = row
    lines = []
    for case, rows in of_case.items():
        ours = rows.pop("polyce", None)
        if ours is None:
            continue
        told = [f"{case}: {_microseconds(ours['median_s'])} µs"]
        if "of_copy" in ours:
            told.append(f"{ours['of_copy']:.2f} of a copy")
        told += [f"{name} {_microseconds(ours[key])}" for name, key in _CLOCKS if key in ours]
        told += [f"{name} {_microseconds(row['median_s'])}" for name, row in rows.items()]
        lines.append(", ".join(told))
    return lines if len(lines) <= most else [*lines[: most - 1], "more times are in the files"]


_CLOCKS = (("with the host", "whole_s"), ("as a graph", "graph_s"))


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.4g}"


def verdict(found: Mapping[str, Sequence[Row]], seconds: float) -> str:
    """Return the last line."""
    count = Counter(row["status"] for rows in found.values() for row in rows if "ends" in row)
    left_out = count[NO_TIME] + count[CUT_OFF]
    within = f"; {left_out} steps did not fit into {seconds:g} s" if left_out else ""
    if count[WRONG]:
        return f"WRONG: {count[WRONG]} of {count[WRONG] + count[RIGHT]} steps are wrong{within}"
    if not count[RIGHT]:
        return f"NOTHING RAN: {count[NOT_HERE]} steps are not for this machine{within}"
    return f"RIGHT: {count[RIGHT]} steps, {count[NOT_HERE]} not for this machine{within}"
