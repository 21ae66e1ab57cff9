"""Run recorded launches again under a sanitizer: replay.py FOLDER --sanitize thread|address.

Each CUDA thread is a thread of the operating system, and each array has memory of exactly its size.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SANITIZERS = {"thread": "thread", "address": "address,undefined"}
# -O1 keeps line numbers distinct in reports. The sums must be those that were recorded.
FLAGS = (
    *("-std=c++17", "-O1", "-g", "-w", "-ffp-contract=off", "-fno-omit-frame-pointer", "-pthread"),
    *("-fno-sanitize-recover=all", "-DSHIM_THREADS", f"-I{HERE}"),
)


def build(folder: Path, sanitizer: str, extra: list[str], out: Path) -> str:
    """Build the program for one text and its options; return the compiler's message if it fails."""
    text = folder / "kernel.cpp"
    options = (folder / "options.txt").read_text().splitlines()
    flags = [*FLAGS, f"-fsanitize={SANITIZERS[sanitizer]}", f'-DSHIM_TEXT="{text.resolve()}"']
    command = ["g++", *flags, *options, *extra, "-o", str(out), str(HERE / "replay.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    return done.stderr if done.returncode else ""


def environment() -> dict[str, str]:
    """Return the environment in which every finding ends the program."""
    ours = {
        "TSAN_OPTIONS": "halt_on_error=1 exitcode=66 report_thread_leaks=0",
        "ASAN_OPTIONS": "halt_on_error=1 detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1 halt_on_error=1",
    }
    return {**os.environ, **ours}


def launcher() -> list[str]:
    """Return the command that starts the program: ThreadSanitizer needs fixed addresses."""
    try:
        spread = int(Path("/proc/sys/vm/mmap_rnd_bits").read_text())
    except OSError:
        spread = 0
    # With more random bits, GCC 12's ThreadSanitizer sometimes gives up at the start.
    return ["setarch", platform.machine(), "-R"] if spread > 28 else []


def legible(report: str) -> str:
    """Drop the standard library's frames from a sanitizer's report."""
    passed = re.compile(r"^ +#\d+ .*(/include/c\+\+/|libstdc\+\+)")
    return "\n".join(line for line in report.splitlines() if not passed.search(line))


def run(program: Path, launches: list[Path], sanitizer: str, timeout: float) -> list[str]:
    """Run all launches and return what was found, going on after each that ended the program."""
    start = launcher() if sanitizer == "thread" else []
    findings, waiting = [], [str(path) for path in launches]
    while waiting:
        command = [*start, str(program), *waiting]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=timeout,
                env=environment(),
                check=False,
            )
            code, said, told = done.returncode, done.stdout, done.stderr
        except subprocess.TimeoutExpired as error:
            code, told = -1, f"it had not ended after {timeout} s"
            said = error.stdout.decode() if error.stdout else ""
        lines = said.splitlines()
        findings += [line.removeprefix("differs ") for line in lines if line[:8] == "differs "]
        if code == 0:
            break
        unfinished = (i for i, path in enumerate(waiting) if f"ran {path}" not in lines)
        place = next(unfinished, len(waiting) - 1)
        findings.append(f"{waiting[place]} (exit status {code}):\n{legible(told)}")
        waiting = waiting[place + 1 :]
    return findings


def main(arguments: list[str] | None = None) -> int:
    """Build and run everything; the exit status is 0 where nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="what was recorded")
    parser.add_argument("--sanitize", choices=SANITIZERS, required=True)
    parser.add_argument("--strict", action="store_true", help="ask readers for a fence as well")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for a text's launches")
    given = parser.parse_args(arguments)
    extra = ["-DSHIM_STRICT"] if given.strict else []
    texts = sorted(path.parent for path in given.folder.glob("*/kernel.cpp"))
    findings, count = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        for folder in texts:
            program = Path(scratch) / folder.name
            launches = sorted(folder.glob("*.launch"))
            failed = build(folder, given.sanitize, extra, program)
            if failed:
                findings.append(f"{folder} does not compile:\n{failed}")
                continue
            findings += run(program, launches, given.sanitize, given.timeout)
            count += len(launches)
            program.unlink()
    if not texts:
        findings.append(f"{given.folder} holds no recording; record launches to it first")
    print(*findings, sep="\n", end="\n" if findings else "")
    under = SANITIZERS[given.sanitize]
    print(f"{count} launches of {len(texts)} texts under {under}: {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
