"""The compiled core when memory, threads or processes run short, each in a separate process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest

pytestmark = [
    pytest.mark.only("numpy"),
    pytest.mark.skipif(sys.platform != "linux", reason="limits and forks are Linux's"),
]

PRELUDE = """
import ctypes, os, resource, sys, threading, time
import numpy as np
import polyce
rng = np.random.default_rng(0)
"""


def run(code: str, **variables: str) -> str:
    """Run a program and return what it printed; it must exit with status 0."""
    command = [sys.executable, "-W", "ignore", "-c", PRELUDE + textwrap.dedent(code)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120,
        env=os.environ | variables,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow("numpy")
def test_no_memory_for_scratch() -> None:
    told = run(
        """
        x = rng.standard_normal((64, 200000), dtype=np.float32)
        target, out = np.arange(64), np.empty_like(x)
        polyce.set_num_threads(4)
        loss, grad = polyce.cross_entropy_with_grad(x, target, out=out)
        want = loss, grad.copy()
        raised = 0
        for spare in range(0, 8 << 20, 1 << 18):
            used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + spare, resource.RLIM_INFINITY))
            try:
                got = polyce.cross_entropy_with_grad(x, target, out=out)
            except MemoryError:
                raised += 1
                got = None
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
            # What a call gives is right, and so is the next one.
            for found in (got, polyce.cross_entropy_with_grad(x, target, out=out)):
                assert found is None or (found[0] == want[0] and np.array_equal(found[1], want[1]))
        print("raised", raised > 0)
        """,
        # malloc keeps no memory in reserve, so that the limit takes effect.
        MALLOC_ARENA_MAX="1",
        MALLOC_MMAP_THRESHOLD_="65536",
    )
    assert told == "raised True\n"


def test_no_thread_to_be_had() -> None:
    told = run(
        """
        x, target = rng.standard_normal((400, 1000), dtype=np.float32), np.arange(400)
        polyce.set_num_threads(1)
        want = polyce.cross_entropy_with_grad(x, target)
        if os.getuid() == 0:
            os.setuid(65534)  # nothing limits root
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        try:
            threading.Thread(target=print).start()
        except RuntimeError:
            print("no thread")
        polyce.set_num_threads(4)
        for _ in range(3):
            got = polyce.cross_entropy_with_grad(x, target)
            assert got[0] == want[0] and np.array_equal(got[1], want[1])
        """
    )
    assert told == "no thread\n"


def test_a_fork_while_another_thread_computes() -> None:
    told = run(
        """
        x, target = rng.standard_normal((400, 1000), dtype=np.float32), np.arange(400)
        want = polyce.cross_entropy(x, target)
        done = threading.Event()

        def compute():
            while not done.is_set():
                polyce.cross_entropy(x, target)

        threads = [threading.Thread(target=compute) for _ in range(3)]
        for thread in threads:
            thread.start()
        children, codes = [], []
        for _ in range(20):
            time.sleep(0.005)
            child = os.fork()
            if not child:
                assert polyce.cross_entropy(x, target) == want
                sys.exit(0)  # an ordinary exit, which waits for the calls under way
            children.append(child)
        done.set()
        end = time.monotonic() + 30
        while children:
            for child in list(children):
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    children.remove(child)
                    codes.append(status)
                elif time.monotonic() > end:
                    os.kill(child, 9)
            time.sleep(0.01)
        print(len(codes), set(codes))
        """
    )
    assert told == "20 {0}\n"


UPWARD = 0x800


def test_helpers_round_as_the_caller_does() -> None:
    told = run(
        f"""
        math = ctypes.CDLL(None)
        x = rng.standard_normal((400, 1000), dtype=np.float32)
        target = np.arange(400)
        def bits():
            math.fesetround({UPWARD})
            loss, grad = polyce.cross_entropy_with_grad(x, target, reduction="none")
            math.fesetround(0)
            return loss.tobytes() + grad.tobytes()
        nearest = polyce.cross_entropy(x, target, reduction="none").tobytes()
        polyce.set_num_threads(1)
        alone = bits()
        polyce.set_num_threads(4)
        print({{bits() for _ in range(20)}} == {{alone}}, alone[:len(nearest)] != nearest)
        """
    )
    assert told == "True True\n"


@pytest.mark.slow("numpy")
@pytest.mark.parametrize("flag", ["-ffast-math", "-ffinite-math-only"])
def test_fast_math_is_refused(flag: str, tmp_path: Any) -> None:
    from pathlib import Path
    from shutil import which

    compiler = which("c++")
    core = Path(__file__).parent.parent / "src" / "polyce" / "_core"
    if compiler is None or not core.is_dir():
        pytest.skip("needs a C++ compiler and the sources")
    command = [compiler, "-std=c++20", "-DPOLYCE_ISA=baseline", "-fsyntax-only", "kernels.cpp"]
    done = subprocess.run([*command, flag], cwd=core, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "must be compiled without -ffast-math" in done.stderr
