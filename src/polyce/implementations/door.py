"""The door: calls like one before, which the compiled core answers by itself.

The first call of its kind goes the whole way: it is described, checked, and computed by a path. If
that was the native one, on plain arrays, the core keeps the facts and options that the description
depends on, with what the path has prepared from them. It answers each call that agrees in all of
these. A call that does not, and one whose labels are bad, goes the whole way.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from polyce.arrays.plain import plain_key
from polyce.call.problem import Problem
from polyce.implementations import registry
from polyce.implementations.contract import Implementation
from polyce.implementations.native import path as native
from polyce.implementations.native.core import core
from polyce.implementations.native.run import kernel


def _closed(given: tuple[Any, ...]) -> None:
    """Answer no call, as long as none was kept."""


# The core's functions, once it has calls to answer. Each takes the arguments of the public function
# in their order, and returns its result, or None if the call has to go the whole way.
cross_entropy: Callable[[tuple[Any, ...]], Any] = _closed
cross_entropy_with_grad: Callable[[tuple[Any, ...]], tuple[Any, Any] | None] = _closed
cross_entropy_in_place: Callable[[tuple[Any, ...]], Any] = _closed
"""That of `polyce.torch`, with inplace_backward"""

# The options are compared by type and value; one of another kind may be anything. What a mean is
# divided by, and the gradient of the loss, may be another number at every call.
_OPTIONS = frozenset({type(None), bool, int, float, str})
_NUMBERS = frozenset({type(None), float})


def keep(given: tuple[Any, ...], problem: Problem, chosen: Implementation) -> None:
    """Keep how a call was computed, if the core can answer calls like it."""
    if not is_kept(given, problem, chosen) or not _is_open(problem):
        return
    if problem.backend == "torch":
        from polyce.implementations import door_torch

        more = door_torch.kept(problem)
    else:
        more = {"like_loss": problem.result_dtype}
    core().keep(_function(given, problem), given, call=kernel(problem), **more)


def is_kept(given: tuple[Any, ...], problem: Problem, chosen: Implementation) -> bool:
    """Tell whether the core keeps how such a call is computed."""
    if not problem.is_concrete or chosen is not native.PATH or problem.options.stats is not None:
        return False
    logits, target, weight, size_average, ignore_index, reduce, reduction, *others = given
    label_smoothing, axis, sample_weight, normalizer, *others = others
    # After seven more options, the gradient of the loss where that is an argument, and out.
    options = (size_average, ignore_index, reduce, reduction, label_smoothing, axis, *others[:7])
    if not _OPTIONS.issuperset(map(type, options)):
        return False
    if not _NUMBERS.issuperset(map(type, (normalizer, *others[7:8]))):
        return False
    # These warn, at every call.
    if size_average is not None or reduce is not None or reduction == "elementwise_mean":
        return False
    if weight is not None and weight.dtype != problem.arithmetic_dtype:
        return False
    if sample_weight is not None and sample_weight.dtype != problem.row_dtype:
        return False
    if registry.is_path_named():
        return False
    return plain_key(logits, target, weight, sample_weight) is not None


def _function(given: tuple[Any, ...], problem: Problem) -> str:
    if problem.inplace_backward:
        return "cross_entropy_in_place"
    return "cross_entropy" if len(given) == 18 else "cross_entropy_with_grad"


# The table as it is read from these files; a call by another one goes the whole way.
_TABLE = registry.TABLE
_open: dict[str, bool] = {}


def _is_open(problem: Problem) -> bool:
    """Let the core answer calls on the arrays of a library, if it can."""
    own = core()
    if not _open:
        globals().update(
            cross_entropy=own.answer_cross_entropy,
            cross_entropy_with_grad=own.answer_cross_entropy_with_grad,
            cross_entropy_in_place=own.answer_cross_entropy_in_place,
        )
        _expect_no_name(own)
    if problem.backend not in _open:
        if problem.backend == "torch":
            from polyce.implementations import door_torch

            _open["torch"] = door_torch.open_torch(own)
        else:
            _open["numpy"] = own.open_numpy(_numpy_c_api())
    return _open[problem.backend]


def _expect_no_name(own: ModuleType) -> None:
    """Say what must hold at every call, as `registry.is_path_named` asks it."""
    own.expect(False, vars(registry), "TABLE", _TABLE)
    own.expect_answer(False, registry._forced.get, None)
    variables: Any = os.environ
    own.expect(False, vars(os), "environ", variables)
    own.expect(False, variables._data, variables.encodekey(registry.VARIABLE), ...)


def _numpy_c_api() -> Any:
    # NumPy 1 has no module of the first name.
    inner = getattr(np, "_core", None) or np.core
    return inner._multiarray_umath._ARRAY_API
