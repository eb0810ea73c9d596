"""The soak of `benchmarks/churn.py`, cut short: workers come and go while clients ask."""

from __future__ import annotations

import pytest

from benchmarks.churn import report, soak

pytestmark = pytest.mark.processes


def test_a_short_churn_goes_by_unnoticed() -> None:
    soaked = soak(minutes=0.3, every_s=2.0, seed=1, calm_s=4.0)
    report(soaked, calm_s=4.0)
    assert not soaked.problems
    assert not soaked.churned.errors
    assert soaked.churned.right > 0
    assert soaked.did["join"] > 0
