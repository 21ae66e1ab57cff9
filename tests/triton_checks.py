"""Checks of the Triton kernels in the interpreter, for correct kernels and for mutants."""

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Callable
from typing import Any

import numpy as np

import polyce
from in_parts import cut_functions, of_parts
from polyce.call.options import Options
from polyce.call.problem import describe
from polyce.testing import Case, cases, check_implementation
from polyce.testing.dtypes import FORMATS
from polyce.testing.oracle import exact_answer
from polyce.testing.selection import representative

# Launch tables that make small problems take the ways of large ones.
APART = {"WHOLE": 0, "_WHOLE_NEIGHBOURS": 0}
TILES = APART | {"_TILE": 4, "SHORT": 0, "_NEIGHBOURS": 4, "_NEIGHBOURS_TILE": 2}
PARTS = APART | {"_TILE": 4, "SHORT": 0, "LONG": 4, "FEW_PROGRAMS": 64, "PART": 2, "_JOINED": 2}


# Names of the short cases that stand for a group; chosen once.
_chosen: dict[str, set[str]] = {}


def chosen(group: str) -> set[str]:
    if group not in _chosen:
        short = [case for case in cases([group], ["float32"]) if case.logits.size < 120]
        wide = [case for case in cases([group], ["float64"]) if case.logits.size < 120]
        _chosen[group] = {c.name for c in (*representative(short, 8), *representative(wide, 4))}
    return _chosen[group]


def grid(
    *groups: str, table: dict[str, int] | None = None, only: str = "", cut: bool = False
) -> Callable[[], None]:
    """Check some cases of some groups of the grid, or those with a word in their names.

    Their classes are `cut` into parts at random, if wanted.
    """

    def left_out(case: Case) -> str:
        wanted = only in case.name if only else case.name in chosen(case.group)
        return "" if wanted else "left out here"

    def check() -> None:
        # What reads parts is no implementation of whole calls.
        name, functions = "triton", None
        if cut:
            name, functions = None, cut_functions(of_parts("triton"))
        with changed(table or {}):
            check_implementation(
                name,
                "torch",
                groups=groups,
                dtypes=["float32", "float64"],
                functions=functions,
                leave_out=left_out,
            )

    return check


class changed:
    """Change the table of launches within the block."""

    def __init__(self, values: dict[str, int]) -> None:
        from polyce.implementations.triton import layout as triton_layout

        self.module, self.values = triton_layout, values
        self.before = {name: getattr(triton_layout, name) for name in values}

    def __enter__(self) -> None:
        self.set(self.values)

    def __exit__(self, *_: object) -> None:
        self.set(self.before)

    def set(self, values: dict[str, int]) -> None:
        from polyce.implementations.triton import plans

        plans.forget()
        for name, value in values.items():
            setattr(self.module, name, value)


def around(values: Any, before: int) -> tuple[Any, Any]:
    """Put a tensor's values among nans."""
    import torch

    memory = torch.full((before + values.numel() + 16,), math.nan, dtype=values.dtype)
    inside = memory[before : before + values.numel()].view(values.shape)
    inside.copy_(values)
    return inside, memory


def zones_apart() -> None:
    """Check the same of loss and gradient in two passes."""
    with changed(APART):
        zones()


def zones() -> None:
    """Check that nothing outside the rows is read or written, wherever these begin."""
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


def entries() -> None:
    """Check the gradient of a sparse target over its own logits, in many programs."""
    import torch

    torch.manual_seed(0)
    with changed(TILES | {"_ENTRIES": 2, "ENTRIES_ALONE": 4}):
        for shape in ((2, 67), (2, 5, 3)):
            x, memory = around(torch.randn(shape), 3)
            index = torch.randint(-1, shape[1], (2, 3, *shape[2:]))
            target = polyce.SparseTarget(index, torch.rand(index.shape))
            options = {"ignore_index": -1, "label_smoothing": 0.1}
            want = polyce.cross_entropy_with_grad(x, target, implementation="reference", **options)
            loss, _ = polyce.cross_entropy_with_grad(
                x, target, implementation="triton", out=x, **options
            )
            torch.testing.assert_close(loss, want[0])
            torch.testing.assert_close(x, want[1], rtol=1e-4, atol=1e-7)
            assert torch.isnan(memory[:3]).all()
            assert torch.isnan(memory[3 + x.numel() :]).all()


def sure_teachers() -> None:
    """Check that rows beside a teacher are right to 4 ulp, however sure it is."""
    import torch

    form, rng = FORMATS["float32"], np.random.default_rng(0)
    random, other = rng.standard_normal((2, 6, 9))
    ahead, sure = random.copy(), other.copy()
    ahead[:, 0] += np.linspace(5, 85, 6)
    sure[:, 0] += np.linspace(85, 45, 6)
    families = ((ahead, sure), (np.roll(ahead, 1, 1), sure), (ahead + 1e4, sure - 3e4))
    for (x, t), scale in itertools.product(families, (1.0, 0.3)):
        logits, teacher = x.astype(np.float32), t.astype(np.float32)
        answer = exact_answer(logits, teacher, reduction="none", teacher_scale=scale)
        target = polyce.TeacherLogits(torch.from_numpy(teacher), scale)
        with changed(TILES):
            loss = polyce.cross_entropy(
                torch.from_numpy(logits), target, reduction="none", implementation="triton"
            )
        ulps = np.abs(loss.double().numpy() - answer.loss) / form.spacing(answer.loss)
        assert ulps.max() <= 4.0, (scale, ulps.max())


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
        given = x.clone()
        for table in ({}, APART):
            x.copy_(given)
            with changed(table):
                loss, grad = polyce.cross_entropy_with_grad(x, t, implementation="triton", out=x)
            torch.testing.assert_close(loss, want[0], rtol=2e-3, atol=0.0)
            torch.testing.assert_close(grad.clone(), want[1], rtol=2e-3, atol=1e-6)

    return check


def ignored() -> None:
    """Check that rows which do not count have gradient 0, whatever their cotangent."""
    import torch

    x, t, g = torch.randn(2, 5), torch.tensor([-100, 1]), torch.tensor([math.nan, 1.0])
    for table in ({}, APART):
        with changed(table):
            _, grad = polyce.cross_entropy_with_grad(
                x, t, reduction="none", grad_output=g, implementation="triton"
            )
        assert torch.equal(grad[0], torch.zeros(5))


def masked() -> None:
    """Check a row whose target lies on a masked class, in a tile of masked classes."""
    import torch

    x, p = torch.zeros(1, 8), torch.zeros(1, 8)
    x[0, :4], p[0, 0] = -math.inf, 1.0
    with changed(TILES):
        assert polyce.cross_entropy(x, p, implementation="triton") == math.inf


def masked_in_parts() -> None:
    """Check a smoothed row of which several programs read only masked classes."""
    import torch

    x, t = torch.zeros(2, 19), torch.full((2,), 15)
    x[:, :9] = -math.inf
    with changed(PARTS):
        loss = polyce.cross_entropy(x, t, label_smoothing=0.1, implementation="triton")
    assert loss == math.inf


def ties() -> None:
    """Check which of several tied classes in several tiles is predicted."""
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
    """Check the entropy of rows whose label is not the class that leads by far."""
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


def states() -> None:
    """Check the states of parts with many equal logits against those of the reference."""
    import torch

    torch.manual_seed(0)
    x, t = torch.randint(-1, 2, (8, 19)).float(), torch.randint(19, (8,))
    t[0] = -100
    for names, (start, end) in itertools.product(
        (("prediction", "brier"), ("prediction", "entropy", "rank")), ((0, 7), (7, 19))
    ):
        problem, operands = describe(x, t, options=Options(label_smoothing=0.1, stats=names))
        piece = operands._replace(logits=x[:, start:end])
        with changed(PARTS):
            found, want = (
                of_parts(name).read(problem, piece, start) for name in ("triton", "reference")
            )
        rows = [*zip(found.state, want.state, strict=True), (found.pivot, want.pivot)]
        for ours, theirs in (*rows, (found.label_logit, want.label_logit)):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours[1:], theirs[1:], rtol=1e-6, atol=1e-6)


def many_rows() -> None:
    """Check a mean over more programs than are added up at once."""
    import torch

    torch.manual_seed(0)
    x, t = torch.randn(64, 2), torch.randint(2, (64,))
    want = polyce.cross_entropy(x, t, implementation="reference")
    # One program adds 32 sums in turns; or several do, the last of them fewer.
    for chunks in ({}, {"MANY_SUMS": 16, "CHUNK_OF_SUMS": 12}):
        with changed({"_SHORT_TILE": 4, "SUMS": 8} | chunks):
            torch.testing.assert_close(polyce.cross_entropy(x, t, implementation="triton"), want)


def second_backward_pass() -> None:
    """Check autograd's gradients of lse and entropy, for which the rows are read again."""
    import torch

    torch.manual_seed(0)
    x, t = torch.randn(3, 19, requires_grad=True), torch.tensor([4, -100, 18])
    grads = []
    for name in ("triton", "reference"):
        loss, stats = polyce.cross_entropy(x, t, return_stats=True, implementation=name)
        total = loss + (stats.lse * stats.entropy)[stats.valid].sum()
        grads.append(torch.autograd.grad(total, x)[0])
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


# A stride that 32 bits hold, but not three of them.
STEP = 2**30 + 64
EXACT = grid("accuracy", "options", table=APART)
NORMALIZED = grid("normalizer")
# The weights of the rows in several chunks.
WEIGHED = grid("options", "combined", table={"WEIGHED": 1, "WEIGHERS": 2})
SPECIAL = grid("special")
IN_TILES = grid("options", "combined", table=TILES)
IN_PARTS = grid("options", "combined", table=PARTS)
STATS = grid("stats", table=TILES)
BESIDE = grid("target-stats", table=TILES)
BESIDE_PARTS = grid("target-stats", table=PARTS)
VALUED = grid("grad-stats", table=TILES)
SPARSE = grid("sparse", table=TILES, only="options/mean")
SPARSE_PARTS = grid("sparse", table=PARTS, only="options/mean")
TEACHERS = grid("teacher", table=TILES, only="options/mean")
TEACHERS_PARTS = grid("teacher", table=PARTS, only="options/mean")
CUT = grid("options", "combined", cut=True)
CUT_STATS = grid("stats", "grad-stats", cut=True)
CUT_SPARSE = grid("sparse", only="options/mean", cut=True)
CUT_TEACHERS = grid("teacher", only="options/mean", cut=True)
COMBINED = grid("combined", "transform")
# Checks that other tests make too.
SLOW = {IN_TILES, IN_PARTS, STATS, SPECIAL, COMBINED, BESIDE, BESIDE_PARTS, VALUED}
SLOW |= {NORMALIZED, WEIGHED, SPARSE, SPARSE_PARTS, TEACHERS, TEACHERS_PARTS}
SLOW |= {CUT, CUT_STATS, CUT_SPARSE, CUT_TEACHERS}
