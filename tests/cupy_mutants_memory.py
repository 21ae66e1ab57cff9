"""Mutants of the cupy path, each with one fault in how threads share work and memory."""

from __future__ import annotations

from typing import Any

import cupy_checks
from cupy_calls import SPLIT
from cupy_checks import ORDERS, far, right, zones
from cupy_mutants import BLOCKS, CLASSES, ENTRIES, GRADIENT, KERNELS, PLAN, wrong

SYNC = "__syncthreads();"
LOSS: dict[str, Any] = {"grad": False, "orders": ORDERS}
MEAN: dict[str, Any] = {"reduction": "mean"}
LONG, SHORT = (3, 70), (40, 10)
TEAMS = right(LONG, **LOSS)
GRADIENTS = right(LONG, orders=ORDERS)
SUM = right(SHORT, **LOSS, reduction="sum")
MEANS = right((300, 2), **MEAN, orders=ORDERS)
PARTS = right(LONG, table=SPLIT, **LOSS)
ENTRIES_OVER_LOGITS = right((12, 70), kind="sparse", in_place=True, orders=ORDERS)
UNEVEN = zones((3, 67), 2)
FAR, NEAR = 2**31 + 64, 2**30 + 64

MUTANTS = {
    # barriers, and who is last
    "no-barrier-before-the-tree": wrong(TEAMS, BLOCKS, f"if (team > 1) {SYNC}\n  for", "for"),
    "no-barrier-in-the-tree": wrong(TEAMS, BLOCKS, f"step].state);\n    {SYNC}", "step].state);\n"),
    "no-barrier-before-the-gradient": wrong(
        GRADIENTS,
        KERNELS,
        f"{SYNC}\n    if (place.row.number >= 0) {{",
        "if (place.row.number >= 0) {",
    ),
    "no-barrier-before-the-next-row": wrong(
        right((5, 70), orders=ORDERS, table={"MOST_BLOCKS": 1, "BLOCK": 32}),
        KERNELS,
        f"may still read.\n    {SYNC}",
        "\n",
    ),
    "no-barrier-before-the-entries": wrong(
        ENTRIES_OVER_LOGITS, KERNELS, f"threads write there.\n    {SYNC}", "\n"
    ),
    "reads-a-written-entry": wrong(
        ENTRIES_OVER_LOGITS,
        ENTRIES,
        "logit_here = entries.logits[first + k]",
        "logit_here = "
        "(real)Stored<LOGITS>::widen(grad[place.row.g_at + entry.number * call.g_class])",
    ),
    "no-barrier-before-adding-up": wrong(
        SUM,
        BLOCKS,
        f"threadIdx.x;\n  {SYNC}\n  for (int reach = BLOCK / 2",
        "threadIdx.x;\n  for (int reach = BLOCK / 2",
    ),
    "no-barrier-behind-the-denominator": wrong(
        MEANS, KERNELS, f"each[0].weight);\n  {SYNC}", "each[0].weight);"
    ),
    "no-barrier-behind-the-count": wrong(
        MEANS, KERNELS, f"{SYNC}\n  if (finished_before", "if (finished_before"
    ),
    "barrier-in-a-branch": wrong(
        SUM,
        BLOCKS,
        f"reach].weight;\n    }}\n    {SYNC}",
        f"reach].weight;\n    {SYNC}\n    }}",
    ),
    "no-fence": wrong(
        cupy_checks.races, KERNELS, "__threadfence();\n    finished_before", "finished_before"
    ),
    "nobody-is-last": wrong(MEANS, KERNELS, "!= gridDim.x - 1) return", "!= gridDim.x) return"),
    "second-last-is-last": wrong(
        MEANS, KERNELS, "!= gridDim.x - 1) return", "!= gridDim.x - 2) return"
    ),
    "count-not-started": wrong(MEANS, KERNELS, "if (blockIdx.x == 0) *finished = 0;", ""),
    "sums-in-the-order-of-blocks": wrong(
        cupy_checks.same_bits,
        KERNELS,
        "sums[blockIdx.x] = mine;\n    __threadfence();\n"
        "    finished_before[0] = atomicAdd(finished, 1u);",
        "finished_before[0] = atomicAdd(finished, 1u);\n    sums[finished_before[0]] = mine;",
    ),
    # heads, tails, alignment
    "tail-one-short": wrong(UNEVEN, CLASSES, "j < classes - body;", "j < classes - body - 1;"),
    "tail-forgotten": wrong(UNEVEN, CLASSES, "j < classes - body;", "j < start;"),
    "head-forgotten": wrong(UNEVEN, CLASSES, "j < start ? j : j + body", "j + body"),
    "nothing-peeled": wrong(
        UNEVEN, CLASSES, "(BYTES - (u64)x % BYTES) % BYTES / sizeof(logit)", "0"
    ),
    "head-is-the-rest": wrong(
        UNEVEN, CLASSES, "(BYTES - (u64)x % BYTES) % BYTES", "(u64)x % BYTES"
    ),
    "reads-one-beyond": wrong(
        zones((70, 12)), CLASSES, "number(u, 0) < limit", "number(u, 0) <= limit"
    ),
    "one-row-too-many": wrong(
        zones((5, 10)), CLASSES, "lane < call.inner ?", "lane <= call.inner ?"
    ),
    "ends-read-by-every-part": wrong(PARTS, CLASSES, "if (part == 0) {", "if (part >= 0) {"),
    "half-the-width-compared": wrong(
        zones((2, 72), out_at=4, name="float16"),
        PLAN,
        "_in_step(threads.width, key.logits, x, key.grad",
        "_in_step(threads.width // 2, key.logits, x, key.grad",
    ),
    "gradient-taken-for-aligned": wrong(
        zones((2, 72), out_at=1), GRADIENT, "W == 1 || call.g_in_step", "true"
    ),
    "probabilities-taken-for-aligned": wrong(
        zones((2, 72), other=1, target="float32"), CLASSES, "if (call.t_in_step)", "if (true)"
    ),
    "probabilities-in-32-bytes": wrong(
        zones((2, 72), other=2, target="float64"),
        CLASSES,
        "W > 1 && W * sizeof(target) <= 16",
        "W > 1",
    ),
    # offsets of 32 bits
    "narrow-rows": wrong(
        far((3, 70), (FAR, 1), "logits"),
        CLASSES,
        "outer * call.x_outer + lane * call.x_lane",
        "(int)(outer * call.x_outer + lane * call.x_lane)",
        crashes=True,
    ),
    "narrow-rows-of-probabilities": wrong(
        far((3, 70), (FAR, 1), "target"),
        CLASSES,
        "outer * call.t_outer + lane * call.t_lane",
        "(int)(outer * call.t_outer + lane * call.t_lane)",
        crashes=True,
    ),
    "narrow-rows-of-the-gradient": wrong(
        far((4, 70), (NEAR, 1), "out"),
        CLASSES,
        "outer * call.g_outer + lane * call.g_lane",
        "(int)(outer * call.g_outer + lane * call.g_lane)",
        crashes=True,
    ),
    "narrow-classes": wrong(
        far((2, 4, 4), (4, NEAR, 1), "logits"),
        CLASSES,
        "(begin + member) * apart",
        "(int)((begin + member) * apart)",
        crashes=True,
    ),
    "narrow-classes-of-the-gradient": wrong(
        far((2, 4, 4), (4, NEAR, 1), "out"),
        GRADIENT,
        "taken.first * apart",
        "(int)(taken.first * apart)",
        crashes=True,
    ),
    "narrow-label": wrong(
        far((2, 4, 4), (4, NEAR, 1), "logits"),
        BLOCKS,
        "x[meaning.label * call.x_class]",
        "x[(int)(meaning.label * call.x_class)]",
        crashes=True,
    ),
    # who reads what
    "first-groups-alone": wrong(
        right((5, 70), grad=False, table={"MOST_BLOCKS": 2, "BLOCK": 32}),
        KERNELS,
        "place.group += gridDim.x",
        "place.group += groups_of(call)",
    ),
    "first-weights-alone": wrong(
        MEANS, KERNELS, "step = (i64)gridDim.x * BLOCK", "step = call.outer * call.inner"
    ),
    "first-sums-alone": wrong(
        right((300, 2), **LOSS, **MEAN, table={"BLOCK": 4, "MOST_BLOCKS": 9}),
        BLOCKS,
        "i < count; i += BLOCK",
        "i < count; i += count",
    ),
    "reads-a-written-label": wrong(
        right(LONG, table=SPLIT, in_place=True, orders=ORDERS),
        KERNELS,
        "const State& state = joined[0];",
        "State state = joined[0]; state.pivot = "
        "Stored<LOGITS>::widen(x[row.x_at + meaning.label * call.x_class]);",
    ),
    "reads-a-written-neighbour": wrong(
        right(LONG, in_place=True, orders=ORDERS),
        BLOCKS,
        "gradient.reference = found.top;",
        "gradient.reference = reference_of(state.top) - state.pivot;",
        KERNELS,
        "const Gradient& gradient = places[first_of(call, place.seat)].gradient;\n      write_part",
        "Gradient gradient = places[first_of(call, place.seat)].gradient; gradient.reference += "
        "Stored<LOGITS>::widen(x[place.row.x_at + gradient.pivot * call.x_class]);",
    ),
    "pivot-in-the-second-part": wrong(
        PARTS, BLOCKS, "member == 0 && part == 0", "member == 0 && part == 1"
    ),
    "pivot-in-every-seat": wrong(TEAMS, BLOCKS, "member == 0 && part == 0", "member == 1"),
    "parts-one-short": wrong(
        right((3, 96), table=SPLIT, **LOSS),
        PLAN,
        '"chunk": threads.chunk',
        '"chunk": threads.chunk - 1',
    ),
    "last-part-forgotten": wrong(
        right((3, 96), table=SPLIT, **LOSS),
        BLOCKS,
        "row >= 0 && seat < parts",
        "row >= 0 && seat + 1 < parts",
    ),
    "odd-part-forgotten": wrong(
        right((3, 96), table=SPLIT, **LOSS),
        BLOCKS,
        "seat + reach < parts",
        "seat + reach < parts - 1",
    ),
    "parts-beyond-the-threads-forgotten": wrong(
        right((3, 96), table={**SPLIT, "BLOCK": 2, "MOST_PARTS": 6}, **LOSS),
        BLOCKS,
        "part += count",
        "part += parts",
    ),
    "no-barrier-before-parts-are-joined": wrong(
        right(
            (3, 96),
            table=SPLIT,
            **LOSS,
        ),
        BLOCKS,
        f"row * parts + part]);\n  }}\n  {SYNC}",
        "row * parts + part]);\n  }\n",
    ),
    # loads that are under way
    "the-same-load-again": wrong(
        right((3, 300), "bfloat16", table={"BLOCK": 16}), CLASSES, "next += LOADS * step;", ""
    ),
    "pairs-turned-round": wrong(
        right((3, 70), "bfloat16"),
        CLASSES,
        "numbers[2 * n], numbers[2 * n + 1]",
        "numbers[2 * n + 1], numbers[2 * n]",
    ),
}
