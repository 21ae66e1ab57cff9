"""Mutants of the cupy path, each with one fault in how rows are read and written in parts."""

from __future__ import annotations

from typing import Any

from cupy_checks import in_parts
from cupy_mutants import CLASSES, ENTRIES, OF_PARTS, PARTS, PLAN, ROW, wrong

SHAPE = (5, 23)
EVERYTHING: dict[str, Any] = {"label_smoothing": 0.1, "return_stats": True, "logit_softcap": 5.0}
LABELS = in_parts(SHAPE)
LIKELY = in_parts(SHAPE, **EVERYTHING)
PREDICTED = in_parts(SHAPE, return_stats=("prediction", "brier"))
SPARSE, TEACHER = in_parts(SHAPE, "sparse"), in_parts(SHAPE, "teacher", label_smoothing=0.1)

MUTANTS = {
    "labels-in-no-part": wrong(LABELS, CLASSES, "label - first_class(call)", "label"),
    "labels-of-the-part-alone": wrong(
        LABELS, CLASSES, "label >= all_classes(call)", "label >= call.classes"
    ),
    "labels-in-every-part": wrong(
        LABELS, CLASSES, "row.label >= 0 && row.label < call.classes", "true", crashes=True
    ),
    "weights-from-the-first-class": wrong(
        in_parts(SHAPE, label_smoothing=0.1),
        OF_PARTS,
        "weight ? weight + call.start : weight",
        "weight",
    ),
    "pivots-in-the-first-part": wrong(
        LIKELY, OF_PARTS, "(double)(call.start + pivot)", "(double)pivot"
    ),
    "labels-not-counted-in": wrong(LIKELY, OF_PARTS, "rest += added;", ""),
    "labels-without-an-excess": wrong(
        LIKELY, OF_PARTS, "excess += added * gap.delta + added * gap.error;", ""
    ),
    "labels-counted-twice": wrong(LIKELY, OF_PARTS, "here && call.kept != 0 ?", "here ? 2 *"),
    "last-of-the-largest-predicted": wrong(
        PREDICTED, OF_PARTS, "call.start + state.first", "call.start + state.first + 1"
    ),
    "first-of-the-first-thread": wrong(
        PREDICTED, ROW, "choose_first(state, other.top, other.first);", ""
    ),
    "entries-of-every-part": wrong(
        SPARSE, ENTRIES, "given - first_class(call)", "(given - call.start + 1) % call.classes"
    ),
    "a-teacher-by-parts": wrong(
        TEACHER, OF_PARTS, "call.kept / targets.teacher[TOTAL * count + number]", "call.kept"
    ),
    "share-of-the-part": wrong(
        TEACHER, PLAN, "label_smoothing / problem.classes", "label_smoothing / width"
    ),
    "every-part-the-first": wrong(LABELS, PARTS, "PartKey(start, width", "PartKey(0, width"),
    "another-rows-sums": wrong(LABELS, OF_PARTS, "rows[REST_SUM * count] = state.total;", ""),
}
