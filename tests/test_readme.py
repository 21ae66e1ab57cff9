"""Every Python block of the README and the docs runs, and prints what its comments say."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = [
    pytest.param(
        block,
        id=f"{path.name}-{number}",
        marks=pytest.mark.only("torch" if "import torch" in block else "numpy"),
    )
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.S))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_block_prints_what_it_says(block: str) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, "block", "exec"), {})
    promised = re.findall(r"print\(.*\)  # (.*)", block)
    assert printed.getvalue().splitlines() == promised


@pytest.mark.only("numpy")
def test_the_readme_has_an_example() -> None:
    assert any("README" in str(block.id) for block in BLOCKS)
