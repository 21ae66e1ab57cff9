"""What the triton kernels do with a tile: read its target and logits, and write the results.

A tile has classes along its first axis and rows, the lanes, along its second.
"""

import triton
import triton.language as tl

from polyce.implementations.triton import layout
from polyce.implementations.triton.arithmetic import narrow
from polyce.implementations.triton.entries import with_entries
from polyce.implementations.triton.records import Label, Meaning, Pivot, Saved, Seen, State, Teacher
from polyce.implementations.triton.row import count_label, finish, likelier, merge, tile_state
from polyce.implementations.triton.saving import saved_of
from polyce.implementations.triton.teacher import join_teachers, teacher_exp, with_teacher

_SHORTEST = tl.constexpr(layout.SHORTEST)


@triton.jit
def lanes(inner, blocks, LANES: tl.constexpr):
    """Return this program's outer index, its first row within that, its rows, and which exist."""
    program = tl.program_id(0)
    outer = (program // blocks).to(tl.int64)
    first = (program % blocks).to(tl.int64) * LANES
    lane = first + tl.arange(0, LANES)
    return outer, first, lane, lane < inner


@triton.jit
def neighbours(LANES: tl.constexpr, BY_TWO: tl.constexpr):
    """Return the numbers of a tile's rows; with BY_TWO, a thread loads and stores two at once.

    A sum tells the compiler no more than that two are contiguous.
    """
    lane = tl.arange(0, LANES).to(tl.int64)
    if BY_TWO:
        lane = lane // 2 * 2 + lane % 2
    return lane[None, :]


@triton.jit
def far_steps(step, LANES: tl.constexpr, BY_TWO: tl.constexpr):
    """Return a tile's classes as factors of addresses.

    Of the shortest rows the compiler is not told that their classes are contiguous: then a thread
    has all classes of a row, and adds them up alone.
    """
    wide = step.to(tl.int64)
    if LANES > 1 and not BY_TWO and step.shape[0] <= _SHORTEST:
        wide = wide * 2 // 2
    return wide[:, None]


@triton.jit
def body(offset, classes, VECTOR: tl.constexpr):
    """Return the range of a row's classes that whole 16-byte loads cover.

    `offset` is where the row begins, in elements from a 16-byte boundary.
    """
    start = tl.minimum((VECTOR - offset % VECTOR) % VECTOR, classes).to(tl.int32)
    return start, start + (classes - start) // VECTOR * VECTOR


@triton.jit
def edge(start, stop, classes, VECTOR: tl.constexpr):
    """Return the classes before and after that range as one small tile, and which of them exist."""
    step = tl.arange(0, 2 * VECTOR)
    c = tl.where(step < VECTOR, step, stop + step - VECTOR)
    return c, tl.where(step < VECTOR, step < start, c < classes)


@triton.jit
def to_load(there, counted):
    """Return which numbers of a tile to load: those of rows that count, if there is one row.

    Several rows share cache lines, and masks of their own would leave single numbers to each load.
    """
    loaded = there
    if counted.shape[0] == 1:
        loaded = there & counted[None, :]
    return loaded


@triton.jit
def target(inputs, row, here, classes, ignore_index, FORM: tl.constexpr):
    """Return what the target means for each row."""
    counted = here
    sample = tl.full(row.shape, 1.0, tl.float64)
    if FORM.SAMPLED:
        sample = tl.load(inputs.sample + row, mask=here, other=0.0).to(tl.float64)
        counted = counted & (sample != 0.0)
    label = tl.zeros(row.shape, tl.int32)
    weight = tl.full(row.shape, 1.0, FORM.DTYPE)
    invalid = here & (label != 0)
    if FORM.LABELED:
        given = tl.load(inputs.target + row, mask=here, other=0).to(tl.int64)
        if FORM.IGNORES:
            counted = counted & (given != ignore_index)
        outside = (given < 0) | (given >= classes)
        if FORM.PART:
            label = given.to(tl.int32)
            here = here & (outside == 0)
        else:
            invalid = counted & outside
            label = tl.where(counted & (invalid == 0), given, 0).to(tl.int32)
        if FORM.WEIGHTED:
            weight = tl.load(inputs.weight + label, mask=here, other=1.0).to(FORM.DTYPE)
            weight = tl.where(invalid, 1.0, weight)
    return Meaning(label, weight, sample, counted, invalid)


@triton.jit
def coefficients(x, target_ptr, weight_ptr, c, loaded, inside, classes, given, FORM: tl.constexpr):
    """Compute a tile of the r_c without the label's own share, and of the probabilities."""
    probability = x
    r = tl.zeros_like(x)
    if FORM.PROBABILITY:
        probability = tl.load(target_ptr, mask=loaded, other=0.0).to(FORM.DTYPE)
        r = probability
        if FORM.SMOOTHED:
            r = r * given.kept.to(FORM.DTYPE) + given.share.to(FORM.DTYPE)
    elif FORM.SMOOTHED:
        r += given.share.to(FORM.DTYPE)
    if FORM.WEIGHTED and FORM.SPREAD:
        known = (c < classes)[:, None]
        r = r * tl.load(weight_ptr + c[:, None], mask=known, other=0.0).to(FORM.DTYPE)
    return tl.where(inside, r, 0.0), probability


@triton.jit
def _teacher_tile(target_ptr, weight_ptr, c, loaded, inside, classes, given, FORM: tl.constexpr):
    """Read a tile of a teacher's logits; return coefficients, class weights, logits and state."""
    t = tl.load(target_ptr, mask=loaded, other=float("-inf")).to(FORM.DTYPE)
    t = tl.where(inside, t, float("-inf"))
    top = tl.max(t, 0)
    r = teacher_exp(t, top, given, FORM)
    total = tl.sum(r, 0).to(tl.float64)
    weight = tl.where(inside, 1.0, tl.zeros_like(r))
    if FORM.WEIGHTED:
        known = (c < classes)[:, None]
        weight = tl.load(weight_ptr + c[:, None], mask=known, other=0.0).to(FORM.DTYPE)
        weight = tl.where(inside, weight, 0.0)
        r = r * weight
    return r, weight, t, Teacher(top, total)


@triton.jit
def choose_pivot(state, pivot, other, given, FORM: tl.constexpr):
    """Choose the larger of two pivots, the first if equal, and count the other among the rest."""
    wins = (other.logit > pivot.logit) | (
        (other.logit == pivot.logit) & (other.number < pivot.number)
    )
    loser = tl.where(wins, pivot.logit, other.logit)
    loser_r = tl.where(wins, pivot.coefficient, other.coefficient)
    # A masked class adds nothing to the sum; with a coefficient it makes the loss infinite, when
    # the merge moves it up from -inf.
    found = tl.where(loser == float("-inf"), 0.0, 1.0).to(tl.float64)
    nothing = tl.zeros_like(state.total)
    loser_even = nothing
    if FORM.EVEN:
        loser_even = tl.where(wins, pivot.even, other.even).to(tl.float64)
    alone = State(
        loser, found, loser_r.to(tl.float64), nothing, nothing, found, loser_even, nothing
    )
    state = merge(state, alone, given, FORM)
    winner = Pivot(
        tl.where(wins, other.logit, pivot.logit),
        tl.where(wins, other.coefficient, pivot.coefficient),
        tl.where(wins, other.number, pivot.number),
        tl.where(wins, other.even, pivot.even) if FORM.EVEN else pivot.even,
    )
    return state, winner


@triton.jit
def nothing_read(LANES: tl.constexpr, FORM: tl.constexpr):
    """Return what is known before any class is read; 0x7FFFFFFF stands for no class."""
    lowest = tl.full((LANES,), float("-inf"), FORM.DTYPE)
    none = tl.full((LANES,), 0x7FFFFFFF, tl.int32)
    zero = tl.zeros((LANES,), tl.float64)
    # In a teacher's units, numbers may be smaller than float32 has them.
    nothing = tl.zeros((LANES,), tl.float64 if FORM.TEACHER else FORM.DTYPE)
    pivot = Pivot(lowest, nothing, none, tl.zeros((LANES,), FORM.DTYPE))
    rank = tl.zeros((LANES,), tl.int32)
    state = State(lowest, zero, zero, zero, zero, zero, zero, zero)
    return Seen(state, pivot, lowest, none, rank, none, Teacher(lowest, zero))


@triton.jit
def read(
    x_ptr, target_ptr, weight_ptr, c, there, meaning, label_x, classes, given, seen,
    FORM: tl.constexpr,
):  # fmt: skip
    """Read a tile, once, into what is known of its rows; `there` says where there is memory."""
    x = tl.load(x_ptr, mask=to_load(there, meaning.counted), other=float("-inf")).to(FORM.DTYPE)
    return take(x, target_ptr, weight_ptr, c, there, meaning, label_x, classes, given, seen, FORM)


@triton.jit
def take(
    x, target_ptr, weight_ptr, c, there, meaning, label_x, classes, given, seen, FORM: tl.constexpr
):
    """Take a tile of logits into what is known of its rows.

    Where the pivot is the class of the largest logit, a label gets its share of the smoothing here,
    and the rest of its coefficient in `conclude`.
    """
    inside = there & meaning.counted[None, :]
    loaded = to_load(there, meaning.counted)
    x = tl.where(inside, x, float("-inf"))
    if FORM.TEACHER:
        r, weight, probability, teacher = _teacher_tile(
            target_ptr, weight_ptr, c, loaded, inside, classes, given, FORM
        )
    else:
        r, probability = coefficients(
            x, target_ptr, weight_ptr, c, loaded, inside, classes, given, FORM
        )
        weight, teacher = r, seen.teacher
    number = c[:, None]
    pivot, most, most_class, rank = seen.pivot, seen.most, seen.most_class, seen.rank
    if FORM.RANK:
        rank = tl.sum((inside & (x > label_x)).to(tl.int32), 0)
    if FORM.LARGEST:
        top = tl.max(x, 0)
        # The largest 32-bit number stands for no class, in an empty tile.
        top_class = tl.min(tl.where((x == top) & inside, number, 0x7FFFFFFF), 0)
        excluded = number == top_class
        top_even = pivot.even
        if FORM.EVEN:
            top_even = tl.sum(tl.where(excluded, weight, 0.0), 0)
        pivot = Pivot(top, tl.sum(tl.where(excluded, r, 0.0), 0), top_class, top_even)
        if FORM.PROBABILITY and FORM.CORRECT:
            known = tl.where(inside, probability, float("-inf"))
            most = tl.max(known, 0)
            most_class = tl.min(tl.where((known == most) & inside, number, 0x7FFFFFFF), 0)
    else:
        excluded = number == meaning.label
    state = tile_state(x, r, weight, excluded, given, FORM)
    first = seen.first
    if FORM.FIRST:
        is_top = inside & (x == state.top) & (excluded == 0)
        first = tl.min(tl.where(is_top, number, 0x7FFFFFFF), 0)
    here = Seen(state, pivot, most, most_class, rank, first, teacher)
    return merge_seen(seen, here, given, FORM)


@triton.jit
def merge_seen(one, other, given, FORM: tl.constexpr):
    """Merge what is known of two parts of each row."""
    before, state, pivot, other_pivot = one.state, other.state, one.pivot, other.pivot
    most, most_class, rank, teacher = one.most, one.most_class, one.rank, one.teacher
    if FORM.RANK:
        rank += other.rank
    if FORM.PROBABILITY and FORM.CORRECT:
        most, most_class = likelier(most, most_class, other.most, other.most_class)
    if FORM.TEACHER:
        before, state, pivot, other_pivot, teacher = join_teachers(
            teacher, other.teacher, before, state, pivot, other_pivot, given, FORM
        )
    state = merge(before, state, given, FORM)
    if FORM.LARGEST:
        state, pivot = choose_pivot(state, pivot, other_pivot, given, FORM)
    first = one.first
    if FORM.FIRST:
        first = first_besides(one, state.top, pivot.number, FORM)
        first = tl.minimum(first, first_besides(other, state.top, pivot.number, FORM))
    return Seen(state, pivot, most, most_class, rank, first, teacher)


@triton.jit
def first_besides(seen, top, number, FORM: tl.constexpr):
    """Return the first class of some with the logit `top`, besides the pivot of them and others."""
    first = tl.where(seen.state.top == top, seen.first, 0x7FFFFFFF)
    if FORM.LARGEST:
        passed = (seen.pivot.logit == top) & (seen.pivot.number != number)
        first = tl.minimum(first, tl.where(passed, seen.pivot.number, 0x7FFFFFFF))
    return first


@triton.jit
def with_labels(
    x_row, x_class, label, weight, counted, classes, state, pivot, given, FORM: tl.constexpr
):
    """Read the logits of the labels, and add the coefficients that `read` has left out.

    Return state, pivot and labels. A label among other classes has no coefficient.
    """
    used = counted & (label < classes)
    if FORM.PART:
        used = used & (label >= 0)
        weight = tl.where(used, weight, 0.0)
    # Labels that are used are in range, so nothing outside is read.
    at = x_row + label.to(tl.int64) * x_class
    x = tl.load(at, mask=used, other=0.0).to(FORM.DTYPE)
    r = weight
    if FORM.SMOOTHED:
        r = weight * (given.kept + given.share).to(FORM.DTYPE)
    leads, p, gap = used, x, x
    if FORM.LARGEST:
        leads = label == pivot.number
        leading_r = tl.where(leads, r, pivot.coefficient)
        pivot = Pivot(pivot.logit, leading_r, pivot.number, pivot.even)
        added = tl.where(leads | (given.kept == 0.0), 0.0, weight * given.kept.to(FORM.DTYPE))
        state, p, gap = count_label(state, x, added, given, FORM)
    else:
        pivot = Pivot(x, r, label, pivot.even)
    return state, pivot, Label(label, x, r, leads, p, gap)


@triton.jit
def conclude(
    x_row, inputs, outputs, row, here, classes, x_class, ignore_index, given, z_loss, seen,
    FORM: tl.constexpr,
):  # fmt: skip
    """Write losses, or their sums, and stats of whole rows; return what KEEP asks for."""
    DTYPE: tl.constexpr = FORM.DTYPE
    label, weight, sample, counted, invalid = target(inputs, row, here, classes, ignore_index, FORM)
    if FORM.ENTRIES > 0:
        seen, invalid = with_entries(
            x_row, inputs, row, counted, classes, x_class, ignore_index, given, seen, FORM
        )
    state, pivot = seen.state, seen.pivot
    unit = pivot.logit
    if FORM.TEACHER:
        state, pivot, unit = with_teacher(seen, given, FORM)
    own = Label(label, weight, weight, counted, weight, weight)
    if FORM.LABELED:
        state, pivot, own = with_labels(
            x_row, x_class, label, weight, counted, classes, state, pivot, given, FORM
        )
    result = finish(state, pivot, weight * z_loss.to(DTYPE), given, FORM)
    lse = result.lse
    loss = tl.where(counted, result.loss.to(tl.float64) * sample, 0.0)
    loss = tl.where(invalid, float("nan"), loss)
    if FORM.REDUCED:
        place = outputs.sums + 2 * tl.program_id(0).to(tl.int64)
        tl.store(place, tl.sum(loss, 0))
        tl.store(place + 1, tl.sum(tl.where(counted, sample * weight, 0.0), 0))
    else:
        loss = narrow(loss, outputs.loss.dtype.element_ty, FORM.EMULATED)
        tl.store(outputs.loss + row, loss, mask=here)
    # What a backward pass needs; nothing, unless it is asked for.
    kept = Saved(lse, lse, lse, label, lse, lse, lse, lse, lse, lse, lse)
    if FORM.KEEP:
        kept = saved_of(
            outputs.of_lse, outputs.of_entropy, row, here,
            state, pivot, own, result, invalid, seen.teacher.top, unit, given, FORM,
        )  # fmt: skip
    if FORM.STATS:
        tl.store(outputs.valid + row, counted.to(tl.uint8), mask=here)
        defined = counted & (lse == lse)
        if FORM.LSE:
            tl.store(outputs.lse + row, tl.where(counted, lse, float("nan")), mask=here)
        if FORM.ENTROPY:
            entropy = tl.where(counted, result.entropy, float("nan"))
            tl.store(outputs.entropy + row, entropy, mask=here)
        if FORM.PREDICTION:
            found = tl.where(defined, pivot.number, -1).to(tl.int64)
            tl.store(outputs.prediction + row, found, mask=here)
        if FORM.CORRECT:
            wanted = label if FORM.LABELED else seen.most_class
            if FORM.TEACHER:
                # Without a softmax it prefers no class.
                total = seen.teacher.total
                wanted = tl.where((total > 0.0) & (total < float("inf")), wanted, -1)
            right = defined & (pivot.number == wanted) & (invalid == 0)
            tl.store(outputs.correct + row, right.to(tl.uint8), mask=here)
        if FORM.TOP:
            most = tl.where(defined, result.top_probability, float("nan"))
            tl.store(outputs.top_probability + row, most, mask=here)
        if FORM.RANK:
            rank = tl.where(defined & (invalid == 0), seen.rank, -1).to(tl.int64)
            tl.store(outputs.rank + row, rank, mask=here)
        if FORM.SQUARES:
            f = result.factor.to(tl.float64)
            away = result.others.to(tl.float64)
            squares = state.squares * f * f
            score = away * away + squares
            if FORM.LARGEST:
                p, near = own.p.to(tl.float64) * f, result.probability.to(tl.float64)
                beside = (1.0 - p) * (1.0 - p) + near * near + (squares - p * p)
                score = tl.where(own.leads, score, beside)
            score = tl.where(defined & (invalid == 0), score, float("nan")).to(DTYPE)
            tl.store(outputs.brier + row, score, mask=here)
        if FORM.DISTANT:
            place = outputs.softmax + 5 * row
            reference = tl.where(state.top == float("-inf"), 0.0, state.top)
            f = tl.where(defined, result.factor, float("nan"))
            tl.store(place, reference.to(tl.float64), mask=here)
            tl.store(place + 1, f.to(tl.float64), mask=here)
            tl.store(place + 2, result.probability.to(tl.float64), mask=here)
            tl.store(place + 3, result.others.to(tl.float64), mask=here)
            tl.store(place + 4, pivot.number.to(tl.float64), mask=here)
    return kept
