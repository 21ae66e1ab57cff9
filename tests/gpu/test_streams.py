"""Streams, graphs, and devices other than the defaults."""

from __future__ import annotations

from .arrays import NAN, problem, same
from .backends import EVERY
from .cases import Size
from .device import Device, NotHereError

pytestmark = EVERY


def test_another_stream(device: Device, size: Size) -> None:
    logits, labels = problem(device, size.dims)
    want = device.loss_and_grad(logits, labels)
    device.synchronize()
    with device.side_stream():
        # A kernel on another stream would read the memory before this has run.
        fresh = device.full(size.dims, NAN, "float32")
        device.keep_busy()
        fresh[...] = logits
        got = device.loss_and_grad(fresh, labels)
    same(device, got, want)


def test_a_graph_replays_on_other_logits(device: Device, size: Size) -> None:
    logits, labels = problem(device, size.dims)
    others = device.xp.flip(logits, axis=0) * 1.25
    other_labels = device.xp.flip(labels, axis=0)
    want = device.loss_and_grad(others, other_labels)
    got, replay = device.captured(lambda: device.loss_and_grad(logits, labels))
    logits[...], labels[...] = others, other_labels
    device.synchronize()
    replay()
    same(device, got, want)


def test_another_device(device: Device, size: Size) -> None:
    count = device.device_count()
    if count < 2:
        raise NotHereError(f"needs two devices, there is {count}")
    logits, labels = problem(device, size.dims)
    want = device.loss_and_grad(logits, labels)
    current = device.current_device()
    there = (current + 1) % count
    got = device.loss_and_grad(device.moved(logits, there), device.moved(labels, there))
    assert [device.device_of(each) for each in got] == [there, there]
    assert device.current_device() == current
    same(device, got, want)
