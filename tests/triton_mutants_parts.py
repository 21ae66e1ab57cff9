"""Triton kernels with one fault each in what they do with some of the classes."""

from __future__ import annotations

from triton_checks import CUT, CUT_SPARSE, CUT_STATS, CUT_TEACHERS, states
from triton_mutants import Mutant

MUTANTS = {
    "labels-of-other-parts-counted": Mutant(
        "tiles", "weight = tl.where(used, weight, 0.0)", "weight = weight + 0.0", CUT
    ),
    "first-of-any-logit": Mutant(
        "tiles",
        "tl.where(seen.state.top == top, seen.first",
        "tl.where(top == top, seen.first",
        states,
    ),
    "passed-pivots-are-not-first": Mutant(
        "tiles",
        "passed = (seen.pivot.logit == top) &",
        "passed = (seen.pivot.logit > top) &",
        states,
    ),
    "first-of-some-parts": Mutant(
        "joining", "first = tl.min(each, 0)", "first = tl.max(each, 0)", states
    ),
    "classes-of-the-part": Mutant(
        "states", ".to(tl.float64) + first_class", ".to(tl.float64)", states
    ),
    "pivot-of-the-part": Mutant(
        "states", "mask=here, other=0.0) - first_class", "mask=here, other=0.0)", CUT_STATS
    ),
    "squares-lost": Mutant(
        "states", "place + 8 * step, state.squares", "place + 8 * step, 0.0 * state.squares", states
    ),
    "entropy-lost": Mutant(
        "states", "place + 6 * step, state.entropy", "place + 6 * step, 0.0 * state.entropy", states
    ),
    "entropy-of-no-part": Mutant(
        "states",
        "entropy = tl.load(place + 6 * step, mask=here, other=0.0)",
        "entropy = tl.load(place + 6 * step, mask=here, other=0.0) * 0.0",
        CUT_STATS,
    ),
    "other-coefficients-forgotten": Mutant(
        "states",
        "rest = tl.load(place + 4 * step, mask=here, other=0.0)",
        "rest = tl.load(place + 4 * step, mask=here, other=0.0) * 0.0",
        CUT,
    ),
    "penalty-forgotten": Mutant(
        "states",
        "tl.load(penalty_ptr + row, mask=here",
        "0.0 * tl.load(penalty_ptr + row, mask=here",
        CUT,
    ),
    "entries-of-a-part-left-out": Mutant("states", "seen, _bad = ", "_seen, _bad = ", CUT_SPARSE),
    "teacher-of-this-part": Mutant(
        "teacher", "seen.first, Teacher(top, total)", "seen.first, seen.teacher", CUT_TEACHERS
    ),
    "teacher-in-units-of-this-part": Mutant(
        "teacher",
        "_carried(seen.teacher, seen.state, seen.pivot, top, given, FORM)",
        "_carried(seen.teacher, seen.state, seen.pivot, seen.teacher.top, given, FORM)",
        CUT_TEACHERS,
    ),
}
