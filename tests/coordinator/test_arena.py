"""Places of sessions: none overlap, none is lost, and whatever fits a gap gets one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.arena import Arena
from protocol.errors import InvariantBroken
from protocol.ids import SessionId


def filled(positions: int, *capacities: int) -> Arena:
    """An arena with sessions 0, 1, 2 ... one after the other."""
    arena = Arena(positions)
    for number, capacity in enumerate(capacities):
        assert arena.take(SessionId(number), capacity) is not None
    return arena


@pytest.mark.parametrize(
    ("freed", "capacity", "place"),
    [
        ([], 10, 60),
        ([], 40, 60),
        ([], 41, None),
        ([0], 10, 0),  # the first gap, not the best
        ([0], 11, 60),
        ([1], 20, 10),
        ([0, 1], 30, 0),  # neighbours are one gap
        ([1, 0], 30, 0),
        ([1, 2], 50, 10),
        ([2], 70, 30),  # the last one and what is free behind it
        ([0, 2], 71, None),  # enough in all, but in two pieces
        ([0, 1, 2], 100, 0),
        ([0, 1, 2], 101, None),
    ],
)
def test_the_first_gap_that_is_large_enough(freed: Sequence[int], capacity: int, place: int | None) -> None:
    arena = filled(100, 10, 20, 30)
    for number in freed:
        arena.free(SessionId(number))
    used = arena.used
    assert arena.take(SessionId(9), capacity) == place
    assert arena.used == used + (0 if place is None else capacity)


def test_an_empty_arena_holds_nobody() -> None:
    assert Arena(0).take(SessionId(1), 1) is None


@pytest.mark.parametrize("capacity", [0, -1])
def test_bugs_are_told(capacity: int) -> None:
    arena = filled(100, 10)
    with pytest.raises(InvariantBroken):
        arena.take(SessionId(0), 5)
    with pytest.raises(InvariantBroken):
        arena.take(SessionId(1), capacity)
    with pytest.raises(InvariantBroken):
        arena.free(SessionId(1))
    assert arena.used == 10


ORDERS = st.lists(st.one_of(st.integers(1, 40), st.integers(-30, -1)), max_size=60)


@given(st.integers(0, 120), ORDERS)
def test_no_two_places_ever_overlap(positions: int, orders: list[int]) -> None:
    """Positive: take so many; negative: free the (-n)th oldest. Held against a map of single positions."""
    arena, owner, held = Arena(positions), [-1] * positions, dict[int, range]()
    for number, order in enumerate(orders):
        if order < 0:
            if -order <= len(held):
                freed = list(held)[-order - 1]
                arena.free(SessionId(freed))
                for position in held.pop(freed):
                    owner[position] = -1
            continue
        start = arena.take(SessionId(number), order)
        runs = [(is_free, len(list(run))) for is_free, run in itertools.groupby(taken < 0 for taken in owner)]
        if start is None:
            assert not any(is_free and length >= order for is_free, length in runs)
            continue
        held[number] = range(start, start + order)
        for position in held[number]:
            assert owner[position] == -1
            owner[position] = number
        assert not any(is_first(owner, gap, order) for gap in range(start))
        assert arena.used == sum(map(len, held.values()))


def is_first(owner: list[int], start: int, size: int) -> bool:
    """Whether so many positions from `start` on are free."""
    return start + size <= len(owner) and all(taken < 0 for taken in owner[start : start + size])
