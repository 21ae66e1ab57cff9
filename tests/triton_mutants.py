"""Triton kernels with one fault each, and the check that must catch it.

Run as a program with a mutant's name, it exits with 1 if the check catches it and with 0 if not:
for mutants that may read unmapped memory.
"""

from __future__ import annotations

import atexit
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from triton_checks import (
    BESIDE,
    BESIDE_PARTS,
    COMBINED,
    EXACT,
    IN_PARTS,
    IN_TILES,
    NORMALIZED,
    SPARSE,
    SPARSE_PARTS,
    SPECIAL,
    STATS,
    STEP,
    TEACHERS,
    TEACHERS_PARTS,
    VALUED,
    WEIGHED,
    entries,
    far,
    grid,
    ignored,
    in_place,
    many_rows,
    masked,
    masked_in_parts,
    second_backward_pass,
    sure_teachers,
    ties,
    unlikely_labels,
    unlikely_labels_in_parts,
    zones,
    zones_apart,
)

FILES = (
    *("records", "arithmetic", "row", "saving", "entries", "teacher", "tiles", "gradient"),
    *("joining", "states", "one_pass", "kernels"),
)


@dataclass(frozen=True)
class Mutant:
    """A text in a file, its replacement, and the check that must catch it."""

    file: str
    old: str
    new: str
    check: Callable[[], None]
    crashes: bool = False
    """Whether it may access memory that is not its own."""

    def install(self) -> None:
        """Make the launcher use kernels with the change."""
        install(self.file, self.old, self.new)


def install(file: str = "", old: str = "", new: str = "") -> None:
    """Load copies of the kernels' files, one of them changed, and make the launcher use them."""
    import polyce.implementations.triton
    from polyce.implementations.triton import arguments as triton_arguments
    from polyce.implementations.triton import launch as triton_launch
    from polyce.implementations.triton import plans

    plans.forget()
    source = Path(polyce.implementations.triton.__file__).parent
    folder = Path(tempfile.mkdtemp())
    # Deleted only at exit: Triton reads a kernel's source when it is first called.
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    prefix = f"{folder.name}_"
    for name in FILES:
        text = (source / f"{name}.py").read_text(encoding="utf-8")
        if name == file:
            if old not in text:
                raise ValueError(f"{file} does not say {old!r} any more")
            text = text.replace(old, new)
        for other in FILES:
            text = text.replace(f"polyce.implementations.triton.{other}", prefix + other)
        path = folder / f"{name}.py"
        path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(prefix + name, path)
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = loaded
        spec.loader.exec_module(loaded)
        for user in (triton_arguments, triton_launch):
            if hasattr(user, name):
                setattr(user, name, loaded)


RECORD, ARITHMETIC, ROW, SAVING, ENTRY, TEACHER, TILE, GRADIENT = FILES[:8]
JOINING, _, ONE_PASS, KERNEL = FILES[8:]
MUTANTS = {
    # masks and tails
    "reads-one-beyond": Mutant(
        KERNEL,
        "(step < length)[:, None] & here",
        "(step <= length)[:, None] & here",
        zones_apart,
    ),
    "writes-one-beyond": Mutant(
        GRADIENT, "(step < length)[:, None] & here", "(step <= length)[:, None] & here", zones_apart
    ),
    "reads-other-rows": Mutant(
        TILE,
        "return outer, first, lane, lane < inner",
        "return outer, first, lane, lane <= inner",
        zones,
        True,
    ),
    "tail-one-short": Mutant(
        TILE, "step < start, c < classes)", "step < start, c < classes - 1)", zones
    ),
    "tail-one-long": Mutant(
        TILE, "step < start, c < classes)", "step < start, c <= classes)", zones
    ),
    "head-one-short": Mutant(
        TILE, "step < start, c < classes)", "step < start - 1, c < classes)", zones
    ),
    "head-is-the-rest": Mutant(
        TILE, "(VECTOR - offset % VECTOR) % VECTOR", "offset % VECTOR", zones
    ),
    "array-is-aligned": Mutant(
        KERNEL, "x_ptr - lead + (x_at + lead + start)", "x_ptr + (x_at + lead + start)", zones_apart
    ),
    "ends-read-by-every-part": Mutant(KERNEL, "if part == 0:", "if part >= 0:", IN_PARTS),
    "coefficients-unmasked": Mutant(
        TILE, "return tl.where(inside, r, 0.0), probability", "return r, probability", EXACT
    ),
    # offsets of 32 bits
    "narrow-program": Mutant(
        TILE,
        "(program % blocks).to(tl.int64) * LANES",
        "program % blocks * LANES",
        far((3, 70), (STEP, 1)),
        True,
    ),
    "narrow-lanes": Mutant(
        TILE,
        "lane = tl.arange(0, LANES).to(tl.int64)\n    if BY_TWO",
        "lane = tl.arange(0, LANES)\n    if BY_TWO",
        far((3, 3), (STEP, 1)),
        True,
    ),
    "neighbours-in-ones": Mutant(TILE, "lane // 2 * 2 + lane % 2", "lane // 2 * 2", zones),
    "narrow-classes": Mutant(
        TILE,
        "wide = step.to(tl.int64)",
        "wide = step",
        far((2, 4, 4), (4, STEP, 1)),
        True,
    ),
    "narrow-label": Mutant(
        TILE, "label.to(tl.int64) * x_class", "label * x_class", far((2, 4, 4), (4, STEP, 1)), True
    ),
    # the state
    "tile-without-guard": Mutant(
        ROW,
        "gap = difference(x, reference, given",
        "gap = difference(x, top, given",
        SPECIAL,
    ),
    "merge-without-guard": Mutant(
        ROW,
        'reference = tl.where(top == float("-inf"), 0.0, top)\n    gap = difference(part.top',
        "reference = top\n    gap = difference(part.top",
        masked_in_parts,
    ),
    "merge-without-rest": Mutant(ROW, "excess + part.rest * risen", "excess", IN_TILES),
    "merge-without-decay": Mutant(
        ROW, "tl.where(part.total == 0.0, 0.0, part.total * decay)", "part.total", IN_TILES
    ),
    "entropy-stays-behind": Mutant(
        ROW, "moved = (entropy + part.total * risen) * decay", "moved = entropy * decay", STATS
    ),
    "pivot-excluded-nowhere": Mutant(
        ROW, 'x = tl.where(excluded, float("-inf"), x)', "x = x + 0.0", EXACT
    ),
    "loser-forgotten": Mutant(
        TILE, "loser, found, loser_r.to", "loser, 0.0 * found, loser_r.to", IN_TILES
    ),
    "loser-without-coefficient": Mutant(
        TILE, "loser, found, loser_r.to(tl.float64)", "loser, found, nothing", masked
    ),
    "parts-of-the-first": Mutant(
        JOINING, "plane * part[:, None]", "plane * 0 * part[:, None]", IN_PARTS
    ),
    "one-part-more": Mutant(
        JOINING,
        "(part < parts)[:, None]",
        "(part <= parts)[:, None]",
        unlikely_labels_in_parts,
    ),
    "last-parts-alone": Mutant(
        JOINING,
        "seen = merge_seen(seen, _joined(found, given, FORM), given, FORM)",
        "seen = _joined(found, given, FORM)",
        unlikely_labels_in_parts,
    ),
    "parts-have-no-decay": Mutant(
        ROW, "moved = _carried(parts, top[None, :], given, FORM)", "moved = parts", IN_PARTS
    ),
    "losing-parts-forgotten": Mutant(
        JOINING, "state, _leader = choose_pivot", "_state, _leader = choose_pivot", IN_PARTS
    ),
    "leading-part-counted-twice": Mutant(
        JOINING, 'tl.where(leads, float("-inf"), pivot.logit)', "pivot.logit", IN_PARTS
    ),
    "last-of-the-largest": Mutant(
        TILE,
        "(other.logit == pivot.logit) & (other.number < pivot.number)",
        "(other.logit == pivot.logit) & (other.number > pivot.number)",
        ties,
    ),
    "entropy-from-the-label": Mutant(
        RECORD,
        "LARGEST=not labeled or form.ENTROPY or form.OF_ENTROPY or form.PREDICTION or form.CORRECT",
        "LARGEST=not labeled",
        unlikely_labels,
    ),
    "entropy-from-the-label-of-parts": Mutant(
        RECORD,
        "LARGEST=not labeled or form.ENTROPY or form.OF_ENTROPY or form.PREDICTION or form.CORRECT",
        "LARGEST=not labeled",
        unlikely_labels_in_parts,
    ),
    # stats beside the target, and gradients of stats
    "equals-are-larger": Mutant(TILE, "(x > label_x)", "(x >= label_x)", BESIDE),
    "rank-of-one-part": Mutant(
        JOINING, "rank = tl.sum(rank, 0)", "rank = tl.max(rank, 0)", BESIDE_PARTS
    ),
    "squares-stay-behind": Mutant(ROW, "squares * decay * decay", "squares", BESIDE),
    "squares-of-the-last-part": Mutant(
        JOINING, "squares = tl.load(place", "squares = 0.0 * tl.load(place", BESIDE_PARTS
    ),
    "label-among-the-squares": Mutant(TILE, "(squares - p * p)", "squares", BESIDE),
    "pivot-like-the-others": Mutant(
        KERNEL, "gap = tl.where(c[:, None] == pivot_class, at_pivot, gap)", "gap = gap", BESIDE
    ),
    "score-of-a-bad-label": Mutant(
        TILE, "score = tl.where(defined & (invalid == 0)", "score = tl.where(defined", BESIDE
    ),
    "entropy-without-gaps": Mutant(
        GRADIENT, "saved.more - gap * saved.by_gap", "saved.more", VALUED
    ),
    "no-entropy-at-the-pivot": Mutant(
        SAVING, "of_entropy * result.entropy_at_pivot", "0.0 * result.entropy_at_pivot", VALUED
    ),
    "no-entropy-at-the-label": Mutant(
        SAVING, "tl.where(label.p == 0.0, 0.0, label.gap) * by_gap", "0.0 * by_gap", VALUED
    ),
    "stats-have-no-slope": Mutant(
        SAVING,
        "pivot_more = pivot_more * slope(saved_x, given, FORM)",
        "pivot_more = pivot_more",
        VALUED,
    ),
    "cotangents-of-stats-swapped": Mutant(
        KERNEL,
        "softmax_ptr, of_lse_ptr, of_entropy_ptr,\n    )",
        "softmax_ptr, of_entropy_ptr, of_lse_ptr,\n    )",
        second_backward_pass,
    ),
    "label-counted-twice": Mutant(
        TILE,
        "added = tl.where(leads | (given.kept == 0.0), 0.0, weight * given.kept.to(FORM.DTYPE))",
        "added = weight * given.kept.to(FORM.DTYPE)",
        grid("stats", only="margins/plain/top"),
    ),
    "likeliest-saved-for-backward": Mutant(
        SAVING,
        "factor = tl.where(label.leads, factor, result.probability)",
        "factor = factor",
        grid("stats", only="margins/plain/wrong"),
    ),
    "one-form-at-the-pivot": Mutant(
        ROW,
        "pivot_grad = tl.where(larger, pivot_grad, share - at_pivot)",
        "pivot_grad = pivot_grad",
        grid("accuracy", only="likeliest/flat"),
    ),
    # the row
    "rounded-gap": Mutant(
        ROW, "return delta, tl.where(finite, error, 0.0)", "return delta, 0.0 * error", EXACT
    ),
    "plain-logarithm": Mutant(ROW, "h = log1p(e, FORM.DTYPE)", "h = tl.log(1.0 + e)", EXACT),
    "plain-exponential": Mutant(
        ROW,
        "decay = exp(tl.where(below, delta, opposite), FORM.DTYPE)",
        "decay = tl.exp(tl.where(below, delta, opposite) * 1.000001)",
        EXACT,
    ),
    "one-too-many": Mutant(ROW, "(total - 1.0) + wide", "total + wide", EXACT),
    "infinite-pivot-is-sure": Mutant(
        ROW, "nothing = pivot.logit - pivot.logit", "nothing = 0.0 * wide", SPECIAL
    ),
    "zero-times-infinity": Mutant(ROW, "tl.where(r == 0.0, 0.0, r * -gap)", "r * -gap", SPECIAL),
    "penalty-without-gradient": Mutant(ROW, "sum_of_r += pull", "sum_of_r += 0.0 * pull", COMBINED),
    "slope-dropped": Mutant(
        GRADIENT, "grad = grad * slope(x, given, FORM)", "grad = grad", COMBINED
    ),
    "slope-dropped-at-the-pivot": Mutant(
        SAVING,
        "pivot_grad = pivot_grad * slope(saved_x, given, FORM)",
        "pivot_grad = pivot_grad",
        COMBINED,
    ),
    "scale-not-in-the-gradient": Mutant(GRADIENT, "g = g * given.scale", "g = g", COMBINED),
    # rows, the mean, the gradient
    "bad-labels-answered": Mutant(
        TILE,
        'loss = tl.where(invalid, float("nan"), loss)',
        "loss = loss",
        grid("targets", only="bad"),
    ),
    "bad-labels-have-gradients": Mutant(
        GRADIENT,
        'grad = tl.where(meaning.invalid, float("nan"), grad)',
        "grad = grad",
        grid("targets", only="bad"),
    ),
    "ignored-rows-kept": Mutant(
        TILE, "counted = counted & (given != ignore_index)", "counted = counted", EXACT
    ),
    "ignored-rows-have-gradients": Mutant(
        GRADIENT, "grad = tl.where(counted, grad, 0.0)", "grad = grad", ignored
    ),
    "mean-without-weight": Mutant(
        TILE, "tl.where(counted, sample * weight, 0.0)", "tl.where(counted, sample, 0.0)", EXACT
    ),
    "last-programs-alone": Mutant(
        KERNEL,
        "loss += tl.load(place, mask=step < end",
        "loss = tl.load(place, mask=step < end",
        many_rows,
    ),
    "sums-beyond-the-chunk": Mutant(
        KERNEL, "tl.minimum(begin + chunk, programs)", "begin + 2 * chunk", many_rows
    ),
    "only-the-first-chunk": Mutant(KERNEL, "program * chunk", "0 * chunk", many_rows),
    "every-row-the-first": Mutant(
        GRADIENT, "cotangent_ptr + row, mask", "cotangent_ptr + 0 * row, mask", grid("cotangent")
    ),
    "class-read-as-a-number": Mutant(
        SAVING, "number.to(tl.int32, bitcast=True)", "number.to(tl.int32)", EXACT
    ),
    "number-as-cotangent-dropped": Mutant(
        GRADIENT, "tl.full((1,), cotangent,", "tl.full((1,), 1.0,", grid("cotangent")
    ),
    "denominator-forgotten": Mutant(GRADIENT, "g = g / denominator", "g = g", EXACT),
    "pivot-next-door": Mutant(
        GRADIENT, "c[:, None] == saved.pivot_class", "c[:, None] == saved.pivot_class + 1", EXACT
    ),
    "reads-what-was-written": Mutant(
        GRADIENT,
        "    put_gradient(\n",
        "    x += 0.01 * tl.load(x_ptr - c[:, None], mask=inside)\n    put_gradient(\n",
        in_place,
    ),
    # loss and gradient in one pass
    "kept-rows-one-beyond": Mutant(
        ONE_PASS, "(step < stop - start)[:, None]", "(step <= stop - start)[:, None]", zones
    ),
    "kept-ends-not-taken": Mutant(
        ONE_PASS,
        "        seen = take(\n            x_ends",
        "        _seen = take(\n            x_ends",
        zones,
    ),
    "kept-array-is-aligned": Mutant(
        ONE_PASS, "x_ptr - lead + (x_at + lead + start)", "x_ptr + (x_at + lead + start)", zones
    ),
    "weighers-left-out": Mutant(ONE_PASS, "weigher < weighers", "weigher < 1", WEIGHED),
    "one-chunk-weighed": Mutant(
        ONE_PASS, "begin = program * chunk", "begin = 0 * program", WEIGHED
    ),
    "ignored-rows-weighed": Mutant(
        ONE_PASS,
        "tl.where(meaning.counted, meaning.sample * meaning.weight, 0.0)",
        "meaning.sample * meaning.weight",
        WEIGHED,
    ),
    "normalizer-dropped": Mutant(
        ONE_PASS, "denominator = normalizer", "denominator = 1.0 + 0.0 * normalizer", NORMALIZED
    ),
    "own-normalizer": Mutant(
        ONE_PASS, "tl.load(normalizer_ptr).to(tl.float64)", "2.0 * normalizer", NORMALIZED
    ),
    # the entries of a sparse target
    "entries-without-excess": Mutant(
        ENTRY, "tl.where(leads, 0.0, added)", "tl.where(leads, 0.0, 0.0 * added)", SPARSE
    ),
    "pivot-has-no-entries": Mutant(
        ENTRY, "at_pivot += tl.sum(tl.where(leads, r, 0.0), 0)", "at_pivot += 0.0 * rest", SPARSE
    ),
    "ignored-entries-kept": Mutant(
        ENTRY, "used = used & (number != ignore_index)", "used = used", SPARSE
    ),
    "equal-entries-apart": Mutant(
        ENTRY,
        "together += tl.where(same",
        "together = tl.where(same",
        grid("sparse", only="width/12"),
    ),
    "entries-in-no-part": Mutant(
        ENTRY, "rest += tl.sum(tl.where(leads, 0.0, r), 0)", "rest += 0.0 * rest", SPARSE_PARTS
    ),
    "bad-entries-answered": Mutant(ENTRY, "bad > 0", "bad < 0", grid("sparse", only="bad-class")),
    "entries-next-door": Mutant(
        GRADIENT, "number.to(tl.int64) * g_class", "(number + 1).to(tl.int64) * g_class", entries
    ),
    "entries-have-no-gradient": Mutant(
        GRADIENT, "other.coefficient, 0.0)", "0.0 * other.coefficient, 0.0)", entries
    ),
    "entries-over-the-pivot": Mutant(
        GRADIENT,
        "used = used & (number != saved.pivot_class)",
        "used = used",
        grid("sparse", only="margins/top"),
    ),
    # a teacher
    "teacher-with-rounded-exponents": Mutant(
        TEACHER, "found * tl.where(tl.abs(error) < 1.0, error, 0.0)", "0.0 * found", sure_teachers
    ),
    "scale-with-rounded-products": Mutant(
        TEACHER, "(lost + low * scale_low)", "0.0 * lost", sure_teachers
    ),
    "coefficients-stay-behind": Mutant(
        TEACHER,
        "with_coefficients(state, state.rest * lower",
        "with_coefficients(state, state.rest",
        TEACHERS,
    ),
    "pivot-stays-behind": Mutant(
        TEACHER, "pivot.coefficient * lower", "pivot.coefficient", TEACHERS
    ),
    "no-even-share-at-the-pivot": Mutant(
        TEACHER, "r += pivot.even * given.share", "r += 0.0 * pivot.even", TEACHERS
    ),
    "no-even-share-in-the-gradient": Mutant(
        TEACHER, "r += given.share.to(FORM.DTYPE)", "r += 0.0 * r", TEACHERS
    ),
    "even-share-stays-behind": Mutant(
        ROW, "even_excess + part.even * risen", "even_excess", TEACHERS
    ),
    "teachers-of-parts-apart": Mutant(
        TEACHER, "Teacher(top, tl.sum(total, 0))", "Teacher(top, tl.max(total, 0))", TEACHERS_PARTS
    ),
    "no-softmax-but-a-class": Mutant(
        TILE, "wanted, -1)", "wanted, wanted)", grid("teacher", only="special")
    ),
}


if __name__ == "__main__":
    name = sys.argv[1]
    mutant = MUTANTS[name]
    mutant.install()
    try:
        mutant.check()
    except AssertionError:
        sys.exit(1)
