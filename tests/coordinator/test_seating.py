"""Who takes which share."""

from __future__ import annotations

import random

import pytest
from core_cases import make_spec

from coordinator.memory import StepBounds
from coordinator.planner import PlanRequest
from coordinator.seating import Seats, seat
from coordinator.shares import format_words, parse_words
from protocol.ids import WorkerId

HEAD, B, C, D = map(WorkerId, ("head", "b", "c", "d"))


def request(words: str | None, *, head_only: bool = False) -> PlanRequest:
    shares = None if words is None else parse_words(words)
    step = StepBounds(rows=16, sampled=4)
    return PlanRequest(spec=make_spec(layers=8), shares=shares, head_only=head_only, step=step)


@pytest.mark.parametrize(
    ("words", "others", "before", "seats", "left"),
    [
        ("1,1/2", (B, C), (), (HEAD, B, C), "1,1/2"),
        ("1,1/2", (C,), (HEAD, B, C), (HEAD, None, C), "1/2"),  # a seat is left out, not moved up
        ("1,1/2", (C, D), (HEAD, B, C), (HEAD, D, C), "1,1/2"),  # and filled by who comes
        ("1,1/2", (D, B, C), (HEAD, None, C), (HEAD, D, C), "1,1/2"),
        ("1,1/2", (B,), (HEAD, B, C), (HEAD, B, None), "1,1"),  # a stage without members leaves its layers
        ("1,1/2", (), (HEAD, B, C), (HEAD, None, None), "1"),
        ("1/1", (C, B, D), (HEAD, B), (HEAD, B), "1/1"),  # who has no seat waits
        ("1/1", (B, HEAD), (B, C), (HEAD, B), "1/1"),  # another head, and the seats of before make no sense to it
    ],
)
def test_seats_are_kept_filled_and_left_out(
    words: str, others: tuple[WorkerId, ...], before: Seats, seats: Seats, left: str
) -> None:
    found = seat(request(words), HEAD, [one for one in others if one != HEAD], before)
    assert found.seats == seats
    assert found.order == tuple(worker for worker in seats if worker)
    assert found.is_complete == (None not in seats)
    assert found.request.shares is not None
    assert format_words(found.request.shares) == left


def test_a_head_that_holds_no_layers_has_a_seat_of_its_own() -> None:
    found = seat(request("1/1", head_only=True), HEAD, [C], (HEAD, B, C))
    assert found.seats == (HEAD, None, C)
    assert found.request.num_workers == 2
    alone = seat(request("1/1", head_only=True), HEAD, [], (HEAD, B, C))
    assert alone.request.shares is None  # there is nobody to hold a layer, which the planner tells


def test_an_automatic_plan_takes_everybody_in_the_order_of_before() -> None:
    found = seat(request(None), HEAD, [B, C, D], (HEAD, C, WorkerId("x")))
    assert (found.order[0], found.order[1]) == (HEAD, C)
    assert found.is_complete
    assert sorted(found.order) == sorted([HEAD, B, C, D])
    assert found.seats == found.order


@pytest.mark.parametrize("seed", range(100))
def test_whoever_stays_keeps_its_seat(seed: int) -> None:
    dice = random.Random(seed)
    names = [WorkerId(f"w{number}") for number in range(6)]
    seats: Seats = ()
    for _ in range(8):
        others = dice.sample(names, dice.randint(0, 6))
        found = seat(request("1,1/2,1/1"), HEAD, others, seats)
        kept = {worker: place for place, worker in enumerate(seats) if worker in others}
        assert all(found.seats[place] == worker for worker, place in kept.items())
        assert len(found.seats) == 5
        assert len(found.order) == min(5, len(others) + 1)
        assert len(set(found.order)) == len(found.order)
        seats = found.seats
