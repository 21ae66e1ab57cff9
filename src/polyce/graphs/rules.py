"""Which derivative rules a library has."""

from __future__ import annotations

from polyce.graphs.contract import Rules


def _torch() -> Rules:
    from polyce.graphs import torch_rows

    return torch_rows.RULES


def _jax() -> Rules:
    from polyce.graphs import jax_rows

    return jax_rows.RULES


NONE = Rules()
"""Those of a library that does not differentiate, or by itself."""
_RULES = {"torch": _torch, "jax": _jax}


def of(backend: str) -> Rules:
    """Return a library's derivative rules, by its name; importing them imports the library."""
    own = _RULES.get(backend)
    return NONE if own is None else own()
