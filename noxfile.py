# /// script
# dependencies = ["nox>=2025.5.1"]
# ///
"""The checks of polyce: `nox -l` lists them, plain `nox` runs the starred, `nox -t ci` the rest."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.5.1"
# pip, not uv: both name the same packages, but the pinned CPU wheel of torch is found by pip alone
# where pip is configured to look for it.
nox.options.default_venv_backend = "virtualenv"
# What every change must pass before it is shown to others.
TIER_1 = ("numpy", "strict", "torch", "jax-x32", "dask", "cupy-emulated")
# The plain run leaves the slow tests of these to `nox -t ci`.
SLOW = ("numpy", "torch", "jax-x32", "dask", "cupy-emulated")
nox.options.sessions = ["lint", "types", "build", *(f"tests({name})" for name in TIER_1), "docs"]
# What else must hold; and variants so similar that they run only with all cases of all tests.
CI, FULL = ["ci"], ["full"]
STRICT = nox.param("strict", id="strict", tags=FULL)
# Those of other torch versions, and a newer one.
TRITON = ("3.6.0", "3.9.0")

PYPROJECT = nox.project.load_toml("pyproject.toml")

# backend: the dependency group that installs its library, and the environment it is tested in
BACKENDS: dict[str, tuple[str, dict[str, str]]] = {
    "numpy": ("numpy", {}),
    "strict": ("strict", {}),
    "torch": ("torch", {}),
    # jax compiles each case anew, so it takes only the few cases that stand for the grid.
    "jax-x32": ("jax", {"JAX_ENABLE_X64": "0", "POLYCE_FEW": "1"}),
    "jax-x64": ("jax", {"JAX_ENABLE_X64": "1", "POLYCE_FEW": "1"}),
    "jax-compile": ("jax-compile", {}),
    "dask": ("dask", {}),
    "cupy-emulated": ("numpy", {}),
    "cupy-compile": ("cupy-compile", {}),
    "cupy-dispatch": ("cupy-dispatch", {}),
    "ndonnx": ("ndonnx", {}),
    "cubed": ("cubed", {}),
    "mlx": ("mlx", {}),
    "mparray": ("mparray", {}),
    "marray": ("marray", {}),
    "refused": ("refused", {}),
    "triton": ("triton", {}),
    "triton-compile": ("triton", {}),
}

# Checks the docstrings behind `polyce.__all__` against numpydoc's rules, except those in its
# arguments. (`numpydoc lint` would check the inner functions of a file too.)
PUBLIC_DOCSTRINGS = """
import sys
import polyce
from numpydoc.validate import validate
findings = [
    f"polyce.{name}: {code} {message}"
    for name in polyce.__all__
    if callable(getattr(polyce, name))
    for code, message in validate(f"polyce.{name}")["errors"]
    if code not in sys.argv
]
sys.exit("\\n".join(findings) or 0)
"""

# Writes the cases for the program that runs the kernels without Python: a few that stand for the
# grid, or all of it.
DUMP = """
import sys
from polyce.testing import cases, dump
from polyce.testing.selection import representative
folder, everything = sys.argv[1:]
dump(folder, cases() if everything == "1" else representative(cases(), 100))
"""

# builds of this program: what it is built with; threads do the same on every instruction set
SANITIZERS = {
    "address": ("-DPOLYCE_SANITIZE=address,undefined",),
    "thread": ("-DPOLYCE_SANITIZE=thread", "-DPOLYCE_BASELINE=ON"),
}

STUB = Path("src/polyce/_core.pyi")
NEEDED = {"polyce/py.typed", "polyce/_core.pyi", "polyce/data/digits.npz"}

# pip would compile all of torch's modules, which takes minutes; Python compiles those it imports.
QUICKLY = "--no-compile"

# The sources of a wheel.
SOURCES = ("src", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE")

_earlier: list[str] = []


def wheel(session: nox.Session) -> str:
    """Return the path of the wheel for the session's Python, built when first asked for."""
    version = session.python or f"{sys.version_info.major}.{sys.version_info.minor}"
    # From 3.12 on all share the stable ABI.
    kind = "cp311" if version == "3.11" else "abi3"
    out = Path(session.cache_dir) / "dist" / kind / fingerprint(Path())
    if not any(out.glob("*.whl")):
        shutil.rmtree(out.parent, ignore_errors=True)
        pip_wheel(session, ".", out)
    built = next(out.glob("*.whl"), None)
    if built is None:
        session.error("no wheel was built: `nox -R` skips that, `nox -r` does not")
    if not any(map(is_core, contents(built))):
        shutil.rmtree(out)
        # pip would hide errors in the compiled part and build a wheel without it.
        session.error("the wheel lacks polyce._core: `pip wheel -v .` tells why")
    return str(built)


def fingerprint(folder: Path) -> str:
    """Return a hash of the sources in a folder, by names and contents."""
    found = hashlib.sha256()
    for name in SOURCES:
        path = folder / name
        files = path.rglob("*") if path.is_dir() else [path]
        for file in sorted(file for file in files if file.is_file()):
            # Files that an editable install, or running from the checkout, leaves there.
            if file.suffix not in (".pyc", ".so", ".pyd"):
                found.update(f"{file.relative_to(folder)} {file.stat().st_size} ".encode())
                found.update(file.read_bytes())
    return found.hexdigest()[:16]


def pip_wheel(session: nox.Session, source: str | Path, out: Path, **env: str) -> None:
    """Build a wheel of `source` into `out`, with the pinned build tools."""
    pins = Path(session.cache_dir) / "build-tools.txt"
    pins.parent.mkdir(parents=True, exist_ok=True)
    pins.write_text("\n".join(nox.project.dependency_groups(PYPROJECT, "native")))
    env["PIP_BUILD_CONSTRAINT"] = str(pins.resolve())
    command = ("python", "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(out), str(source))
    session.run_install(*command, silent=True, env=env)


def is_core(name: str) -> bool:
    """Tell whether a file in a wheel is the compiled part."""
    return re.fullmatch(r"polyce/_core\..*(so|pyd)", name) is not None


def contents(path: str | Path) -> dict[str, bytes]:
    """Return the names and contents of the files in a wheel."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def forget_earlier(session: nox.Session) -> None:
    """Delete the environments of this run's earlier sessions, except under `nox -r`.

    Together they would take 15 GB.
    """
    while _earlier:
        shutil.rmtree(_earlier.pop(), ignore_errors=True)
    environment = session.virtualenv
    if not environment.reuse_existing:
        _earlier.append(environment.location)


def install(session: nox.Session, *groups: str) -> None:
    """Install the wheel and dependency groups, and nothing from the checkout itself."""
    forget_earlier(session)
    built = wheel(session)
    requirements = nox.project.dependency_groups(PYPROJECT, *groups)
    session.install(QUICKLY, built, *dict.fromkeys(requirements))  # groups overlap
    # In a reused environment (`nox -r`) pip would keep the older wheel of the same version.
    session.install(QUICKLY, "--force-reinstall", "--no-deps", built)


def run_tests(session: nox.Session, backend: str, *options: str, **env: str) -> None:
    """Run the tests of one backend; what follows `--` on nox's command line goes to pytest."""
    env |= BACKENDS[backend][1] if backend in BACKENDS else {}
    # Keeps caches out of the home folder.
    folder = Path(session.create_tmp()).resolve()
    env["TRITON_CACHE_DIR"] = str(folder / "triton")
    env["POLYCE_EMULATION_CACHE"] = str(folder / "emulation")
    # Large exact answers, which all runs share and which take longer than the runs.
    env["POLYCE_ANSWERS"] = str(Path(session.cache_dir).resolve() / "answers")
    # Two processes, as any machine has two cores today. A `-n` after `--` overrides this one.
    command = ("pytest", f"--backend={backend}", "-n", "2", *options, *session.posargs)
    session.run(*command, env=env)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format and public docstrings."""
    requirements = nox.project.dependency_groups(PYPROJECT, "lint")
    session.install(QUICKLY, *PYPROJECT["project"]["dependencies"], *requirements)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    left_out = PYPROJECT["tool"]["numpydoc_validation"]["checks"]
    # Not the wheel, which takes minutes to build.
    session.run("python", "-c", PUBLIC_DOCSTRINGS, *left_out, env={"PYTHONPATH": "src"})


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of the package strictly, and those of a caller of the installed package."""
    install(session, "types")
    session.run("mypy")
    session.run("mypy", "tests/typing/consumer.py")
    if write_stub(session, Path(session.create_tmp())) != STUB.read_text(encoding="utf-8"):
        session.error(f"{STUB} is not what the core looks like: `nox -s stub` writes it anew")


@nox.session
def stub(session: nox.Session) -> None:
    """Rewrite the types of the compiled core, src/polyce/_core.pyi."""
    install(session, "types")
    write_stub(session, STUB.parent)


def write_stub(session: nox.Session, folder: Path) -> str:
    """Write the stub of the installed core into a folder, and return its text."""
    path = folder / STUB.name
    session.run("python", "-m", "nanobind.stubgen", "-q", "-m", "polyce._core", "-o", str(path))
    return path.read_text(encoding="utf-8")


@nox.session
def build(session: nox.Session) -> None:
    """Check wheel and sdist, and run the demo from the wheel, with its core and without."""
    install(session)
    session.run("python", "-m", "pip", "check")
    with tempfile.TemporaryDirectory() as elsewhere:
        with session.chdir(elsewhere):
            session.run("polyce")
            session.run("python", "-m", "polyce", "demo")
        # Until now the environment must hold only the wheel and what it requires.
        session.install(*nox.project.dependency_groups(PYPROJECT, "build"))
        session.run("python", "-m", "build", "--sdist", "--outdir", elsewhere, silent=True)
        (sdist,) = Path(elsewhere).glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            archive.extractall(elsewhere, filter="data")
        (unpacked,) = (path for path in Path(elsewhere).iterdir() if path.is_dir())
        # The core takes minutes to compile, so it is not built again from the same sources.
        if fingerprint(unpacked) != fingerprint(Path()):
            session.error(f"the sdist has other files than the checkout in {SOURCES}")
        check_without_core(session, unpacked, Path(elsewhere) / "pure")
        check_required_core(session, unpacked, Path(elsewhere) / "none")
    if missing := NEEDED - contents(wheel(session)).keys():
        session.error(f"the wheel lacks {sorted(missing)}")


def check_without_core(session: nox.Session, source: Path, folder: Path) -> None:
    """Check that a build without a compiler is the same polyce without its core, and runs."""
    pip_wheel(session, source, folder, POLYCE_BUILD_CORE="0")
    (pure,) = folder.glob("*.whl")
    if not pure.name.endswith("-py3-none-any.whl"):
        session.error(f"the wheel without the core is {pure.name}")
    # RECORD has the core's checksum, WHEEL says for which Pythons it is.
    ours, theirs = (
        {n: text for n, text in contents(path).items() if not n.endswith(("/RECORD", "/WHEEL"))}
        for path in (wheel(session), pure)
    )
    if differing := {n for n, _ in ours.items() ^ theirs.items() if not is_core(n)}:
        session.error(f"besides the core, the wheel without it differs in {sorted(differing)}")
    session.install("--force-reinstall", "--no-deps", str(pure))
    with session.chdir(folder):
        session.run("python", "-m", "polyce", "demo")


def check_required_core(session: nox.Session, source: Path, folder: Path) -> None:
    """Check that a build whose core is required fails without a compiler."""
    try:
        pip_wheel(session, source, folder, POLYCE_REQUIRE_CORE="1", CXX="false")
    except nox.command.CommandFailed:
        session.log("so it should: there is no compiler, and the core is required")
    else:
        session.error("with POLYCE_REQUIRE_CORE=1 a wheel was built without a compiler")


@nox.session
@nox.parametrize("python", [nox.param(each, id=each, tags=CI) for each in ("3.11", "3.12", "3.13")])
def wheels(session: nox.Session) -> None:
    """Make the wheel one for any Linux, and test it where there is no compiler."""
    if sys.platform != "linux":
        session.skip("auditwheel knows the wheels of Linux alone")
    forget_earlier(session)
    built = wheel(session)
    session.install(QUICKLY, *nox.project.dependency_groups(PYPROJECT, "wheels"))
    folder = Path(session.create_tmp()).resolve()
    repaired, clean = folder / "repaired", folder / "clean"
    shutil.rmtree(repaired, ignore_errors=True)
    session.run("auditwheel", "repair", "--wheel-dir", str(repaired), built)
    (found,) = repaired.glob("*-manylinux*.whl")
    session.run("python", "-m", "venv", "--clear", str(clean))
    # As cibuildwheel does for the other platforms.
    asked = PYPROJECT["tool"]["cibuildwheel"]
    groups = nox.project.dependency_groups(PYPROJECT, *asked["test-groups"])
    pip = (str(clean / "bin" / "python"), "-m", "pip", "install", "-q", "--only-binary", ":all:")
    session.run_install(*pip, QUICKLY, str(found), *groups, external=True)
    command = asked["test-command"].replace("{project}", str(Path.cwd()))
    # nox would put the session's own programs first.
    alone = ("/usr/bin/env", f"PATH={clean / 'bin'}", "/bin/sh", "-c", command)
    with session.chdir(folder):
        session.run(*alone, external=True)


@nox.session(tags=CI)
def sanitize(session: nox.Session) -> None:
    """Run the compiled kernels without Python, under three sanitizers; in full without them too."""
    install(session, "numpy", "native")
    folder = Path(session.create_tmp())
    cases = folder / "cases"
    shutil.rmtree(cases, ignore_errors=True)
    full = os.environ.get("POLYCE_FULL", "0")
    session.run("python", "-c", DUMP, str(cases), full)
    builds = SANITIZERS | ({"plain": ()} if full == "1" else {})
    for name, options in builds.items():
        built = folder / name
        command = ("cmake", "-G", "Ninja", "-S", ".", "-B", str(built), "-DPOLYCE_DRIVER=ON")
        session.run(*command, *options, silent=True)
        session.run("cmake", "--build", str(built), silent=True)
        session.run(str(built / "polyce_driver"), str(cases), external=True)


def tags(backend: str) -> list[str]:
    """Return the tags of a backend's tests."""
    if backend in TIER_1:
        return []
    # It downloads 400 MB.
    return FULL if backend == "jax-compile" else CI


@nox.session
@nox.parametrize(
    "backend",
    [nox.param(name, id=name, tags=tags(name)) for name in BACKENDS],
)
def tests(session: nox.Session, backend: str) -> None:
    """Run the tests on one array library."""
    install(session, BACKENDS[backend][0])
    # Tests named after `--` run, slow or not.
    leaves_slow = backend in SLOW and not session.posargs
    run_tests(session, backend, *(["--slow=without"] if leaves_slow else []))


@nox.session(tags=CI)
@nox.parametrize("backend", [nox.param(name, id=name) for name in SLOW])
def slow(session: nox.Session, backend: str) -> None:
    """Run the slow tests on a library of the first tier."""
    install(session, BACKENDS[backend][0])
    run_tests(session, backend, "--slow=only")


@nox.session
@nox.parametrize(
    ("python", "backend"),
    [
        nox.param(*other, id="-".join(other), tags=CI if other == ("3.13", "numpy") else FULL)
        for other in itertools.product(("3.12", "3.13"), ("numpy", "strict"))
    ],
)
def tests_other(session: nox.Session, backend: str) -> None:
    """Run the tests on another Python, with a few cases that stand for the grid."""
    install(session, BACKENDS[backend][0])
    run_tests(session, backend, POLYCE_FEW="1")


@nox.session(tags=FULL)
@nox.parametrize("version", [nox.param(one, id=one) for one in TRITON])
def triton_versions(session: nox.Session, version: str) -> None:
    """Compile the kernels for GPUs by another Triton than the one that the group pins."""
    install(session, "triton")
    session.install(QUICKLY, "--no-deps", f"triton=={version}")
    run_tests(session, "triton-compile")


@nox.session(python="3.11")
@nox.parametrize("backend", [nox.param("numpy", id="numpy", tags=CI), STRICT])
def minimums(session: nox.Session, backend: str) -> None:
    """Run the tests on the oldest Python, NumPy and array-api-compat that polyce supports."""
    install(session, "minimums")
    run_tests(session, backend, POLYCE_FEW="1")


@nox.session
def docs(session: nox.Session) -> None:
    """Run every example, the tests of scores against others, and build docs/_build/html."""
    # Every module is imported, so the libraries that some modules need must be installed; CuPy has
    # a stand-in.
    install(session, "docs", "triton")
    env = {"PYTHONPATH": str(Path("tests/emulation").resolve())}
    doctest = ("pytest", "-n", "2", "--doctest-modules", "--pyargs", "polyce")
    session.run(*doctest, *session.posargs, env=env)
    # Here, since no other session has what scores are read with and compared with.
    run_tests(session, "score", "tests/test_score.py", "tests/test_score_command.py")
    build = ("sphinx-build", "-j", "2", "-W", "--keep-going", "-q", "-d", "docs/_build/doctrees")
    # -E reads all pages again, since many are made from the code.
    session.run(*build, "-E", "-b", "doctest", "docs", "docs/_build/doctest")
    session.run(*build, "-b", "html", "docs", "docs/_build/html")


@nox.session
def bench(session: nox.Session) -> None:
    """Time polyce on a CPU, draw the results, and measure errors; arguments follow `--`.

    `--reference` times the reference on NumPy and the dask path instead.
    """
    install(session, "bench")
    arguments = list(session.posargs)
    if "--reference" in arguments:
        arguments.remove("--reference")
        session.run("python", "-m", "benchmarks.cpu.reference", *arguments)
        return
    # Other arguments name shapes of logits.
    quick = [argument for argument in arguments if argument == "--quick"]
    for name, given in (("cpu", arguments), ("linear", quick)):
        command = ("python", "-m", f"benchmarks.{name}")
        results = str(Path(session.create_tmp()) / f"{name}.json")
        session.run(*command, "run", "--out", results, *given)
        session.run(*command, "table", results)
        session.run(*command, "plot", results, "--out", "docs/_static")
    session.run("python", "-m", "benchmarks.cpu.accuracy")


@nox.session
def gpu(session: nox.Session) -> None:
    """Test and time polyce on a CUDA or ROCm device, and fail where there is none.

    Arguments go to the benchmark, which writes its results into benchmarks/results.
    """
    install(session, "cupy", "triton")
    code = "import torch; print(torch.cuda.is_available(), torch.version.hip is not None)"
    found = str(session.run("python", "-c", code, silent=True)).split()
    if found[:1] != ["True"]:
        session.error("torch finds no CUDA or ROCm device")
    timed = ("python", "-m", "benchmarks.gpu", *session.posargs)
    commands = [("pytest", "--backend=torch-cuda"), timed]
    # The group installs CuPy for CUDA.
    if found[1:] == ["False"]:
        code = "import cupy; print(cupy.cuda.is_available())"
        if session.run("python", "-c", code, silent=True) != "True\n":
            session.error("cupy finds no CUDA device")
        commands.insert(0, ("pytest", "--backend=cupy"))
        commands.append((*timed, "--library", "cupy"))
    # A device is rarely available, so a failure of one of these does not stop the others.
    failed = []
    for command in commands:
        try:
            session.run(*command)
        except nox.command.CommandFailed:
            failed.append(" ".join(command))
    if failed:
        session.error(f"failed: {', '.join(failed)}")


@nox.session(python=False)
def full(session: nox.Session) -> None:
    """Run every session of tests and checks, each test with all of its cases (POLYCE_FULL=1)."""
    for sessions in ((), ("-t", *CI, *FULL)):
        session.run(sys.executable, "-m", "nox", *sessions, env={"POLYCE_FULL": "1"}, external=True)


if __name__ == "__main__":
    nox.main()
