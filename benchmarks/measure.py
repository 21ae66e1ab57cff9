"""How the benchmarks measure: calls in turn, peak memory, fresh processes, the environment.

As a program this is the fresh process: `python -m benchmarks.measure module:function
'{"argument": 1}'` calls the function and prints its result as JSON.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]

ROOT = Path(__file__).parents[1]
LIBRARIES = ("numpy", "ml_dtypes", "torch", "jax", "jaxlib", "dask")
# A sample this long is not disturbed by the clock's own cost.
_SAMPLE_SECONDS = 1e-3
_MEBIBYTE = 2**20


def take_turns(
    names: Sequence[str], take: Callable[[str], float], budget: float, rounds: int
) -> dict[str, list[float]]:
    """Take samples of contenders in turn, so that a busy machine disturbs all of them alike.

    Each round takes one sample of every contender, starting with another one each time. There are
    at least `rounds` rounds, and more until `budget` seconds are spent.
    """
    samples: dict[str, list[float]] = {name: [] for name in names}
    order = list(names)
    done, end = 0, time.perf_counter() + budget
    while order and (done < rounds or time.perf_counter() < end):
        for name in order:
            samples[name].append(take(name))
        order.append(order.pop(0))
        done += 1
    return samples


def interleave(
    contenders: Mapping[str, Callable[[], Any]], budget: float, rounds: int
) -> dict[str, dict[str, float]]:
    """Time contenders in turn, and return the summary of the seconds of one call of each."""
    repeats = {name: _repeats(call) for name, call in contenders.items()}
    gc.collect()
    gc.disable()
    try:
        samples = take_turns(
            list(contenders), lambda name: sample(contenders[name], repeats[name]), budget, rounds
        )
    finally:
        gc.enable()
    return {name: summary(taken) for name, taken in samples.items()}


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Return the median, the best, and the distance of the quartiles in parts of the median."""
    low, middle, high = (float(quartile) for quartile in np.percentile(samples, (25, 50, 75)))
    return {"median_s": middle, "best_s": min(samples), "spread": (high - low) / middle}


def sample(call: Callable[[], Any], repeats: int = 1) -> float:
    """Return the seconds of one call, averaged over several in a row."""
    start = time.perf_counter()
    for _ in itertools.repeat(None, repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _repeats(call: Callable[[], Any]) -> int:
    """Warm a contender up and count how many of its calls make a sample."""
    call()
    repeats = 1
    # Two long ones in a row: one alone may have been interrupted.
    while any(sample(call, repeats) * repeats < _SAMPLE_SECONDS for _ in range(2)):
        repeats *= 2
    return repeats


def busy_with_others() -> float | None:
    """Return for how many seconds the processors have done other work, where the system tells."""
    table = Path("/proc/stat")
    if not table.exists():
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal: of all processors together.
    ticks = [int(word) for word in table.read_text().split("\n", 1)[0].split()[1:9]]
    busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
    return busy - time.process_time()


def check_losses(case: str, losses: Mapping[str, float], expected: float, tolerance: float) -> None:
    """Check that all contenders compute the same loss."""
    for name, loss in losses.items():
        if not math.isclose(loss, expected, rel_tol=tolerance):
            raise RuntimeError(f"{case}: the losses differ ({name}): {dict(losses)}")


def against(
    case: str,
    polyce: Callable[[], Any],
    peers: Mapping[str, tuple[Callable[[], Any], float | None]],
    budget: float,
    rounds: int,
) -> list[Row]:
    """Time polyce against its peers, each given with a target for the ratio, or None."""
    calls = {"polyce": polyce} | {name: call for name, (call, _) in peers.items()}
    losses = {name: loss_of(call()) for name, call in calls.items()}
    check_losses(case, losses, losses["polyce"], 1e-4)
    times = interleave(calls, budget, rounds)
    ours = times["polyce"]
    rows: list[Row] = [{"case": case, "contender": "polyce", **ours}]
    for name, (_, target) in peers.items():
        theirs = times[name]
        ratio = ours["median_s"] / theirs["median_s"]
        ratios = {"ratio": ratio, "ratio of bests": ours["best_s"] / theirs["best_s"]}
        rows.append({"case": case, "contender": name, **theirs, **ratios, **judge(ratio, target)})
    return rows


def judge(value: float, target: float | None) -> Row:
    """Return a number's target, and whether the number meets it; nothing without a target."""
    return {} if target is None else {"target": target, "met": value <= target}


def loss_of(answer: Any) -> float:
    """Return the loss of an answer, which may also have a gradient."""
    return float(answer[0] if isinstance(answer, tuple) else answer)


def peak_growth(call: Callable[[], Any]) -> dict[str, float] | None:
    """Measure by how many bytes the process grows at most during a call, and how long it takes.

    Right only in a process that has never been larger than it is now; None if the system does not
    report it. (ru_maxrss does not serve: a new process starts with its parent's.)
    """
    before = memory()
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    after = memory()
    del result
    if before is None or after is None:
        return None
    if after["VmHWM"] == before["VmHWM"] > before["VmRSS"] + 8 * _MEBIBYTE:
        raise RuntimeError("the process had been larger before the call than it was during it")
    return {"bytes": after["VmHWM"] - before["VmRSS"], "seconds": seconds}


def settled_growth(call: Callable[[], Any]) -> dict[str, float] | None:
    """Measure the same in a process that has made a call before, once its result is freed."""
    time.sleep(0.5)  # jax frees results with a delay
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        # Reset the system's record of the peak.
        clear.write_text("5")
    return peak_growth(call)


def memory() -> dict[str, int] | None:
    """Return this process's memory, now and at its peak, if the system reports it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = (line.split() for line in status.read_text().splitlines())
    return {words[0][:-1]: 1024 * int(words[1]) for words in lines if words[0].startswith("Vm")}


def fresh(
    function: Callable[..., Any], /, variables: Mapping[str, str] | None = None, **arguments: Any
) -> Any:
    """Call a function of the benchmarks in a fresh process, by way of JSON."""
    module = sys.modules[function.__module__].__spec__
    if module is None:
        raise ValueError(f"{function} is in no module that a process can import")
    name = f"{module.name}:{function.__name__}"
    command = [sys.executable, "-m", "benchmarks.measure", name, json.dumps(arguments)]
    environment = os.environ | dict(variables or {})
    done = subprocess.run(
        command, env=environment, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def fresh_source(source: str, times: int) -> list[Any]:
    """Run source that prints JSON in several fresh processes, with bytecode compiled as by pip."""
    command = [sys.executable, "-c", source]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"PYTHONPYCACHEPREFIX": cache}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        # The first process compiles the bytecode.
        runs = [
            subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
            for _ in range(1 + times)
        ]
    return [json.loads(run.stdout) for run in runs[1:]]


def installed(*modules: str) -> list[str]:
    """Return those of the modules that can be imported."""
    return [name for name in modules if importlib.util.find_spec(name) is not None]


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, Any]:
    """Return what the numbers depend on: versions, processor, number of threads."""
    import polyce

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "versions": {
            "python": platform.python_version(),
            "polyce": polyce.__version__,
            **versions(*LIBRARIES),
        },
        "processor": _processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "processors usable": threads,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        # It may name an older processor, whose products are slower.
        "OPENBLAS_CORETYPE": os.environ.get("OPENBLAS_CORETYPE"),
    }


def _processor() -> str:
    table = Path("/proc/cpuinfo")
    if table.exists():
        for line in table.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def say(text: str) -> None:
    """Report progress on stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    module_name, _, function_name = sys.argv[1].partition(":")
    function = getattr(importlib.import_module(module_name), function_name)
    print(json.dumps(function(**json.loads(sys.argv[2]))))
