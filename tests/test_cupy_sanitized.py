"""The cupy kernels under ThreadSanitizer, and under those for addresses and undefined behaviour."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest

import cupy_calls as calls
import polyce
from conftest import FULL
from cupy_calls import draw, inside, on_device, settings

pytestmark = pytest.mark.only("cupy-emulated")

# Each thread of a block is a thread of the operating system; blocks take several groups of rows.
FEW = {"BLOCK": 32, "MOST_BLOCKS": 3, "PER_THREAD": 2, "NEIGHBOURS": 8}
SPLIT = FEW | {"LONG": 64, "FEW_ROWS": 8, "PART": 32, "MOST_PARTS": 3}
EVERYTHING = calls.EVERYTHING | {"reduction": "none"}
# shape, dtype, target, settings, options
CALLS: list[tuple[tuple[int, ...], str, str, dict[str, int], dict[str, Any]]] = [
    ((9, 70), "float32", "index", FEW, {}),
    ((2, 7, 21), "float32", "index", FEW, {}),
    ((3, 75), "float16", "probability", FEW, EVERYTHING),
    ((2, 301), "float64", "probability", SPLIT, {}),
]
if FULL:
    CALLS += [
        ((70, 10), "float32", "index", FEW, {}),
        ((2, 300), "float64", "index", SPLIT, {"label_smoothing": 0.1}),
        ((2, 301), "bfloat16", "probability", SPLIT, {}),
    ]
    CALLS += [
        (shape, name, kind, table, options)
        for (shape, table), name, kind, options in itertools.product(
            (((9, 70), FEW), ((40, 10), FEW), ((2, 7, 9), FEW), ((2, 301), SPLIT)),
            calls.DTYPES,
            ("index", "probability"),
            ({}, EVERYTHING),
        )
    ]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record each kernel in all its uses: a loss, and a gradient in place and elsewhere."""
    from cupy import emulation

    folder = tmp_path_factory.mktemp("recorded")
    emulation.reset()
    with emulation.record(folder):
        for shape, name, kind, table, options in CALLS:
            given = draw(shape, name, kind)
            t, w, v = on_device(*given[1:])
            more = options | {"sample_weight": v}
            with settings(**table):
                for at in (0, 1):
                    x = inside(given.logits, math.nan, at).array
                    polyce.cross_entropy(x, t, w, **more)
                    polyce.cross_entropy_with_grad(x, t, w, **more)
                    polyce.cross_entropy_with_grad(x, t, w, out=x, **more)
    launched = {launch.name for launch in emulation.launches}
    emulation.reset()
    assert launched == {"forward", "join", "reduce", "weigh", "forward_backward", "backward"}
    return folder


@pytest.mark.slow("cupy-emulated")
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_nothing_is_found(
    recorded: Path, capsys: pytest.CaptureFixture[str], sanitizer: str
) -> None:
    import replay

    # By the letter, the reader of what another block has written needs a fence too.
    strict = ["--strict"] if sanitizer == "thread" else []
    replay.main([str(recorded), "--sanitize", sanitizer, *strict])
    *findings, summary = capsys.readouterr().out.splitlines()
    found = re.fullmatch(r"(\d+) launches of \d+ texts under .*: \d+ findings", summary)
    assert found, summary
    assert int(found[1]) >= 6 * len(CALLS)
    assert findings == []
