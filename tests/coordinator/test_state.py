"""The whole core: stories told event by event, and a seeded world."""

from __future__ import annotations

import pytest
from core_cases import (
    arrived,
    faulted,
    finished,
    heartbeat,
    joined,
    loaded,
    make_spec,
    of,
    reached,
    sent,
    steps,
    stocked,
)

from coordinator.events import (
    DisconnectWorker,
    Effect,
    Event,
    Phase,
    PhaseChanged,
    RequestCancelled,
    SessionEnded,
    SessionFailed,
    Stopping,
    Tick,
    TokensCommitted,
    WorkerGone,
    WorkerHeard,
)
from coordinator.policy import ClusterPolicy
from coordinator.session import open_session
from coordinator.state import ClusterState
from protocol.errors import DeadlineExceeded, FrameMalformed, Overloaded, PeerLost, PlanImpossible
from protocol.ids import SessionId, WorkerId
from protocol.messages import HeartbeatReply, Load, Probe, Release, Step, Unload, WorkerPhase


class Stand:
    """The core with its clock, driven by hand."""

    def __init__(self, policy: ClusterPolicy | None = None) -> None:
        self.core = ClusterState(make_spec(), policy or ClusterPolicy(plan_words="1/1"), term=1)
        self.now = 0.0

    def tell(self, *events: Event) -> list[Effect]:
        return [effect for event in events for effect in self.core.handle(event, self.now)]

    def wait(self, seconds: float, *alive: str, progress: int = 0) -> list[Effect]:
        """Let time pass in ticks; the workers named keep sending heartbeats with this progress counter."""
        effects: list[Effect] = []
        for _ in range(round(seconds * 10)):
            self.now += 0.1
            effects += self.tell(*(heartbeat(name, progress=progress) for name in alive), Tick())
        return effects

    def form(self, *names: str) -> list[Effect]:
        """Let the workers join, answer probes and load until the plan is ready."""
        effects = self.tell(*(joined(name) for name in names))
        return self.settle(effects)

    def settle(self, effects: list[Effect]) -> list[Effect]:
        all_effects = list(effects)
        for _ in range(3):
            answers: list[Event] = [reached(name, probe.probe) for name, probe in sent(Probe, effects).items()]
            answers += [loaded(name, load.plan.epoch) for name, load in sent(Load, effects).items()]
            effects = self.tell(*answers)
            all_effects += effects
        assert self.core.status(self.now).phase is Phase.READY
        return all_effects

    def ask(self, number: int = 1, *, max_tokens: int = 4) -> Step:
        (step,) = steps(self.tell(arrived(number, max_tokens=max_tokens)))
        return step


def test_a_request_that_waits_for_the_model_is_answered_token_by_token() -> None:
    stand = Stand()
    assert stand.tell(arrived(1, max_tokens=2)) == [
        PhaseChanged(
            phase=Phase.WAITING,
            epoch=10**9,
            detail="waiting for a trusted worker to be the head; 0 other workers are here",
        )
    ]
    assert stand.core.session_phase(SessionId(1)).startswith("waiting: waiting for a trusted worker")
    effects = stand.form("head", "b")
    assert [change.phase for change in of(PhaseChanged, effects)][-3:] == [Phase.PROBING, Phase.LOADING, Phase.READY]
    (step,) = steps(effects)
    assert stand.core.session_phase(SessionId(1)) == "reading the prompt: 0 of 3 tokens"
    effects = stand.tell(finished("head", step, 11))
    assert [effect.tokens for effect in of(TokensCommitted, effects)] == [(11,)]
    assert stand.core.session_phase(SessionId(1)) == "answering"
    (step,) = steps(effects)
    effects = stand.tell(finished("head", step, 12))
    assert of(SessionEnded, effects)
    assert set(sent(Release, effects)) == {"head", "b"}
    assert stand.core.session_phase(SessionId(1)) == ""


def test_plan_words_are_checked_at_the_start() -> None:
    for words in ("1,", "1/1/1/1/1"):
        with pytest.raises(PlanImpossible):
            ClusterState(make_spec(), ClusterPolicy(plan_words=words), term=1)


def test_heartbeats_are_answered_and_a_stranger_is_told_to_say_hello() -> None:
    stand = Stand()
    stand.tell(joined("head"))
    assert sent(HeartbeatReply, stand.tell(heartbeat("head", 7)))["head"].sequence == 7
    (refused,) = of(DisconnectWorker, stand.tell(heartbeat("x")))
    assert isinstance(refused.error, PeerLost)
    assert (
        stand.tell(WorkerHeard(worker=WorkerId("x")), loaded("x", 1), WorkerGone(worker=WorkerId("x"), reason="")) == []
    )


def test_a_silent_worker_is_lost_within_the_lease_and_the_next_plan_is_made_in_that_call() -> None:
    stand = Stand()
    stand.form("head", "b")
    stand.ask()
    stand.wait(1.0, "head", "b")
    assert of(DisconnectWorker, stand.wait(2.6, "head")) == []
    effects = stand.wait(0.3, "head")
    assert of(SessionFailed, effects) == []
    assert set(sent(Unload, effects)) == {"head"}
    (gone,) = of(DisconnectWorker, effects)
    assert gone.worker == "b"
    assert "b was silent for 2.8 s" in gone.error.message
    assert set(sent(Load, effects)) == {"head"}
    (again,) = steps(stand.settle(effects))
    assert [part.session for part in again.rows] == [1]


def test_data_traffic_alone_keeps_a_worker_alive() -> None:
    stand = Stand()
    stand.form("head", "b")
    for _ in range(50):
        stand.now += 0.1
        effects = stand.tell(WorkerHeard(worker=WorkerId("b")), WorkerHeard(worker=WorkerId("head")), Tick())
        assert of(DisconnectWorker, effects) == []


def test_a_coordinator_that_was_away_does_not_blame_the_workers() -> None:
    stand = Stand()
    stand.form("head", "b")
    stand.wait(0.5, "head", "b")
    stand.now += 60.0
    assert of(DisconnectWorker, stand.tell(Tick())) == []
    assert of(DisconnectWorker, stand.wait(3.1, "head")) != []


def test_a_worker_that_restarts_ends_the_plan_and_is_taken_in_again() -> None:
    stand = Stand()
    stand.form("head", "b")
    stand.ask()
    effects = stand.tell(joined("b", phase=WorkerPhase.READY, epoch=10**9 + 1))
    assert of(SessionFailed, effects) == []
    assert set(sent(Unload, effects)) == {"head", "b"}
    (step,) = steps(stand.settle(effects))
    assert (step.epoch, [part.session for part in step.rows]) == (10**9 + 2, [1])


def test_a_worker_that_leaves_names_its_reason() -> None:
    stand = Stand()
    stand.form("head", "b")
    stand.ask()
    stand.tell(WorkerGone(worker=WorkerId("b"), reason="battery low"))
    assert stand.core.status(stand.now).last_error.startswith("b is gone: battery low")


def test_after_a_fault_the_sessions_wait_out_the_pause_and_go_on() -> None:
    stand = Stand()
    stand.form("head", "b")
    step = stand.ask()
    assert of(SessionFailed, stand.tell(faulted("b", step.epoch))) == []
    assert steps(stand.tell(arrived(2))) == []
    assert "pausing 1 s" in stand.core.session_phase(SessionId(2))
    (step,) = steps(stand.settle(stand.wait(1.1, "head", "b")))
    assert [part.session for part in step.rows] == [1]  # alone, for it may be the reason
    effects = stand.tell(finished("head", step, 5))
    assert [part.session for one in steps(effects) for part in one.rows] == [1, 2]


@pytest.mark.parametrize(("sender", "epoch_offset"), [("b", 0), ("head", 1), ("x", 0)])
def test_step_results_count_only_from_the_head_and_for_the_epoch(sender: str, epoch_offset: int) -> None:
    stand = Stand()
    stand.form("head", "b")
    step = stand.ask()
    other = Step(epoch=step.epoch + epoch_offset, step=step.step, rows=step.rows)
    assert stand.tell(finished(sender, other, 5)) == []
    assert of(TokensCommitted, stand.tell(finished("head", step, 5)))


def test_a_head_that_sends_wrong_tokens_ends_the_plan() -> None:
    stand = Stand()
    stand.form("head", "b")
    assert set(sent(Unload, stand.tell(finished("head", stand.ask(), 10**6)))) == {"head", "b"}
    error = stand.core._deployment.error
    assert isinstance(error, FrameMalformed)
    assert error.node == "head"


def test_a_step_without_progress_ends_the_plan_and_progress_extends_it() -> None:
    stand = Stand(ClusterPolicy(plan_words="1/1", step_timeout_s=5.0))
    stand.form("head", "b")
    stand.ask()
    for progress in (1, 2, 3):
        assert sent(Unload, stand.wait(4.0, "head", "b", progress=progress)) == {}
    assert set(sent(Unload, stand.wait(1.5, "head", "b", progress=3))) == {"head", "b"}
    error = stand.core._deployment.error
    assert isinstance(error, DeadlineExceeded)
    assert error.phase == "step"


def test_a_lost_step_ends_the_plan_even_while_others_move() -> None:
    stand = Stand(ClusterPolicy(plan_words="1/1", step_timeout_s=2.0))
    stand.form("head", "b")
    stand.ask()
    ends = 0
    for tick in range(205):
        stand.now += 0.1
        ends += len(sent(Unload, stand.tell(heartbeat("head", progress=tick), heartbeat("b"), Tick())))
    assert ends == 2


def test_a_request_without_a_model_fails_saying_what_is_missing() -> None:
    stand = Stand()
    stand.tell(joined("head"), arrived(1))
    assert of(SessionFailed, stand.wait(59.0, "head")) == []
    (failed,) = of(SessionFailed, stand.wait(2.0, "head"))
    assert isinstance(failed.error, Overloaded)
    assert "waiting for 1 of 2 workers; here: head" in failed.error.message


def test_cancelling_ends_a_session_at_once() -> None:
    stand = Stand()
    stand.form("head", "b")
    step = stand.ask()
    assert of(SessionEnded, stand.tell(RequestCancelled(session=SessionId(1))))
    effects = stand.tell(finished("head", step, 5))
    assert of(TokensCommitted, effects) == []
    assert set(sent(Release, effects)) == {"head", "b"}


def test_a_newcomer_enters_an_automatic_plan_when_the_last_session_has_ended() -> None:
    stand = Stand(ClusterPolicy())
    stand.form("head")
    step = stand.ask(max_tokens=1)
    assert sent(Probe, stand.tell(joined("b"))) == {}
    effects = stand.tell(finished("head", step, 5))
    assert of(SessionEnded, effects)
    assert set(sent(Probe, effects)) == {"head", "b"}
    stand.settle(effects)
    stand.settle(stand.tell(stocked("b", 1)))
    plan = stand.core.plan
    assert plan is not None
    assert plan.workers == ("head", "b")


def test_stopping_answers_everybody() -> None:
    stand = Stand()
    stand.form("head", "b")
    stand.ask()
    effects = stand.tell(Stopping())
    assert [type(failed.error) for failed in of(SessionFailed, effects)] == [Overloaded]
    assert set(sent(Unload, effects)) == {"head", "b"}
    assert of(SessionFailed, stand.tell(arrived(2)))
    assert stand.wait(1.0) == []


def test_relaying_is_for_relayed_links_of_the_plan() -> None:
    stand = Stand()
    stand.form("head", "b")  # the probes found nobody
    head, b = WorkerId("head"), WorkerId("b")
    assert stand.core.can_relay(head, b)
    assert stand.core.can_relay(b, head)
    assert not stand.core.can_relay(b, WorkerId("x"))
    stand.tell(WorkerGone(worker=b, reason=""))
    assert not stand.core.can_relay(head, b)


def test_status_tells_it_all() -> None:
    stand = Stand()
    stand.form("head", "b")
    stand.ask()
    stand.tell(heartbeat("b"))
    stand.now += 1.0
    status = stand.core.status(stand.now)
    assert (status.term, status.epoch, status.phase, status.last_error) == (1, 10**9 + 1, Phase.READY, "")
    assert status.plan is stand.core.plan
    assert (status.sessions.running, status.sessions.waiting, status.totals.requests) == (1, 0, 1)
    head, b = status.workers
    assert (head.name, head.link, head.heartbeat) == ("head", "relay", None)
    assert (b.name, b.heartbeat, b.last_heard_s) == ("b", heartbeat("b").heartbeat, 1.0)
    assert b.loaded is not None
    assert (status.kv.positions, status.kv.used) == (8192, 7)
    stand.tell(WorkerGone(worker=WorkerId("b"), reason="battery low"))
    assert "battery low" in stand.core.status(stand.now).last_error


def test_time_never_runs_backwards() -> None:
    stand = Stand()
    stand.form("head", "b")
    stand.core.handle(Tick(), 100.0)
    stand.core.handle(heartbeat("b"), 1.0)
    assert stand.core.status(100.0).workers[1].last_heard_s == 0.0


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_sessions", 0, "max_sessions 0"),
        ("max_sessions", 5000, "exceeds 1024"),
        ("lease_s", 0.5, "shorter than lease_s"),
        ("probe_timeout_s", float("nan"), "probe_timeout_s nan"),
    ],
)
def test_a_policy_is_checked(name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClusterPolicy(**{name: value})  # type: ignore[arg-type]


def test_a_crew_that_was_refused_is_tried_again_when_its_owner_lets_it_compute() -> None:
    stand = Stand(ClusterPolicy(head_only=True))
    effects = stand.tell(joined("b"), heartbeat("b", paused="on battery"), joined("head"))
    assert sent(Load, effects) == sent(Probe, effects) == {}
    assert set(sent(Probe, stand.tell(heartbeat("b")))) == {"head", "b"}


def test_being_away_takes_no_time_from_steps_and_requests() -> None:
    stand = Stand(ClusterPolicy(plan_words="1/1", step_timeout_s=5.0, form_timeout_s=10.0))
    stand.form("head", "b")
    stand.ask()
    stand.now += 1000.0
    assert sent(Unload, stand.tell(heartbeat("head"), Tick())) == {}
    stand.tell(WorkerGone(worker=WorkerId("head"), reason=""))
    stand.now += 1000.0
    assert of(SessionFailed, stand.wait(9.0, "b")) == []
    assert of(SessionFailed, stand.wait(2.0, "b")) != []


def test_restored_sessions_wait_as_long_as_new_ones() -> None:
    saved = [open_session(arrived(number), make_spec(), 1.0) for number in range(3)]
    core = ClusterState(make_spec(), ClusterPolicy(max_sessions=1, form_timeout_s=10.0), term=2, saved=saved)
    assert of(SessionFailed, [effect for now in range(1000, 1010) for effect in core.handle(Tick(), float(now))]) == []
    stand = Stand()
    stand.core, stand.now = core, 1010.5
    effects = stand.settle(stand.tell(joined("head")))
    (load,) = sent(Load, effects).values()
    assert [carry.session for carry in load.carries] == [0]  # there is room for one, and only that one takes a place
    assert [part.session for step in steps(effects) for part in step.rows] == [0]
