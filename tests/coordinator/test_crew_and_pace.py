"""Who is on probation, who is far behind its own pace, whom the cluster waits for."""

from __future__ import annotations

import pytest
from core_cases import heartbeat, joined, make_spec

from coordinator.crew import Crew
from coordinator.memory import StepBounds
from coordinator.pace import LEAST_S, Pace
from coordinator.planner import PlanRequest
from coordinator.policy import ClusterPolicy
from coordinator.probation import FORGIVEN, MEMORY_S, MOST_NOTED, MOST_S, Probation
from coordinator.registry import Member, Registry
from coordinator.seating import Seats
from coordinator.shares import parse_words
from protocol.ids import WorkerId

A = WorkerId("a")

# ---------------------------------------------------------------- probation


def test_the_first_losses_are_forgiven_and_each_further_one_doubles_the_time() -> None:
    probation = Probation(30.0)
    left = []
    for number in range(8):
        probation.lost(A, float(number))
        left.append(probation.left_s(A, float(number)))
    assert left == [0.0] * FORGIVEN + [30.0, 60.0, 120.0, 240.0, MOST_S, MOST_S]
    assert probation.left_s(A, 8.0) == MOST_S - 1.0
    assert probation.left_s(WorkerId("b"), 8.0) == 0.0


def test_losses_are_forgotten() -> None:
    probation = Probation(30.0)
    for number in range(3):
        probation.lost(A, float(number))
    assert probation.left_s(A, 10.0) == 22.0
    assert probation.left_s(A, 32.0) == 0.0
    probation.lost(A, MEMORY_S + 2.0)
    assert probation.left_s(A, MEMORY_S + 2.0) == 0.0


def test_no_probation_at_all() -> None:
    probation = Probation(0.0)
    for number in range(100 * MOST_NOTED):
        probation.lost(A, float(number))
    assert probation.left_s(A, 100.0 * MOST_NOTED) == 0.0


# ---------------------------------------------------------------- pace


def moving(*moves: float) -> tuple[Pace, Member]:
    """A worker whose counter moved at these times, while there was work."""
    member = Registry(3.0).join(joined("a"), 0.0)
    pace = Pace()
    for at in moves:
        member.progress_at = at
        assert not pace.is_late(member, 0.0, at)
    return pace, member


@pytest.mark.parametrize(("pause_s", "patience_s"), [(0.1, LEAST_S), (1.0, 8.0)])
def test_who_stands_still_much_longer_than_it_ever_did_is_late(pause_s: float, patience_s: float) -> None:
    times = [pause_s * number for number in range(1, 50)]
    pace, member = moving(*times)
    assert not pace.is_late(member, 0.0, times[-1] + 0.9 * patience_s)
    assert pace.is_late(member, 0.0, times[-1] + 1.2 * patience_s)
    member.progress_at = times[-1] + 2 * patience_s
    assert not pace.is_late(member, 0.0, member.progress_at)


def test_nobody_is_late_without_work_nor_before_it_had_the_time() -> None:
    pace, member = moving(0.1, 0.2, 0.3)
    assert not pace.is_late(member, None, 1000.0)
    assert not pace.is_late(member, 1000.0, 1001.0)
    assert pace.is_late(member, 1000.0, 1003.0)


# ---------------------------------------------------------------- crew


def crew_of(policy: ClusterPolicy, registry: Registry, seats: Seats = ()) -> Crew:
    shares = None if policy.plan_words is None else parse_words(policy.plan_words)
    step = StepBounds(rows=16, sampled=4)
    request = PlanRequest(spec=make_spec(), shares=shares, head_only=policy.head_only, step=step)
    return Crew(request, policy, registry, seats)


def test_the_first_plan_waits_for_all_and_later_ones_for_nobody() -> None:
    registry = Registry(3.0)
    crew = crew_of(ClusterPolicy(plan_words="1/1"), registry)
    assert "waiting for a trusted worker" in crew.missing(0.0)
    registry.join(joined("head"), 0.0)
    assert crew.missing(0.0) == "waiting for 1 of 2 workers; here: head"
    registry.join(joined("a"), 0.0)
    assert crew.missing(0.0) == ""
    crew.seated((WorkerId("head"), A))
    registry.leave(A)
    assert crew.missing(100.0) == ""


def test_after_a_restart_the_crew_of_before_has_some_time_to_come_back() -> None:
    registry = Registry(3.0)
    crew = crew_of(ClusterPolicy(plan_words="1/1", return_s=10.0), registry, (WorkerId("head"), A))
    for name in ("head-0", "head", "b"):
        registry.join(joined(name), 0.0)
    assert crew.missing(5.0) == "waiting for a to come back"
    assert registry.head is registry.get(WorkerId("head"))
    assert crew.returned is None
    assert crew.missing(14.9)
    assert not crew.missing(15.0)
    assert not crew.missing(15.1)


def test_a_crew_that_is_back_forms_the_first_plan_alone() -> None:
    registry = Registry(3.0)
    crew = crew_of(ClusterPolicy(return_s=10.0), registry, (WorkerId("head"), None, A))
    for name in ("head", "a", "b"):
        registry.join(joined(name), 0.0)
    assert not crew.missing(0.0)
    assert crew.returned == {"head", "a"}
    crew.seated((WorkerId("head"), A))
    assert crew.returned is None


def test_what_is_special_about_a_member_is_told() -> None:
    registry = Registry(3.0)
    crew = crew_of(ClusterPolicy(probation_s=30.0), registry)
    member = registry.join(joined("a"), 0.0)
    assert crew.state_of(member, 0.0) == ""
    member.is_suspect = True
    assert "pace" in crew.state_of(member, 0.0)
    for _ in range(3):
        crew.probation.lost(A, 0.0)
    assert crew.state_of(member, 10.0) == "on probation for 20 s: it was lost time and again"
    registry.heard(A, heartbeat("a", paused="on battery").heartbeat, 1.0)
    assert crew.state_of(member, 10.0) == "paused: on battery"
    assert crew.must_stop(A)
    registry.mark_leaving(A, own_wish=False)
    assert crew.state_of(member, 10.0).startswith("leaving")
