"""`polyce score`: files of every kind, what is printed and written, and what goes wrong."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import polyce
from polyce.__main__ import main
from polyce.arrays import find
from polyce.score import blocks, command, passes

RNG = np.random.default_rng(4)
LABELS = RNG.integers(6, size=200)
LOGITS = (RNG.normal(size=(200, 6)) + 2.0 * (np.arange(6) == LABELS[:, None])).astype(np.float32)
NUMPY = pytest.mark.only("numpy")
OTHERS = pytest.mark.only("score")
# This polyce, in processes that start in another folder.
PATHS = [str(Path(polyce.__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, PATHS))}


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write both arrays into a folder, and cut what is read into several blocks."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 4 * 6 * 64)
    monkeypatch.setattr(passes, "TOGETHER", 2)
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", LOGITS)
    np.save("y.npy", LABELS)
    return tmp_path


def figures(*arguments: str) -> dict[str, Any]:
    """Run the command and return the figures that it writes."""
    assert main(["score", *arguments, "--json", "found.json"]) == 0
    return json.loads(Path("found.json").read_text())


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command, which must fail with one line, and return that."""
    assert main(["score", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line.removeprefix("polyce score: ")


def in_json(found: polyce.Score) -> dict[str, Any]:
    return {name: None if value != value else value for name, value in found.as_dict().items()}


# Files that are read


@NUMPY
def test_npy_and_npz(paths: Path) -> None:
    wanted = in_json(polyce.score(LOGITS, LABELS))
    assert figures("x.npy", "y.npy") == pytest.approx(wanted)
    np.save("fortran.npy", np.asfortranarray(LOGITS.astype(">f4")))
    assert figures("fortran.npy", "y.npy") == pytest.approx(wanted)
    np.savez_compressed("both.npz", logits=LOGITS, labels=LABELS.astype(np.uint8))
    assert figures("both.npz", "both.npz") == wanted
    np.savez("named.npz", a=LOGITS, b=LABELS)
    assert figures("named.npz:a", "named.npz:b") == wanted
    np.savez("single.npz", LOGITS)
    assert figures("single.npz", "y.npy") == wanted


@OTHERS
def test_safetensors_and_zarr(paths: Path) -> None:
    import zarr
    from ml_dtypes import bfloat16
    from safetensors.numpy import save_file

    wanted = in_json(polyce.score(LOGITS, LABELS))
    rounded = LOGITS.astype(bfloat16)
    save_file({"logits": LOGITS, "labels": LABELS, "rounded": rounded}, "both.safetensors")
    assert figures("both.safetensors", "both.safetensors") == wanted
    found = figures("both.safetensors:rounded", "y.npy")
    assert found == in_json(polyce.score(rounded, LABELS))
    zarr.create_array("x.zarr", data=LOGITS, chunks=(50, 4))
    assert figures("x.zarr", "y.npy") == pytest.approx(wanted)
    zarr.save_group("both.zarr", logits=LOGITS, labels=LABELS)
    assert figures("both.zarr", "both.zarr") == pytest.approx(wanted)
    Path("cut.safetensors").write_bytes(Path("both.safetensors").read_bytes()[:3000])
    Path("no.zarr").mkdir()
    for name in ("cut.safetensors", "no.zarr"):
        with pytest.raises(ValueError, match=f"{name} must be"):
            command.files.open_array(name, "logits")


@NUMPY
def test_options_are_those_of_the_function(paths: Path) -> None:
    np.save("w.npy", np.arange(6.0))
    np.save("turned.npy", LOGITS.T)
    found = figures(
        *("turned.npy", "y.npy", "--axis", "0", "--ignore-index", "2", "--weights", "w.npy"),
        *("--temperature", "2", "--softcap", "9", "--bins", "4", "--by-class"),
    )
    wanted = polyce.score(
        LOGITS,
        LABELS,
        ignore_index=2,
        weight=np.arange(6.0),
        temperature=2.0,
        logit_softcap=9.0,
        bins=4,
        by_class=True,
    )
    table = found.pop("by_class")
    assert found == pytest.approx(in_json(wanted))
    assert [row["rows"] for row in table] == wanted.by_class["rows"].tolist()
    fitted = figures("x.npy", "y.npy", "--fit-temperature")
    assert fitted == pytest.approx(in_json(polyce.score(LOGITS, LABELS, fit_temperature=True)))


@NUMPY
def test_it_prints_the_record_and_writes_csv(
    paths: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["score", "x.npy", "y.npy", "--csv", "found.csv", "--by-class"]) == 0
    printed, wanted = capsys.readouterr(), polyce.score(LOGITS, LABELS)
    assert printed.err == ""  # without a terminal there is no progress
    assert printed.out.startswith(f"{wanted}\n\n    class       rows")
    with Path("found.csv").open(newline="") as file:
        ((row),) = csv.DictReader(file)
    assert {name: float(value) for name, value in row.items()} == pytest.approx(
        wanted.as_dict(), nan_ok=True
    )


@OTHERS
@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_it_draws(paths: Path, suffix: str) -> None:
    assert main(["score", "x.npy", "y.npy", "--plot", f"found.{suffix}"]) == 0
    start = Path(f"found.{suffix}").read_bytes()[:60]
    assert (b"<?xml" if suffix == "svg" else b"\x89PNG") in start


@OTHERS
def test_on_a_dask_cluster(paths: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from distributed import LocalCluster

    options = {"n_workers": 1, "threads_per_worker": 2, "processes": False}
    with LocalCluster(dashboard_address=None, **options) as cluster:
        address = cluster.scheduler_address
        found = figures(str(paths / "x.npy"), str(paths / "y.npy"), "--dask", address)
        np.savez("x.npz", LOGITS)
        capsys.readouterr()
        assert "workers can read in part" in fails(capsys, "x.npz", "y.npy", "--dask", address)
    assert found == in_json(polyce.score(LOGITS, LABELS))


@OTHERS
def test_on_a_terminal_it_shows_rows_a_second_and_each_pass(paths: Path) -> None:
    termios = pytest.importorskip("termios")
    terminal, inside = os.openpty()
    termios.tcsetwinsize(inside, (24, 100))
    done = subprocess.run(
        [sys.executable, "-m", "polyce", "score", "x.npy", "y.npy", "--fit-temperature"],
        stdout=subprocess.PIPE,
        stderr=inside,
        env=ENVIRONMENT,
        timeout=300,
        check=True,
    )
    os.close(inside)
    shown = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert "rows/s" in shown
    assert "pass 2" in shown
    assert done.stdout.startswith(b"rows           200\n")


# What goes wrong


@NUMPY
def test_rows_that_cannot_be_scored_are_named(
    paths: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logits, labels = LOGITS.copy(), LABELS.copy()
    logits[[130, 140], 3] = np.nan
    labels[170] = 6
    np.save("x.npy", logits)
    np.save("y.npy", labels)
    assert "got 6 at position (170,)" in fails(capsys, "x.npy", "y.npy")
    assert main(["score", "x.npy", "y.npy", "--validate", "off"]) == 0
    undefined, bad = capsys.readouterr().err.splitlines()
    assert undefined == (
        "polyce score: 2 rows have no softmax (nan, +inf or nothing but -inf), the first at "
        "(130,): left out of every figure"
    )
    assert "1 row has a label that is not a class, the first at (170,)" in bad


@NUMPY
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("none.npy y.npy", "there is no file none.npy"),
        ("x.npy x.npy", "target must hold class indices"),
        ("y.npy y.npy", "input must be real floating point"),
        ("x.npy short.npy", "there are 200 rows, but 199 labels"),
        ("empty.npy empty-y.npy", "input must have at least one row"),
        ("cut.npy y.npy", "cut.npy is cut short: float32 (200, 6) takes 4800 bytes, got 1800"),
        ("text.npy y.npy", "text.npy must hold an array as numpy.save writes it"),
        ("objects.npy y.npy", "objects.npy must hold numbers, got Python objects"),
        ("text.npz y.npy", "text.npz must be an archive of arrays"),
        ("two.npz y.npy", "two.npz has no array 'logits', got a, b; name one of them"),
        ("two.npz:c y.npy", "two.npz has no array 'c'"),
        ("x.txt y.npy", "x.txt must be named as one of .npy"),
        ("x.npy y.npy --json no/found.json", "No such file or directory: 'no/found.json'"),
        ("x.npy y.npy --csv x.npy", "x.npy must not be written over"),
        ("x.npy y.npy --temperature 0", "temperature must lie between"),
    ],
)
def test_bad_input_is_one_sentence(
    paths: Path, capsys: pytest.CaptureFixture[str], arguments: str, says: str
) -> None:
    np.save("short.npy", LABELS[1:])
    np.save("empty.npy", LOGITS[:0])
    np.save("empty-y.npy", LABELS[:0])
    np.savez("two.npz", a=LOGITS, b=LABELS)
    np.save("objects.npy", np.array([None]), allow_pickle=True)
    Path("cut.npy").write_bytes(Path("x.npy").read_bytes()[: 128 + 1800])
    for name in ("text.npy", "text.npz", "x.txt"):
        Path(name).write_text("no array")
    before = sorted(paths.iterdir())
    assert says in fails(capsys, *arguments.split())
    assert sorted(paths.iterdir()) == before


@NUMPY
def test_outputs_are_checked_before_anything_is_read(
    paths: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(*_: Any) -> None:
        raise AssertionError("a file was opened")

    monkeypatch.setattr(command.files, "open_array", unread)
    assert "Is a directory" in fails(capsys, "x.npy", "y.npy", "--json", str(paths))
    monkeypatch.setattr(find, "installed", lambda module: True)
    assert "--plot must end in" in fails(capsys, "x.npy", "y.npy", "--plot", "found.gif")


@NUMPY
@pytest.mark.parametrize(
    ("arguments", "library"),
    [
        ("x.safetensors y.npy", "safetensors"),
        ("x.zarr y.npy", "zarr"),
        ("x.npy y.npy --plot found.svg", "matplotlib"),
        ("x.npy y.npy --dask tcp://localhost:1", "distributed"),
    ],
)
def test_a_missing_library_is_named_with_the_command(
    paths: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
    library: str,
) -> None:
    Path("x.safetensors").touch()
    Path("x.zarr").touch()
    monkeypatch.setattr(find, "installed", lambda module: False)
    line = fails(capsys, *arguments.split())
    package = "distributed" if library == "distributed" else "'polyce[score]'"
    assert line.endswith(f"needs {library}, which is not installed: pip install {package}")


@NUMPY
def test_interrupted_it_tells_what_it_has(
    paths: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = passes.run

    def stopped(*given: Any) -> Any:
        for number, running in enumerate(whole(*given)):
            if number == 1:
                raise KeyboardInterrupt
            yield running

    monkeypatch.setattr(passes, "run", stopped)
    assert main(["score", "x.npy", "y.npy", "--json", "found.json"]) == 130
    printed = capsys.readouterr()
    assert printed.err.startswith("polyce score: interrupted after 128 of 200 rows; ")
    assert printed.out == f"{polyce.score(LOGITS[:128], LABELS[:128])}\n"
    assert not Path("found.json").exists()


@NUMPY
def test_a_closed_pipe_ends_it_silently(paths: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "polyce", "score", "x.npy", "y.npy"],
        stdout=writing,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        timeout=300,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


@NUMPY
@pytest.mark.slow
def test_memory_is_that_of_a_block(tmp_path: Path) -> None:
    """A file of holes, which takes no room on the disk."""
    logits = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (16384, 16384))
    del logits
    np.save(tmp_path / "y.npy", np.zeros(16384, np.int64))
    code = (
        "from polyce.__main__ import main; main()\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc")
    done = subprocess.run(
        [sys.executable, "-c", code, "score", "x.npy", "y.npy"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    kilobytes = int(done.stdout.split("VmHWM:")[1].split()[0])
    assert kilobytes < 300_000
