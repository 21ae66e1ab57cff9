"""Classes over processes of torch.distributed, against the oracle and against one process.

What needs DTensors, or as many processes as a mesh of two axes, takes long to start.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
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


@pytest.fixture(scope="module", params=(2, 3) if FULL else (3,))
def few(request: Any, tmp_path_factory: Any) -> Iterator[Processes]:
    found = Processes(request.param, tmp_path_factory.mktemp("few"))
    yield found
    found.close()


@pytest.fixture(scope="module", params=(2, 3, 4) if FULL else (4,))
def many(request: Any, tmp_path_factory: Any) -> Iterator[Processes]:
    found = Processes(request.param, tmp_path_factory.mktemp("many"))
    yield found
    found.close()


def test_a_few_cases_of_the_grid(few: Processes) -> None:
    few.run("sharded_checks.grid", most=25)


@pytest.mark.parametrize(
    "check", ["bytes_of_a_row", "bad_calls", "ranges", "unlooked_at", "values", "module", "citizen"]
)
def test_shards(few: Processes, check: str) -> None:
    few.run(f"sharded_checks.{check}")


@pytest.mark.slow
@pytest.mark.parametrize("group", [*GROUPS] if FULL else ["grad-stats", "targets", "values"])
def test_the_grid(many: Processes, group: str) -> None:
    many.run("sharded_checks.grid", most=None if FULL else 40, groups=[group])


@pytest.mark.slow
def test_collectives_are_counted(many: Processes) -> None:
    many.run("sharded_checks.one_collective")


@pytest.mark.slow
@pytest.mark.parametrize("check", ["losses", "values", "module", "bad_calls", "compiled"])
def test_heads(many: Processes, check: str) -> None:
    many.run(f"sharded_head_checks.{check}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "check",
    [
        *("losses", "gradients", "values", "log_probabilities", "heads", "collectives"),
        *("bad_calls", "against_loss_parallel", "compiled", "model"),
    ],
)
def test_meshes(many: Processes, check: str) -> None:
    many.run(f"sharded_mesh_checks.{check}")
