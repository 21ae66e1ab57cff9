"""Mutants of the cupy path, each with one fault in what it computes or how it is called."""

from __future__ import annotations

import math
from typing import Any

import cupy_checks
from cupy_calls import SHARED, SPLIT
from cupy_checks import labels, of_rows, right, two_calls
from cupy_mutants import (
    BLOCKS,
    CLASSES,
    ENTRIES,
    GRADIENT,
    KERNELS,
    LAUNCH,
    NUMBERS,
    OUTCOME,
    PLAN,
    ROW,
    wrong,
)

INF, NAN = math.inf, math.nan
LOSS: dict[str, Any] = {"grad": False}
MEAN: dict[str, Any] = {"reduction": "mean"}
LONG = (3, 70)
SMOOTH = right(LONG, label_smoothing=0.1, **LOSS)
LIKELY = right(LONG, kind="probability", **LOSS)
PARTS_LIKELY = right(LONG, kind="probability", table=SPLIT, **LOSS)
MEANS = right((300, 2), **LOSS, **MEAN)
STATS = right(LONG, return_stats=True)
GRADIENTS = right(LONG)
CAPPED = right(LONG, logit_softcap=5.0, z_loss=0.1)
MASKED = of_rows([[0.0, -INF, -INF, -INF, -INF, -INF, 1.0, -INF]], [0], table=SHARED, **LOSS)
TIES = of_rows([[0.0] * 19] * 2, [18, 0], table=SHARED, return_stats="prediction")
BY_ROW = right((3, 10), grad_output=cupy_checks.thirds(3))
ASKED = ("top_probability", "brier", "rank")
BESIDE = right(LONG, return_stats=ASKED)
BESIDE_PARTS = right(LONG, return_stats=ASKED, table=SPLIT)
BESIDE_SOFT = right(LONG, kind="probability", return_stats=ASKED[:2])
VALUED = right(
    LONG, return_stats=True, grad_stats={n: cupy_checks.thirds(3) for n in ("lse", "entropy")}
)
RANK_TIES = of_rows([[0.0] * 19] * 2, [18, 0], table=SHARED, return_stats="rank")
SPARSE = right((12, 40), kind="sparse", label_smoothing=0.1, return_stats=True)
TEACHER = right(LONG, kind="teacher", label_smoothing=0.1, return_stats=True)
OLD_KEY = "plan = _plans.get((problem, key))"
FIND_PIVOT = "if (x > pivot_logit || (pivot == NONE && x == pivot_logit))"
UINT64 = [2**64 - 100, 3, 2**63]

MUTANTS = {
    # the state of a row
    "no-guard-of-the-reference": wrong(
        MASKED, ROW, "top == -infinity() ? (real)0 : top; }", "top; }"
    ),
    "merge-without-rest": wrong(
        SMOOTH, ROW, "if (state.rest != 0) state.excess += state.rest * risen;", ""
    ),
    "merge-without-decay": wrong(
        right(LONG, **LOSS), ROW, "if (state.total != 0) state.total *= lower;", ""
    ),
    "merge-without-the-other-top": wrong(
        right(LONG, **LOSS), ROW, "if (state.top > other.top) carry(call, other, state.top);", ""
    ),
    "merge-without-the-pivot": wrong(
        LIKELY,
        ROW,
        "choose_pivot(call, state, other.pivot, other.pivot_r, other.pivot_class, other_even);",
        "",
    ),
    "loser-forgotten": wrong(LIKELY, ROW, "include(call, state, x, r, c, even);", ""),
    "loser-without-its-coefficient": wrong(
        LIKELY,
        ROW,
        "part_r loser_r = state.pivot_r",
        "part_r loser_r = 0",
    ),
    "pivot-of-parts-forgotten": wrong(
        PARTS_LIKELY, ROW, "state.pivot_class = c;", "state.pivot_class = NONE;"
    ),
    "masked-excess": wrong(
        # As many as one thread loads at once; the thread has other classes beside the masked ones.
        of_rows([[0.0, -INF, 1.0, 0.5] * 2], [[0.25, 0.0, 0.25, 0.0] * 2], **LOSS),
        CLASSES,
        "rest[i] == 0 ? (real)0 : rest[i] * -gap",
        "rest[i] * -gap",
    ),
    "pivot-counted-twice": wrong(GRADIENTS, CLASSES, "taken.holds(u, pivot)", "false"),
    "nan-dropped": wrong(
        of_rows([[0.0, NAN, 1.0, 2.0]], [0], **LOSS),
        CLASSES,
        "total[i] = exp_of(gap);",
        "total[i] = gap == gap ? exp_of(gap) : (real)0;",
    ),
    "infinite-label-is-sure": wrong(
        of_rows([[0.0, INF, 1.0]], [1], **LOSS),
        OUTCOME,
        "nothing = state.pivot - state.pivot",
        "nothing = 0",
    ),
    "narrow-sums": wrong(cupy_checks.equal_terms, ROW, "typedef double Sum;", "typedef float Sum;"),
    "float64-sums-forget": wrong(
        cupy_checks.many_equal_terms, ROW, "if (error == error) lost += error;", ""
    ),
    "narrow-sums-of-rows": wrong(
        cupy_checks.equal_rows,
        BLOCKS,
        "struct Sums { double loss, weight; }",
        "struct Sums { float loss, weight; double no; }",
    ),
    "last-of-the-largest": wrong(
        TIES, ROW, "(x == state.pivot && c < state.pivot_class)", "x == state.pivot"
    ),
    "entropy-from-the-label": wrong(
        cupy_checks.unlikely_labels(), CLASSES, FIND_PIVOT, "if (c == label)"
    ),
    "entropy-from-the-label-of-parts": wrong(
        cupy_checks.unlikely_labels(**SPLIT), CLASSES, FIND_PIVOT, "if (c == label)"
    ),
    "label-counted-twice": wrong(
        of_rows([[0.0, 3.0, 1.0]], [1], return_stats=True),
        OUTCOME,
        "added = leads || call.kept == 0 ? (real)0 : weight",
        "added = weight",
    ),
    "likeliest-is-the-gradient-s-pivot": wrong(STATS, OUTCOME, "found.factor = probability;", ""),
    "one-form-at-the-pivot": wrong(
        cupy_checks.flat, OUTCOME, "if (!larger) found.pivot_gradient = share - at_pivot;", ""
    ),
    "entropy-stays-behind": wrong(STATS, ROW, "state.entropy += state.total * risen;", ""),
    # stats beside the target, and gradients of stats
    "equals-are-larger": wrong(RANK_TIES, CLASSES, "if (x > state.label)", "if (x >= state.label)"),
    "rank-beside-0": wrong(
        BESIDE, BLOCKS, "RANKED || (place.seat.member == 0", "(place.seat.member == 0"
    ),
    "rank-of-the-first-part": wrong(BESIDE_PARTS, ROW, "state.rank += other.rank;", ""),
    "squares-stay-behind": wrong(BESIDE, ROW, "state.squares *= lower * lower;", ";"),
    "label-counted-among-the-squares": wrong(BESIDE, OUTCOME, "(squares - p * p)", "squares"),
    "largest-probability-of-the-label": wrong(
        BESIDE,
        OUTCOME,
        "found.top_probability = 1 / (1 + e);",
        "found.top_probability = low / (1 + e);",
    ),
    "distances-of-the-first-thread": wrong(
        BESIDE_SOFT,
        BLOCKS,
        "if (place.seat.member < reach)\n      place.gradient",
        "if (0) place.gradient",
    ),
    "entropy-without-gaps": wrong(VALUED, GRADIENT, "row.more - gap * row.by_gap", "row.more"),
    "no-entropy-at-the-pivot": wrong(
        VALUED, BLOCKS, "of_entropy * found.entropy_at_pivot", "0 * found.entropy_at_pivot"
    ),
    "no-entropy-at-the-label": wrong(VALUED, BLOCKS, "(more + found.label_gap * by_gap)", "more"),
    "cotangents-of-stats-swapped": wrong(
        VALUED,
        LAUNCH,
        "(_of_stats(of_lse), _of_stats(of_entropy))",
        "(_of_stats(of_entropy), NULL)",
    ),
    "every-entropy-the-first": wrong(
        VALUED, BLOCKS, "of_stats.entropy[number]", "of_stats.entropy[0]"
    ),
    # entries of a sparse target, and a teacher
    "entries-of-the-first-thread": wrong(
        SPARSE, ENTRIES, "kept.rest += other.rest;", "kept.rest += 0;"
    ),
    "last-of-equal-entries": wrong(
        SPARSE, ENTRIES, "sum += of(other, first + k);", "sum = of(other, first + k);"
    ),
    "ignored-entries-are-bad": wrong(
        SPARSE, ENTRIES, "call.ignores && given == call.ignore_index", "false"
    ),
    "bad-entries-are-answered": wrong(
        cupy_checks.bad_entries, ENTRIES, "if (entry.bad) own.bad = 1;", ""
    ),
    "pivot-s-entry-among-the-others": wrong(
        SPARSE, ENTRIES, "own.pivot_r += entry.r;\n      continue;", ""
    ),
    "entries-without-smoothing": wrong(
        SPARSE,
        GRADIENT,
        "coefficient(call, weight, 0, c) + given",
        "given == 0 ? coefficient(call, weight, 0, c) : given",
    ),
    "teacher-s-rest-stays-behind": wrong(TEACHER, ROW, "state.rest *= lower;", ""),
    "teacher-s-pivot-stays-behind": wrong(TEACHER, ROW, "state.pivot_r *= lower;", ""),
    "teacher-s-parts-apart": wrong(
        TEACHER,
        ROW,
        "if (state.teacher_top > other.teacher_top) carry_teacher(call, other, state.teacher_top);",
        "",
    ),
    "teacher-without-scale": wrong(
        TEACHER, ROW, "const real scale = (real)call.teacher_scale,", "const real scale = 1,"
    ),
    "teacher-rounded": wrong(
        cupy_checks.distant_teacher, ROW, "(error - error == 0 ? error : 0)", "0"
    ),
    "teacher-s-pivot-without-smoothing": wrong(
        TEACHER, OUTCOME, "pivot_r += (double)state.pivot_even * call.share;", ""
    ),
    "gradient-of-another-teacher": wrong(
        TEACHER, BLOCKS, "gradient.teacher_top = state.teacher_top;", "gradient.teacher_top = 0;"
    ),
    # whole rows
    "rounded-gap": wrong(
        cupy_checks.confident, OUTCOME, "gap.error = (real)(exact - gap.delta);", "gap.error = 0;"
    ),
    "plain-logarithm": wrong(cupy_checks.confident, OUTCOME, "h = log1p_of(e)", "h = logf(1 + e)"),
    "one-too-many": wrong(GRADIENTS, OUTCOME, "(state.total - 1) + low", "state.total + low"),
    "penalty-without-gradient": wrong(CAPPED, OUTCOME, "sum_of_r += pull;", ""),
    "slope-dropped": wrong(CAPPED, GRADIENT, "grad *= slope(call, x);", ""),
    "slope-dropped-at-the-pivot": wrong(
        CAPPED, BLOCKS, "gradient.at_pivot *= slope(call, state.pivot);", ""
    ),
    "scale-not-in-the-gradient": wrong(
        right(LONG, logit_scale=2.0), BLOCKS, "g *= call.exact_scale;", ""
    ),
    "pivot-next-door": wrong(
        GRADIENTS, GRADIENT, "if (taken.number(u, w) == c)", "if (taken.number(u, w) == c + 1)"
    ),
    # which rows count, and for how much
    "ignored-rows-in-the-mean": wrong(
        MEANS,
        CLASSES,
        "return row.counted ? row.sample * row.weight : 0;",
        "return row.sample * row.weight;",
    ),
    "sample-weights-not-in-the-mean": wrong(
        MEANS, CLASSES, "row.counted ? row.sample * row.weight : 0", "row.counted ? row.weight : 0"
    ),
    "class-weights-not-in-the-mean": wrong(
        MEANS, CLASSES, "row.counted ? row.sample * row.weight : 0", "row.counted ? row.sample : 0"
    ),
    "every-sample-the-first": wrong(
        right(LONG, **LOSS), CLASSES, "targets.sample, row, call", "targets.sample, 0, call"
    ),
    "ignored-rows-have-losses": wrong(
        right(LONG, **LOSS),
        BLOCKS,
        "row.counted ? found.loss * row.sample : 0",
        "found.loss * row.sample",
    ),
    "ignored-rows-have-gradients": wrong(
        cupy_checks.ignored, BLOCKS, "row.invalid ? 2 : row.counted ? 0 : 1", "row.invalid ? 2 : 0"
    ),
    "ignored-rows-are-valid": wrong(
        STATS, BLOCKS, "results.valid[number] = row.counted;", "results.valid[number] = 1;"
    ),
    "ignored-rows-have-predictions": wrong(
        of_rows([[0.0, 1.0]] * 2, [-100, 1], return_stats=True),
        BLOCKS,
        "if (results.prediction) results.prediction[number] = defined ? predicted : -1;",
        "if (results.prediction) results.prediction[number] = predicted;",
    ),
    "denominator-forgotten": wrong(
        right(LONG, **MEAN), KERNELS, "call.mean ? g / divides[0] : g", "g"
    ),
    "every-cotangent-the-first": wrong(BY_ROW, BLOCKS, "call.cotangent_by_row ? row : 0", "0"),
    "cotangent-forgotten": wrong(
        BY_ROW, LAUNCH, "cotangent=_array_and_number(cotangent)", "cotangent=(NULL, 1.0)"
    ),
    # labels
    "bad-labels-are-read": wrong(
        labels([3, 2**30], "int64", [1]),
        CLASSES,
        "if (found.counted && !found.invalid) found.label",
        "if (found.counted) found.label",
    ),
    "bad-labels-are-answered": wrong(
        labels([3, 70], "int64", [1]), BLOCKS, "if (row.invalid) loss = not_a_number();", ""
    ),
    "bad-labels-have-gradients": wrong(
        labels([3, -1], "int64", [1]), BLOCKS, "row.invalid ? 2 : row.counted", "row.counted"
    ),
    "labels-in-32-bits": wrong(
        labels([3, 2**32 + 3], "int64", [1]),
        CLASSES,
        "const i64 label = (i64)targets.given[row];",
        "const i64 label = (int)targets.given[row];",
    ),
    "ignore-index-cut-off": wrong(
        labels([1, 156], "uint8", [1]),
        PLAN,
        "labels.ignored_as_signed(problem)",
        "problem.options.ignore_index",
        CLASSES,
        "label == call.ignore_index",
        "(target)label == (target)call.ignore_index",
    ),
    "large-labels-taken-for-negative": wrong(
        labels(UINT64, "uint64", [0, 2]),
        PLAN,
        "labels.ignored_as_signed(problem)",
        "problem.options.ignore_index",
    ),
    "large-labels-in-32-bits": wrong(
        labels(UINT64, "uint64", [0, 2]),
        NUMBERS,
        "template <> struct Stored<UINT64> { typedef long long type; }",
        "struct Low { unsigned low, high; operator i64() const { return low; } };\n"
        "template <> struct Stored<UINT64> { typedef Low type; }",
    ),
    "bad-labels-not-refused": wrong(
        cupy_checks.refused_labels, LAUNCH, "if problem.check_labels", "if False"
    ),
    # rounding
    "bfloat16-cut-off": wrong(
        cupy_checks.nearest, NUMBERS, "(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16", "bits >> 16"
    ),
    "rounded-twice": wrong(
        cupy_checks.rounded_once, NUMBERS, "narrow(rounded_to_odd(value))", "narrow((float)value)"
    ),
    # the launch
    "number-in-32-bits": wrong(
        right(LONG),
        LAUNCH,
        "NULL, 1.0 if value is None else value",
        "NULL, np.float32(1.0 if value is None else value)",
    ),
    "argument-missing": wrong(
        right(LONG), LAUNCH, "(plan.blocks,), *arguments)", "(plan.blocks,), *arguments[:-1])"
    ),
    "fields-swapped": wrong(right(LONG), PLAN, "outer inner classes", "inner outer classes"),
    "field-missing": wrong(
        right(LONG),
        PLAN,
        '"share", "z_loss")',
        '"share")',
        PLAN,
        '"z_loss": problem.options.z_loss,',
        "",
    ),
    "alignment-not-in-the-key": wrong(
        two_calls({"shape": (2, 72)}, {"shape": (2, 72), "out_at": 1}),
        LAUNCH,
        OLD_KEY,
        "real, key = key, key._replace(grad=key.grad._replace(address=0))\n    " + OLD_KEY,
        LAUNCH,
        "cupy_plan.plan(problem, key)",
        "cupy_plan.plan(problem, real)",
    ),
    "strides-not-in-the-key": wrong(
        two_calls({"shape": (2, 10)}, {"shape": (2, 10), "apart": 2}),
        LAUNCH,
        OLD_KEY,
        "real, key = key, key._replace(logits=key.logits._replace(strides=()))\n    " + OLD_KEY,
        LAUNCH,
        "cupy_plan.plan(problem, key)",
        "cupy_plan.plan(problem, real)",
    ),
    "device-not-entered": wrong(
        cupy_checks.elsewhere,
        LAUNCH,
        "with problem.library.computing(operands.named())",
        "with cupy.cuda.Device()",
    ),
    "unknown-order-not-copied": wrong(
        cupy_checks.odd_layout, PLAN, "a is not None and b is None", "False"
    ),
    "copy-not-given-back": wrong(
        cupy_checks.odd_layout, LAUNCH, "if call.grad is not grad:", "if False:"
    ),
}
