"""Print a run of the GPU benchmark as Markdown."""

from __future__ import annotations

from collections import Counter
from typing import Any

from gpu.ledger import NOT_HERE, RIGHT, WRONG

from ..measure import Row
from ..tables import print_table, text
from .timing import PASSES, TARGET, TARGET_CLASSES

PEERS = (
    *("torch eager", "torch compiled", "liger", "quack"),
    *("reference", "cupyx log_softmax"),
)
_SHOWN = 300


def show(found: dict[str, Any]) -> None:
    """Print the main results; the JSON file has the rest."""
    head(found["header"])
    parts = found["parts"]
    statuses = (RIGHT, WRONG, NOT_HERE)
    counted = {part: Counter(row["status"] for row in rows) for part, rows in parts.items()}
    print_table(
        ["part", *statuses],
        [[part, *(str(count[status]) for status in statuses)] for part, count in counted.items()],
    )
    listed("Wrong", WRONG, "wrong", parts)
    if "times" in parts:
        times(parts["times"])
        host(parts["times"])
    if "first calls" in parts:
        first_calls(parts["first calls"])
    if "sweep" in parts:
        sweep(parts["sweep"])
    listed("Not here", NOT_HERE, "reason", parts)
    wrong = sum(count[WRONG] for count in counted.values())
    print(f"{wrong} wrong" if wrong else "nothing is wrong")


def head(header: dict[str, Any]) -> None:
    """Print what the numbers depend on."""
    device = header["device"]
    name = device.get("name", device.get("not here"))
    versions = ", ".join(" ".join(each) for each in header["versions"].items())
    print(f"{header['date']}, {name}, commit {header['commit']}; {versions}\n")
    if header["rehearsal"]:
        print("A rehearsal on a CPU: times and launches say nothing about a device.\n")
    print(f"Clocks and power: {header['clocks and power']}\n")
    if copy := header.get("copy"):
        print(f"A copy of {copy['bytes'] / 2e9:.3g} GB moves {copy['gb_per_s']:.4g} GB/s.\n")


def listed(title: str, status: str, key: str, parts: dict[str, list[Row]]) -> None:
    """Print what failed or was left out, grouped by reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for part, rows in parts.items():
        for row in rows:
            if row["status"] == status:
                what = (row["check"], row.get("contender"), row.get("what"))
                name = " ".join(text for text in what if text)
                reasons.setdefault((part, str(row.get(key))), []).append(name)
    if not reasons:
        return
    print(f"{title}\n")
    for (part, reason), names in reasons.items():
        unique = list(dict.fromkeys(names))
        others = f" and {len(unique) - 3} more" if len(unique) > 3 else ""
        print(f"- {part}: {'; '.join(unique[:3])}{others}: {' '.join(reason.split())[:_SHOWN]}")
    print()


def times(rows: list[Row]) -> None:
    """Print polyce's times beside the copy, and how many times as long its peers take."""
    timed = {key(row): row for row in rows if row["check"] == "times" and "median_s" in row}
    target = f"of copy (>= {TARGET} from {TARGET_CLASSES} classes)"
    header = ["logits", "what", "median", "p10 to p90", "GB/s", target, "launches", "extra memory"]
    table = []
    for (case, what, contender), row in timed.items():
        if not contender.startswith("polyce"):
            continue
        peers = [*PEERS] if contender == "polyce" else ["quack in place"]
        others = {peer: timed.get((case, what, peer)) for peer in peers}
        ratios = [f"{peer} {faster(other, row)}" for peer, other in others.items() if other]
        table.append([
            case,
            what,
            text("_s", row["median_s"]),
            f"{text('_s', row['p10_s'])} to {text('_s', row['p90_s'])}",
            f"{row['gb_per_s']:.3g}",
            f"{row['of_copy']:.2f}",
            NOT_HERE if row["launches"] is None else str(row["launches"]),
            _memory(row),
            ", ".join(ratios),
        ])  # fmt: skip
    if table:
        reads = ", ".join(f"{what} {passes}" for what, passes in PASSES.items())
        print(f"Times, with cold caches. Reads and writes of the logits' size: {reads}\n")
        print_table([*header, "peers take times as long"], table)


def faster(theirs: Row, ours: Row) -> str:
    """Say how many times as fast polyce is, in words too where it is slower."""
    ratio = theirs["median_s"] / ours["median_s"]
    return f"{ratio:.3g}" if ratio >= 1 else f"{ratio:.2f}, polyce is slower"


def _memory(row: Row) -> str:
    if row["extra_bytes"] is None:
        return NOT_HERE
    return f"{row['extra_bytes'] / row['logits_bytes']:.2f} of the logits"


def key(row: Row) -> tuple[str, str, str]:
    """Return what a time was measured for."""
    layout = "" if row["layout"] == "plain" else f" {row['layout']}"
    case = f"{'x'.join(map(str, row['dims']))} {row['dtype']}{layout}"
    return case, row["what"], row["contender"]


def host(rows: list[Row]) -> None:
    """Print the host's share of a call."""
    table = [
        [row["contender"], row["what"], text("_s", row["median_s"])]
        for row in rows
        if row["check"] == "host" and "median_s" in row
    ]
    print("What the host takes for a call on 1x10\n")
    print_table(["", "what", "median"], table)


def first_calls(rows: list[Row]) -> None:
    """Print the first calls of a process."""
    for row in rows:
        if row["check"].startswith("first call") and row["status"] == RIGHT:
            parts = (
                f"{name.removesuffix('_s')} {text('_s', value)}"
                for name, value in row.items()
                if name.startswith(("first ", "second "))
            )
            print(f"{row['check']}: {', '.join(parts)}\n")


def sweep(rows: list[Row]) -> None:
    """Print the best tile and number of warps of each case."""
    table = [
        [
            *(str(each) for each in (row["dtype"], row["dims"][1], row["what"])),
            *(str(row["tile"]), str(row["warps"]), text("_s", row["median_s"])),
        ]
        for row in rows
        if row.get("best")
    ]
    print("The best of the sweep\n")
    print_table(["dtype", "classes", "what", "tile", "warps", "median"], table)
