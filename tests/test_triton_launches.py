"""The Python code of the triton path, as on a GPU, with a driver that records launches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import polyce

pytestmark = pytest.mark.only("triton-compile")


@pytest.fixture(scope="module")
def recorder() -> Any:
    from recorder import record

    return record("sm_90")


@pytest.fixture
def launched(recorder: Any) -> list[Any]:
    recorder.launched.clear()
    return recorder.launched


def arguments(launch: Any) -> dict[str, Any]:
    """Return what a kernel was called with, by name."""
    from polyce.implementations.triton import kernels as triton_kernels

    kernel = getattr(triton_kernels, launch.name)
    return dict(zip(kernel.arg_names, launch.arguments, strict=True))


def names(launched: list[Any]) -> list[str]:
    return [launch.name for launch in launched]


def test_the_interpreter_must_be_asked_for_first(
    torch: Any, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, t = torch.zeros(2, 3), labels(torch, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (reason,) = polyce.explain(x, t).reasons["triton"]
    assert reason.startswith("torch finds no CUDA or ROCm device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (reason,) = polyce.explain(x, t).reasons["triton"]
    assert reason == "tensors on a CPU are taken under TRITON_INTERPRET=1 only"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "after Triton was imported" in polyce.explain(x, t).reasons["triton"][0]


def labels(torch: Any, *shape: int) -> Any:
    return torch.zeros(shape, dtype=torch.int64)


@pytest.mark.parametrize("classes", [2, 10, 1000, 16384])
def test_one_launch_each(torch: Any, launched: list[Any], classes: int) -> None:
    from recorder import call

    x = torch.zeros(3, classes)
    call(x, labels(torch, 3), reduction="none")
    assert names(launched) == ["forward", "backward"]
    launched.clear()
    call(x, labels(torch, 3), reduction="mean", return_stats=True)
    # One program adds the sums of the others.
    assert names(launched) == ["forward", "reduce", "backward"]
    assert launched[1].grid == (1, 1, 1)


def test_few_long_rows_are_split_and_joined(torch: Any, launched: list[Any]) -> None:
    from recorder import call

    call(torch.zeros(2, 200_000), labels(torch, 2), backward=False)
    assert names(launched) == ["forward", "join", "reduce"]
    forward, join, _ = launched
    assert forward.grid == (2, 49, 1)
    assert join.grid == (2, 1, 1)
    found = arguments(forward)
    assert found["chunk"] * 49 >= 200_000 > found["chunk"] * 48
    assert found["chunk"] % found["TILE"] == 0
    # All parts are joined at once, two to a thread.
    assert (arguments(join)["TILE"], join.warps) == (64, 2)


@pytest.mark.parametrize(
    ("rows", "classes", "grid"),
    [
        (8, 128_256, (8, 32, 1)),
        (64, 128_256, (64, 11, 1)),
        (329, 32_000, (329, 3, 1)),
        (330, 32_000, (330, 1, 1)),
        (8, 16_384, (8, 1, 1)),
        (1, 10_000_000, (1, 611, 1)),
    ],
)
def test_how_many_programs_read_a_row(
    torch: Any, launched: list[Any], rows: int, classes: int, grid: tuple[int, int, int]
) -> None:
    from recorder import call

    x = torch.empty(classes, dtype=torch.float16).expand(rows, classes)
    call(x, labels(torch, rows), backward=False)
    assert launched[0].grid == grid


def test_the_sums_of_many_programs_are_added_in_two_steps(torch: Any, launched: list[Any]) -> None:
    from recorder import call

    x = torch.empty(10_000, 100, dtype=torch.float16)
    call(x[:8192], labels(torch, 8192), backward=False)
    assert names(launched) == ["forward", "reduce"]
    launched.clear()
    call(x, labels(torch, 10_000), backward=False)
    assert names(launched) == ["forward", "add_up", "reduce"]
    assert [launch.grid[0] for launch in launched] == [10_000, 3, 1]


@pytest.mark.parametrize(
    ("shape", "options", "launches"),
    [
        ((70, 1000), {"reduction": "none"}, ["both"]),
        ((70, 1000), {"reduction": "sum"}, ["both", "reduce"]),
        # A gradient of a mean needs the weights of all rows.
        ((70, 1000), {}, ["weigh", "both", "reduce"]),
        ((70, 8192), {"return_stats": True}, ["weigh", "both", "reduce"]),
        ((70, 32, 4), {}, ["weigh", "both", "reduce"]),
        ((70, 8193), {}, ["forward", "reduce", "backward"]),
        ((70, 33, 4), {}, ["forward", "reduce", "backward"]),
        ((70, 4097), {"logit_softcap": 3.0}, ["forward", "reduce", "backward"]),
    ],
)
def test_loss_and_gradient_in_one_pass(
    torch: Any,
    launched: list[Any],
    shape: tuple[int, ...],
    options: dict[str, Any],
    launches: list[str],
) -> None:
    from recorder import call_both

    x = torch.zeros(shape, dtype=torch.float16)
    call_both(x, labels(torch, *shape[:1], *shape[2:]), **options)
    assert names(launched) == launches


def test_a_few_programs_weigh_many_rows(torch: Any, launched: list[Any]) -> None:
    from recorder import call_both

    call_both(torch.zeros((10**6, 2), dtype=torch.float16), labels(torch, 10**6))
    found = arguments(launched[0])
    assert launched[0].grid == (123, 1, 1)
    assert found["chunk"] % found["TILE"] == 0
    assert found["chunk"] * 123 >= 10**6
    assert arguments(launched[1])["WEIGHERS"] == 128


def entries(torch: Any, *shape: int) -> Any:
    return polyce.SparseTarget(labels(torch, *shape), torch.ones(shape))


def test_entries_take_two_launches_more(torch: Any, launched: list[Any]) -> None:
    from recorder import call

    call(torch.zeros(70, 1000), entries(torch, 70, 9))
    assert names(launched) == ["forward", "reduce", "at_entries", "backward", "put_entries"]
    assert launched[2].grid == launched[4].grid == (5, 1, 1)
    launched.clear()
    call(torch.zeros(3, 1000), entries(torch, 3, 0), reduction="none")
    assert names(launched) == ["forward", "backward"]


def test_no_launch_for_nothing(torch: Any, launched: list[Any]) -> None:
    from recorder import call

    call(torch.zeros(0, 5), labels(torch, 0))
    call(torch.zeros(2, 5, 0), labels(torch, 2, 0))
    call(torch.zeros(2, 0), torch.zeros(2, 0))
    assert launched == []


@pytest.mark.parametrize("shape", [(1,), (1, 1), (1, 70), (5, 1), (1, 1, 1), (1, 2, 1), (1, 5, 3)])
def test_sizes_of_one(torch: Any, launched: list[Any], shape: tuple[int, ...]) -> None:
    # Triton turns arguments that are 1 into constants.
    from recorder import call

    x, w = torch.ones(shape), torch.ones(shape[-1] if len(shape) == 1 else shape[1])
    rows = (*shape[:1], *shape[2:]) if len(shape) > 1 else ()
    options = {"label_smoothing": 0.1, "return_stats": True, "sample_weight": torch.ones(rows)}
    call(x, labels(torch, *rows), w, **options)
    call(x, torch.ones(shape), w, logit_softcap=3.0, **options)
    assert names(launched) == ["forward", "reduce", "backward"] * 2


GRIDS = [
    # shape, strides, (programs, parts), classes and lanes of a tile, warps
    ((4096, 32000), (32000, 1), (4096, 1), (4096, 1), 8),
    ((4096, 1000), (1000, 1), (4096, 1), (1024, 1), 2),
    # A thread has a whole row, except with Triton 3.6.
    ((100_000, 10), (10, 1), (1563, 1), (16, 64), 2),
    ((100_000, 2), (2, 1), (196, 1), (2, 512), 8),
    # A thread has 16 classes of two neighbouring rows; where there are few programs, four threads.
    ((8, 19, 65536), (1245184, 65536, 1), (4096, 1), (16, 128), 2),
    ((4096, 1000), (1, 4096), (32, 1), (64, 128), 8),
    ((8, 19, 1024), (19456, 1024, 1), (64, 1), (32, 128), 4),
    ((8, 19, 49), (931, 49, 1), (8, 1), (32, 64), 2),
    ((8, 19, 1024), (19456, 1, 19), (256, 1), (32, 32), 8),
    ((7,), (1,), (1, 1), (8, 1), 1),
]


@pytest.mark.parametrize(("shape", "strides", "grid", "tile", "warps"), GRIDS)
def test_grids(
    torch: Any,
    launched: list[Any],
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    grid: tuple[int, int],
    tile: tuple[int, int],
    warps: int,
) -> None:
    from polyce.implementations.triton.layout import SHORTEST
    from recorder import call

    if tile[0] == 16 and strides[1] == 1 and not SHORTEST:
        warps *= 4
    x = torch.empty_strided(shape, strides, dtype=torch.float16)
    rows = (*shape[:1], *shape[2:]) if len(shape) > 1 else ()
    call(x, labels(torch, *rows), reduction="none", backward=False)
    (launch,) = launched
    found = arguments(launch)
    assert launch.grid == (*grid, 1)
    assert (found["TILE"], found["LANES"]) == tile
    assert launch.warps == warps
    programs = found["blocks"] * (grid[0] // found["blocks"])
    assert programs * tile[1] >= x.numel() // shape[min(1, len(shape) - 1)]


def test_few_rows_share_the_writing(torch: Any, launched: list[Any]) -> None:
    from recorder import call

    call(torch.zeros(4, 50257), labels(torch, 4))
    assert launched[-1].grid == (4, 13, 1)
    launched.clear()
    call(torch.zeros(4096, 2000), labels(torch, 4096))
    assert launched[-1].grid == (4096, 1, 1)


PEELED = [
    # offset of the first logit, row stride, classes, item size -> peeled, elements in one load
    (0, 1000, 1000, 4, False, 4),
    (0, 1000, 1000, 2, False, 8),
    (0, 1001, 1001, 4, True, 1),
    (1, 1000, 1000, 4, True, 1),
    (4, 1000, 1000, 4, False, 4),
    (4, 1000, 1000, 2, True, 1),
    (0, 1002, 1000, 4, True, 1),
    (0, 1004, 1000, 4, False, 4),
    (0, 1008, 999, 4, True, 1),
    (0, 64, 64, 4, False, 4),
    (0, 63, 63, 4, False, 1),
    (1, 64, 64, 4, False, 1),
]


@pytest.mark.parametrize(("offset", "stride", "classes", "size", "peeled", "unit"), PEELED)
def test_what_is_promised_of_alignment_is_so(
    torch: Any,
    launched: list[Any],
    offset: int,
    stride: int,
    classes: int,
    size: int,
    peeled: bool,
    unit: int,
) -> None:
    from recorder import call

    dtype = {2: torch.float16, 4: torch.float32}[size]
    memory = torch.zeros(4 * stride + 16, dtype=dtype)
    assert memory.data_ptr() % 16 == 0
    x = memory.as_strided((3, classes), (stride, 1), offset)
    vector = 16 // size
    for shift in range(vector):
        p = torch.zeros(4 * stride + 16, dtype=dtype).as_strided((3, classes), (stride, 1), shift)
        launched.clear()
        grad = call(x, p)
        for launch in (launched[0], launched[-1]):
            found = arguments(launch)
            assert (found["PEEL"], found["UNIT"]) == (peeled, unit)
            assert found["units"] * unit == classes
            assert found["IN_STEP"] == ((peeled or unit > 1) and shift == offset % vector)
            # The kernel's own arithmetic: addresses are multiples where the kernel promises it.
            for row in range(3):
                at = row * stride + found["lead"]
                start = min((vector - at % vector) % vector, classes) if peeled else 0
                if peeled or unit > 1:
                    assert (at + start) % vector == 0
                    assert (x.data_ptr() + size * (row * stride + start)) % 16 == 0
                if found["IN_STEP"]:
                    assert (p.data_ptr() + size * (row * stride + start)) % 16 == 0
                if found.get("GRAD_IN_STEP"):
                    step = grad.stride(0)
                    assert (grad.data_ptr() + size * (row * step + start)) % 16 == 0


@pytest.fixture
def watched(torch: Any) -> Iterator[dict[str, Any]]:
    """Record what torch does meanwhile: how large its results are, and whether it waits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: dict[str, Any] = {"sizes": [], "waits": []}
    waiting = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_to_copy", "unique")

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = function(*args, **(kwargs or {}))
            name = function.overloadpacket.__name__
            if name in waiting:
                seen["waits"].append(name)
            if isinstance(result, torch.Tensor) and not function.is_view:
                seen["sizes"].append((name, result.numel() * result.element_size()))
            return result

    with Watch():
        yield seen


@pytest.mark.parametrize("shape", [(64, 4096), (64, 4097), (16, 16, 32, 32)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_waits_and_nothing_large_is_made(
    torch: Any,
    launched: list[Any],
    watched: dict[str, Any],
    shape: tuple[int, ...],
    reduction: str,
) -> None:
    from recorder import call

    x = torch.zeros(shape)
    t, weight = labels(torch, shape[0], *shape[2:]), torch.ones(shape[1])
    watched["sizes"].clear()
    call(x, t, weight, return_stats=True, reduction=reduction)
    rows = t.numel()
    assert watched["waits"] == []
    large = [name for name, size in watched["sizes"] if size > 40 * rows]
    # The gradient itself.
    assert large == ["empty_like"]


def test_a_look_at_the_labels_would_be_noticed(torch: Any, watched: dict[str, Any]) -> None:
    from polyce.call.options import Options
    from polyce.call.problem import describe
    from polyce.implementations.triton import arguments as triton_arguments

    problem, operands = describe(
        torch.zeros(3, 5), labels(torch, 3), options=Options(validate=True)
    )
    triton_arguments.call(problem, operands)
    assert watched["waits"]


def test_pointers_are_followed_with_64_bits(torch: Any, recorder: Any, launched: list[Any]) -> None:
    from recorder import binary, call

    call(torch.zeros(3, 5, 4), labels(torch, 3, 4), reduction="none")
    call(torch.zeros(3, 5, 4), entries(torch, 3, 2, 4), reduction="none")
    for launch in launched:
        lines = binary(launch, recorder.device).asm["ttir"].splitlines()
        products = [line.strip() for line in lines if "arith.muli" in line]
        narrow = [line for line in products if "i64" not in line]
        assert len(products) > len(narrow)
        # A part's start is a class index, which fits in 32 bits.
        assert all(line.startswith("%begin = ") for line in narrow), narrow
