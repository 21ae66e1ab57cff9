"""`python -m polyce score LOGITS LABELS`: a score of arrays in files, with its progress."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from polyce.arrays import find
from polyce.score import cluster, files, passes, plot, report
from polyce.score.passes import Call, Running
from polyce.score.record import Score

INTERRUPTED = 130
"""What a shell reports for a command that Ctrl-C has ended."""


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    given = _parser().parse_args(arguments)
    try:
        code = _score(given)
        sys.stdout.flush()
    except KeyboardInterrupt:
        _say("interrupted before any logits were scored")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has enough; Python would complain once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (TypeError, ValueError, IndexError, OSError, ImportError) as problem:
        _say(str(problem))
        return 2
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="polyce score",
        description="Loss, accuracy and calibration of logits in a file, with standard errors.",
        epilog="Files are .npy, .npz, .safetensors or .zarr; FILE:NAME names one of several "
        "arrays in a file; without a name it is the one called logits or labels.",
    )
    add = parser.add_argument
    add("logits", metavar="LOGITS", help="a file of logits, which may be larger than memory")
    add("labels", metavar="LABELS", help="a file of class indices, of any integer dtype")
    add("--axis", type=int, help="the class axis (default: 1, or 0 if there is only one)")
    add("--ignore-index", type=int, default=-100, help="the label of rows to leave out")
    add("--weights", metavar="FILE", help="a file with a weight for each class, for the loss")
    add("--temperature", type=float, default=1.0, help="divides the logits (default: 1)")
    add("--softcap", type=float, help="a cap: logits become cap·tanh(logits/cap)")
    add("--bins", type=int, default=15, help="bins of the calibration errors (default: 15)")
    add(
        "--fit-temperature",
        action="store_true",
        help="find the temperature with the smallest loss, in five to ten passes",
    )
    add("--by-class", action="store_true", help="print a table of the classes too")
    add(
        "--validate",
        choices=("on", "off"),
        default="on",
        help="off: count labels that are not classes, and score the rest",
    )
    add("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    add("--csv", type=Path, metavar="FILE", help="write the figures as CSV")
    add("--plot", type=Path, metavar="FILE", help="draw a reliability diagram: .svg, .png, .pdf")
    add("--dask", metavar="ADDRESS", help="the scheduler of a dask cluster that computes")
    return parser


def _score(given: argparse.Namespace) -> int:
    _check_outputs(given)
    weights = files.open_array(given.weights, "weights") if given.weights else None
    call = passes.describe(
        files.open_array(given.logits, "logits"),
        files.open_array(given.labels, "labels"),
        axis=given.axis,
        ignore_index=given.ignore_index,
        weight=weights and weights.read((slice(None),) * len(weights.shape)),
        temperature=given.temperature,
        logit_softcap=given.softcap,
        bins=given.bins,
        by_class=given.by_class,
        fit_temperature=given.fit_temperature,
        validate=given.validate == "on",
        implementation=None,
    )
    where = (
        cluster.on_cluster(given.dask, given.logits, given.labels)
        if given.dask
        else nullcontext(passes.here(call))
    )
    last: Running | None = None
    try:
        with where as each, _progress(call) as show:
            for last in passes.run(call, each):
                show(last)
    except KeyboardInterrupt:
        return _interrupted(call, last)
    if last is not None:
        found = passes.finish(call, last)
        _write(given, found)
        _print(found)
    return 0


def _interrupted(call: Call, last: Running | None) -> int:
    """Tell how far a score came, and what it found until there."""
    total = math.prod(call.question.row_shape)
    done = 0 if last is None else last.totals.rows
    of_pass = "" if last is None or not call.fit_temperature else f" of pass {last.step}"
    until = "the figures until there follow, no file is written" if done else "nothing is known yet"
    _say(f"interrupted after {done} of {total} rows{of_pass}; {until}")
    if last is not None:
        _print(passes.finish(call, last))
    return INTERRUPTED


def _print(found: Score) -> None:
    print(found)
    if found.by_class is not None:
        print("", *report.class_lines(found.by_class), sep="\n")
    for line in report.left_out_lines(found):
        _say(line)


def _say(line: str) -> None:
    print(f"polyce score: {line}", file=sys.stderr)


# Files that are written


def _check_outputs(given: argparse.Namespace) -> None:
    """Refuse files that cannot be written before hours are spent on what goes into them."""
    if given.plot:
        files.need("matplotlib", "--plot")
        if given.plot.suffix not in plot.FORMATS:
            raise ValueError(
                f"--plot must end in one of {', '.join(plot.FORMATS)}, got {given.plot}; rename it"
            )
    for path in filter(None, (given.json, given.csv, given.plot)):
        is_new = not path.exists()
        with path.open("ab"):  # which changes nothing that is there
            pass
        if is_new:
            path.unlink()
        else:
            _check_is_no_input(given, path)


def _check_is_no_input(given: argparse.Namespace, path: Path) -> None:
    for name in filter(None, (given.logits, given.labels, given.weights)):
        if files.path_of(name).exists() and path.samefile(files.path_of(name)):
            raise ValueError(f"{path} must not be written over, as it is read; name another file")


def _write(given: argparse.Namespace, found: Score) -> None:
    for path, write in (
        (given.json, report.write_json),
        (given.csv, report.write_csv),
        (given.plot, plot.draw),
    ):
        if path:
            write(found, path)


# Progress


@contextmanager
def _progress(call: Call) -> Iterator[Callable[[Running], None]]:
    """Show a bar with rows a second and the time left, on a terminal only."""
    if not sys.stderr.isatty():
        yield lambda running: None
        return
    if not find.installed("tqdm"):
        _say("a progress bar needs tqdm, which is not installed: pip install 'polyce[score]'")
        yield lambda running: None
        return
    from tqdm import tqdm

    step, total = 1, math.prod(call.question.row_shape)
    with tqdm(total=total, unit=" rows", unit_scale=True, file=sys.stderr) as bar:

        def show(running: Running) -> None:
            nonlocal step
            if running.step != step:
                step = running.step
                bar.reset()
                bar.set_description(f"pass {step}")
            bar.update(running.totals.rows - bar.n)

        yield show
