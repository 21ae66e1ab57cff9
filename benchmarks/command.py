"""The command line of the benchmarks that measure, print and draw: run, table and plot."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .measure import environment, say


class Sizes(NamedTuple):
    """How much a run measures; each has a field `shapes`, of names."""

    full: Any
    quick: Any
    tiny: Any


class Log:
    """A run's results, saved after each step with the load of the machine."""

    def __init__(self, out: Path, shapes: Mapping[str, Any]) -> None:
        self.out, self.start = out, time.perf_counter()
        self.found: dict[str, Any] = {
            "environment": environment() | {"loads": []},
            "shapes": {
                name: {"dims": shape.dims, "source": shape.source} for name, shape in shapes.items()
            },
        }

    def add(self, text: str, **rows: list[Any]) -> None:
        """Add rows by their kind, and say how far it is."""
        load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
        self.found["environment"]["loads"].append(load)
        for kind, more in rows.items():
            self.found.setdefault(kind, []).extend(more)
        self.out.write_text(json.dumps(self.found, indent=1) + "\n")
        say(f"{self.seconds():4.0f} s: {text}, load {load}")

    def seconds(self) -> float:
        """Return how long the run has taken."""
        return time.perf_counter() - self.start


def main(
    description: str,
    shapes: Mapping[str, Any],
    sizes: Sizes,
    run: Callable[[Any, Log], None],
    show: Callable[[dict[str, Any], str], None],
    draw: Callable[[dict[str, Any], Path], None],
    choices: tuple[str, ...] = (),
) -> None:
    """Run a command. `choices` are more fields of a size that options choose from, or turn on."""
    parser = argparse.ArgumentParser(description=description)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="measure")
    runs.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON to write")
    runs.add_argument("--quick", action="store_true", help="take a few minutes")
    tiny = "run in seconds; the numbers mean nothing"
    runs.add_argument("--tiny", action="store_true", help=tiny)
    runs.add_argument("--shapes", nargs="+", choices=shapes, metavar="NAME", help=" ".join(shapes))
    for name in choices:
        usual, option = getattr(sizes.full, name), f"--{name.replace('_', '-')}"
        if isinstance(usual, bool):
            runs.add_argument(option, action="store_true")
        else:
            runs.add_argument(option, nargs="+", choices=usual)
    tables = commands.add_parser("table", help="print Markdown tables of a run")
    tables.add_argument("results", type=Path)
    tables.add_argument("--best", action="store_true", help="compare the bests, not the medians")
    plots = commands.add_parser("plot", help="draw a run")
    plots.add_argument("results", type=Path)
    plots.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    arguments = parser.parse_args()
    if arguments.command == "run":
        size = sizes.tiny if arguments.tiny else sizes.quick if arguments.quick else sizes.full
        given = {name: getattr(arguments, name) for name in ("shapes", *choices)}
        size = size._replace(**{name: chosen for name, chosen in given.items() if chosen})
        run(size, Log(arguments.out, {name: shapes[name] for name in size.shapes}))
        return
    found = json.loads(arguments.results.read_text())
    if arguments.command == "table":
        show(found, "best_s" if arguments.best else "median_s")
    else:
        draw(found, arguments.out)
