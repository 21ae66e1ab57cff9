"""The triton kernels compiled for GPUs: few registers, none spilled in a loop, 16-byte loads."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

import polyce
from conftest import FULL
from polyce.call.options import STATS

pytestmark = pytest.mark.only("triton-compile")

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = ("float16", "bfloat16", "float32", "float64")
# Shape and strides; whether several numbers are read, and of the gradient written, at once.
LAYOUTS = {
    "aligned": ((4, 4096), (4096, 1), True),
    "odd": ((4, 16383), (16383, 1), True),
    "rows of 1000": ((4, 1000), (1000, 1), True),
    "short": ((300, 10), (10, 1), False),
    "neighbours": ((2, 19, 65536), (1245184, 65536, 1), True),
    "split": ((2, 200_001), (200_001, 1), True),
}
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 0.1, "logit_softcap": 30.0, "return_stats": True}
BESIDE = {"label_smoothing": 0.1, "return_stats": STATS}
# What else is passed: arrays and options.
FLAGS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "plain": ((), {}),
    "sum": ((), {"reduction": "sum"}),
    "rows": ((), {"reduction": "none"}),
    "weighted": (("weight", "sample_weight"), {}),
    "smoothed": ((), {"label_smoothing": 0.1}),
    "weighted and smoothed": (("weight",), {"label_smoothing": 0.1, "reduction": "none"}),
    "normalized": (("normalizer",), {"z_loss": 0.1, "logit_scale": 0.7}),
    "everything": (("weight", "sample_weight"), EVERYTHING),
    "probabilities": (("probabilities",), {}),
    "beside the target": ((), BESIDE),
    "beside probabilities": (("probabilities",), {**BESIDE, "return_stats": ("brier",)}),
    "valued": (("grad_lse", "grad_entropy"), {"return_stats": True}),
    "valued probabilities": (("probabilities", "grad_lse", "grad_entropy"), EVERYTHING),
    "everything of probabilities": (("probabilities", "weight", "sample_weight"), EVERYTHING),
    "entries": (("entries",), {}),
    "everything of entries": (("entries", "weight", "sample_weight"), EVERYTHING),
    "teacher": (("teacher",), {}),
    "everything of a teacher": (("teacher", "weight", "sample_weight"), EVERYTHING),
}
# The kernels of parts know no mean.
PART_FLAGS = [flags for flags, (given, _) in FLAGS.items() if "normalizer" not in given]
# Most registers of a thread with which two programs of 8 warps share a multiprocessor's 65536. For
# float64, for a softcap with all stats, and if a thread keeps several rows, all that there are:
# 255, or 512 on AMD's GPUs.
FEW, MANY = 128, {"gfx942": 512}
HEAVY = (
    "everything",
    "everything of probabilities",
    "valued probabilities",
    "everything of entries",
    "everything of a teacher",
)


def cases() -> list[Any]:
    """Return all combinations; or some with each layout, dtype and flags, and a GPU in turn."""
    if FULL:
        found = list(itertools.product(TARGETS, LAYOUTS, DTYPES, FLAGS))
    else:
        chosen = [(layout, dtype, "plain") for layout in LAYOUTS for dtype in DTYPES[1:3]]
        chosen += [("odd", dtype, "plain") for dtype in (DTYPES[0], DTYPES[3])]
        chosen += [("odd", "bfloat16", flags) for flags in FLAGS if flags != "plain"]
        chosen += [("neighbours", "float32", flags) for flags in HEAVY]
        chosen += [("short", "float64", "everything"), ("split", "float32", "probabilities")]
        chosen += [("split", "float32", flags) for flags in ("entries", "teacher")]
        found = [(TARGETS[(i + i // 4) % 4], *case) for i, case in enumerate(chosen)]
    return [pytest.param(*case, id="-".join(case)) for case in found]


@pytest.mark.parametrize(("target", "layout", "dtype", "flags"), cases())
def test_compiled(
    torch: Any, tmp_path: Path, target: str, layout: str, dtype: str, flags: str
) -> None:
    from recorder import call, record

    recorder = record(target)
    arrays, options = drawn(torch, layout, dtype, flags)
    call(*arrays, **options)
    check(recorder, tmp_path, target, layout, dtype, flags)


def parts() -> list[Any]:
    """Return layouts, dtypes and flags of some classes of a call, all of them if asked for."""
    if FULL:
        return list(itertools.product(LAYOUTS, DTYPES, PART_FLAGS))
    return [
        ("odd", "bfloat16", "plain"),
        ("odd", "float32", "everything"),
        ("split", "float32", "valued probabilities"),
        ("neighbours", "float32", "everything of entries"),
        ("aligned", "bfloat16", "everything of a teacher"),
        ("short", "float64", "valued"),
    ]


@pytest.mark.parametrize(("layout", "dtype", "flags"), parts())
def test_parts_compiled(torch: Any, tmp_path: Path, layout: str, dtype: str, flags: str) -> None:
    from recorder import call_part, record

    recorder = record("sm_90")
    arrays, options = drawn(torch, layout, dtype, flags, classes=LAYOUTS[layout][0][1] + 5)
    call_part(*arrays, **options)
    names = {launch.name for launch in recorder.launched}
    assert names >= {"forward", "write_states", "save_states", "backward"}
    assert ("teacher" in flags) == ("write_teachers" in names)
    check(recorder, tmp_path, "sm_90", layout, dtype, flags)


def drawn(
    torch: Any, layout: str, dtype: str, flags: str, classes: int | None = None
) -> tuple[list[Any], dict[str, Any]]:
    """Return the arrays and options of a call; its logits are some of so many `classes`, if given.

    Nobody looks at the values.
    """
    shape, strides, _ = LAYOUTS[layout]
    given, options = FLAGS[flags]
    if classes is not None:
        options = options | {"classes": classes}
    x = torch.empty_strided(shape, strides, dtype=getattr(torch, dtype))
    rows = (shape[0], *shape[2:])
    taken: Any = torch.zeros(rows, dtype=torch.int64)
    if "probabilities" in given:
        taken = torch.empty_like(x)
    elif "teacher" in given:
        taken = polyce.TeacherLogits(torch.empty_like(x), 0.5)
    elif "entries" in given:
        several = torch.zeros((rows[0], 32, *rows[1:]), dtype=torch.int64)
        taken = polyce.SparseTarget(several, several.float())
    of_stats = {n: torch.ones(rows) for n in ("lse", "entropy") if f"grad_{n}" in given}
    return [
        x,
        taken,
        torch.ones(classes or shape[1]) if "weight" in given else None,
        torch.ones(rows) if "sample_weight" in given else None,
        torch.ones(()) if "normalizer" in given else None,
    ], {**options, "grad_stats": of_stats or None}


def check(recorder: Any, folder: Path, target: str, layout: str, dtype: str, flags: str) -> None:
    """Check the kernels that were launched: registers, spills, how much is loaded at once."""
    from recorder import binary, registers, spills_in_loops, widths

    wide = LAYOUTS[layout][2]
    for launch in recorder.launched:
        compiled = binary(launch, recorder.device)
        count, spilled = registers(compiled, folder)
        # Sometimes ptxas spills some numbers until after the loop, to save registers.
        most = 40 if flags in HEAVY else 16
        assert spilled <= (most if "cubin" in compiled.asm else 0), launch.name
        if spilled:
            assert spills_in_loops(compiled, folder) == []
        heavy = flags in HEAVY or dtype == "float64" or layout in ("short", "neighbours")
        assert count <= (MANY.get(target, 255) if heavy else FEW), launch.name
        loads, stores = widths(compiled)
        at_once = 16
        if layout == "neighbours":
            # Two neighbouring rows, which are all that a thread has.
            at_once = 2 * int(dtype.rpartition("float")[2]) // 8
        if wide and launch.name in ("forward", "backward"):
            assert at_once in loads, launch.name
        if wide and launch.name == "backward":
            assert at_once in stores
            assert layout != "neighbours" or stores == {at_once}


KEPT = {
    "rows of 1000": ((4, 1000), (1000, 1)),
    "rows of 4095": ((4, 4095), (4095, 1)),
    "rows of 8192": ((4, 8192), (8192, 1)),
    "short": ((300, 10), (10, 1)),
    "neighbours": ((2, 19, 65536), (1245184, 65536, 1)),
}


def kept_cases() -> list[Any]:
    """Return all combinations; or each layout with some dtype and flags, and a GPU in turn."""
    if FULL:
        found = list(itertools.product(TARGETS, KEPT, DTYPES, ("plain", "everything")))
    else:
        flags = [("bfloat16", "plain"), ("float32", "everything")]
        chosen = [(layout, *flag) for layout in KEPT for flag in flags]
        found = [(TARGETS[(i + i // 4) % 4], *case) for i, case in enumerate(chosen)]
    return [pytest.param(*case, id="-".join(case)) for case in found]


@pytest.mark.parametrize(("target", "layout", "dtype", "flags"), kept_cases())
def test_rows_that_are_kept_are_kept_in_registers(
    torch: Any, tmp_path: Path, target: str, layout: str, dtype: str, flags: str
) -> None:
    from recorder import binary, call_both, record, registers

    recorder = record(target)
    shape, strides = KEPT[layout]
    x = torch.empty_strided(shape, strides, dtype=getattr(torch, dtype))
    call_both(x, torch.zeros((shape[0], *shape[2:]), dtype=torch.int64), **FLAGS[flags][1])
    for launch in recorder.launched:
        compiled = binary(launch, recorder.device)
        count, spilled = registers(compiled, tmp_path)
        # Four numbers of a thread, at most; and there is no loop.
        assert spilled <= (16 if flags in HEAVY else 0), launch.name
        heavy = flags in HEAVY or dtype == "float64" or layout in ("short", "neighbours")
        assert count <= (MANY.get(target, 255) if heavy else FEW), launch.name


COUNTED = {
    # registers, instructions of the loop for each logit
    "aligned": (48, 16.0),
    "neighbours": (80, 20.0),
    "short": (48, 24.0),
}


@pytest.mark.parametrize("layout", COUNTED)
def test_what_a_logit_takes(torch: Any, tmp_path: Path, layout: str) -> None:
    """A few more instructions do no harm; a layout that the compiler sees otherwise takes twice."""
    from polyce.implementations.triton.layout import SHORTEST
    from recorder import binary, call, instructions, record, registers

    if layout == "short" and not SHORTEST:
        pytest.skip("this Triton spreads short rows over threads")

    recorder = record("sm_90")
    shape, strides, _ = LAYOUTS[layout]
    x = torch.empty_strided(shape, strides, dtype=torch.bfloat16)
    call(x, torch.zeros((shape[0], *shape[2:]), dtype=torch.int64), backward=False)
    launch = recorder.launched[0]
    compiled = binary(launch, recorder.device)
    most, each = COUNTED[layout]
    assert registers(compiled, tmp_path)[0] <= 1.2 * most
    given = dict(zip(compiled.src.fn.arg_names, launch.arguments, strict=True))
    of_thread = given["TILE"] * given["LANES"] / (32 * launch.warps)
    assert instructions(compiled, tmp_path)[1] <= 1.2 * each * of_thread


def test_no_thread_writes_before_all_have_read(torch: Any) -> None:
    """Each thread reads the label's logit, which another one overwrites in place."""
    from recorder import binary, call_both, record

    recorder = record("sm_90")
    call_both(torch.zeros(4, 1000), torch.zeros(4, dtype=torch.int64), reduction="none")
    (launch,) = recorder.launched
    lines = binary(launch, recorder.device).asm["ptx"].splitlines()
    loads = [i for i, line in enumerate(lines) if "ld.global" in line]
    # The gradient is written 16 bytes at once, a loss is one number.
    stores = [i for i, line in enumerate(lines) if "st.global.v4" in line]
    assert any("bar.sync" in line for line in lines[max(loads) : min(stores)])


def test_a_spill_in_a_loop_is_seen(
    torch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from polyce.implementations.triton import layout as triton_layout
    from recorder import binary, call, record, registers, spills_in_loops

    monkeypatch.setattr(triton_layout, "_TILE", 32768)
    recorder = record("sm_90")
    x, target = torch.empty(2, 65536, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    call(x, target, logit_softcap=3.0, backward=False)
    compiled = binary(recorder.launched[0], recorder.device)
    assert registers(compiled, tmp_path)[1] > 16
    assert spills_in_loops(compiled, tmp_path)
