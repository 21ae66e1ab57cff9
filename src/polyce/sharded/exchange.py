"""The one collective: every process sends a row of numbers, its range of classes first."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from polyce.sharded.call import ShardCall

HEADER = 4
"""How many numbers say which classes a process holds, and how many others it sends."""


class Gathered(NamedTuple):
    """What the processes of a group have sent."""

    words: Any
    """(processes, numbers)"""
    is_torn: Any
    """0-d: whether the ranges overlap, leave a gap or do not fit; None once that was looked at."""


def gather(call: ShardCall, words: Any) -> Any:
    """Return what each process of the group passes here, (processes, numbers), in their order."""
    group, ops = call.group, torch.ops._c10d_functional
    # The operators that torch.compile puts into its graph; torch renames their functions.
    found = ops.all_gather_into_tensor(words, group.size(), group.group_name)
    return ops.wait_tensor(found).view(group.size(), words.shape[0])


def gather_with_ranges(call: ShardCall, words: Any) -> Gathered:
    """Do what `gather` does, and check the ranges of the shards in the same collective.

    Every process sees them all, so that all raise the same error and none waits for another. Where
    a look would stall the host, `is_torn` says what there is to find.
    """
    numbers = (call.start, call.width, call.problem.classes, words.shape[0])
    # Filled on the device: a copy from the host would wait for it.
    header = [torch.full((1,), n, dtype=words.dtype, device=words.device) for n in numbers]
    found = gather(call, torch.cat([*header, words]))
    ranges, words = found[:, :HEADER], found[:, HEADER:]
    problem, validate = call.problem, call.problem.options.validate
    at_hand = problem.library.is_at_hand(found)
    if validate is not False and (at_hand or (validate and problem.library.has_values(found))):
        check_ranges(ranges.tolist())
        return Gathered(words, None)
    return Gathered(words, _is_torn(ranges))


def total(call: ShardCall, tensor: Any) -> Any:
    """Return the sum of what each process of the group passes here."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(tensor, "sum", call.group.group_name))


def check_ranges(ranges: list[list[int]]) -> None:
    """Refuse shards that are not a partition of the classes.

    Each is (start, width, classes, count): how many numbers of its rows a process sends.
    """
    counts = [count for *_, count in ranges]
    if len(set(counts)) > 1:
        sizes = ", ".join(map(str, counts))
        raise ValueError(
            "rows, dtype and options must be the same in every process of the group, but they send "
            f"{sizes} numbers; pass the same rows everywhere"
        )
    numbers = {classes for _, _, classes, _ in ranges}
    shown = ", ".join(f"{start} to {start + width}" for start, width, *_ in ranges)
    advice = "pass class_start= and num_classes= as the logits are cut"
    if len(numbers) > 1:
        given = ", ".join(str(classes) for _, _, classes, _ in ranges)
        raise ValueError(
            "the shards must be of equal width, or name the same num_classes in every process, got "
            f"classes {shown} of {given}; {advice}"
        )
    (classes,) = numbers
    for start, width, *_ in ranges:
        if start < 0 or start + width > classes:
            raise ValueError(
                f"each shard must lie within the {classes} classes, got classes {shown}; {advice}"
            )
    end = 0
    for start, width, *_ in sorted(ranges):
        if width and start != end:
            what = "overlap" if start < end else "leave a gap"
            raise ValueError(
                f"the shards must hold each of the {classes} classes once, but they {what}, got "
                f"classes {shown}; {advice}"
            )
        end += width
    if end != classes:
        raise ValueError(
            f"the shards must hold each of the {classes} classes once, but they leave a gap, got "
            f"classes {shown}; {advice}"
        )


def _is_torn(ranges: Any) -> Any:
    """Tell what `check_ranges` would raise an error about, without a look at the values."""
    start, width, classes, count = ranges.unbind(1)
    end = start + width
    outside = (start < 0) | (end > classes) | (classes != classes[0]) | (count != count[0])
    meet = (start[:, None] < end[None, :]) & (start[None, :] < end[:, None])
    meet &= (width > 0)[:, None] & (width > 0)[None, :]
    alone = meet.sum() == (width > 0).sum()
    return outside.any() | ~alone | (width.sum() != classes[0])
