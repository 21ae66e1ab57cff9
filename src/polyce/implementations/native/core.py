"""The compiled module: whether it is there, and how it is set up when first used."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from types import ModuleType

ISA_VARIABLE = "POLYCE_ISA"
THREADS_VARIABLE = "POLYCE_NUM_THREADS"
# More must be a mistake, and each thread costs memory.
MOST_THREADS = 1024

# Looked up once: torch.compile traces the choice of an implementation. In a checkout the folder of
# C++ files, which has the module's name, is found too, but it has no loader.
_SPEC = importlib.util.find_spec("polyce._core")
_IS_BUILT = _SPEC is not None and _SPEC.loader is not None


def unavailable() -> str | None:
    """Return that the core was not built, and what that costs, or None."""
    if _IS_BUILT:
        return None
    return (
        "the compiled core is not built, so calls on NumPy and torch CPU arrays take several times "
        "as long (where there is a C++ compiler, pip install --no-cache-dir --force-reinstall "
        "--no-deps polyce builds it)"
    )


class CoreMissingWarning(UserWarning):
    """Calls that the compiled core would compute take the slow path, as it was not built.

    The first such call of a process warns.

    Examples
    --------
    >>> import warnings
    >>> import polyce
    >>> warnings.simplefilter("ignore", polyce.CoreMissingWarning)
    """


_warned: list[bool] = []


def warn_of_missing_core() -> None:
    """Warn, once in a process, that a call takes the slow way for want of the core."""
    if not _warned:
        _warned.append(True)
        silence = "warnings.simplefilter('ignore', polyce.CoreMissingWarning)"
        # Named is the line that calls polyce.cross_entropy, through `select`.
        warnings.warn(f"{unavailable()}; {silence} silences this", CoreMissingWarning, stacklevel=5)


_loaded: list[ModuleType] = []


def core() -> ModuleType:
    """Return the compiled module, set up from the environment on the first call."""
    if not _loaded:
        _loaded.append(_set_up(importlib.import_module("polyce._core")))
    return _loaded[0]


def _set_up(module: ModuleType) -> ModuleType:
    isa, threads = os.environ.get(ISA_VARIABLE), os.environ.get(THREADS_VARIABLE)
    if isa and not module.use_isa(isa):
        raise ValueError(
            f"{ISA_VARIABLE} must be one of {', '.join(module.isas())} on this processor, got "
            f"{isa!r}; leave it out for the first of them"
        )
    if threads:
        if not threads.isdecimal() or not 1 <= int(threads) <= MOST_THREADS:
            raise ValueError(
                f"{THREADS_VARIABLE} must be a number of threads from 1 to {MOST_THREADS}, got "
                f"{threads!r}; leave it out for one on each processor"
            )
        module.set_num_threads(int(threads))
    return module
