"""Threads of the compiled core: their number, several callers, forks, the end of a process."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest

import polyce

pytestmark = pytest.mark.only("numpy")

RNG = np.random.default_rng(0)
X = RNG.standard_normal((400, 1000), dtype=np.float32)
T = RNG.integers(0, 1000, 400)


def loss_bits() -> bytes:
    loss, grad = polyce.cross_entropy_with_grad(X, T)
    return np.asarray(loss).tobytes() + grad.tobytes()


def run(code: str, **variables: str) -> Any:
    environment = os.environ | variables
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_number_can_be_set() -> None:
    before = polyce.get_num_threads()
    try:
        for count in (1, 3, np.int64(2)):
            polyce.set_num_threads(count)
            assert polyce.get_num_threads() == count
    finally:
        polyce.set_num_threads(before)


@pytest.mark.parametrize("count", [0, -1, 1025])
def test_a_number_out_of_range(count: int) -> None:
    with pytest.raises(ValueError, match=f"count must lie between 1 and 1024, got {count}; 1 is"):
        polyce.set_num_threads(count)


@pytest.mark.parametrize("count", [True, 1.0, "2", None])
def test_what_is_no_number(count: Any) -> None:
    with pytest.raises(TypeError, match=r"count must be an integer, got .*; pass a number"):
        polyce.set_num_threads(count)


def test_the_default_is_the_processors_that_may_be_used() -> None:
    code = "import os, polyce; print(polyce.get_num_threads(), len(os.sched_getaffinity(0)))"
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system does not tell which processors a process may use")
    one, other = run(code, POLYCE_NUM_THREADS="").stdout.split()
    assert one == other
    pinned = run(f"import os; os.sched_setaffinity(0, {{0}}); {code}", POLYCE_NUM_THREADS="")
    assert pinned.stdout.split() == ["1", "1"]


@pytest.mark.parametrize(
    ("text", "says"),
    [("5", "5"), ("0", ""), ("1025", ""), ("2147483648", ""), ("many", ""), ("-1", "")],
)
def test_the_environment_variable(text: str, says: str) -> None:
    done = run("import polyce; print(polyce.get_num_threads())", POLYCE_NUM_THREADS=text)
    if text == "5":
        assert done.stdout.split() == [says]
    else:
        rule = "POLYCE_NUM_THREADS must be a number of threads from 1 to 1024"
        assert f"ValueError: {rule}, got '{text}'; leave it out" in done.stderr


def test_the_instruction_set_can_be_chosen() -> None:
    code = "from polyce.implementations.native.core import core; print(core().isa())"
    assert run(code, POLYCE_ISA="baseline").stdout.split() == ["baseline"]
    assert "POLYCE_ISA must be one of" in run(code, POLYCE_ISA="mmx").stderr


def test_callers_at_once_get_what_each_would_get_alone() -> None:
    want, found = loss_bits(), []

    def call() -> None:
        found.extend(loss_bits() for _ in range(20))

    callers = [threading.Thread(target=call) for _ in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 120
    assert set(found) == {want}


def in_child(results: Any) -> None:
    results.put(loss_bits())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own() -> None:
    want = loss_bits()  # the parent's threads exist by now, and the child does not have them
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [context.Process(target=in_child, args=(results,)) for _ in range(3)]
    for child in children:
        child.start()
    assert [results.get(timeout=60) for _ in children] == [want] * 3
    for child in children:
        child.join(timeout=60)
        assert child.exitcode == 0
    assert loss_bits() == want


@pytest.mark.slow("numpy")
def test_a_process_ends_while_threads_sleep_or_work() -> None:
    code = """
import threading, numpy as np, polyce
x, t = np.zeros((2000, 2000), np.float32), np.zeros(2000, np.int64)
polyce.cross_entropy(x, t)
def work():
    while True:
        polyce.cross_entropy(x, t)
threading.Thread(target=work, daemon=True).start()
polyce.cross_entropy(x, t)
print("done")
"""
    for _ in range(3):
        done = run(code)
        assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_plain_call_touches_no_array_api_compat() -> None:
    code = """
import sys, numpy as np, polyce
x, t = np.zeros((8, 10), np.float32), np.zeros(8, np.int64)
polyce.cross_entropy(x, t, np.ones(10), label_smoothing=0.1)
polyce.cross_entropy_with_grad(x, t, out=x)
polyce.log_softmax(x)
print([name for name in sys.modules if name.startswith("array_api_compat")])
"""
    assert run(code).stdout == "[]\n"
