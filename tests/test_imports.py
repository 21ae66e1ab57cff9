"""What importing polyce loads, its public names, and rules that its source keeps."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import polyce

PACKAGE = Path(polyce.__file__).parent
NUMPY = pytest.mark.only("numpy")
LIBRARIES = (
    *("torch", "jax", "jaxlib", "dask", "cupy", "array_api_strict", "ml_dtypes"),
    *("ndonnx", "onnx", "cubed", "mlx", "mparray", "mpmath", "marray"),
)

ARRAYS = """
import numpy as np
logits = np.array([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]], dtype=np.float32)
labels = np.array([2, 0])
probabilities = np.full((2, 3), 1 / 3, dtype=np.float32)
"""
NUMPY_CALLS = f"""{ARRAYS}
import polyce
for target in (labels, probabilities):
    polyce.cross_entropy(logits, target)
    polyce.cross_entropy_with_grad(logits, target, np.ones(3), label_smoothing=0.1)
    polyce.CrossEntropyLoss()(logits, target)
polyce.NLLLoss()(polyce.log_softmax(logits), labels)
"""
STEPS = {
    "import": "import polyce",
    "numpy-calls": NUMPY_CALLS,
    "explain": f"{ARRAYS}\nimport polyce; print(polyce.explain(logits, labels))",
    "show_versions": "import polyce; polyce.show_versions()",
    "testing": "import polyce.testing; polyce.testing.check_implementation("
    "None, groups=['cotangent'], dtypes=['float32'])",
}


def loaded(code: str) -> set[str]:
    """Return the top-level modules that are loaded after running code in a fresh interpreter."""
    code += "\nimport sys\nprint(*{name.partition('.')[0] for name in sys.modules})"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return set(done.stdout.splitlines()[-1].split())


@NUMPY
@pytest.mark.parametrize("step", STEPS)
def test_nothing_on_numpy_imports_another_array_library(step: str) -> None:
    found = loaded(STEPS[step])
    assert {"polyce", "numpy"} <= found
    assert not found.intersection(LIBRARIES)


@NUMPY
def test_calls_with_numpy_arrays_do_without_array_api_compat() -> None:
    """array-api-compat's wrapper of NumPy takes a tenth of a second at its first use."""
    assert "array_api_compat" not in loaded(NUMPY_CALLS)


@NUMPY
def test_importing_polyce_leaves_its_tools_alone() -> None:
    code = "import polyce, sys; print(*(name for name in sys.modules if name[:7] == 'polyce.'))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    modules = set(done.stdout.split())
    assert "polyce.functional" in modules
    tools = {"polyce.testing", "polyce.demo", "polyce.graphs.torch_rows", "polyce.graphs.jax_rows"}
    tools |= {"polyce.score.passes", "polyce.score.command"}
    assert not modules & tools


@pytest.mark.only("torch")
def test_calls_with_torch_tensors_import_no_third_library() -> None:
    code = f"""{ARRAYS}
import torch
import polyce
logits = torch.tensor(logits, requires_grad=True)
labels = torch.tensor(labels)
polyce.cross_entropy(logits, labels).backward()
polyce.cross_entropy_with_grad(logits, labels)
polyce.explain(logits, labels)
import sys
# What only torch.compile or the modules need is not imported.
assert not {"polyce.implementations.torch_ops", "polyce.torch"} & sys.modules.keys()
"""
    found = loaded(code)
    assert {"polyce", "torch"} <= found
    assert not found.intersection(LIBRARIES) - {"torch"}


# Public names


@NUMPY
@pytest.mark.parametrize("name", polyce.__all__)
def test_public_names_exist_and_have_a_docstring(name: str) -> None:
    value = getattr(polyce, name)
    if callable(value):
        assert inspect.getdoc(value)
        assert value.__doc__
        summary = value.__doc__.strip().splitlines()[0]
        assert summary.endswith("."), summary


@NUMPY
def test_all_is_sorted_and_lists_the_functions_of_the_package() -> None:
    assert sorted(polyce.__all__) == polyce.__all__
    functions = {
        name
        for name, value in vars(polyce).items()
        if not name.startswith("_") and (inspect.isfunction(value) or inspect.isclass(value))
    }
    assert functions <= set(polyce.__all__)


@NUMPY
def test_dir_lists_the_public_names() -> None:
    assert dir(polyce) == polyce.__all__


@NUMPY
def test_the_package_is_marked_as_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


@NUMPY
def test_the_version_is_that_of_the_installed_distribution() -> None:
    numbers = polyce.__version__.split(".")
    assert len(numbers) == 3
    assert all(number.isdecimal() for number in numbers)
    # A checkout on sys.path is not an installed distribution.
    for distribution in importlib.metadata.distributions(name="polyce"):
        assert distribution.version == polyce.__version__


# The source


@functools.cache
def parsed() -> dict[str, ast.Module]:
    """Parse the files of the package."""
    return {
        str(path.relative_to(PACKAGE)): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def source(*, testing: bool) -> dict[str, ast.Module]:
    """Return the files of the package, with those of polyce.testing only if asked for."""
    return {
        name: tree
        for name, tree in parsed().items()
        if testing or "testing" not in Path(name).parts
    }


@NUMPY
def test_no_assert_statement_outside_testing() -> None:
    """`python -O` drops them."""
    for name, tree in source(testing=False).items():
        found = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
        assert not found, f"{name}: assert in lines {found}"


@NUMPY
def test_no_exception_is_caught_wholesale_outside_testing() -> None:
    broad = {"Exception", "BaseException"}
    for name, tree in source(testing=False).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{name}:{node.lineno}: bare except"
                caught = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
                assert not caught & broad, f"{name}:{node.lineno}: catches {caught}"


@NUMPY
def test_every_file_has_a_docstring_and_at_most_400_lines() -> None:
    for name, tree in source(testing=True).items():
        assert ast.get_docstring(tree), name
        lines = (PACKAGE / name).read_text(encoding="utf-8").count("\n")
        assert lines <= 400, f"{name}: {lines} lines"


CACHES = {"lru_cache", "cache", "cached_property", "contextvars", "ContextVar"}


@NUMPY
def test_nothing_on_the_way_of_a_call_is_cached_or_a_context_variable() -> None:
    """torch.compile cannot trace context variables, and warns of lru_cache.

    The context variable of `use` is hidden from it; test_use.py compiles whole calls.
    """
    way = source(testing=False)
    for tool in ("explain.py", "__main__.py", "demo.py"):
        del way[tool]
    assert {"functional.py", "formula/rows.py", "graphs/torch_rows.py"} <= way.keys()
    for name, tree in way.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            else:
                names = {getattr(node, "attr", None), getattr(node, "id", None)}
            if name == "implementations/registry.py":
                names -= {"contextvars", "ContextVar"}
            assert not names & CACHES, f"{name}:{getattr(node, 'lineno', '?')}: {names & CACHES}"


# The rooms, from the bottom up: a room imports from those below it, and from no others.
FLOORS = (
    {"version", "arrays"},
    {"call"},
    {"formula"},
    {"graphs"},
    {"implementations"},
    {"sharded"},
    {"functional", "linear"},
    {"loss", "values", "score"},
    {"explain", "torch"},
    {"polyce"},
    {"demo", "testing"},
    {"__main__"},
)


def house() -> dict[str, set[str]]:
    """Map each file of the package to those it imports, in functions and for types too."""
    trees = {
        name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): tree
        for name, tree in source(testing=True).items()
    }
    trees["polyce"] = trees.pop("__init__")
    is_package = {name for name in trees if any(other.startswith(f"{name}.") for other in trees)}
    found: dict[str, set[str]] = {}
    for name, tree in trees.items():
        steps = name.split(".") if name in is_package else name.split(".")[:-1]
        named: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                own = [*(["polyce", *steps[: len(steps) - node.level + 1]] if node.level else [])]
                base = ".".join([*own, *([node.module] if node.module else [])])
                named |= {f"{base}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
                named |= {part.value for part in node.args if isinstance(part, ast.Constant)}
        inside = {
            other.removeprefix("polyce.") for other in named if f"{other}.".startswith("polyce.")
        }
        # For a name defined in a file, the file.
        inside |= {other.rpartition(".")[0] for other in inside}
        found[name] = (inside & trees.keys()) - {name} - {p for p in is_package if p != "polyce"}
    return found


@NUMPY
def test_imports_go_downwards_only() -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    found = house()
    assert {name.partition(".")[0] for name in found} == floor.keys()
    assert found["formula.rows"] >= {"formula.rowstate", "call.problem"}
    for name, others in found.items():
        for other in others:
            here, there = name.partition(".")[0], other.partition(".")[0]
            assert here == there or floor[here] > floor[there], f"{name} imports {other}"


@NUMPY
def test_no_files_import_each_other_in_a_ring() -> None:
    below = house()
    while below:
        ground = {name for name, others in below.items() if not others & below.keys()}
        assert ground, f"among these there is a ring: {sorted(below)}"
        for name in ground:
            del below[name]
