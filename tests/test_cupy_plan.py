"""What the cupy path plans for a problem, without arrays, and that the kernels' text agrees."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from polyce.call.options import Options
from polyce.call.problem import Problem, describe
from polyce.implementations.cupy import plan as cupy_plan
from polyce.implementations.cupy.plan import LaunchKey, LaunchPlan, Layout
from polyce.testing.dtypes import dtype

pytestmark = pytest.mark.only("cupy-emulated")

DTYPES = ("float16", "bfloat16", "float32", "float64")


def problem(
    shape: tuple[int, ...], name: str = "float32", target: str = "int64", **options: Any
) -> Problem:
    """Describe a call with logits of any size."""
    few = (2,) * len(shape)
    axis = options.setdefault("axis", min(1, len(shape) - 1)) % len(shape)
    is_float = target in DTYPES
    labels = np.zeros(few if is_float else few[1:], dtype(target) if is_float else target)
    found, _ = describe(
        np.zeros(few, dtype(name)),
        labels,
        options=Options.taken_from({"validate": False} | options),
    )
    return found._replace(shape=shape, row_shape=shape[:axis] + shape[axis + 1 :])


def layout(
    shape: tuple[int, ...],
    name: str,
    address: int = 0,
    order: tuple[int, ...] | None = None,
    rows_apart: int = 0,
) -> Layout:
    """Make a layout: the axes in some order, with a little padding along the first of them."""
    size, strides = dtype(name).itemsize, [0] * len(shape)
    step = size
    for axis in reversed(order or range(len(shape))):
        strides[axis] = step
        step *= shape[axis]
    strides[0] += rows_apart * size
    return Layout(tuple(strides), address * size % 16, size)


def planned(about: Problem, **layouts: Layout) -> LaunchPlan:
    name = about.logits_dtype_name
    lie = {"logits": layout(about.shape, name), "grad": layout(about.shape, name)}
    if about.kind == "probability":
        lie["probabilities"] = layout(about.shape, about.target_dtype)
    given = {"probabilities": None} | lie | layouts
    return cupy_plan.plan(
        about,
        LaunchKey(**given, sample=None, normalizer=None, cotangent=None, cotangent_by_row=False),
    )


HUGE = [
    *((2**31, 10), (2**33, 2), (65536, 128256), (1, 10**7), (3, 50257), (255, 2**20), (256, 2**20)),
    *((8, 19, 1024, 2048), (2, 2**31 - 2**16), (1, 1), (7,), (2**31, 1), (1, 5, 2**31), (300, 10)),
]


@pytest.mark.parametrize("shape", HUGE, ids=str)
@pytest.mark.parametrize("target", ["int64", "float32"])
@pytest.mark.parametrize("name", ["float16", "float64"])
def test_grids_cover_all_and_are_within_limits(
    shape: tuple[int, ...], target: str, name: str
) -> None:
    plan = planned(problem(shape, name, target))
    call = {key: plan.call[key][0] for key in plan.call.dtype.names}
    classes = shape[min(1, len(shape) - 1)]
    rows = math.prod(shape) // classes
    assert plan.rows == call["outer"] * call["inner"] == rows
    assert call["classes"] == classes
    assert 1 <= plan.blocks <= cupy_plan.MOST_BLOCKS
    assert 1 <= plan.weighing <= cupy_plan.MOST_WEIGHING
    assert call["lanes"] * call["team"] == cupy_plan.BLOCK
    assert call["blocks"] * call["lanes"] >= call["inner"]
    assert plan.blocks <= call["outer"] * call["blocks"]
    width = 16 // dtype(name).itemsize
    assert plan.parts == call["parts"] <= cupy_plan.MOST_PARTS
    assert (plan.parts - 1) * call["chunk"] < classes
    # A row has some whole loads fewer after its first elements are peeled.
    assert plan.parts * call["chunk"] * width >= classes - classes % width
    assert (plan.parts > 1) == (rows < 256 and classes > 16384)
    # A loop over classes computes one index beyond the last class.
    assert classes + 2 * width * cupy_plan.BLOCK < 2**31
    if plan.parts > 1:
        assert call["lanes"] == 1
        assert call["blocks"] == call["inner"]
        assert plan.rows + 1 < 2**31
    assert not any(plan.copies)


def test_rows_have_a_thread_each_once_they_fill_a_device() -> None:
    def shared(*shape: int) -> tuple[int, int]:
        call = planned(problem(shape)).call
        return call["lanes"][0], call["team"][0]

    assert shared(8, 19, 1024, 2048) == shared(1024, 19, 256) == (256, 1)
    assert shared(8, 19, 64, 64) == shared(1, 19, 1024, 64) == (64, 4)
    assert shared(1024, 19, 40) == (64, 4)


def test_strides_are_kept_in_64_bits() -> None:
    about = problem((3, 5, 4), target="float32")
    lie = {
        name: Layout((4 * (2**33 + i), 4 * (2**32 + i), 4 * (2**31 + i)), 0, 4)
        for i, name in enumerate(("logits", "probabilities", "grad"))
    }
    call = planned(about, **lie).call
    for i, name in enumerate("xtg"):
        assert call[name][0].tolist() == [2**33 + i, 2**31 + i, 2**32 + i]


def test_strides_backwards() -> None:
    call = planned(problem((3, 5)), logits=Layout((-20, -4), 0, 4)).call
    assert call["x"][0].tolist() == [0, -5, -1]


ORDERS = list(itertools.permutations(range(4)))


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("axis", range(4))
def test_what_two_indices_do_not_reach_is_copied(axis: int, order: tuple[int, ...]) -> None:
    shape = (2, 3, 5, 7)
    about = problem(shape, target="float32", axis=axis)
    rest = [i for i in order if i != axis]

    def in_order(axes: list[int]) -> bool:
        places = [order.index(i) for i in axes]
        # One array directly after the other, with no gap.
        return places == list(range(places[0], places[0] + len(places))) if places else True

    joined = in_order(sorted(rest))
    reached = joined or (in_order(list(range(axis))) and in_order(list(range(axis + 1, 4))))
    for which in range(3):
        names = ("logits", "probabilities", "grad")
        plan = planned(about, **{names[which]: layout(shape, "float32", order=order)})
        assert plan.copies == tuple(i == which and not reached for i in range(3))


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("target", ["int64", "float16", "float32", "float64"])
def test_what_is_promised_of_alignment_is_so(name: str, target: str) -> None:
    shape, size = (3, 100), dtype(name).itemsize
    other = target if target != "int64" else name
    wide = dtype(other).itemsize
    promised = 0
    for at, apart, there, also in itertools.product(range(8), range(3), range(8), range(3)):
        x = layout(shape, name, at, rows_apart=apart)
        second = layout(shape, other, there, rows_apart=also)
        which = "grad" if target == "int64" else "probabilities"
        about = problem(shape, name, target)
        call = planned(about, **{"logits": x, which: second}).call
        in_step = call["g_in_step" if target == "int64" else "t_in_step"][0]
        most = 2 if name == target == "float16" else 4
        width = min(16 // size, 8 if target == "int64" else most)
        rows = [
            (x.address + row * x.strides[0], second.address + row * second.strides[0])
            for row in range(3)
        ]
        # Where a row's logits reach a boundary, so do the other array's numbers.
        starts = [(-one // size) % width for one, _ in rows]
        places = [two // wide + start for (_, two), start in zip(rows, starts, strict=True)]
        assert not in_step or all(place % width == 0 for place in places)
        promised += in_step
        if wide * width <= 16:
            apart_alike = apart % width == also % width
            assert in_step == (at % width == there % width and apart_alike)
    assert promised


@pytest.fixture
def probe() -> Iterator[Any]:
    """Run a line of C++, appended to the kernels' text, that writes to `double* out`."""
    import cupy

    cupy.emulation.reset()

    def run(plan: LaunchPlan, kernel: str, line: str, count: int) -> list[float]:
        text = f"""{cupy_plan.source()}
extern "C" __global__ void probe(const Call call, double* out) {{ {line} }}"""
        options = tuple(each for each in plan.options[kernel] if "KERNEL=" not in each)
        function = cupy.RawModule(code=text, options=("-DKERNEL=0", *options)).get_function("probe")
        out = cupy.empty(count, np.float64)
        function((1,), (1,), (plan.call, out))
        return out.tolist()

    yield run
    cupy.emulation.reset()


@pytest.mark.parametrize("name", ["float16", "float64"])
def test_the_struct_is_the_text_s(probe: Any, name: str) -> None:
    plan = planned(problem((3, 5), name))
    fields = []
    for field in plan.call.dtype.names:
        ways = ("outer", "lane", "class") if plan.call[field].ndim > 1 else ()
        fields += [f"{field}_{way}" for way in ways] or [field]
    values = iter(range(1, 100))
    for field in plan.call.dtype.names:
        shape = plan.call[field][0].shape
        plan.call[field] = (
            [next(values) for _ in range(math.prod(shape))] if shape else next(values)
        )
    line = "".join(f"out[{i}] = call.{field}; " for i, field in enumerate(fields))
    found = probe(plan, "forward", f"{line} out[{len(fields)}] = sizeof(Call);", len(fields) + 1)
    assert found == [*range(1, len(fields) + 1), plan.call.nbytes]


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("target", ["int64", "float32"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("stats", [False, True])
def test_sizes_are_the_text_s(
    probe: Any, name: str, target: str, softcap: float | None, stats: bool
) -> None:
    from polyce.implementations.cupy import launch as cupy_launch

    about = problem((3, 100), name, target, logit_softcap=softcap, return_stats=stats)
    # In step if rows are a multiple of a load's numbers apart, and not otherwise.
    wide = {
        width: planned(about, grad=layout((3, 100), name, rows_apart=width)).call["g_in_step"][0]
        for width in (1, 2, 4, 8)
    }
    plan = planned(about)
    line = "out[0] = WIDTH; out[1] = sizeof(State); out[2] = sizeof(Sums);"
    width, state, sums = probe(plan, "forward", line, 3)
    assert wide == {each: each >= width for each in wide}
    assert state <= cupy_launch._STATE
    assert state % 8 == 0
    assert sums == cupy_launch._SUMS


def test_few_texts_and_their_options() -> None:
    found = set()
    for shape in HUGE:
        options = planned(problem(shape)).options
        assert set(options) == set(cupy_plan.KERNELS)
        for kernel, each in options.items():
            assert type(each) is tuple
            assert all(type(option) is str for option in each)
            assert len(each) <= 15
            assert f"-DKERNEL={kernel.upper()}" in each
            assert f"-DBLOCK={cupy_plan.BLOCK}" in each
        found |= set(options.values())
    # The sizes only decide whether rows are read in vectors.
    assert len(found) == len(cupy_plan.KERNELS) + 3


def test_a_plan_depends_on_the_problem_alone() -> None:
    about = problem((3, 100))
    one, other = planned(about), planned(about)
    assert one.call.tobytes() == other.call.tobytes()
    assert one[1:] == other[1:]
