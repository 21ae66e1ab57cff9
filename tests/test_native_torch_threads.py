"""The compiled core on torch's threads: when it takes them, and that they stay as they were."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

pytestmark = [
    pytest.mark.only("torch"),
    pytest.mark.same_everywhere,
    pytest.mark.skipif(sys.platform != "linux", reason="only there are torch's threads known"),
]

PRELUDE = """
import ctypes, os, sys
import numpy as np, torch
import polyce

math = ctypes.CDLL(None)
UPWARD = 0x800

def threads():
    return len(os.listdir("/proc/self/task"))

def parallel():
    return torch.linspace(-3.0, 3.0, 1 << 20).exp_().numpy().tobytes()

x = torch.from_numpy(np.random.default_rng(0).standard_normal((400, 1000), np.float32))
target = torch.arange(400)

def bits(x=x, target=target):
    loss, grad = polyce.cross_entropy_with_grad(x, target, reduction="none")
    return np.asarray(loss).tobytes() + np.asarray(grad).tobytes()
"""


def run(code: str) -> str:
    """Run a program and return what it printed; it must end by itself, and well."""
    command = [sys.executable, "-W", "ignore", "-c", PRELUDE + textwrap.dedent(code)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow("torch")
def test_tensors_take_torchs_threads_and_arrays_those_of_polyce() -> None:
    told = run(
        """
        torch.set_num_threads(3)
        polyce.set_num_threads(3)
        parallel()
        before = threads()
        bits()
        print(threads() - before)
        bits(x.numpy(), target.numpy())
        print(threads() - before)
        """
    )
    assert told.split() == ["0", "2"]


@pytest.mark.slow("torch")
def test_where_torch_has_too_few_threads_polyce_has_its_own() -> None:
    told = run(
        """
        torch.set_num_threads(1)
        polyce.set_num_threads(3)
        before = threads()
        bits()
        print(threads() - before)
        """
    )
    assert told.split() == ["2"]


@pytest.mark.slow("torch")
def test_torchs_threads_may_end_and_others_begin() -> None:
    told = run(
        """
        polyce.set_num_threads(1)
        want = bits()
        polyce.set_num_threads(3)
        found = set()
        for count in (3, 1, 5, 2, 3):
            torch.set_num_threads(count)
            parallel()
            found |= {bits() for _ in range(5)}
        print(found == {want})
        """
    )
    assert told == "True\n"


@pytest.mark.slow("torch")
def test_torchs_threads_give_the_same_bits_and_round_as_before() -> None:
    told = run(
        """
        torch.set_num_threads(3)
        want = parallel()
        polyce.set_num_threads(1)
        nearest = bits()
        math.fesetround(UPWARD)
        upward = bits()
        polyce.set_num_threads(3)
        found = {bits() for _ in range(20)}
        math.fesetround(0)
        print(found == {upward}, {bits() for _ in range(20)} == {nearest}, upward != nearest)
        print(parallel() == want)
        """
    )
    assert told == "True True True\nTrue\n"


@pytest.mark.slow("torch")
def test_a_forked_child_does_not_wait_for_torchs_threads() -> None:
    told = run(
        """
        torch.set_num_threads(3)
        polyce.set_num_threads(3)
        parallel()
        want = bits()
        children = []
        for _ in range(3):
            child = os.fork()
            if not child:
                os._exit(0 if bits() == want else 1)
            children.append(child)
        print(*(os.waitpid(child, 0)[1] for child in children))
        print(bits() == want)
        """
    )
    assert told == "0 0 0\nTrue\n"


@pytest.mark.slow("torch")
def test_nor_does_a_child_that_loads_the_core_itself() -> None:
    told = run(
        """
        torch.set_num_threads(3)
        parallel()
        child = os.fork()
        if not child:
            polyce.set_num_threads(3)
            bits()
            os._exit(0)
        print(os.waitpid(child, 0)[1])
        """
    )
    assert told == "0\n"
