"""The referee of the seeded world: checks every effect of the core against what was promised.

Knows nothing of how the world works. `FoldedLog` stands for a model, `expected_answer` for a single machine.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from core_cases import make_spec

from coordinator.events import (
    Effect,
    SendControl,
    SendStep,
    SessionEnded,
    SessionFailed,
    TokensCommitted,
    token_ids,
)
from coordinator.policy import ClusterPolicy
from coordinator.state import ClusterState
from protocol.errors import ManyhandsError
from protocol.ids import SessionId, WorkerId
from protocol.messages import Carry, FinishReason, Load, Release, Step

VOCAB = 97
SPEC = make_spec(layers=4, max_positions=256, vocab=VOCAB)


class FoldedLog:
    """Stands for a model: the next token depends on all tokens before it, in their order."""

    def __init__(self) -> None:
        self.length = 0
        self._value = 1

    def extend(self, tokens: list[int]) -> None:
        for token in tokens:
            self._value = (self._value * 31 + token) % 1_000_003
        self.length += len(tokens)

    @property
    def next_token(self) -> int:
        return self._value % VOCAB


def expected_answer(prompt: list[int], max_tokens: int, stop_tokens: frozenset[int]) -> list[int]:
    """What a single machine would answer."""
    log, answer = FoldedLog(), list[int]()
    log.extend(prompt)
    while len(answer) < max_tokens and log.next_token not in stop_tokens:
        answer.append(log.next_token)
        log.extend(answer[-1:])
    return answer


@dataclass
class Request:
    prompt: list[int]
    max_tokens: int
    stop_tokens: frozenset[int]
    answer: list[int] = field(default_factory=list)
    end: SessionEnded | SessionFailed | None = None


class Referee:
    """Checks every effect against what was promised; raises AssertionError."""

    def __init__(self, core: ClusterState, policy: ClusterPolicy) -> None:
        self.core = core
        self.policy = policy
        self.requests: dict[SessionId, Request] = {}
        self.flying: dict[int, Step] = {}
        self.epoch = self.room = 0
        self.last_step = -1
        self.held: dict[SessionId, range] = {}  # places in the arena
        self.starts: dict[SessionId, int] = {}
        self.claims: dict[WorkerId, dict[SessionId, int]] = {}  # positions that workers say they have, this epoch
        self.known: set[SessionId] = set()  # to the head
        self.released: set[SessionId] = set()
        self.told_release: set[tuple[WorkerId, SessionId]] = set()
        self.carried: dict[SessionId, Carry] = {}

    def check_leases(self, now: float) -> None:
        """After a tick nobody counts as a member who was silent for too long."""
        assert all(member.lease.silence_s(now) < self.policy.lease_s for member in self.core._registry)

    def check(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case SendControl(message=Load() as load):
                    self._check_load(load)
                case SendControl(message=Release() as release):
                    self._check_release(effect.worker, release)
                case SendStep():
                    self._check_step(effect)
                case TokensCommitted():
                    request = self.requests[effect.session]
                    assert request.end is None
                    assert effect.index == len(request.answer)
                    request.answer += effect.tokens
                case SessionEnded() | SessionFailed():
                    self._check_end(effect)
                case _:
                    pass
        self._check_bounds()

    def _check_load(self, load: Load) -> None:
        assert load.plan.epoch >= self.epoch
        if load.plan.epoch > self.epoch:
            self.epoch = load.plan.epoch
            self.flying, self.held, self.starts, self.released, self.told_release = {}, {}, {}, set(), set()
            self.claims, self.known = {}, set()
            self.carried = {carry.session: carry for carry in load.carries}

    def _check_release(self, worker: WorkerId, release: Release) -> None:
        flying = {part.session for step in self.flying.values() for part in step.rows}
        for session in release.sessions:
            assert session in self.starts or session in self.carried
            assert session not in flying
            assert (worker, session) not in self.told_release
            assert self.requests[session].end is not None
            self.held.pop(session, None)
            self.released.add(session)
            self.told_release.add((worker, session))

    def _check_step(self, effect: SendStep) -> None:
        step, plan = effect.step, self.core.plan
        assert plan is not None
        assert (step.epoch, effect.worker) == (plan.epoch, plan.head)
        assert step.step > self.last_step
        if not self.starts:
            self.room = plan.kv_positions
        self.last_step = step.step
        flying = {part.session for other in self.flying.values() for part in other.rows}
        tokens = token_ids(effect.tokens).tolist()
        starts = {part.session: part.start for part in step.rows}
        assert [new.session for new in step.opens] == [part for part in starts if part not in self.known]
        for new in step.opens:
            request = self.requests[new.session]
            history, tokens = tokens[: new.history], tokens[new.history :]
            assert new.history == starts[new.session]
            assert history == (request.prompt + request.answer)[: new.history]
            self.known.add(new.session)
        for part in step.rows:
            request = self.requests[part.session]
            assert request.end is None
            assert part.session not in flying | self.released
            assert part.start == self.starts.get(part.session, self._first_start(part.session))
            log = request.prompt + request.answer
            mine, tokens = tokens[: part.count], tokens[part.count :]
            assert mine == log[part.start : part.start + part.count]
            assert part.sample == (part.start + part.count == len(log))
            self.starts[part.session] = part.start + part.count
            place = range(part.at, part.at + part.capacity)
            assert self.held.setdefault(part.session, place) == place
        assert tokens == []
        assert sum(part.count > 1 for part in step.rows) <= 1
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

    def _check_end(self, end: SessionEnded | SessionFailed) -> None:
        request = self.requests[end.session]
        assert request.end is None
        request.end = end
        whole = expected_answer(request.prompt, request.max_tokens, request.stop_tokens)
        assert request.answer == whole[: len(request.answer)]
        if isinstance(end, SessionFailed):
            assert isinstance(end.error, ManyhandsError)
            assert end.error.message
            return
        assert end.usage.completion_tokens == len(request.answer)
        if end.reason is not FinishReason.CANCELLED:
            assert request.answer == whole
            assert (end.reason is FinishReason.LENGTH) == (len(whole) == request.max_tokens)

    def _check_bounds(self) -> None:
        counts = self.core._sessions.counts
        assert counts.running <= self.policy.max_sessions
        assert counts.waiting <= self.policy.max_waiting + self.policy.max_sessions  # those that ran wait once more
        assert counts.running + counts.waiting == sum(request.end is None for request in self.requests.values())
