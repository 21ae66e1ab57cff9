"""The entries of a sparse target: coefficients at some classes of each row, beside those of all.

Kernels go through the classes as if there were none. What the entries add to a row's sums is added
once the whole row has been read.
"""

import triton
import triton.language as tl

from polyce.implementations.triton.records import Entries, Pivot, Seen
from polyce.implementations.triton.row import exact_gap, likelier, with_coefficients


@triton.jit
def entries_at(inputs, place, inside, classes, ignore_index, given, FORM: tl.constexpr):
    """Read the entries at some places."""
    number, used, bad = classes_at(inputs, place, inside, classes, ignore_index, FORM)
    chance = tl.load(inputs.chance + place, mask=used, other=0.0).to(FORM.DTYPE)
    r = chance * given.kept.to(FORM.DTYPE)
    if FORM.WEIGHTED:
        weight = tl.load(inputs.weight + number, mask=used, other=0.0).to(FORM.DTYPE)
        # Nothing times an infinite weight is nothing.
        r = tl.where(given.kept == 0.0, r, r * weight)
    return Entries(number, chance, r, used, bad)


@triton.jit
def classes_at(inputs, place, inside, classes, ignore_index, FORM: tl.constexpr):
    """Return the classes of entries, which entries take part, and which are out of range."""
    number = tl.load(inputs.target + place, mask=inside, other=0).to(tl.int64)
    used = inside
    if FORM.IGNORES:
        used = used & (number != ignore_index)
    bad = used & ((number < 0) | (number >= classes))
    used = used & (bad == 0)
    return tl.where(used, number, 0).to(tl.int32), used, bad


@triton.jit
def with_entries(
    x_row, inputs, row, counted, classes, x_class, ignore_index, given, seen, FORM: tl.constexpr
):
    """Add the entries of whole rows to what is known of these; mark the rows with a bad one."""
    state, pivot = seen.state, seen.pivot
    rest, excess, at_pivot = state.rest, state.excess, pivot.coefficient.to(tl.float64)
    # What has no probability above 0 is not the likeliest class.
    most = tl.zeros_like(seen.most)
    most_class = tl.zeros_like(seen.most_class) - 1
    bad = tl.zeros_like(seen.most_class)
    reference = tl.where(state.top == float("-inf"), 0.0, state.top)
    first = row * inputs.entries
    for done in range(0, inputs.entries, FORM.ENTRIES):
        k = done + tl.arange(0, FORM.ENTRIES)[:, None]
        inside = (k < inputs.entries) & counted[None, :]
        entry = entries_at(inputs, first[None, :] + k, inside, classes, ignore_index, given, FORM)
        bad += tl.sum(entry.bad.to(tl.int32), 0)
        at = x_row[None, :] + entry.number.to(tl.int64) * x_class
        x = tl.load(at, mask=entry.used, other=0.0).to(FORM.DTYPE)
        gap, error = exact_gap(reference, x, given, FORM)
        r = entry.coefficient.to(tl.float64)
        added = tl.where(r == 0.0, 0.0, r * gap.to(tl.float64) + r * error.to(tl.float64))
        leads = entry.number == pivot.number[None, :]
        rest += tl.sum(tl.where(leads, 0.0, r), 0)
        excess += tl.sum(tl.where(leads, 0.0, added), 0)
        at_pivot += tl.sum(tl.where(leads, r, 0.0), 0)
        if FORM.CORRECT:
            # Those of one class add up.
            together = tl.zeros_like(entry.chance)
            for j in range(inputs.entries):
                other = entries_at(inputs, first + j, counted, classes, ignore_index, given, FORM)
                same = entry.number == other.number[None, :]
                together += tl.where(same, other.chance[None, :], 0.0)
            together = tl.where(entry.used, together, float("-inf"))
            largest = tl.max(together, 0)
            is_largest = entry.used & (together == largest[None, :])
            number = tl.min(tl.where(is_largest, entry.number, 0x7FFFFFFF), 0)
            most, most_class = likelier(most, most_class, largest, number)
    state = with_coefficients(state, rest, excess)
    pivot = Pivot(pivot.logit, at_pivot.to(FORM.DTYPE), pivot.number, pivot.even)
    return Seen(state, pivot, most, most_class, seen.rank, seen.first, seen.teacher), bad > 0
