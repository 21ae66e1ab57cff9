"""A run on a GPU within a number of seconds: its parts, each in a process of its own.

This process loads no array library, so that nothing that happens to one of them can end the run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .ledger import AGAIN, CUT_OFF, RIGHT, WRONG, Ledger

ROOT = Path(__file__).parents[2]
_HERE = Path(__file__).parent
# A process that is stopped gets this long before its end to write what it has.
_SPARE = 1.0
_SHOWN = 1500


class Part(NamedTuple):
    """A part of the run."""

    share: float
    """Of 240 seconds, those that it gets if all before it take theirs."""
    command: tuple[str, ...]
    """What Python is to run."""
    rehearsed: tuple[str, ...]
    """The same without a GPU."""


def _by_steps(share: float, what: str, library: str) -> Part:
    command = ("-m", "gpu.part", what, "--library", library)
    return Part(share, command, (*command, "--rehearse"))


def _by_pytest(share: float, library: str, *files: str) -> Part:
    device, stand_in = {"torch": ("torch-cuda", "triton"), "cupy": ("cupy", "cupy-emulated")}[
        library
    ]
    # The time goes to tests, not to warnings of versions that the project does not pin.
    options = ("-q", "-p", "gpu.pytest_rows", "-p", "no:cacheprovider", "-W", "default")
    paths = tuple(str(_HERE / name) for name in files)
    commands = (
        ("-m", "pytest", f"--backend={name}", *options, *paths) for name in (device, stand_in)
    )
    return Part(share, *commands)


_BEHAVIOUR = ("test_behaviour.py", "test_streams.py")
# In the order of what is learnt.
PARTS = {
    "compile": _by_steps(28, "compile", "torch"),
    "smoke": _by_steps(20, "smoke", "torch"),
    "times": _by_steps(48, "times", "torch"),
    "cupy-compile": _by_steps(12, "compile", "cupy"),
    "cupy-smoke": _by_steps(12, "smoke", "cupy"),
    "cupy-times": _by_steps(18, "times", "cupy"),
    "behaviour": _by_pytest(18, "torch", *_BEHAVIOUR, "test_torch.py"),
    "cupy-behaviour": _by_pytest(10, "cupy", *_BEHAVIOUR),
    "heads": _by_steps(12, "heads", "torch"),
    "cupy-heads": _by_steps(8, "heads", "cupy"),
    "jax-heads": _by_steps(12, "heads", "jax"),
    "jax-times": _by_steps(12, "times", "jax"),
    "values": _by_pytest(12, "torch", "test_values.py"),
    "sanitizer": _by_pytest(18, "torch", "test_sanitizer.py"),
}


def run(
    out: Path,
    seconds: float,
    names: Sequence[str],
    *,
    rehearse: bool,
    wheels: Path | None,
    parts: Mapping[str, Part] = PARTS,
) -> dict[str, Ledger]:
    """Run parts one after the other, and return what each has found."""
    ends = time.time() + seconds
    out.mkdir(parents=True, exist_ok=True)
    environment = _environment(None if wheels is None else unpacked(wheels, out / "wheels"))
    found: dict[str, Ledger] = {}
    for place, name in enumerate(names):
        share = parts[name].share / sum(parts[other].share for other in names[place:])
        left = ends - time.time()
        ledger = found[name] = Ledger(out / f"{name}.jsonl", time.time() + left * share)
        ledger.path.unlink(missing_ok=True)
        command = parts[name].rehearsed if rehearse else parts[name].command
        print(f"{seconds - left:5.0f} s: {name}", file=sys.stderr, flush=True)
        _run_part(ledger, [sys.executable, *command], environment, out / f"{name}.log")
    return found


def _environment(paths: Sequence[Path] | None) -> dict[str, str]:
    """Return an environment in which a source tree and unpacked wheels are found."""
    folders = [ROOT / "tests", ROOT / "src", ROOT, *(paths or ())]
    before = os.environ.get("PYTHONPATH")
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([*map(str, folders), *([before] if before else [])]),
        # jax would take most of the device's memory from the others.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }


def unpacked(wheels: Path, folder: Path) -> list[Path]:
    """Unpack wheels, without pip, and return where."""
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return [folder]


def _run_part(
    ledger: Ledger, command: Sequence[str], environment: Mapping[str, str], log: Path
) -> None:
    """Run a part, and start it again behind each step that ends its process."""
    log.unlink(missing_ok=True)
    while True:
        before = ledger.known()
        status, told = _process(ledger, command, environment, log)
        open_steps = ledger.unfinished()
        if status is None:
            for step in open_steps or ["the part starts"]:
                ledger.end(step, {"status": CUT_OFF, "reason": "its time was up"})
            return
        # Only a crash leaves a step unfinished.
        for step in open_steps:
            reason = f"the process ended with {_ending(status)}: {told}"
            ledger.end(step, {"status": WRONG, "wrong": reason})
        if not ledger.rows():
            reason = f"the part did not start ({_ending(status)}): {told}"
            ledger.end("the part starts", {"status": WRONG, "wrong": reason})
        goes_on = bool(open_steps) or status == AGAIN
        if not goes_on or ledger.known() == before or ledger.left() <= 0:
            return


def _process(
    ledger: Ledger, command: Sequence[str], environment: Mapping[str, str], log: Path
) -> tuple[int | None, str]:
    """Run a process until its time is up; return its exit status, None if that was the end."""
    with log.open("ab") as file:
        start = file.tell()
        process = subprocess.Popen(
            command,
            env={**environment, **ledger.environment()},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            # Its own children are stopped with it.
            start_new_session=True,
        )
        try:
            status = process.wait(max(0.0, ledger.left() + _SPARE))
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    with log.open("rb") as file:
        file.seek(start)
        return status, file.read().decode(errors="replace").strip()[-_SHOWN:]


def _ending(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit status {status}"


def has_failed(found: Mapping[str, Ledger]) -> bool:
    """Tell whether something is wrong, or nothing was right because nothing ran."""
    statuses = {row["status"] for ledger in found.values() for row in ledger.rows()}
    return WRONG in statuses or RIGHT not in statuses
