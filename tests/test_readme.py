"""Every Python block of the README runs, and prints what its comments say."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = [
    pytest.param(
        block,
        id=str(number),
        marks=pytest.mark.only("torch" if "import torch" in block else "numpy"),
    )
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", README.read_text(), re.S))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_block_prints_what_it_says(block: str) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, "block", "exec"), {})
    promised = re.findall(r"print\(.*\)  # (.*)", block)
    assert printed.getvalue().splitlines() == promised
