"""What happened, in words and in numbers; and what is kept ready for a loss, with what it costs."""

from __future__ import annotations

from core_cases import make_spec

from coordinator.memory import Candidate, StepBounds
from coordinator.planner import PlanRequest, make_plan
from coordinator.readiness import make_ready
from coordinator.replays import NOTHING, Repeated
from coordinator.shares import parse_words
from coordinator.story import MAX_HAPPENINGS, MAX_RECOVERIES, Story
from protocol.ids import WorkerId
from protocol.plans import Plan
from protocol.specs import Span
from protocol.tiles import HEAD_KINDS

HEAD, B, C = map(WorkerId, ("head", "b", "c"))


def plan_of(words: str, *names: WorkerId, epoch: int = 1) -> Plan:
    step = StepBounds(rows=16, sampled=4)
    request = PlanRequest(spec=make_spec(), shares=parse_words(words), head_only=False, step=step)
    return make_plan(request, [Candidate(worker=name, budget_bytes=10**9) for name in names], epoch=epoch)


def test_a_recovery_goes_from_the_loss_over_failed_plans_to_the_next_token() -> None:
    story, plan = Story(), plan_of("1/1", HEAD, B, epoch=7)
    story.broke(10.0, "b is gone")
    story.planned(10.1, plan, plan.tiles_of(B)[:2])
    story.broke(10.5, "it broke")  # while loading: the same recovery goes on
    story.planned(11.0, plan, [])
    some = Repeated(40, 80, Span(1, 3))
    story.ready(12.0, plan, fetched_bytes=5, worker_load_s=0.5, repeated=some)
    story.resumed(12.5)
    story.resumed(13.0)
    (recovery,) = story.recoveries
    assert (recovery.cause, recovery.epoch) == ("b is gone", 7)
    assert (recovery.began_at, recovery.planned_at, recovery.ready_at, recovery.resumed_at) == (10.0, 11.0, 12.0, 12.5)
    assert (recovery.fetched_bytes, recovery.worker_load_s, recovery.repeated) == (5, 0.5, some)
    texts = [happening.text for happening in story.happenings]
    assert "2 tiles to fetch (" in texts[0]
    assert texts[-1] == "ready; layers 1 to 2 of 40 positions to compute again"


def test_a_first_plan_is_no_recovery() -> None:
    story = Story()
    story.planned(1.0, plan_of("1", HEAD), [])
    story.ready(2.0, plan_of("1", HEAD), fetched_bytes=0, worker_load_s=0.0, repeated=NOTHING)
    story.resumed(3.0)
    assert not story.recoveries


def test_the_latest_of_each_are_kept() -> None:
    story, plan = Story(), plan_of("1", HEAD)
    for number in range(100):
        story.tell(float(number), str(number))
        story.broke(float(number), str(number))
        story.ready(float(number), plan, fetched_bytes=0, worker_load_s=0.0, repeated=NOTHING)
    assert (len(story.happenings), len(story.recoveries)) == (MAX_HAPPENINGS, MAX_RECOVERIES)
    assert story.recoveries[-1].cause == "99"


def test_spares_are_what_the_next_plan_would_lack_and_never_the_heads_own() -> None:
    plan, after = plan_of("1/1/1", HEAD, B, C), [plan_of("1/1", HEAD, C), plan_of("1/1", HEAD, B)]
    ready = make_ready(plan, after, spares=True, copies=False)
    for worker, spares in ready.spares.items():
        needed = {tile for successor in after if worker in successor.workers for tile in successor.tiles_of(worker)}
        assert set(spares) == needed - set(plan.tiles_of(worker))
        assert not {tile.kind for tile in spares} & HEAD_KINDS
    assert set(ready.spares) == {B, C}  # the head keeps its layers in both
    text = ready.cost_text(plan.model)
    assert text.startswith(f"{sum(map(len, ready.spares.values()))} spare tiles (")
    assert "copies" not in text


def test_a_copy_of_keys_and_values_is_kept_by_who_would_take_over() -> None:
    plan = plan_of("1/1/1", HEAD, B, C)
    ready = make_ready(plan, [plan_of("1/1", HEAD, C)], spares=False, copies=True)
    assert {(copy.owner, copy.holder) for copy in ready.copies} <= {(B, HEAD), (B, C)}
    assert ready.spares == {}
    assert "copies of keys and values" in ready.cost_text(plan.model)


def test_nothing_is_kept_when_nobody_wants_it_or_nobody_could_take_over() -> None:
    plan, after = plan_of("1/1/1", HEAD, B, C), [plan_of("1/1", HEAD, C)]
    for ready in (make_ready(plan, after, spares=False, copies=False), make_ready(plan, [], spares=True, copies=True)):
        assert (ready.spares, ready.copies, ready.cost_text(plan.model)) == ({}, (), "")
