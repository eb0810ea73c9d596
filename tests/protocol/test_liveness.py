"""Leases and back-off, on virtual time and loaded dice."""

from __future__ import annotations

import math
import random

import pytest

from protocol.liveness import Backoff, Lease


def test_a_lease_runs_from_the_last_time_heard() -> None:
    lease = Lease(3.0)
    lease.heard(10.0)
    assert not lease.is_over(12.9)
    assert lease.is_over(13.0)
    lease.heard(12.0)
    assert not lease.is_over(14.9)
    assert lease.silence_s(14.5) == 2.5


def test_who_was_never_heard_holds_no_lease() -> None:
    lease = Lease(3.0)
    assert lease.is_over(0.0)
    assert lease.silence_s(0.0) == math.inf


def test_time_never_runs_backwards() -> None:
    lease = Lease(3.0)
    lease.heard(10.0)
    lease.heard(5.0)
    assert lease.silence_s(11.0) == 1.0
    assert lease.silence_s(9.0) == 0.0


@pytest.mark.parametrize("lease_s", [0.0, -1.0, math.inf, math.nan])
def test_a_lease_needs_a_length(lease_s: float) -> None:
    with pytest.raises(ValueError, match="lease_s"):
        Lease(lease_s)


def test_waits_double_up_to_the_most_and_start_again() -> None:
    backoff = Backoff(0.5, 4.0, random.Random(7))
    for whole_s in (0.5, 1.0, 2.0, 4.0, 4.0, 4.0):
        assert whole_s / 2 <= backoff.next_s() <= whole_s
    backoff.reset()
    assert backoff.next_s() <= 0.5


def test_the_same_dice_give_the_same_waits_and_other_dice_others() -> None:
    def waits(seed: int) -> list[float]:
        backoff = Backoff(0.1, 5.0, random.Random(seed))
        return [backoff.next_s() for _ in range(8)]

    assert waits(1) == waits(1)
    assert waits(1) != waits(2)


@pytest.mark.parametrize(("first_s", "most_s"), [(0.0, 1.0), (2.0, 1.0), (1.0, math.inf), (math.nan, 1.0)])
def test_backoff_needs_bounds_in_order(first_s: float, most_s: float) -> None:
    with pytest.raises(ValueError, match="back-off needs"):
        Backoff(first_s, most_s, random.Random(0))
