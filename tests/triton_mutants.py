"""Triton kernels with something wrong, one thing each, and the check that has to notice.

Run as a program, with a mutant's name, it exits with 1 if its check notices and with 0 if not: for
those that may read where no memory is.
"""

from __future__ import annotations

import atexit
import importlib.util
import itertools
import math
import mmap
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polyce
from polyce.testing import Case, cases, check_implementation
from polyce.testing.selection import representative

FILES = ("triton_row", "triton_tiles", "triton_kernels")
# Launch tables with everything of a large problem in a small one.
TILES = {"_TILE": 4, "SHORT": 0, "_NEIGHBOURS": 4, "_NEIGHBOURS_TILE": 8}
PARTS = {"_TILE": 4, "SHORT": 0, "LONG": 4, "FEW_PROGRAMS": 64, "PART": 2}


# Names of the cases of a group that stand for it, short ones; chosen once.
_chosen: dict[str, set[str]] = {}


def chosen(group: str) -> set[str]:
    if group not in _chosen:
        short = [case for case in cases([group], ["float32"]) if case.logits.size < 300]
        wide = [case for case in cases([group], ["float64"]) if case.logits.size < 300]
        _chosen[group] = {c.name for c in (*representative(short, 12), *representative(wide, 6))}
    return _chosen[group]


def grid(*groups: str, table: dict[str, int] | None = None, only: str = "") -> Callable[[], None]:
    """Check some cases of groups of the conformance grid, or those with a word in their names."""

    def left_out(case: Case) -> str:
        wanted = only in case.name if only else case.name in chosen(case.group)
        return "" if wanted else "left out here"

    def check() -> None:
        with changed(table or {}):
            check_implementation(
                "triton",
                "torch",
                groups=groups,
                dtypes=["float32", "float64"],
                leave_out=left_out,
            )

    return check


class changed:
    """Change the table of launches meanwhile."""

    def __init__(self, values: dict[str, int]) -> None:
        from polyce.implementations import triton_layout

        self.module, self.values = triton_layout, values
        self.before = {name: getattr(triton_layout, name) for name in values}

    def __enter__(self) -> None:
        for name, value in self.values.items():
            setattr(self.module, name, value)

    def __exit__(self, *_: object) -> None:
        for name, value in self.before.items():
            setattr(self.module, name, value)


def around(values: Any, before: int) -> tuple[Any, Any]:
    """Put a tensor's values among nans."""
    import torch

    memory = torch.full((before + values.numel() + 16,), math.nan, dtype=values.dtype)
    inside = memory[before : before + values.numel()].view(values.shape)
    inside.copy_(values)
    return inside, memory


def zones() -> None:
    """Check that nothing beyond rows is read or written, wherever these begin."""
    import torch

    torch.manual_seed(0)
    for shape, before in itertools.product(((2, 67), (2, 72), (3, 5), (2, 5, 3)), (0, 1, 4)):
        x = torch.randn(shape)
        rows = (shape[0], *shape[2:])
        for target in (torch.randint(shape[1], rows), torch.rand(shape)):
            want = polyce.cross_entropy_with_grad(x, target, implementation="reference")
            inside, _ = around(x, before)
            out, memory = around(x, 3)
            loss, grad = polyce.cross_entropy_with_grad(
                inside, target, implementation="triton", out=out
            )
            torch.testing.assert_close(loss, want[0])
            torch.testing.assert_close(grad, want[1], rtol=1e-4, atol=1e-7)
            assert torch.isnan(memory[:3]).all()
            assert torch.isnan(memory[3 + x.numel() :]).all()


def in_place() -> None:
    """Check the gradient over its own logits, in many programs."""
    import torch

    torch.manual_seed(0)
    with changed(TILES):
        for label in (0, 40, 66):
            x, t = torch.randn(2, 67), torch.tensor([label, label])
            want = polyce.cross_entropy_with_grad(x, t, implementation="reference")[1]
            polyce.cross_entropy_with_grad(x, t, implementation="triton", out=x)
            torch.testing.assert_close(x, want, rtol=1e-4, atol=1e-7)


def far(shape: tuple[int, ...], strides: tuple[int, ...]) -> Callable[[], None]:
    """Check rows and classes more than 2^31 elements apart."""

    def check() -> None:
        import torch

        torch.manual_seed(0)
        count = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        memory = mmap.mmap(-1, 2 * count, flags=flags)
        x = torch.frombuffer(memory, dtype=torch.float16).as_strided(shape, strides)
        x.copy_(torch.randn(shape))
        t = torch.randint(shape[1], (shape[0], *shape[2:]))
        want = polyce.cross_entropy_with_grad(x.clone(), t, implementation="reference")
        loss, grad = polyce.cross_entropy_with_grad(x, t, implementation="triton", out=x)
        torch.testing.assert_close(loss, want[0], rtol=2e-3, atol=0.0)
        torch.testing.assert_close(grad.clone(), want[1], rtol=2e-3, atol=1e-6)

    return check


def ignored() -> None:
    """Check that rows which do not count have no gradient, whatever is passed on to them."""
    import torch

    x, t = torch.randn(2, 5), torch.tensor([-100, 1])
    _, grad = polyce.cross_entropy_with_grad(
        x, t, reduction="none", grad_output=torch.tensor([math.nan, 1.0]), implementation="triton"
    )
    assert torch.equal(grad[0], torch.zeros(5))


def masked() -> None:
    """Check a row whose target lies on a masked class, in a tile of masked classes."""
    import torch

    x, p = torch.zeros(1, 8), torch.zeros(1, 8)
    x[0, :4], p[0, 0] = -math.inf, 1.0
    with changed(TILES):
        assert polyce.cross_entropy(x, p, implementation="triton") == math.inf


def ties() -> None:
    """Check which of several largest classes is predicted, in several tiles."""
    import torch

    with changed(TILES):
        _, stats = polyce.cross_entropy(
            torch.zeros(2, 19),
            torch.tensor([18, 0]),
            return_stats="prediction",
            implementation="triton",
        )
    assert stats.prediction.tolist() == [0, 0]


def unlikely_labels(table: dict[str, int] = TILES) -> None:
    """Check the entropy of rows with another label than the class that leads by far."""
    import torch

    torch.manual_seed(0)
    x, t = torch.randn(8, 19), torch.full((8,), 11)
    x[:, 3] += 20.0
    with changed(table):
        _, stats = polyce.cross_entropy(x, t, return_stats="entropy", implementation="triton")
    exact = torch.special.entr(x.double().softmax(1)).sum(1)
    torch.testing.assert_close(stats.entropy.double(), exact, rtol=1e-6, atol=0.0)


def unlikely_labels_in_parts() -> None:
    """Check the same in rows that several programs read."""
    unlikely_labels(PARTS)


def many_rows() -> None:
    """Check a mean over more programs than are added up at once."""
    import torch

    torch.manual_seed(0)
    x, t = torch.randn(64, 2), torch.randint(2, (64,))
    want = polyce.cross_entropy(x, t, implementation="reference")
    with changed({"_SHORT_TILE": 4, "SUMS": 8}):
        torch.testing.assert_close(polyce.cross_entropy(x, t, implementation="triton"), want)


# A stride that 32 bits hold, but not three of them.
STEP = 2**30 + 64
EXACT = grid("accuracy", "options")
SPECIAL = grid("special")
IN_TILES = grid("options", "combined", table=TILES)
IN_PARTS = grid("options", "combined", table=PARTS)
STATS = grid("stats", table=TILES)
COMBINED = grid("combined", "transform")
# What other tests hold the kernels to as well.
SLOW = {IN_TILES, IN_PARTS, STATS, SPECIAL, COMBINED}


@dataclass(frozen=True)
class Mutant:
    """What is said in a file, what is said in its place, and the check that has to notice."""

    file: str
    old: str
    new: str
    check: Callable[[], None]
    crashes: bool = False
    """Whether it may read or write where no memory of its own is."""

    def install(self) -> None:
        """Put kernels with the change into the launcher's hands."""
        from polyce.implementations import triton_launch

        triton_launch.triton_kernels = kernels(self.file, self.old, self.new)


def kernels(file: str = "", old: str = "", new: str = "") -> Any:
    """Load copies of the kernels' files, one of them with a change."""
    import polyce.implementations

    source = Path(polyce.implementations.__file__).parent
    folder = Path(tempfile.mkdtemp())
    # Not earlier: Triton reads a kernel's source when it is first called.
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    prefix = f"{folder.name}_"
    loaded = None
    for name in FILES:
        text = (source / f"{name}.py").read_text(encoding="utf-8")
        if name == file:
            if old not in text:
                raise ValueError(f"{file} does not say {old!r} any more")
            text = text.replace(old, new)
        for other in FILES:
            text = text.replace(f"polyce.implementations.{other}", prefix + other)
        path = folder / f"{name}.py"
        path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(prefix + name, path)
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = loaded
        spec.loader.exec_module(loaded)
    return loaded


ROW, TILE, KERNEL = FILES
MUTANTS = {
    # masks and tails
    "reads-one-beyond": Mutant(
        KERNEL, "(step < length)[:, None] & counted", "(step <= length)[:, None] & counted", zones
    ),
    "writes-one-beyond": Mutant(
        KERNEL, "(step < length)[:, None] & here", "(step <= length)[:, None] & here", zones
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
        KERNEL, "x_ptr - lead + (x_at + lead + start)", "x_ptr + (x_at + lead + start)", zones
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
        KERNEL,
        "others = tl.arange(0, LANES).to(tl.int64)[None, :]",
        "others = tl.arange(0, LANES)[None, :]",
        far((3, 3), (STEP, 1)),
        True,
    ),
    "narrow-classes": Mutant(
        KERNEL,
        "step[:, None].to(tl.int64) * x_class",
        "step[:, None] * x_class",
        far((2, 4, 4), (4, STEP, 1)),
        True,
    ),
    "narrow-written-classes": Mutant(
        KERNEL,
        "wide = step[:, None].to(tl.int64)",
        "wide = step[:, None]",
        far((2, 4, 4), (4, STEP, 1)),
        True,
    ),
    "narrow-label": Mutant(
        TILE, "label.to(tl.int64) * x_class", "label * x_class", far((2, 4, 4), (4, STEP, 1)), True
    ),
    # the state
    "tile-without-guard": Mutant(
        ROW,
        'difference(x, tl.where(top == float("-inf"), 0.0, top), scale',
        "difference(x, top, scale",
        SPECIAL,
    ),
    "merge-without-guard": Mutant(
        ROW, 'reference = tl.where(new == float("-inf"), 0.0, new)', "reference = new", SPECIAL
    ),
    "merge-without-rest": Mutant(ROW, "excess + rest * risen", "excess", IN_TILES),
    "merge-without-decay": Mutant(
        ROW, "tl.where(total == 0.0, 0.0, total * decay)", "total", IN_TILES
    ),
    "entropy-stays-behind": Mutant(
        ROW, "moved = (entropy + total * risen) * decay", "moved = entropy * decay", STATS
    ),
    "pivot-excluded-nowhere": Mutant(
        ROW, 'x = tl.where(excluded, float("-inf"), x)', "x = x + 0.0", EXACT
    ),
    "loser-forgotten": Mutant(
        TILE, "loser, found, loser_r.to", "loser, 0.0 * found, loser_r.to", IN_TILES
    ),
    "loser-without-coefficient": Mutant(
        TILE, "loser, found, loser_r.to(tl.float64)", "loser, found, tl.zeros_like(total)", masked
    ),
    "parts-of-the-first": Mutant(
        KERNEL, "parts_ptr + plane * part + row", "parts_ptr + row", IN_PARTS
    ),
    "last-of-the-largest": Mutant(
        TILE,
        "(other == pivot) & (other_class < pivot_class)",
        "(other == pivot) & (other_class > pivot_class)",
        ties,
    ),
    "entropy-from-the-label": Mutant(
        KERNEL,
        "LARGEST: tl.constexpr = PROBABILITY or ENTROPY or PREDICTION or CORRECT",
        "LARGEST: tl.constexpr = PROBABILITY",
        unlikely_labels,
    ),
    "entropy-from-the-label-of-parts": Mutant(
        KERNEL,
        "LARGEST: tl.constexpr = PROBABILITY or ENTROPY or PREDICTION or CORRECT",
        "LARGEST: tl.constexpr = PROBABILITY",
        unlikely_labels_in_parts,
    ),
    "label-counted-twice": Mutant(
        TILE,
        "added = tl.where(leads | (kept == 0.0), 0.0, weight * kept.to(DTYPE))",
        "added = weight * kept.to(DTYPE)",
        grid("stats", only="margins/plain/top"),
    ),
    "likeliest-saved-for-backward": Mutant(
        TILE,
        "factor = tl.where(leads, factor, probability)",
        "factor = factor",
        grid("stats", only="margins/plain/wrong"),
    ),
    "one-form-at-the-pivot": Mutant(
        ROW,
        "pivot_grad = tl.where(smaller, share - at_pivot, pivot_grad)",
        "pivot_grad = pivot_grad",
        grid("accuracy", only="likeliest/flat"),
    ),
    # the row
    "rounded-gap": Mutant(
        ROW, "return delta, tl.where(finite, error, 0.0)", "return delta, 0.0 * error", EXACT
    ),
    "plain-logarithm": Mutant(ROW, "h = log1p(e, DTYPE)", "h = tl.log(1.0 + e)", EXACT),
    "plain-exponential": Mutant(
        ROW,
        "decay = exp(tl.where(below, delta, opposite), DTYPE)",
        "decay = tl.exp(tl.where(below, delta, opposite) * 1.000001)",
        EXACT,
    ),
    "one-too-many": Mutant(ROW, "(total - 1.0) + wide", "total + wide", EXACT),
    "infinite-pivot-is-sure": Mutant(
        ROW, "nothing = pivot - pivot", "nothing = 0.0 * rest", SPECIAL
    ),
    "zero-times-infinity": Mutant(ROW, "tl.where(r == 0.0, 0.0, r * -gap)", "r * -gap", SPECIAL),
    "penalty-without-gradient": Mutant(ROW, "sum_of_r += pull", "sum_of_r += 0.0 * pull", COMBINED),
    "slope-dropped": Mutant(
        KERNEL, "grad = grad * slope(x, scale, cap, TRANSFORM, DTYPE)", "grad = grad", COMBINED
    ),
    "slope-dropped-at-the-pivot": Mutant(
        TILE,
        "pivot_grad = pivot_grad * slope(pivot, scale, cap, TRANSFORM, DTYPE)",
        "pivot_grad = pivot_grad",
        COMBINED,
    ),
    "scale-not-in-the-gradient": Mutant(KERNEL, "g = g * scale", "g = g", COMBINED),
    # rows, the mean, the gradient
    "bad-labels-answered": Mutant(
        TILE,
        'loss = tl.where(invalid, float("nan"), loss)',
        "loss = loss",
        grid("targets", only="bad"),
    ),
    "bad-labels-have-gradients": Mutant(
        KERNEL,
        'grad = tl.where(invalid, float("nan"), grad)',
        "grad = grad",
        grid("targets", only="bad"),
    ),
    "ignored-rows-kept": Mutant(
        TILE, "counted = counted & (given != ignore_index)", "counted = counted", EXACT
    ),
    "ignored-rows-have-gradients": Mutant(
        KERNEL, "grad = tl.where(counted, grad, 0.0)", "grad = grad", ignored
    ),
    "mean-without-weight": Mutant(
        TILE, "tl.where(counted, sample * weight, 0.0)", "tl.where(counted, sample, 0.0)", EXACT
    ),
    "first-programs-alone": Mutant(
        KERNEL,
        "for done in range(0, programs, TILE):\n        step = done +",
        "for done in range(0, 1, TILE):\n        step = done +",
        many_rows,
    ),
    "every-row-the-first": Mutant(
        KERNEL, "cotangent_ptr + row * BY_ROW", "cotangent_ptr + row * 0", grid("cotangent")
    ),
    "denominator-forgotten": Mutant(KERNEL, "g = g / tl.load(denominator_ptr)", "g = g", EXACT),
    "pivot-next-door": Mutant(
        KERNEL, "c[:, None] == pivot_class", "c[:, None] == pivot_class + 1", EXACT
    ),
    "reads-what-was-written": Mutant(
        KERNEL,
        "top = tl.load(place, mask=here, other=0.0).to(DTYPE)\n    factor",
        "top = tl.load(x_ptr + row * x_lane, mask=here).to(DTYPE)\n    factor",
        in_place,
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
