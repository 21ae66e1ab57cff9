"""How many threads the compiled core uses."""

from __future__ import annotations

import numbers

from polyce.implementations.native.core import MOST_THREADS, core, unavailable


def get_num_threads() -> int:
    """Return the number of threads that a large call of the native path uses.

    Returns
    -------
    int
        At first the number of processors that this process may use, or what the environment
        variable ``POLYCE_NUM_THREADS`` says. Results do not depend on it.

    Raises
    ------
    ValueError
        If the compiled core is not built.

    Examples
    --------
    >>> import polyce
    >>> polyce.get_num_threads() >= 1
    True
    """
    _check_built()
    return int(core().get_num_threads())


def set_num_threads(count: int) -> None:
    """Set the number of threads that a large call of the native path uses, in this process.

    A call uses fewer threads if more would not pay, because it is small or because other processes
    keep it waiting. With torch tensors on Linux, these are torch's own threads if torch has as
    many; otherwise they are polyce's, and while one call uses them, calls from other threads use
    one thread.

    Parameters
    ----------
    count : int
        From 1 on.

    Raises
    ------
    TypeError, ValueError
        If `count` is not such a number, or if the compiled core is not built.

    Examples
    --------
    >>> import polyce
    >>> polyce.set_num_threads(polyce.get_num_threads())
    """
    if isinstance(count, bool) or not isinstance(count, numbers.Integral):
        raise TypeError(f"count must be an integer, got {count!r}; pass a number of threads")
    if not 1 <= count <= MOST_THREADS:
        raise ValueError(
            f"count must lie between 1 and {MOST_THREADS}, got {count}; 1 is the caller alone"
        )
    _check_built()
    core().set_num_threads(int(count))


def _check_built() -> None:
    missing = unavailable()
    if missing is not None:
        raise ValueError(f"only the native path has threads, but {missing}")
