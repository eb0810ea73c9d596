"""The queue and the life of all sessions: admitted while memory lasts, batched into steps, ended one by one.

Knows nothing of workers beyond the plan it serves and the room it gives.

    waiting --place--> running: prompt in chunks, then a token a step --> ended
       ^                 |  cancelled while a step computes it
       |                 +--> closing: its memory is released when that step is done
       +--- interrupt ---+

An epoch that ends costs a session nothing but time: it goes back to the front of the queue with its log, and `prepare`
gives it a place under the next plan, where it goes on as far as the workers have it; `replays` says with which layers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

from coordinator.arena import Arena
from coordinator.batching import pick
from coordinator.cluster_status import KvStatus, SessionCounts, Totals
from coordinator.events import (
    Effect,
    RequestArrived,
    RequestCancelled,
    SendControl,
    SessionEnded,
    SessionFailed,
    TokensCommitted,
)
from coordinator.legs import leg_of
from coordinator.memory import KvRoom
from coordinator.policy import ClusterPolicy
from coordinator.replays import NOTHING, Remains, Repeated, find_replay, repeated_by
from coordinator.session import Session, open_session
from coordinator.steps_under_way import StepsUnderWay
from protocol.errors import InvariantBroken, LocalError, ManyhandsError, Overloaded, PromptTooLong
from protocol.ids import SessionId
from protocol.messages import Carry, FinishReason, Release, StepDone
from protocol.plans import Plan
from protocol.specs import ModelSpec


class Sessions:
    """All open sessions. `prepare`, `serve` and `interrupt` are a plan's service; `schedule` keeps its pipeline full.

    While `is_held` no step begins.
    """

    def __init__(self, spec: ModelSpec, policy: ClusterPolicy) -> None:
        self._spec = spec
        self._policy = policy
        self._plan: Plan | None = None
        self._room: KvRoom | None = None
        self._arena = Arena(0)
        self._waiting: deque[Session] = deque()
        self._running: dict[SessionId, Session] = {}
        self._closing: dict[SessionId, Session] = {}
        self._released: list[SessionId] = []
        self.steps = StepsUnderWay(spec)
        self._idle_since: float | None = 0.0  # since when no plan is served; None: since the first look
        self._cause = ""  # why the plan before is over
        self._refusal, self.is_held = "", False
        self.totals = Totals()

    # ------------------------------------------------------------ what others ask

    @property
    def is_idle(self) -> bool:
        """Whether no session holds anything on the workers."""
        return not self._running and not self._closing

    @property
    def is_between_steps(self) -> bool:
        """Whether no step is under way."""
        return not len(self.steps)

    @property
    def num_open(self) -> int:
        """Sessions that run or wait."""
        return len(self._running) + len(self._waiting)

    @property
    def num_tokens_shown(self) -> int:
        """Tokens of the answers of all sessions that run."""
        return sum(session.num_answer for session in self._running.values())

    @property
    def counts(self) -> SessionCounts:
        """How many run and wait; one that only waits for its memory to be released counts as neither."""
        return SessionCounts(running=len(self._running), waiting=len(self._waiting))

    @property
    def kv(self) -> KvStatus:
        """How much of the room for keys and values is taken."""
        return KvStatus(positions=self._arena.positions, used=self._arena.used)

    def phase_of(self, session: SessionId) -> str:
        """Say in a few words what a session waits for; empty for an unknown one."""
        found = self._running.get(session)
        if found is None:
            place = next((i for i, waiting in enumerate(self._waiting) if waiting.session == session), None)
            return "" if place is None else f"queued behind {place} others, {len(self._running)} running"
        return found.phase

    # ------------------------------------------------------------ requests

    def arrive(self, event: RequestArrived, now: float) -> list[Effect]:
        """Queue a request, or refuse it with RequestInvalid, PromptTooLong or Overloaded.

        Raises InvariantBroken when its number belongs to an open session.
        """
        if event.session in {*self._running, *self._closing, *(waiting.session for waiting in self._waiting)}:
            raise InvariantBroken(f"session {event.session} was begun twice")
        try:
            session = open_session(event, self._spec, now)
            self._require_place(session)
        except (LocalError, Overloaded) as error:
            return [self._failed(event.session, error)]
        self._waiting.append(session)
        self._count(requests=1)
        return []

    def cancel(self, event: RequestCancelled, now: float) -> list[Effect]:
        """End a session at once; what a step in flight still yields for it is dropped."""
        session = self._running.get(event.session)
        if session is not None:
            return [self._end(session, event.reason, now)]
        for waiting in self._waiting:
            if waiting.session == event.session:
                self._waiting.remove(waiting)
                return [self._ended(waiting, event.reason, now)]
        return []

    def expire(self, now: float, detail: str) -> list[Effect]:
        """Fail the requests that have waited too long for a plan; `detail` says what it waits for."""
        limit_s = self._policy.form_timeout_s
        idle_since = self._idle_since = now if self._idle_since is None else self._idle_since
        late = [one for one in self._waiting if now - max(one.arrived_at, idle_since) >= limit_s]
        return [self._drop(one, Overloaded(f"no model after {limit_s:g} s: {detail}")) for one in late]

    def stop(self, reason: str) -> list[Effect]:
        """Fail every session, and every request from now on."""
        self._refusal = reason
        effects: list[Effect] = [self._failed(session, Overloaded(reason)) for session in self._running]
        effects += [self._drop(waiting, Overloaded(reason)) for waiting in list(self._waiting)]
        self._forget_epoch()
        return effects

    def _require_place(self, session: Session) -> None:
        if self._refusal:
            raise Overloaded(self._refusal)
        if len(self._waiting) >= self._policy.max_waiting:
            raise Overloaded(f"{len(self._waiting)} requests are waiting already", remedy="try again later")
        if self._room is not None:
            session.require_room(self._room)

    # ------------------------------------------------------------ epochs

    def prepare(self, plan: Plan, room: KvRoom) -> tuple[Carry, ...]:
        """Give the sessions that have begun their places under a plan that is about to load, while there are any."""
        self._room, self._arena = room, Arena(room.positions)
        begun = [session for session in self._waiting if session.reached]
        for session in begun:
            is_full = len(self._running) >= self._policy.max_sessions
            place = None if is_full else self._arena.take(session.session, session.capacity)
            if place is None:
                session.computed = session.reached = 0  # nobody keeps it for later
                continue
            self._waiting.remove(session)
            session.at, session.is_known = place, True
            self._running[session.session] = session
        return tuple(
            Carry(session=one.session, at=one.at, capacity=one.capacity, computed=one.reached)
            for one in self._running.values()
        )

    def serve(self, plan: Plan, remains: Mapping[SessionId, Remains]) -> Repeated:
        """Run sessions under this plan from now on; `remains`: what the workers have of carried ones.

        Returns what will be computed again.
        """
        self._plan = plan
        self.is_held = False
        total, num_layers = NOTHING, plan.model.layers
        for session in self._running.values():
            found = remains.get(session.session) or Remains([0] * num_layers)
            session.replay = find_replay(found, session.reached)
            session.computed = session.replay.start
            repeated = repeated_by(session.replay, session.reached, num_layers)
            session.begin_leg(leg_of(plan, session.num_answer, self._cause, repeated))
            total = total.plus(repeated)
        return total

    def interrupt(self, error: ManyhandsError, now: float) -> list[Effect]:
        """The plan is over: what runs goes back to the front of the queue, and steps under way never were.

        A session that was under way time and again when an epoch ended fails with `error`: it may well be the reason.
        """
        effects: list[Effect] = []
        for session in list(self._running.values()):
            if session.is_given_up_after(error):
                del self._running[session.session]
                effects.append(self._failed(session.session, error))
        self.rest(error.message, now)
        return effects

    def rest(self, cause: str, now: float) -> None:
        """The plan is over, for a better one if no step is under way: all go back to the front of the queue."""
        running = list(self._running.values())
        self._forget_epoch()
        self._cause, self._idle_since = cause, now
        for session in reversed(running):
            session.is_in_flight = session.is_known = False
            session.replay = None
            self._waiting.appendleft(session)

    def restore(self, saved: Iterable[Session]) -> None:
        """Queue sessions of an earlier life of the coordinator; what workers still hold of them will show."""
        self._idle_since = None
        for session in saved:
            session.advance_to(len(session.tokens) - 1)
            self._waiting.append(session)

    def _forget_epoch(self) -> None:
        self._plan = self._room = None
        self._arena = Arena(0)
        self._running, self._closing, self._released = {}, {}, []
        self.steps.forget()

    # ------------------------------------------------------------ steps

    def step_finished(self, done: StepDone, now: float) -> list[Effect]:
        """Take in a step's tokens; a step of another epoch, or unknown, is ignored.

        Raises FrameMalformed, before anything has changed, when its tokens are not those that were asked for.
        """
        if self._plan is None or done.epoch != self._plan.epoch:
            return []
        finished = self.steps.finish(done)
        if finished is None:
            return []
        effects: list[Effect] = []
        for part in finished.rows:
            if self._closing.pop(part.session, None) is not None:
                self._released.append(part.session)
                continue
            session = self._running[part.session]
            session.is_in_flight = False
            session.advance_to(part.start + part.count)
            if part.sample:
                effects += self._commit(session, finished.tokens[part.session], now)
        return effects

    def schedule(self, now: float) -> list[Effect]:
        """Release what ended, admit what fits, and send steps until the pipeline is full."""
        plan = self._plan
        if plan is None:
            return []
        effects = self._release(plan)
        if self.is_held:
            return effects
        effects += self._admit(plan, now)
        while len(self.steps) < len(plan.stages):
            batch = pick(self._running.values(), len(plan.stages), plan.prompt_rows(self._policy.prefill_chunk))
            if not batch.parts:
                break
            effects.append(self.steps.send(plan, batch, now))
        return effects

    def _release(self, plan: Plan) -> list[Effect]:
        if not self._released:
            return []
        message = Release(sessions=tuple(self._released))
        for session in self._released:
            self._arena.free(session)
        self._released = []
        return [SendControl(worker=worker, message=message) for worker in plan.workers]

    def _admit(self, plan: Plan, now: float) -> list[Effect]:
        """Move waiting sessions to running, in their order; one that can never fit fails and is passed."""
        effects: list[Effect] = []
        while self._waiting and self._room is not None:
            session = self._waiting[0]
            try:
                session.require_room(self._room)
            except PromptTooLong as error:
                effects.append(self._drop(session, error))
                continue
            if len(self._running) + len(self._closing) >= self._policy.max_sessions:
                break
            place = self._arena.take(session.session, session.capacity)
            if place is None:
                break
            self._waiting.popleft()
            session.at = place
            self._running[session.session] = session
            session.begin_leg(leg_of(plan, session.num_answer, self._cause if session.num_answer else ""))
            if session.started_at is None:
                session.started_at = now
                self._count(prompt_tokens=session.num_prompt)
        return effects

    # ------------------------------------------------------------ ends

    def _commit(self, session: Session, token: int, now: float) -> list[Effect]:
        """Append a token to the log, or end the session when it is an end-of-text token (which is not part of it)."""
        if session.first_token_at is None:
            session.first_token_at = now
        if token in session.stop_tokens:
            return [self._end(session, FinishReason.STOP, now)]
        index = session.num_answer
        session.tokens.append(token)
        session.setbacks = 0
        self._count(completion_tokens=1)
        committed = TokensCommitted(session=session.session, index=index, tokens=(token,))
        if session.num_answer == session.max_tokens:
            return [committed, self._end(session, FinishReason.LENGTH, now)]
        return [committed]

    def _end(self, session: Session, reason: FinishReason, now: float) -> SessionEnded:
        """End a running session; its memory on the workers goes when no step computes it any more."""
        del self._running[session.session]
        if session.is_in_flight:
            self._closing[session.session] = session
        elif session.is_known:
            self._released.append(session.session)
        else:
            self._arena.free(session.session)
        return self._ended(session, reason, now)

    def _ended(self, session: Session, reason: FinishReason, now: float) -> SessionEnded:
        return SessionEnded(
            session=session.session,
            reason=reason,
            usage=session.usage(),
            timings=session.timings(now),
            legs=tuple(session.legs),
        )

    def _drop(self, waiting: Session, error: ManyhandsError) -> SessionFailed:
        self._waiting.remove(waiting)
        return self._failed(waiting.session, error)

    def _failed(self, session: SessionId, error: ManyhandsError) -> SessionFailed:
        self._count(errors=1)
        return SessionFailed(session=session, error=error)

    def _count(self, **more: int) -> None:
        self.totals = self.totals.plus(**more)
