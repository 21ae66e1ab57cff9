"""Kernels on the emulated CuPy: every kind of fault is found, and correct kernels run."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

pytestmark = pytest.mark.only("cupy-emulated")

TEXT = (Path(__file__).parent / "emulation" / "toys.cu").read_text(encoding="utf-8")
BLOCK = 32
NUMBERS = np.arange(BLOCK, dtype=np.float32)


@pytest.fixture
def cupy() -> Iterator[Any]:
    import cupy

    assert cupy.__version__.endswith("+emulated")
    cupy.emulation.reset()
    yield cupy
    cupy.emulation.reset()


@pytest.fixture
def toy(cupy: Any) -> Callable[..., Any]:
    module = cupy.RawModule(code=TEXT)

    def start(name: str, *args: Any, grid: int = 1, block: int = BLOCK) -> None:
        module.get_function(name)((grid,), (block,), args)

    return start


def raises(cupy: Any, match: str) -> Any:
    return pytest.raises(cupy.emulation.EmulationError, match=match)


def test_threads_and_blocks_come_in_the_order_asked_for(cupy: Any, toy: Any) -> None:
    def seen(order: str, seed: int = 0) -> list[int]:
        cupy.emulation.order, cupy.emulation.seed = order, seed
        count, who = cupy.zeros(1, np.uint32), cupy.empty(3 * BLOCK, np.uint32)
        toy("turns", count, who, grid=3)
        return who.tolist()

    everyone = list(range(3 * BLOCK))
    assert seen("forward") == everyone
    assert seen("reverse") == everyone[::-1]
    shuffled = seen("shuffled")
    assert sorted(shuffled) == everyone
    assert shuffled not in (everyone, everyone[::-1], seen("shuffled", seed=7))
    # Still block by block.
    assert [who // BLOCK for who in shuffled[::BLOCK]] == [who // BLOCK for who in shuffled[31::32]]
    assert seen("cycle") != seen("cycle") != seen("cycle")


def test_order_by_environment(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYCE_EMULATION_ORDER", "reverse")
    cupy.emulation.reset()
    assert cupy.emulation.order == "reverse"
    monkeypatch.setenv("POLYCE_EMULATION_ORDER", "sideways")
    with pytest.raises(ValueError, match="POLYCE_EMULATION_ORDER must be one of"):
        cupy.emulation.reset()
    monkeypatch.delenv("POLYCE_EMULATION_ORDER")


def test_missing_barrier_shows_in_two_of_three_orders(cupy: Any, toy: Any) -> None:
    x, out = cupy.asarray(NUMBERS), cupy.empty(1, np.float32)
    right = {}
    for order in cupy.emulation.ORDERS:
        cupy.emulation.order = order
        toy("total", x, out)
        assert out.item() == NUMBERS.sum()
        toy("total_unguarded", x, out)
        right[order] = out.item() == NUMBERS.sum()
    assert right == {"forward": False, "reverse": True, "shuffled": False}


def test_last_block_sees_the_others(cupy: Any, toy: Any) -> None:
    x, count, out = cupy.asarray(NUMBERS), cupy.zeros(1, np.uint32), cupy.empty(1, np.float32)
    for _ in range(3):
        toy("last", x, cupy.empty(5, np.float32), count, out, grid=5)
        assert (out.item(), count.item()) == (10, 0)


def test_lanes_of_a_warp_wait_for_each_other(cupy: Any, toy: Any) -> None:
    out = cupy.empty(BLOCK, np.uint32)
    for order in cupy.emulation.ORDERS:
        cupy.emulation.order = order
        toy("neighbours", out)
        assert out.tolist() == [i ^ 31 for i in range(BLOCK)]


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (
            "some_leave",
            r"block \(0, 0, 0\): divergent.* of 32 threads 5 wait at __sync.*27",
        ),
        ("two_barriers", r"5 wait at the __syncthreads of kernel\.cu:\d+ and 27 at that of kernel"),
        ("warp_and_block", r"27 wait at __syncthreads .*, 5 at __syncwarp and 0 have finished"),
    ],
)
def test_divergent_barrier(cupy: Any, toy: Any, name: str, match: str) -> None:
    for order in cupy.emulation.ORDERS:
        cupy.emulation.order = order
        with raises(cupy, match):
            toy(name, np.int32(5))
    if name != "two_barriers":
        # After a failed launch the next one works.
        toy("total", cupy.asarray(NUMBERS), cupy.empty(1, np.float32))
    toy("some_leave", np.int32(BLOCK))


def test_shared_memory(cupy: Any, toy: Any) -> None:
    out = cupy.empty(3, np.int32)
    toy("shared_index", np.int32(3), out)
    for place in (-1, 4):
        with raises(cupy, rf"thread \(\d+, 0, 0\): shared array few of 4 has no entry {place}"):
            toy("shared_index", np.int32(place), out)
    with raises(cupy, "wrote behind a shared array"):
        toy("shared_pointer", np.int32(4), out)
    with raises(cupy, "more than 48 KiB in all"):
        toy("shared_much", out)
    fresh = cupy.zeros(3, np.float32)
    toy("shared_fresh", fresh, grid=3)
    assert np.isnan(fresh.get()).all()


@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.float64])
def test_writes_outside_an_array(cupy: Any, toy: Any, dtype: Any) -> None:
    x = cupy.zeros(12, dtype)
    ends = x.nbytes // 4
    if dtype != np.float64:
        toy("write_at", x, ends - 1)
        for place, match in ((-1, "1 bytes before the first"), (ends, "0 bytes behind the last")):
            fresh = cupy.zeros(12, dtype)
            with raises(cupy, match):
                toy("write_at", fresh, place)
    else:
        with raises(cupy, "pointer to 4 bytes each, got an array of float64"):
            toy("write_at", x, 0)


def test_reads_outside_an_array(cupy: Any, toy: Any) -> None:
    x, out = cupy.zeros(8, np.float32), cupy.zeros(1, np.float32)
    for place in (-1, 8):
        toy("read_at", x, place, out)
        assert np.isnan(out.item())
    with raises(cupy, "it reads or writes 0x.*, where nothing is"):
        toy("read_at", x, -(2**40), out)
    with raises(cupy, r"it reads or writes \(nil\), where nothing is"):
        toy("write_at", 0, 0)


def test_division_by_zero(cupy: Any, toy: Any) -> None:
    out = cupy.empty(1, np.int64)
    toy("divide", 7, 2, out)
    assert out.item() == 3
    with raises(cupy, "it divides an integer by 0"):
        toy("divide", 7, 0, out)


def test_misaligned_access(cupy: Any, toy: Any) -> None:
    x, out = cupy.zeros(16, np.float32), cupy.zeros(16, np.float32)
    toy("copy_words", x[4:], out[8:])
    with raises(cupy, r"misaligned access at kernel\.cu:\d+: 0x\w+4 is no multiple of 16"):
        toy("copy_words", x[1:], out)
    with raises(cupy, "aligned to 4 bytes"):
        toy("write_at", cupy.zeros(9, np.uint8)[1:], 0)


PAIR = np.dtype([("real", np.float64), ("whole", np.int32)], align=True)


@pytest.mark.parametrize(
    ("place", "wrong", "match"),
    [
        (
            0,
            np.zeros(1, [("real", "f8"), ("whole", "i4")]),
            "struct of 16.*as a struct of 12 bytes",
        ),
        (0, np.zeros((), PAIR)[()], "CuPy 13 does not take void; pass a numpy.ndarray of size 1"),
        (0, 5, "a struct of 16 bytes, but int goes as an integer of 8 bytes"),
        (1, 2.0, "a float of 4 bytes, but float goes as a float of 8 bytes"),
        (1, np.int32(2), "a float of 4 bytes, but int32 goes as an integer of 4"),
        (1, np.ndarray, "a float of 4 bytes, got a pointer"),
        (1, True, "a bool goes as 1 byte with CuPy 14 and as 8 with CuPy 13"),
        (2, 3, "an integer of 2 bytes, but int goes as an integer of 8 bytes"),
        (2, ml_dtypes.bfloat16(3), "CuPy 13 does not take bfloat16"),
        (2, 2**63, "does not fit int64"),
        (3, 7, "a pointer of 8 bytes, but int goes as an integer"),
        (3, None, "CuPy 13 crashes over None; pass 0 for a null pointer"),
    ],
)
def test_arguments(cupy: Any, toy: Any, place: int, wrong: Any, match: str) -> None:
    out = cupy.empty(1, np.float64)
    args = [np.array((1.5, 2), PAIR), np.float32(0.25), np.uint16(8), out]
    toy("by_value", *args)
    assert out.item() == 11.75
    toy("by_value", args[0].reshape(1), np.full((1, 1), 0.5, np.float32), args[2], out.data)
    assert out.item() == 12
    wrong = out if wrong is np.ndarray else wrong
    with raises(cupy, f"by_value, argument {place}: .*{match}"):
        toy("by_value", *args[:place], wrong, *args[place + 1 :])
    with raises(cupy, "by_value takes 4 arguments, got 3"):
        toy("by_value", *args[:3])


def test_arguments_that_cupy_refuses(cupy: Any, toy: Any) -> None:
    with pytest.raises(TypeError, match=r"numpy\.ndarray of shape \(2,\) as a kernel parameter"):
        toy("write_at", np.zeros(2, np.float32), 0)
    with pytest.raises(TypeError, match="Unsupported type <class 'str'>"):
        toy("write_at", "x", 0)


@pytest.mark.parametrize(
    ("grid", "block", "match"),
    [
        ((0,), (32,), r"total, grid must not be empty, got \(0,\); start no kernel at all"),
        ((1, 65536), (32,), r"grid must be at most \(2147483647, 65535, 65535\)"),
        ((2**31,), (32,), "grid must be at most"),
        ((1,), (0,), "block must not be empty"),
        ((1,), (33,), "blocks of at most 32 threads, got 33"),
        ((1,), (8, 8), "blocks of at most 32 threads, got 64"),
        ((1,), (1, 1, 65), "block must be at most"),
        ([1], (32,), "grid must be a tuple of one to three ints"),
        ((np.int64(1),), (32,), "grid must be a tuple of one to three ints"),
        ((1, 1, 1, 1), (32,), "grid must be a tuple"),
    ],
)
def test_extents(cupy: Any, grid: Any, block: Any, match: str) -> None:
    args = (cupy.asarray(NUMBERS), cupy.empty(1, np.float32))
    with raises(cupy, match):
        cupy.RawModule(code=TEXT).get_function("total")(grid, block, args)
    assert cupy.emulation.launches == []


def test_blocks_of_more_than_1024_threads(cupy: Any, toy: Any) -> None:
    count, who = cupy.zeros(1, np.uint32), cupy.empty(1024, np.uint32)
    toy("turns", count, who, block=1024)
    with raises(cupy, "at most 1024 threads"):
        cupy.RawModule(code=TEXT).get_function("turns")((1,), (1024, 2), (count, who))


def test_device_and_stream_of_a_launch(cupy: Any, toy: Any) -> None:
    out = cupy.empty(1, np.float32)
    with cupy.cuda.Device(1):
        there, stream = cupy.asarray(NUMBERS), cupy.cuda.Stream()
        with raises(cupy, r"argument 1: the array lies on device 0.*device 1; enter `with array"):
            toy("total", there, out)
        with stream:
            assert cupy.cuda.get_current_stream() == stream
            toy("total", there, cupy.empty(1, np.float32))
    assert cupy.cuda.get_current_stream() == cupy.cuda.Stream.null
    kernel = cupy.RawModule(code=TEXT).get_function("total")
    with raises(cupy, "the stream is of device 1, but the current device is 0"):
        kernel((1,), (BLOCK,), (cupy.asarray(NUMBERS), out), stream=stream)
    with raises(cupy, "shared_mem must be 0"):
        kernel((1,), (BLOCK,), (cupy.asarray(NUMBERS), out), shared_mem=4)


def test_compilation(cupy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYCE_EMULATION_CACHE", str(tmp_path))
    compile_error = cupy.cuda.compiler.CompileException
    # A text that has never been compiled before.
    code = f"// {tmp_path}\n{TEXT}"
    module = cupy.RawModule(code=code, options=("--std=c++17", "--fmad=false", "-DBLOCK=64"))
    assert list(tmp_path.iterdir()) == []
    out = cupy.empty(1, np.float32)
    total = module.get_function("total")
    total((1,), (64,), (cupy.ones(64, np.float32), out))
    assert out.item() == 64
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="CUDA_ERROR_NOT_FOUND"):
        module.get_function("more")
    cupy.RawModule(code=code, options=("-DMORE",)).get_function("more")((1,), (1,), (0,))
    with pytest.raises(compile_error, match=r"unrecognized options \['--use_fast_math'\]"):
        cupy.RawModule(code=code, options=("--use_fast_math",)).get_function("total")
    with pytest.raises(compile_error, match=r"kernel\.cu:1:.*error"):
        cupy.RawModule(code='extern "C" __global__ void f() { oops; }').get_function("f")
    with pytest.raises(compile_error, match="the text has no kernel"):
        cupy.RawModule(code="__global__ void f() {}").get_function("f")
    with pytest.raises(TypeError, match="expected tuple"):
        cupy.RawModule(code=code, options=["-DMORE"])
    assert [launch.options for launch in cupy.emulation.launches] == [module.options, ("-DMORE",)]
    assert cupy.emulation.launches[0][:3] == ("total", (1, 1, 1), (64, 1, 1))


def test_inexact_exponentials(cupy: Any, toy: Any) -> None:
    x, out = np.linspace(-80, 80, 2**10, dtype=np.float32), cupy.empty(2**10, np.float32)
    x[0] = 0
    off = {}
    for error in (0, 3):
        cupy.emulation.defines = (f"-DSHIM_EXP_ERROR={error}",)
        toy("powers", cupy.asarray(x), out, grid=2**5)
        assert out[0].item() == 1
        exact = np.exp(x.astype(np.float64))
        off[error] = np.abs((out.get() - exact) / np.spacing(out.get())).max()
    assert off[0] < 1
    assert 2.4 < off[3] < 4.1


def test_subnormal_numbers(cupy: Any, toy: Any) -> None:
    x, out = cupy.asarray(np.float32([2.0**-70, 2.0**-70])), cupy.empty(1, np.float32)
    for cupy.emulation.flushes, expected in ((False, 2.0**-140), (True, 0)):
        toy("product", x, out)
        assert out.item() == expected


def record(cupy: Any, folder: Path, calls: list[tuple[Any, ...]]) -> None:
    """Record launches, whether or not the emulation itself finds a fault in them."""
    module = cupy.RawModule(code=TEXT)
    with cupy.emulation.record(folder):
        for name, args, *_ in calls:
            grid = (4,) if name.startswith("last") else (1,)
            with contextlib.suppress(cupy.emulation.EmulationError):
                module.get_function(name)(grid, (BLOCK,), args)


@pytest.mark.slow("cupy-emulated")
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_replay(
    cupy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], sanitizer: str
) -> None:
    import replay

    cupy.emulation.order = "forward"
    memory = cupy.zeros(64, np.float32)
    x, out, whole = cupy.asarray(NUMBERS), cupy.empty(1, np.float32), cupy.empty(1, np.int32)
    counted = (x, cupy.empty(4, np.float32), cupy.zeros(1, np.uint32), out)
    sound = [
        ("total", (x, out)),
        ("last", counted),
        # In place, and elsewhere in the same memory; neither is aligned to more than an element.
        ("total", (memory[1:33], memory[1:])),
        ("total", (memory[1:33], memory[40:])),
        ("copy_words", (memory[4:8], memory[12:16])),
        ("read_at", (x, 31, out)),
        ("neighbours", (x.view(np.uint32),)),
    ]
    record(cupy, tmp_path, sound)
    assert replay.main([str(tmp_path), "--sanitize", sanitizer]) == 0
    told = capsys.readouterr().out
    assert f"{len(sound)} launches of 1 texts" in told
    assert ": 0 findings" in told
    assert replay.main([str(tmp_path / "nowhere"), "--sanitize", sanitizer]) == 1

    recorded = next(path for path in tmp_path.glob("*/*.launch"))
    recorded.write_bytes(recorded.read_bytes()[:-1] + b"!")
    faulty = {
        "thread": [
            ("total_unguarded", (x, out), r"data race .*kernel\.cu:\d+ in .*add_up<false>"),
            ("last_unfenced", counted, r"data race .*kernel\.cu:\d+ in .*add_last<false>"),
            ("some_leave", (np.int32(3),), r"divergent barrier: of 32 threads 3 wait at"),
            ("two_barriers", (np.int32(3),), r"divergent barrier: it waits at"),
        ],
        "address": [
            ("read_at", (x, 32, out), r"heap-buffer-overflow"),
            ("read_at", (x[4:], -1, out), r"use-after-poison"),
            ("copy_words", (memory[5:], memory), r"misaligned address"),
            ("shared_pointer", (np.int32(4), whole), r"use-after-poison"),
            ("shared_index", (np.int32(4), whole), r"has no entry 4"),
        ],
    }[sanitizer]
    record(cupy, tmp_path, faulty)
    assert replay.main([str(tmp_path), "--sanitize", sanitizer]) == 1
    told = capsys.readouterr().out
    assert f": {len(faulty) + 1} findings" in told
    for _, _, match in [*faulty, ("", (), f"{recorded}: .* other than it was recorded")]:
        assert re.search(match, told), told
