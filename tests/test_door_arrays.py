"""NumPy arrays that differ from those of a call before, which the core has kept."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import polyce
from door_calls import Ways
from door_numpy import FUNCTIONS, LABELS, LOGITS, MARKS, PROBABILITIES, check_after

pytestmark = MARKS


class Own(np.ndarray):
    """A subclass of NumPy's array."""


def unaligned(array: np.ndarray) -> np.ndarray:
    memory = np.empty(array.nbytes + 1, np.uint8)[1:]
    found = memory.view(array.dtype).reshape(array.shape)
    found[...] = array
    return found


LIKE_LOGITS: dict[str, Callable[[], Any]] = {
    "float32": lambda: LOGITS,
    "other values": lambda: LOGITS * 2,
    "float64": lambda: LOGITS.astype(np.float64),
    "float16": lambda: LOGITS.astype(np.float16),
    "int32": lambda: LOGITS.astype(np.int32),
    "swapped": lambda: LOGITS.astype(LOGITS.dtype.newbyteorder()),
    "unpickled": lambda: pickle.loads(pickle.dumps(LOGITS)),
    "fortran": lambda: np.asfortranarray(LOGITS),
    "reversed": lambda: LOGITS[::-1, ::-1],
    "strided": lambda: np.repeat(LOGITS, 3, axis=1)[:, ::3],
    "broadcast": lambda: np.broadcast_to(LOGITS[0], LOGITS.shape),
    "unaligned": lambda: unaligned(LOGITS),
    "more rows": lambda: np.concatenate([LOGITS, LOGITS]),
    "more classes": lambda: np.concatenate([LOGITS, LOGITS], axis=1),
    "no rows": lambda: LOGITS[:0],
    "no classes": lambda: LOGITS[:, :0],
    "three axes": lambda: LOGITS[..., None],
    "one row": lambda: LOGITS[0],
    "subclass": lambda: LOGITS.view(Own),
    "masked": lambda: np.ma.masked_array(LOGITS),
    "read-only": lambda: np.frombuffer(LOGITS.tobytes(), LOGITS.dtype).reshape(LOGITS.shape),
    "scalar": lambda: np.float32(1),
    "list": LOGITS.tolist,
    "none": lambda: None,
}
LIKE_LABELS: dict[str, Callable[[], Any]] = {
    **{name: lambda name=name: LABELS.astype(name) for name in ("int64", "int8", "uint16", "bool")},
    "long long": lambda: LABELS.astype(np.longlong),
    "float64": lambda: LABELS.astype(np.float64),
    "swapped": lambda: LABELS.astype(LABELS.dtype.newbyteorder()),
    "strided": lambda: np.repeat(LABELS, 2)[::2],
    "reversed": lambda: LABELS[::-1],
    "unaligned": lambda: unaligned(LABELS),
    "too large": lambda: np.where(LABELS == 1, 5, LABELS),
    "negative": lambda: np.where(LABELS == 1, -1, LABELS),
    "ignored": lambda: np.where(LABELS == 1, -100, LABELS),
    "fewer": lambda: LABELS[:-1],
    "column": lambda: LABELS[:, None],
    "subclass": lambda: LABELS.view(Own),
    "list": LABELS.tolist,
    "none": lambda: None,
    "probabilities": lambda: PROBABILITIES,
    "probabilities in float64": lambda: PROBABILITIES.astype(np.float64),
    "one-hot integers": lambda: np.eye(5, dtype=int)[LABELS],
    "probabilities backwards": lambda: np.ascontiguousarray(PROBABILITIES[::-1])[::-1],
}


@pytest.mark.parametrize("name", LIKE_LOGITS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_logits_change_between_calls(function: str, name: str) -> None:
    call, other = FUNCTIONS[function], LIKE_LOGITS[name]()
    for reduction in ("mean", "none"):
        check_after(
            lambda: call(LOGITS, LABELS, reduction=reduction),  # noqa: B023
            lambda: call(other, LABELS, reduction=reduction),  # noqa: B023
        )
        check_after(
            lambda: call(other, LABELS, reduction=reduction),  # noqa: B023
            lambda: call(LOGITS, LABELS, reduction=reduction),  # noqa: B023
        )


@pytest.mark.parametrize("name", LIKE_LABELS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_target_changes_between_calls(function: str, name: str) -> None:
    call, other = FUNCTIONS[function], LIKE_LABELS[name]()
    for first, second in ((LABELS, other), (other, LABELS), (PROBABILITIES, other)):
        check_after(
            lambda: call(LOGITS, first),  # noqa: B023
            lambda: call(LOGITS, second),  # noqa: B023
        )


def outs() -> dict[str, Any]:
    memory = np.zeros((12, 10), np.float32)
    shared = np.zeros((7, 5), np.float32)
    return {
        "own": np.empty_like(LOGITS),
        "fortran": np.empty_like(LOGITS, order="F"),
        "strided": memory[::2, ::2],
        "backwards": memory[11::-2, ::-2],
        "float64": np.empty((6, 5)),
        "short": np.empty((5, 5), np.float32),
        "swapped": np.empty((6, 5), LOGITS.dtype.newbyteorder()),
        "read-only": LIKE_LOGITS["read-only"](),
        "broadcast": np.lib.stride_tricks.as_strided(memory, (6, 5), (0, 4)),
        "overlapping": np.lib.stride_tricks.as_strided(memory, (6, 5), (4, 4)),
        "subclass": np.empty_like(LOGITS).view(Own),
        "list": LOGITS.tolist(),
        "beside": (shared[1:], shared[:-1]),
        "weights": (LOGITS.copy(), "weight"),
    }


@pytest.mark.parametrize("name", outs())
def test_the_memory_for_the_gradient_changes_between_calls(name: str) -> None:
    def second() -> Any:
        logits, given, out = LOGITS, {}, outs()[name]
        if name == "beside":
            logits, out = out
            logits[...] = LOGITS
        if name == "weights":
            out = out[0]
            given = {"weight": out[0]}
        loss, grad = polyce.cross_entropy_with_grad(logits, LABELS, out=out, **given)
        assert grad is out
        return loss, np.array(grad)

    check_after(
        lambda: polyce.cross_entropy_with_grad(LOGITS, LABELS, out=np.empty_like(LOGITS)), second
    )
    check_after(second, lambda: polyce.cross_entropy_with_grad(LOGITS, LABELS))


def test_the_gradient_goes_over_the_logits(ways: Ways) -> None:
    _, expected = polyce.cross_entropy_with_grad(LOGITS, LABELS)
    for logits in (LOGITS.copy(), np.asfortranarray(LOGITS), LOGITS.copy()[::-1][::-1]):
        polyce.cross_entropy_with_grad(LOGITS, LABELS, out=np.empty_like(LOGITS))

        def call(logits: Any = logits) -> None:
            _, grad = polyce.cross_entropy_with_grad(logits, LABELS, out=logits)
            assert grad is logits

        assert ways.of(call) == 0
        np.testing.assert_array_equal(logits, expected)
