"""Check polyce's GPU kernels on a device, measure them, and say how it went.

python benchmarks/gpu.py [--library LIBRARY] [--out FILE] [--only PART ...] [--quick] [--sweep]
python benchmarks/gpu.py --rehearse [--library LIBRARY] [--out FILE] [--only PART ...]
python benchmarks/gpu.py --table FILE

It wants a CUDA or ROCm device that torch finds, and triton; or, with `--library cupy`, one that
CuPy finds. All results go into one JSON file, by default benchmarks/results/gpu-<device>.json, or
gpu-cupy-<device>.json, and a Markdown summary is printed. The exit status is 1 where something is
wrong, and no time is ever wrong. What cannot be done on a machine is recorded as "not here", with
its reason.

`--rehearse` goes the same way without a device, on tiny arrays, with kernels in Triton's
interpreter, or in the emulated CuPy of tests/emulation: it shows that the script runs, and nothing
about a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

PARTS = ("grid", "values", "behaviour", "processes", "times", "sweep")
LIBRARIES = ("torch", "cupy")
RESULTS = Path(__file__).parent / "results"
EMULATION = Path(__file__).parents[1] / "tests" / "emulation"


def main() -> int:
    """Run what is asked for; the exit status tells whether all is right."""
    arguments = parsed()
    if arguments.table:
        import gpu_tables

        gpu_tables.show(json.loads(arguments.table.read_text()))
        return 0
    # Triton reads it as it is imported.
    if arguments.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    # torch's profiler tells about its every start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    machine = found_machine(arguments.library, arguments.rehearse)
    if arguments.spoil:
        import gpu_spoil

        gpu_spoil.spoil(arguments.library, arguments.spoil)
    if arguments.small_set or arguments.first_call:
        in_this_process(machine, arguments.small_set)
        return 0
    found = run(machine, arguments)
    import gpu_tables

    gpu_tables.show(found)
    return 1 if found["wrong"] else 0


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", choices=LIBRARIES, default="torch", help="by default torch")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON to write")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=" ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="time two shapes only")
    parser.add_argument("--sweep", action="store_true", help="try tiles and numbers of warps too")
    parser.add_argument("--rehearse", action="store_true", help="run on a CPU, emulated and tiny")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print a run again")
    # For the script's own test, and for the processes that it starts.
    parser.add_argument("--spoil", choices=("loss", "gradient", "bits"), help=argparse.SUPPRESS)
    parser.add_argument("--small-set", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--first-call", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def found_machine(library: str, rehearse: bool) -> Any:
    """Give the device as a library finds it, or the CPU that rehearses."""
    return cupy_machine(rehearse) if library == "cupy" else torch_machine(rehearse)


def torch_machine(rehearse: bool) -> Any:
    """Give what torch finds."""
    import torch
    from gpu_machine import Machine, Rehearsal

    if rehearse:
        return Rehearsal()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 runs kernels on a CPU; unset it, or pass --rehearse")
    if not torch.cuda.is_available():
        sys.exit(
            f"torch {torch.__version__} finds no CUDA or ROCm device; "
            "run this where there is one, or pass --rehearse"
        )
    return Machine()


def cupy_machine(rehearse: bool) -> Any:
    """Give what CuPy finds."""
    if rehearse:
        # Before any CuPy that is installed.
        sys.path.insert(0, str(EMULATION))
    import cupy
    from gpu_cupy_machine import Machine, Rehearsal

    if rehearse:
        return Rehearsal()
    if not cupy.cuda.is_available() or EMULATION in Path(cupy.__file__).parents:
        sys.exit(
            f"cupy {cupy.__version__} finds no device; "
            "run this where there is one, or pass --rehearse"
        )
    return Machine()


def in_this_process(machine: Any, small_set: bool) -> None:
    """Do what another process has started this one for."""
    import gpu_cases
    import gpu_processes

    if machine.library == "cupy":
        import gpu_cupy_behaviour as behaviour
        import gpu_cupy_values as values
    else:
        import gpu_behaviour as behaviour
        import gpu_values as values
    if small_set:
        gpu_processes.small_set(machine, gpu_cases.REHEARSAL, values.compared)
    else:
        behaviour.first_call(machine)


def run(machine: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the parts, and write what is known after each of them, lest a crash take it along."""
    import gpu_header

    found: dict[str, Any] = {"header": gpu_header.header(machine), "parts": {}}
    out = arguments.out or default_out(found["header"])
    start = time.perf_counter()
    asked = arguments.only or [part for part in PARTS if part != "sweep" or arguments.sweep]
    parts = cupy_parts if machine.library == "cupy" else torch_parts
    for name, part in parts(machine, arguments.quick, found).items():
        if name in asked:
            found["parts"][name] = guarded(part)
            say(f"{time.perf_counter() - start:5.0f} s: {name}: {tally(found['parts'][name])}")
        found["wrong"] = sum(
            row["status"] == "wrong" for rows in found["parts"].values() for row in rows
        )
        write(found, out)
    found["header"]["clocks and power afterwards"] = gpu_header.told(
        lambda: gpu_header.power(machine)
    )
    found["header"]["took_s"] = time.perf_counter() - start
    write(found, out)
    return found


def guarded(part: Callable[[], list[Any]]) -> list[Any]:
    """Run a part; where it ends early, as when the device is lost, that is what is wrong."""
    import gpu_checks

    rows: list[Any] = []
    row = gpu_checks.attempt("the part runs to its end", lambda: rows.extend(part()))
    return [*rows, row]


def torch_parts(
    machine: Any, quick: bool, found: dict[str, Any]
) -> dict[str, Callable[[], list[Any]]]:
    """Give what is done with torch tensors.

    Correctness comes first: what is fast and wrong is not worth a time.
    """
    import gpu_behaviour
    import gpu_grid
    import gpu_processes
    import gpu_sweep
    import gpu_times
    import gpu_values

    values, times = sizes(machine, quick)
    return {
        "grid": lambda: gpu_grid.check(machine),
        "values": lambda: gpu_values.check(machine, values),
        "behaviour": lambda: gpu_behaviour.check(machine, values),
        "processes": lambda: gpu_processes.check(machine),
        "times": lambda: timed(machine, gpu_times, times, found),
        "sweep": lambda: gpu_sweep.check(machine, times),
    }


def cupy_parts(
    machine: Any, quick: bool, found: dict[str, Any]
) -> dict[str, Callable[[], list[Any]]]:
    """Give what is done with CuPy arrays, in the same order."""
    import gpu_cupy_behaviour
    import gpu_cupy_times
    import gpu_cupy_values
    import gpu_grid
    import gpu_processes

    values, times = sizes(machine, quick)
    return {
        "grid": lambda: gpu_grid.check(machine),
        "values": lambda: gpu_cupy_values.check(machine, values),
        "behaviour": lambda: gpu_cupy_behaviour.check(machine, values),
        "processes": lambda: gpu_processes.check(machine),
        "times": lambda: timed(machine, gpu_cupy_times, times, found),
    }


def sizes(machine: Any, quick: bool) -> tuple[Any, Any]:
    """Give how much is compared, and how much is timed."""
    import gpu_cases
    import gpu_timing

    if machine.rehearses:
        return gpu_cases.REHEARSAL, gpu_timing.REHEARSAL
    return gpu_cases.FULL, gpu_timing.QUICK if quick else gpu_timing.FULL


def timed(machine: Any, library_times: Any, size: Any, found: dict[str, Any]) -> list[Any]:
    """Time a library's calls, beside a copy, and its first ones in processes of their own."""
    import gpu_processes

    copy = library_times.copy_bandwidth(machine, size)
    found["header"]["copy"] = copy
    rows: list[Any] = library_times.check(machine, size, copy["gb_per_s"])
    return rows + gpu_processes.first_calls(machine)


def tally(rows: list[Any]) -> str:
    """Count how the checks of a part went."""
    counts = Counter(row["status"] for row in rows)
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def default_out(header: dict[str, Any]) -> Path | None:
    """Name the file after the device; a rehearsal leaves none behind."""
    if header["rehearsal"]:
        return None
    name = re.sub(r"[^a-z0-9]+", "-", header["device"]["name"].lower()).strip("-")
    library = "" if header["library"] == "torch" else f"{header['library']}-"
    return RESULTS / f"gpu-{library}{name}.json"


def write(found: dict[str, Any], out: Path | None) -> None:
    """Write the JSON file."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(plain(found), indent=1, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """Write numbers that JSON lacks as text."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def say(text: str) -> None:
    """Tell how far it is, beside what is printed."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
