"""The referee of the seeded world: checks every effect of one core against what was promised.

Knows nothing of how the world works. Raises AssertionError.
"""

from __future__ import annotations

import itertools

from coordinator.events import (
    Effect,
    Event,
    Phase,
    PhaseChanged,
    RequestArrived,
    SendControl,
    SendStep,
    SessionEnded,
    SessionFailed,
    StepFinished,
    Tick,
    TokensCommitted,
    WorkerFaulted,
    WorkerGone,
    WorkerJoined,
    WorkerLoaded,
    token_ids,
)
from coordinator.policy import ClusterPolicy
from coordinator.session import ERROR_WEIGHT, MAX_SETBACKS
from coordinator.state import ClusterState
from protocol.errors import ManyhandsError, Overloaded, PromptTooLong
from protocol.ids import SessionId, WorkerId
from protocol.messages import Carry, FinishReason, Goodbye, Load, Release, Step, Unload
from world.books import Journal


class Referee:
    """One for each start of a coordinator."""

    def __init__(self, core: ClusterState, policy: ClusterPolicy, journal: Journal, awake_s: float) -> None:
        """`awake_s`: the coordinator's clock, less what it slept."""
        self.core = core
        self.policy = policy
        self.requests = journal.requests
        self.flying: dict[int, Step] = {}
        self.first_epoch = self.epoch = core.status(0.0).epoch
        self.room = 0
        self.last_step = -1
        self.held: dict[SessionId, range] = {}  # places in the arena
        self.starts: dict[SessionId, int] = {}
        self.claims: dict[WorkerId, dict[SessionId, int]] = {}  # positions that workers say they have, this epoch
        self.known: set[SessionId] = set()  # to the head
        self.released: set[SessionId] = set()
        self.told_release: set[tuple[WorkerId, SessionId]] = set()
        self.carried: dict[SessionId, Carry] = {}
        self.loaded_on: dict[WorkerId, Load] = {}
        self.said_goodbye: set[tuple[WorkerId, int]] = set()
        self._phase = Phase.WAITING
        self._asked_at: dict[SessionId, float] = {}
        self._waits_since = awake_s

    def check_leases(self, clock: float) -> None:
        """After a tick nobody counts as a member who was silent for too long."""
        own_time = clock - self.core._away_s
        assert all(member.lease.silence_s(own_time) < self.policy.lease_s for member in self.core._registry)

    def check(self, event: Event, effects: list[Effect], awake_s: float) -> None:
        """Look at what an event led to."""
        if isinstance(event, RequestArrived):
            self._asked_at[event.session] = awake_s
        answers: dict[SessionId, list[int]] = {}  # tokens of this very event
        if isinstance(event, StepFinished):
            self.flying.pop(event.done.step, None)
        if isinstance(event, WorkerLoaded) and event.loaded.epoch == self.epoch:
            held = {one.session: one.positions for one in event.loaded.held}
            self.claims.setdefault(event.worker, held)
        was_flying = {part.session for step in self.flying.values() for part in step.rows}
        ends_plan = self._phase is Phase.READY and any(
            isinstance(effect, PhaseChanged) and effect.phase is not Phase.READY for effect in effects
        )
        is_over = any(isinstance(one, SendControl) and isinstance(one.message, Unload) for one in effects)
        if isinstance(event, WorkerFaulted) and event.fault.epoch != self.epoch:
            assert not is_over, "a fault of another epoch ended a plan"
        if ends_plan:
            is_forced = is_over or isinstance(event, WorkerGone | WorkerJoined | Tick)
            assert is_forced or not was_flying, "a change that nobody forced broke a step"
            self._waits_since = awake_s
            for session in was_flying:
                self.requests[session].setbacks += 1
        for effect in effects:
            match effect:
                case SendControl(message=Load() as load):
                    self._check_load(effect.worker, load)
                case SendControl(message=Release() as release):
                    self._check_release(effect.worker, release)
                case SendControl(message=Goodbye()):
                    self._check_goodbye(effect.worker)
                case SendStep():
                    self._check_step(effect, answers)
                case TokensCommitted():
                    self._check_tokens(effect, answers)
                case SessionEnded() | SessionFailed():
                    self._check_end(effect, event, answers, awake_s)
                case PhaseChanged():
                    self._phase = effect.phase
                case _:
                    pass
        ended = {effect.session for effect in effects if isinstance(effect, SessionEnded | SessionFailed)}
        self._check_bounds(ended)

    def _log(self, session: SessionId, answers: dict[SessionId, list[int]]) -> list[int]:
        request = self.requests[session]
        return request.prompt + request.answer + answers.get(session, [])

    def _check_tokens(self, effect: TokensCommitted, answers: dict[SessionId, list[int]]) -> None:
        request = self.requests[effect.session]
        assert request.end is None, f"{effect.session} gets tokens after its end"
        new = answers.setdefault(effect.session, [])
        assert effect.index == len(request.answer) + len(new), f"{effect.session}: token {effect.index} comes twice"
        new += effect.tokens
        request.setbacks = 0
        so_far = request.answer + new
        assert so_far == request.whole[: len(so_far)], f"{effect.session}: wrong token at {len(so_far)}"

    def _check_load(self, worker: WorkerId, load: Load) -> None:
        assert load.plan.epoch >= self.epoch
        if load.plan.epoch > self.epoch:
            self.epoch = load.plan.epoch
            self.flying, self.held, self.starts, self.released, self.told_release = {}, {}, {}, set(), set()
            self.claims, self.known, self.loaded_on = {}, set(), {}
            self.carried = {carry.session: carry for carry in load.carries}
            assert all(self.requests[session].end is None for session in self.carried)
        assert worker not in self.loaded_on, f"{worker} is sent epoch {self.epoch} twice"
        self.loaded_on[worker] = load
        places = sorted((carry.at, carry.at + carry.capacity) for carry in load.carries)
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(places))
        assert not places or places[-1][1] <= load.plan.kv_positions

    def _check_goodbye(self, worker: WorkerId) -> None:
        member = self.core._registry.get(worker)
        assert member is not None
        assert member.is_leaving
        assert (worker, member.incarnation) not in self.said_goodbye
        self.said_goodbye.add((worker, member.incarnation))

    def _check_release(self, worker: WorkerId, release: Release) -> None:
        flying = {part.session for step in self.flying.values() for part in step.rows}
        for session in release.sessions:
            assert session in self.starts or session in self.carried
            assert session not in flying
            assert (worker, session) not in self.told_release
            self.held.pop(session, None)
            self.released.add(session)
            self.told_release.add((worker, session))

    def _check_step(self, effect: SendStep, answers: dict[SessionId, list[int]]) -> None:
        step, plan = effect.step, self.core.plan
        assert plan is not None
        assert (step.epoch, effect.worker) == (plan.epoch, plan.head)
        assert set(plan.workers) <= self.claims.keys(), "a step before all have loaded"
        assert step.step > self.last_step
        if not self.starts:
            self.room = plan.kv_positions
        self.last_step = step.step
        flying = {part.session for other in self.flying.values() for part in other.rows}
        tokens = token_ids(effect.tokens).tolist()
        starts = {part.session: part.start for part in step.rows}
        assert [new.session for new in step.opens] == [part for part in starts if part not in self.known]
        for new in step.opens:
            history, tokens = tokens[: new.history], tokens[new.history :]
            assert new.history == starts[new.session]
            assert history == self._log(new.session, answers)[: new.history]
            self.known.add(new.session)
        for part in step.rows:
            assert self.requests[part.session].end is None
            assert part.session not in flying | self.released
            assert part.start == self.starts.get(part.session, self._first_start(part.session))
            log = self._log(part.session, answers)
            mine, tokens = tokens[: part.count], tokens[part.count :]
            assert mine == log[part.start : part.start + part.count]
            assert part.sample == (part.start + part.count == len(log))
            self.starts[part.session] = part.start + part.count
            place = range(part.at, part.at + part.capacity)
            assert self.held.setdefault(part.session, place) == place
            if part.session in self.carried:
                assert self.carried[part.session].at == part.at
        assert tokens == []
        assert len(step.layers) or sum(part.count > 1 for part in step.rows) <= 1
        assert not len(step.layers) or sum(part.count for part in step.rows) <= self.policy.prefill_chunk
        self.flying[step.step] = step
        assert len(self.flying) <= len(plan.stages)
        assert len(self.held) <= self.policy.max_sessions
        places = sorted(self.held.values(), key=lambda place: place.start)
        assert all(one.stop <= other.start for one, other in itertools.pairwise(places))
        assert not places or places[-1].stop <= self.room == plan.kv_positions

    def _first_start(self, session: SessionId) -> int:
        """Where a session goes on in a new epoch: at the first position that some worker with keys and values lacks."""
        carry, plan = self.carried.get(session), self.core.plan
        if carry is None or plan is None:
            return 0
        bearers = [share.worker for stage in plan.stages for share in stage.members if len(share.groups)]
        return min([carry.computed, *(self.claims[worker].get(session, 0) for worker in bearers)])

    def _check_end(
        self, end: SessionEnded | SessionFailed, event: Event, answers: dict[SessionId, list[int]], awake_s: float
    ) -> None:
        request = self.requests[end.session]
        assert request.end is None, f"{end.session} ends twice"
        answer = request.answer + answers.get(end.session, [])
        whole = request.whole
        assert answer == whole[: len(answer)]
        if isinstance(end, SessionFailed):
            self._check_failure(end, event, awake_s)
            return
        assert end.usage.completion_tokens == len(answer)
        starts = [leg.start for leg in end.legs]
        assert starts == sorted(set(starts))
        if end.reason is not FinishReason.CANCELLED:
            assert answer == whole
            assert (end.reason is FinishReason.LENGTH) == (len(whole) == request.max_tokens)
            assert starts

    def _check_failure(self, end: SessionFailed, event: Event, awake_s: float) -> None:
        """A session may only be lost for a reason that was promised."""
        assert isinstance(end.error, ManyhandsError)
        assert end.error.message
        request = self.requests[end.session]
        if isinstance(event, RequestArrived) and event.session == end.session:
            assert isinstance(end.error, Overloaded | PromptTooLong)
        elif isinstance(end.error, PromptTooLong):
            assert not request.answer, f"{end.session} had {len(request.answer)} tokens and has no room any more"
        elif isinstance(end.error, Overloaded):
            assert isinstance(event, Tick)
            assert "no model after" in end.error.message
            waited_s = awake_s - max(self._waits_since, self._asked_at.get(end.session, 0.0))
            assert waited_s >= self.policy.form_timeout_s, f"{end.session} expires after {waited_s:.1f} s"
        else:
            assert request.setbacks >= MAX_SETBACKS // ERROR_WEIGHT, f"{end.session} is given up early: {end.error}"

    def _check_bounds(self, ended: set[SessionId]) -> None:
        sessions = self.core._sessions
        assert sessions.counts.running <= self.policy.max_sessions
        still_open = sum(one.end is None and number not in ended for number, one in self.requests.items())
        assert sessions.counts.running + sessions.counts.waiting == still_open
