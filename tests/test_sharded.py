"""Classes over processes of torch.distributed, against the oracle and against one process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import FULL
from polyce.testing.grid import GROUPS
from processes import Processes

pytestmark = [
    pytest.mark.only("torch"),
    pytest.mark.skipif(
        sys.platform != "linux", reason="the name of the loopback differs elsewhere"
    ),
]
COUNTS = (2, 3, 4) if FULL else (4,)


@pytest.fixture(scope="module", params=COUNTS)
def processes(request: Any, tmp_path_factory: Any) -> Iterator[Processes]:
    folder: Path = tmp_path_factory.mktemp("processes")
    found = Processes(request.param, folder)
    yield found
    found.close()


def test_a_few_cases_of_the_grid(processes: Processes) -> None:
    processes.run("sharded_checks.grid", most=25)


@pytest.mark.slow
@pytest.mark.parametrize("group", [*GROUPS] if FULL else ["grad-stats", "targets", "values"])
def test_the_grid(processes: Processes, group: str) -> None:
    processes.run("sharded_checks.grid", most=None if FULL else 40, groups=[group])


@pytest.mark.parametrize(
    "check",
    ["one_collective", "bytes_of_a_row", "bad_calls", "unlooked_at", "values", "module", "citizen"],
)
def test_of_every_process(processes: Processes, check: str) -> None:
    processes.run(f"sharded_checks.{check}")


@pytest.mark.parametrize(
    "check", ["losses", "values", "heads", "collectives", "bad_calls", "against_loss_parallel"]
)
def test_meshes(processes: Processes, check: str) -> None:
    processes.run(f"sharded_mesh_checks.{check}")


@pytest.mark.parametrize("check", ["losses", "values", "bad_calls"])
def test_heads(processes: Processes, check: str) -> None:
    processes.run(f"sharded_head_checks.{check}")


@pytest.mark.slow
@pytest.mark.parametrize("check", ["compiled", "model"])
def test_what_goes_with_meshes(processes: Processes, check: str) -> None:
    processes.run(f"sharded_mesh_checks.{check}")
