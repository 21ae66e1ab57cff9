"""How the benchmarks measure: interleaved timing, peak memory, fresh processes, tables.

Run as a program it is the fresh process: `python measure.py module:function '{"argument": 1}'`
calls the function and prints what it returns as JSON.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]

LIBRARIES = ("polyce", "numpy", "ml_dtypes", "torch", "jax", "jaxlib", "optax", "dask")
# A sample this long is not disturbed by the clock's own cost.
_SAMPLE_SECONDS = 1e-3
_MEBIBYTE = 2**20


def interleave(
    contenders: Mapping[str, Callable[[], Any]], budget: float, rounds: int
) -> dict[str, dict[str, float]]:
    """Time the contenders in turn, so that a busy machine disturbs all of them alike.

    Each round takes one sample of every contender, starting with another one each time. Rounds go
    on until `budget` seconds are spent, but there are at least `rounds`.

    Returns
    -------
    dict
        Median and best seconds of one call, by contender.
    """
    repeats = {name: _repeats(call) for name, call in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + budget
        while len(samples[order[0]]) < rounds or time.perf_counter() < end:
            for name in order:
                samples[name].append(_sample(contenders[name], repeats[name]))
            order.append(order.pop(0))
    finally:
        gc.enable()
    return {
        name: {"median_s": statistics.median(taken), "best_s": min(taken)}
        for name, taken in samples.items()
    }


def _sample(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _repeats(call: Callable[[], Any]) -> int:
    """Warm a contender up and count how many of its calls make a sample."""
    call()
    repeats = 1
    while repeats < 1000 and _sample(call, repeats) * repeats < _SAMPLE_SECONDS:
        repeats *= 2
    return repeats


def against(
    case: str,
    polyce: Callable[[], Any],
    peers: Mapping[str, tuple[Callable[[], Any], float | None]],
    budget: float,
    rounds: int,
) -> list[Row]:
    """Time polyce against its peers, each given with the target for the ratio or None."""
    calls = {"polyce": polyce} | {name: call for name, (call, _) in peers.items()}
    losses = {name: loss_of(call()) for name, call in calls.items()}
    for name, loss in losses.items():
        if not math.isclose(loss, losses["polyce"], rel_tol=1e-4):
            raise RuntimeError(f"{case}: the losses differ ({name}): {losses}")
    times = interleave(calls, budget, rounds)
    ours = times["polyce"]
    rows: list[Row] = [{"case": case, "contender": "polyce", **ours}]
    for name, (_, target) in peers.items():
        theirs = times[name]
        ratio = ours["median_s"] / theirs["median_s"]
        ratios = {"ratio": ratio, "ratio of bests": ours["best_s"] / theirs["best_s"]}
        rows.append({"case": case, "contender": name, **theirs, **ratios, **judge(ratio, target)})
    return rows


def loss_of(answer: Any) -> float:
    """Give the loss of an answer that may have a gradient beside it."""
    return float(answer[0] if isinstance(answer, tuple) else answer)


def judge(value: float, target: float | None) -> Row:
    """Say what a number should not exceed, and whether it does."""
    return {} if target is None else {"target": target, "met": value <= target}


def peak_growth(call: Callable[[], Any]) -> dict[str, float] | None:
    """Tell by how many bytes the process grows at most during a call, and how long it takes.

    Right only in a process that has not yet been larger than it is; None where the system does not
    tell. (ru_maxrss would not do: a new process starts with its parent's.)
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


def memory() -> dict[str, int] | None:
    """Give this process's memory, now and at its peak, where the system tells."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = (line.split() for line in status.read_text().splitlines())
    return {words[0][:-1]: 1024 * int(words[1]) for words in lines if words[0].startswith("Vm")}


def fresh(function: str, /, variables: Mapping[str, str] | None = None, **arguments: Any) -> Any:
    """Call `module:function` of this folder in a fresh process."""
    command = [sys.executable, __file__, function, json.dumps(arguments)]
    environment = os.environ | dict(variables or {})
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def fresh_source(source: str, times: int) -> list[Any]:
    """Run source that prints JSON in so many fresh processes, with the bytecode as after pip."""
    command = [sys.executable, "-c", source]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"PYTHONPYCACHEPREFIX": cache}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        # The first one compiles.
        runs = [
            subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
            for _ in range(1 + times)
        ]
    return [json.loads(run.stdout) for run in runs[1:]]


def installed(*modules: str) -> list[str]:
    """Give those of the modules that can be imported."""
    return [name for name in modules if importlib.util.find_spec(name) is not None]


def show(rows: list[Row]) -> None:
    """Print rows as a table, with units for people."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = [[column.removesuffix("_s").replace("_", " ") for column in columns]]
    table += [[text(column, row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    print()


def text(column: str, value: Any) -> str:
    """Write a cell."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if column.endswith("_s"):
        for unit, factor in (("s", 1.0), ("ms", 1e3)):
            if value * factor >= 1.0:
                return f"{value * factor:.3g} {unit}"
        return f"{value * 1e6:.3g} µs"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def environment() -> dict[str, Any]:
    """Tell what the numbers depend on: versions, processor, number of threads."""
    import polyce

    versions = {"python": platform.python_version(), "polyce": polyce.__version__}
    for name in installed(*LIBRARIES[1:]):
        versions[name] = importlib.metadata.version(name)
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "versions": versions,
        "processor": _processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "processors usable": threads,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        # It may name an older processor than this one, whose products are slower.
        "OPENBLAS_CORETYPE": os.environ.get("OPENBLAS_CORETYPE"),
    }


def _processor() -> str:
    table = Path("/proc/cpuinfo")
    if table.exists():
        for line in table.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


if __name__ == "__main__":
    module_name, _, function_name = sys.argv[1].partition(":")
    function = getattr(importlib.import_module(module_name), function_name)
    print(json.dumps(function(**json.loads(sys.argv[2]))))
