"""What holds for all inputs: shifts, permutations, linearity, independent rows, the derivative.

Tolerances. A row's loss is a sum of non-negative terms, right to 8 units in the last place, so two
ways to compute it agree to 16; sums over a few rows and scaling by constants add a few more: 32
units of the loss itself. An entry of the gradient is the difference of two parts, each at most the
total coefficient of its row, and right to about 8 units of these: 32 units of that total.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import polyce
from polyce.testing.backends import Backend

# jax compiles nearly every call anew.
pytestmark = pytest.mark.slow("jax-x32")

ULPS = 32


@dataclass(frozen=True, eq=False)
class Call:
    """A call on NumPy arrays in float64 whose numbers are all exact in float32."""

    logits: Any
    target: Any
    weight: Any
    smoothing: float
    ignore_index: int

    @property
    def soft(self) -> bool:
        return bool(self.target.dtype.kind == "f")

    @property
    def total(self) -> float:
        """An upper bound of a row's total coefficient."""
        weight = 1.0 if self.weight is None else self.weight.max()
        return float(weight * (max(self.target.sum(axis=1).max(), 1.0) if self.soft else 1.0))


@st.composite
def calls(draw: st.DrawFn, fixed: bool, soft: bool | None = None) -> Call:
    """Draw rows of all kinds, confident ones included; of one shape only if asked to."""
    rows, classes = (3, 4) if fixed else (draw(st.integers(1, 5)), draw(st.integers(1, 6)))
    # Multiples of 1/8: differences, and sums with such shifts, are exact in float32 too.
    logits = draw(hnp.arrays(np.int64, (rows, classes), elements=st.integers(-240, 240))) / 8
    if draw(st.booleans()) if soft is None else soft:
        steps = hnp.arrays(np.int64, (rows, classes), elements=st.integers(0, 8))
        target, ignore_index = draw(steps) / 8, -100
    else:
        labels = hnp.arrays(np.int32, rows, elements=st.integers(0, classes - 1))
        target, ignore_index = draw(labels), draw(st.sampled_from([-100, 0, 1]))
    weight = None
    if draw(st.booleans()):
        weight = draw(hnp.arrays(np.int64, classes, elements=st.integers(1, 16))) / 4
    return Call(logits, target, weight, draw(st.sampled_from([0.0, 0.25, 1.0])), ignore_index)


def holds(backend: Backend, **drawn: Any) -> Callable[[Callable[..., None]], None]:
    """Run a check on many calls, or on few if each new shape costs a compilation or a graph."""
    few = {"jax": 6, "dask-rows": 4}.get(backend.name)

    def run(check: Callable[..., None]) -> None:
        profile = settings(
            deadline=None,
            derandomize=True,
            database=None,
            max_examples=few or 40,
            suppress_health_check=[HealthCheck.too_slow],
        )
        profile(given(calls(few is not None, **drawn))(check))()

    return run


def dtype(backend: Backend) -> np.dtype[Any]:
    return np.dtype("float64" if "float64" in backend.floats else "float32")


def eps(backend: Backend) -> float:
    return float(np.finfo(dtype(backend)).eps)


def arguments(backend: Backend, call: Call) -> tuple[Any, Any, Any]:
    def floats(array: Any) -> Any:
        return backend.asarray(array.astype(dtype(backend)))

    target = floats(call.target) if call.soft else backend.asarray(call.target)
    return floats(call.logits), target, None if call.weight is None else floats(call.weight)


def run(backend: Backend, call: Call, reduction: str = "none", **options: Any) -> tuple[Any, Any]:
    """Return loss and gradient, as NumPy arrays."""
    options = {"ignore_index": call.ignore_index, "label_smoothing": call.smoothing} | options
    results = polyce.cross_entropy_with_grad(
        *arguments(backend, call), reduction=reduction, **options
    )
    return backend.to_numpy(results[0]), backend.to_numpy(results[1])


def same_loss(backend: Backend, got: Any, want: Any) -> None:
    np.testing.assert_allclose(got, want, rtol=ULPS * eps(backend), atol=0)


def same_grad(backend: Backend, got: Any, want: Any, scale: float) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=ULPS * eps(backend) * scale)


@pytest.mark.parametrize("shift", [-1000.0, 0.125, 4096.0])
def test_a_shift_of_all_logits_changes_nothing(backend: Backend, shift: float) -> None:
    @holds(backend)
    def check(call: Call) -> None:
        loss, grad = run(backend, call)
        moved, moved_grad = run(backend, replace(call, logits=call.logits + shift))
        same_loss(backend, moved, loss)
        same_grad(backend, moved_grad, grad, call.total)


def test_classes_may_be_permuted(backend: Backend) -> None:
    @holds(backend)
    def check(call: Call) -> None:
        order = np.roll(np.arange(call.logits.shape[1])[::-1], 1)
        permuted = Call(
            call.logits[:, order],
            call.target[:, order] if call.soft else np.argsort(order).astype("i4")[call.target],
            None if call.weight is None else call.weight[order],
            call.smoothing,
            -100,
        )
        loss, grad = run(backend, call, ignore_index=-100)
        got, got_grad = run(backend, permuted)
        same_loss(backend, got, loss)
        same_grad(backend, got_grad, grad[:, order], call.total)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_one_hot_probabilities_are_the_index(backend: Backend, reduction: str) -> None:
    @holds(backend, soft=False)
    def check(call: Call) -> None:
        one_hot = np.eye(call.logits.shape[1])[call.target]
        loss, grad = run(backend, call, reduction, ignore_index=-100)
        got, got_grad = run(backend, replace(call, target=one_hot), reduction, ignore_index=-100)
        same_loss(backend, got, loss)
        same_grad(backend, got_grad, grad, call.total)


def denominator(call: Call) -> float:
    if call.soft:
        return float(len(call.target))
    weight = np.ones(call.logits.shape[1]) if call.weight is None else call.weight
    return float(weight[call.target[call.target != call.ignore_index]].sum())


def test_the_mean_is_the_sum_over_the_denominator(backend: Backend) -> None:
    @holds(backend)
    def check(call: Call) -> None:
        total, total_grad = run(backend, call, "sum")
        mean, grad = run(backend, call, "mean")
        count = denominator(call)
        if count:
            same_loss(backend, mean * count, total)
            same_grad(backend, grad * count, total_grad, call.total)
        else:
            assert np.isnan(mean)
            assert not grad.any()


def test_the_sum_is_the_sum_of_the_rows(backend: Backend) -> None:
    @holds(backend)
    def check(call: Call) -> None:
        rows, rows_grad = run(backend, call)
        total, grad = run(backend, call, "sum")
        same_loss(backend, total, rows.astype(np.float64).sum())
        same_grad(backend, grad, rows_grad, call.total)


def test_rows_do_not_see_each_other(backend: Backend) -> None:
    @holds(backend)
    def check(call: Call) -> None:
        cut = len(call.logits) // 2
        parts = [
            run(backend, replace(call, logits=call.logits[part], target=call.target[part]))
            for part in (slice(cut), slice(cut, None))
        ]
        loss, grad = run(backend, call)
        same_loss(backend, np.concatenate([part[0] for part in parts]), loss)
        same_grad(backend, np.concatenate([part[1] for part in parts]), grad, call.total)


def test_the_gradient_of_a_row_sums_to_zero(backend: Backend) -> None:
    @holds(backend)
    def check(call: Call) -> None:
        _, grad = run(backend, call)
        classes = grad.shape[1]
        same_grad(backend, grad.astype(np.float64).sum(axis=1), 0.0, classes * call.total)


@pytest.mark.parametrize("factor", [4.0, 3.0])
def test_the_sum_scales_with_the_weight_and_the_mean_of_labels_does_not(
    backend: Backend, factor: float
) -> None:
    @holds(backend)
    def check(call: Call) -> None:
        ones = np.ones(call.logits.shape[1])
        call = replace(call, weight=ones if call.weight is None else call.weight)
        heavier = replace(call, weight=factor * call.weight)
        loss, grad = run(backend, call, "sum")
        got, got_grad = run(backend, heavier, "sum")
        same_loss(backend, got, factor * loss)
        same_grad(backend, got_grad, factor * grad, heavier.total)
        mean, heavier_mean = run(backend, call, "mean")[0], run(backend, heavier, "mean")[0]
        same_loss(backend, heavier_mean, mean * (factor if call.soft else 1))


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_smoothing_mixes_the_hard_loss_with_the_even_one(
    backend: Backend, smoothing: float
) -> None:
    @holds(backend)
    def check(call: Call) -> None:
        hard, hard_grad = run(backend, call, label_smoothing=0.0)
        even, even_grad = run(backend, call, label_smoothing=1.0)
        loss, grad = run(backend, call, label_smoothing=smoothing)
        same_loss(backend, loss, (1 - smoothing) * hard + smoothing * even)
        mixed = (1 - smoothing) * hard_grad + smoothing * even_grad
        same_grad(backend, grad, mixed, call.total)


@pytest.mark.parametrize("axis", [0, 2, -1])
def test_axis_is_moveaxis(backend: Backend, axis: int) -> None:
    @holds(backend)
    def check(call: Call) -> None:
        # Two trailing positions, the second with the logits in reverse order.
        x = np.stack([call.logits, -call.logits], axis=2)
        t = np.stack([call.target, call.target], axis=-1)
        moved = np.ascontiguousarray(np.moveaxis(x, 1, axis))
        moved_target = np.ascontiguousarray(np.moveaxis(t, 1, axis)) if call.soft else t
        loss, grad = run(backend, replace(call, logits=x, target=t))
        got, got_grad = run(backend, replace(call, logits=moved, target=moved_target), axis=axis)
        same_loss(backend, got, loss)
        same_grad(backend, np.moveaxis(got_grad, axis, 1), grad, call.total)


@pytest.mark.only("numpy", "strict", "torch", "torch-cuda", "cupy")
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_gradient_is_the_derivative(backend: Backend, reduction: str) -> None:
    """Central differences err by h² of truncation, and an ulp of the loss over h of rounding."""
    step = 2.0**-17

    @holds(backend)
    def check(call: Call) -> None:
        if reduction == "mean" and not denominator(call):
            return
        call = replace(call, logits=call.logits / 8)
        loss, grad = run(backend, call, reduction)
        for index in np.ndindex(*call.logits.shape):
            there, back = call.logits.copy(), call.logits.copy()
            there[index] += step
            back[index] -= step
            difference = (
                run(backend, replace(call, logits=there), reduction)[0]
                - run(backend, replace(call, logits=back), reduction)[0]
            ) / (2 * step)
            # 32 ulp of the loss over h are 1e-9 of it, and h² is 6e-11.
            assert abs(difference - grad[index]) <= 1e-9 * (call.total + loss)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_the_loss_beside_the_gradient_is_the_loss(backend: Backend, reduction: str) -> None:
    @holds(backend)
    def check(call: Call) -> None:
        options = {"ignore_index": call.ignore_index, "label_smoothing": call.smoothing}
        want = polyce.cross_entropy(*arguments(backend, call), reduction=reduction, **options)
        same_loss(backend, run(backend, call, reduction)[0], backend.to_numpy(want))


def test_the_gradient_is_linear_in_grad_output(backend: Backend) -> None:
    @holds(backend)
    def check(call: Call) -> None:
        upstream = np.linspace(-2, 3, len(call.logits)).astype(dtype(backend))
        _, grad = run(backend, call)
        _, got = run(backend, call, grad_output=backend.asarray(upstream))
        same_grad(backend, got, upstream[:, None] * grad, 3 * call.total)
        if denominator(call):
            _, grad = run(backend, call, "mean")
            _, got = run(backend, call, "mean", grad_output=-3.0)
            same_grad(backend, got, -3 * grad, 3 * call.total)
