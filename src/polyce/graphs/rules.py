"""Which derivative rules a backend has."""

from __future__ import annotations

from polyce.graphs.contract import Rules

_NONE = Rules()


def of(backend: str) -> Rules:
    """Return a backend's derivative rules; importing them imports the library."""
    if backend == "torch":
        from polyce.graphs import torch_rows

        return torch_rows.RULES
    if backend == "jax":
        from polyce.graphs import jax_rows

        return jax_rows.RULES
    return _NONE
