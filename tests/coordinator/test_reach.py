"""What is known about who can dial whom."""

from __future__ import annotations

from core_cases import joined, make_spec, sent

from coordinator.memory import Candidate, StepBounds
from coordinator.planner import PlanRequest, make_plan
from coordinator.reach import ReachBook
from coordinator.registry import Registry
from coordinator.shares import parse_words
from protocol.ids import WorkerId
from protocol.messages import Probe
from protocol.plans import Plan

HEAD, B, C = map(WorkerId, ("head", "b", "c"))


class Stand:
    def __init__(self) -> None:
        self.registry = Registry(3.0)
        for name in (HEAD, B, C):
            self.registry.join(joined(name), 0.0)
        self.book = ReachBook(self.registry, 3.0)

    def begin(self, words: str, now: float = 0.0) -> dict[str, list[str]]:
        """Begin a probe; returns who is asked about whom."""
        probes = sent(Probe, self.book.begin(plan_of(words), now))
        return {worker: [peer.worker for peer in probe.peers] for worker, probe in probes.items()}


def plan_of(words: str) -> Plan:
    shares = parse_words(words)
    request = PlanRequest(spec=make_spec(), shares=shares, head_only=False, step=StepBounds(rows=16, sampled=4))
    return make_plan(request, [Candidate(worker=name, budget_bytes=10**9) for name in (HEAD, B, C)], epoch=1)


def test_every_pair_is_asked_once() -> None:
    stand = Stand()
    assert stand.begin("1/1") == {"head": ["b"], "b": ["head"]}
    stand.book.answer(HEAD, 1, [B])
    assert not stand.book.is_over(0.1)
    stand.book.answer(B, 1, [])
    assert stand.book.is_over(0.1)
    assert stand.book.pairs == {(HEAD, B)}
    assert stand.begin("1/1") == {}  # a link that does not work is known as well
    assert stand.begin("1/1/1") == {"head": ["c"], "b": ["c"], "c": ["b", "head"]}


def test_late_doubled_and_foreign_answers_change_nothing() -> None:
    stand = Stand()
    stand.begin("1/1")
    stand.book.answer(C, 1, [HEAD])
    stand.book.answer(HEAD, 0, [B])
    assert stand.book.unanswered == {HEAD, B}
    stand.book.answer(HEAD, 1, [])
    stand.book.answer(HEAD, 1, [B])
    assert stand.book.pairs == frozenset()


def test_after_the_timeout_what_was_not_answered_is_asked_again_the_next_time() -> None:
    stand = Stand()
    stand.begin("1/1")
    stand.book.answer(HEAD, 1, [B])
    assert not stand.book.is_over(2.9)
    assert stand.book.is_over(3.0)
    stand.book.answer(B, 1, [HEAD])  # too late
    assert stand.book.pairs == {(HEAD, B)}
    assert stand.begin("1/1", 4.0) == {"b": ["head"]}


def test_a_process_that_came_back_is_asked_anew() -> None:
    stand = Stand()
    stand.begin("1/1")
    stand.book.answer(HEAD, 1, [B])
    stand.book.answer(B, 1, [HEAD])
    stand.registry.join(joined(B), 1.0)
    assert stand.book.pairs == frozenset()
    assert stand.begin("1/1", 1.0) == {"head": ["b"], "b": ["head"]}


def test_a_link_that_broke_does_not_count_any_more() -> None:
    stand = Stand()
    stand.begin("1/1")
    stand.book.answer(HEAD, 1, [B])
    stand.book.answer(B, 1, [HEAD])
    stand.book.broke(HEAD, B)
    assert stand.book.pairs == frozenset()
    assert stand.begin("1/1") == {}


def test_a_worker_that_is_gone_is_forgotten_and_not_waited_for() -> None:
    stand = Stand()
    stand.begin("1/1")
    stand.book.answer(HEAD, 1, [B])
    stand.registry.leave(B)
    stand.book.forget(B)
    assert stand.book.is_over(0.1)
    assert stand.book.pairs == frozenset()
    stand.book.broke(HEAD, B)  # says who was told too late
    assert stand.book.pairs == frozenset()
