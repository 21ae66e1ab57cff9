"""Exact answers cached in a folder, if a test run names one: large ones take long."""

from __future__ import annotations

import hashlib
import inspect
import os
import pickle
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from . import oracle, oracle_row, oracle_softmax, oracle_stats, oracle_target
from .oracle import Answer

VARIABLE = "POLYCE_ANSWERS"
"""The environment variable that names the folder."""
_SOURCES = (oracle, oracle_row, oracle_softmax, oracle_stats, oracle_target)
LARGE = 1000
"""Answers of calls with at least this many logits are kept."""


def exact_answer(logits: Any, *arguments: Any, **options: Any) -> Answer:
    """Return what `oracle.exact_answer` does, from the folder if it is there."""
    folder = os.environ.get(VARIABLE)
    if not folder or logits.size < LARGE:
        return oracle.exact_answer(logits, *arguments, **options)
    path = Path(folder) / f"{_key((logits, *arguments), options)}.pickle"
    if path.exists():
        kept: Answer = pickle.loads(path.read_bytes())
        return kept
    answer = oracle.exact_answer(logits, *arguments, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Other processes see the whole file or no file.
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        pickle.dump(answer, file)
    os.replace(file.name, path)
    return answer


def _key(arguments: tuple[Any, ...], options: dict[str, Any]) -> str:
    """Return a key of the call and of the oracle's source."""
    key = hashlib.sha256(_oracle())
    for name, value in (*enumerate(arguments), *sorted(options.items())):
        described: tuple[Any, ...] = (name, value)
        if isinstance(value, np.ndarray):
            described = (name, value.dtype.name, value.shape)
            key.update(value.tobytes())
        key.update(repr(described).encode())
    return key.hexdigest()


@cache
def _oracle() -> bytes:
    sources = "".join(inspect.getsource(module) for module in _SOURCES)
    return f"{np.__version__} {sources}".encode()
