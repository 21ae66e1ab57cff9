"""Which derivative rules a backend has: one module each, all with the same five functions."""

from __future__ import annotations

from types import ModuleType

from polyce import autograd_none


def rules(backend: str) -> ModuleType:
    """Give the module with a backend's derivative rules; importing it imports the library."""
    if backend == "torch":
        from polyce import autograd_torch

        return autograd_torch
    if backend == "jax":
        from polyce import autograd_jax

        return autograd_jax
    return autograd_none
