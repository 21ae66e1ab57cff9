"""Mutants of the cupy path, each with one fault, and the check that must catch it.

Run as a program with a mutant's name, it exits with 1 if the check catches it and with 0 if not:
for mutants that may write to memory that is not theirs.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from cupy_checks import Check

NUMBERS, ROW, OUTCOME, CLASSES = "numbers.cu", "row.cu", "outcome.cu", "classes.cu"
GRADIENT, BLOCKS = "gradient.cu", "blocks.cu"
ENTRIES, KERNELS = "entries.cu", "kernels.cu"
PLAN, LAUNCH, PARTS = "plan.py", "launch.py", "parts.py"
OF_PARTS = "parts.cu"
Edit = tuple[str, str, str]
"""A file, a text in it, and the text that replaces every occurrence."""


@dataclass(frozen=True)
class Mutant:
    """What is changed, and the check that must catch it."""

    check: Check
    edits: tuple[Edit, ...]
    crashes: bool = False
    """Whether it may write to memory that is not its own."""


def wrong(check: Check, *edits: str, crashes: bool = False) -> Mutant:
    """Make a mutant from triples of a file, a text in it and the text to put in its place."""
    return Mutant(check, tuple(zip(edits[::3], edits[1::3], edits[2::3], strict=True)), crashes)


@contextlib.contextmanager
def installed(edits: tuple[Edit, ...] = ()) -> Iterator[None]:
    """Run calls through a copy of plan, launcher and kernels with these changes."""
    from polyce.implementations import cupy as path
    from polyce.implementations.cupy import launch as before
    from polyce.implementations.cupy import parts as parts_before

    plan, launch = _module(PLAN, edits), _module(LAUNCH, edits)
    text = plan.source()
    for file, old, new in edits:
        if file.endswith(".cu"):
            begin = text.index(f'"{file}"')
            behind = text.find("#line", begin)
            end = behind if behind > 0 else len(text)
            text = text[:begin] + _changed(text[begin:end], file, old, new) + text[end:]
    plan._text[:] = [text]
    launch.cupy_plan = plan
    path.launch = launch
    # It takes that launcher.
    path.parts = _module(PARTS, edits)
    try:
        yield
    finally:
        path.launch, path.parts = before, parts_before


def _module(file: str, edits: tuple[Edit, ...]) -> Any:
    """Load a copy of a file, with those of the changes that concern it."""
    from polyce.implementations import cupy

    path = Path(cupy.__file__).with_name(file)
    text = path.read_text(encoding="utf-8")
    for name, old, new in edits:
        text = _changed(text, file, old, new) if name == file else text
    module = ModuleType(f"polyce.implementations.cupy.{path.stem}")
    exec(compile(text, f"a copy of {file}", "exec"), module.__dict__)
    return module


def _changed(text: str, file: str, old: str, new: str) -> str:
    if old not in text:
        raise ValueError(f"{file} does not say {old!r} any more")
    return text.replace(old, new)


def mutants() -> dict[str, Mutant]:
    """Return all mutants, by name."""
    from cupy_mutants_memory import MUTANTS as OF_MEMORY
    from cupy_mutants_parts import MUTANTS as IN_PARTS
    from cupy_mutants_values import MUTANTS as OF_VALUES

    return OF_MEMORY | OF_VALUES | IN_PARTS


def main(name: str) -> int:
    from cupy import emulation

    mutant = mutants()[name]
    try:
        with installed(mutant.edits):
            mutant.check()
    except (AssertionError, emulation.EmulationError):
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
