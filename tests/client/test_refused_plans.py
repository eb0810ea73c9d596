"""A cluster whose workers can't hold the model says so at once, with the numbers and the ways out."""

from __future__ import annotations

import pytest

from manyhands import LocalCluster
from protocol.errors import BudgetTooSmall


@pytest.mark.processes
def test_a_budget_below_the_floor_is_refused_by_name() -> None:
    with pytest.raises(BudgetTooSmall, match="worker-1") as caught, LocalCluster(plan="1", memory="150MB"):
        pytest.fail("a worker took less than its own process needs")
    for way in ("--memory", "--plan", "--dtype"):
        assert way in caught.value.remedy
