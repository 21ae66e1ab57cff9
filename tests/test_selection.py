"""The few cases that stand for the grid: each of its traits is in one of them."""

from __future__ import annotations

import pytest

from polyce.testing import GROUPS, cases
from polyce.testing.selection import representative, traits

pytestmark = pytest.mark.only("numpy")


def test_every_trait_is_in_one_of_them() -> None:
    every = cases(dtypes=["float32", "float64"])
    chosen = representative(every)
    assert len(chosen) < len(every) / 5
    seen = set().union(*map(traits, chosen))
    assert [case.name for case in every if not traits(case) <= seen] == []
    for trait in ("options", "ignore-all"), ("shapes", "no-rows"), ("accuracy", "offset"):
        assert any(trait in traits(case) for case in chosen)
    assert {case.group for case in chosen} == set(GROUPS)


def test_the_first_have_the_most_to_them() -> None:
    every = cases(["options"])
    chosen = representative(every)
    assert [case.name for case in representative(every, 3)] == [case.name for case in chosen[:3]]
    assert len(traits(chosen[0])) == max(len(traits(case)) for case in every)
    assert representative(every, 0) == []
    assert representative([]) == []
