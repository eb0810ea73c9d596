"""The queue and the life of all sessions: admitted while memory lasts, batched into steps, ended one by one.

Knows nothing of workers beyond the plan it serves and the room it gives.

    waiting --place--> running: prompt in chunks, then a token a step --> ended
                         |  cancelled while a step computes it
                         +--> closing: its memory is released when that step is done
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from coordinator.arena import Arena
from coordinator.cluster_status import KvStatus, SessionCounts, Totals
from coordinator.events import (
    Effect,
    RequestArrived,
    RequestCancelled,
    SendControl,
    SendStep,
    SessionEnded,
    SessionFailed,
    TokensCommitted,
    token_bytes,
)
from coordinator.memory import KvRoom
from coordinator.policy import ClusterPolicy
from coordinator.session import Session, open_session
from protocol.batches import SessionRows
from protocol.errors import (
    FrameMalformed,
    InvariantBroken,
    LocalError,
    ManyhandsError,
    Overloaded,
    PromptTooLong,
)
from protocol.ids import SessionId
from protocol.messages import FinishReason, Release, SessionSampling, Step, StepDone
from protocol.plans import Plan
from protocol.specs import ModelSpec


class _InFlight(NamedTuple):
    rows: tuple[SessionRows, ...]
    sent_at: float


class Sessions:
    """All open sessions. `serve` and `interrupt` begin and end a plan's service; `schedule` keeps its pipeline full."""

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
        self._in_flight: dict[int, _InFlight] = {}
        self._next_step = 0
        self._idle_since = 0.0  # since when no plan is served
        self._refusal = ""
        self.totals = Totals()

    # ------------------------------------------------------------ what others ask

    @property
    def is_idle(self) -> bool:
        """Whether no session holds anything on the workers."""
        return not self._running and not self._closing

    @property
    def counts(self) -> SessionCounts:
        """How many sessions run and wait; one that only waits for its memory to be released counts as neither."""
        return SessionCounts(running=len(self._running), waiting=len(self._waiting))

    @property
    def kv(self) -> KvStatus:
        """How much of the room for keys and values is taken."""
        return KvStatus(positions=self._arena.positions, used=self._arena.used)

    @property
    def oldest_step_at(self) -> float | None:
        """When the oldest step in flight was sent; None when there is none."""
        return min((step.sent_at for step in self._in_flight.values()), default=None)

    def phase_of(self, session: SessionId) -> str:
        """Say in a few words what a session waits for; empty for an unknown one."""
        found = self._running.get(session)
        if found is None:
            place = next((i for i, waiting in enumerate(self._waiting) if waiting.session == session), None)
            return "" if place is None else f"queued behind {place} others, {len(self._running)} running"
        if found.computed < found.num_prompt:
            return f"reading the prompt: {found.computed} of {found.num_prompt} tokens"
        return "answering"

    # ------------------------------------------------------------ requests

    def arrive(self, event: RequestArrived, now: float) -> list[Effect]:
        """Queue a request, or refuse it with RequestInvalid, PromptTooLong or Overloaded.

        Raises InvariantBroken when its number belongs to an open session.
        """
        if event.session in self._running or event.session in self._closing or event.session in self._waiting_ids():
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
        late = [one for one in self._waiting if now - max(one.arrived_at, self._idle_since) >= limit_s]
        return [self._drop(one, Overloaded(f"no model after {limit_s:g} s: {detail}")) for one in late]

    def stop(self, reason: str) -> list[Effect]:
        """Fail every session, and every request from now on."""
        self._refusal = reason
        effects: list[Effect] = [self._failed(session, Overloaded(reason)) for session in self._running]
        effects += [self._drop(waiting, Overloaded(reason)) for waiting in list(self._waiting)]
        self._forget_epoch()
        return effects

    def _waiting_ids(self) -> Iterable[SessionId]:
        return (session.session for session in self._waiting)

    def _require_place(self, session: Session) -> None:
        if self._refusal:
            raise Overloaded(self._refusal)
        if len(self._waiting) >= self._policy.max_waiting:
            raise Overloaded(f"{len(self._waiting)} requests are waiting already", remedy="try again later")
        self._require_room(session)

    def _require_room(self, session: Session) -> None:
        if self._room is not None and session.capacity > self._room.positions:
            raise PromptTooLong(
                f"{session.num_prompt} prompt tokens and max_tokens {session.max_tokens} need {session.capacity} "
                f"positions, but {self._room.text}",
                remedy=f"shorten the prompt, lower max_tokens, or {self._room.remedy}",
                node=self._room.worker or "",
            )

    # ------------------------------------------------------------ epochs

    def serve(self, plan: Plan, room: KvRoom) -> None:
        """Run sessions under this plan from now on."""
        self._plan, self._room, self._arena = plan, room, Arena(room.positions)

    def interrupt(self, error: ManyhandsError, now: float) -> list[Effect]:
        """The plan is over. This is the one place that decides what becomes of its sessions: they fail.

        A later version may instead set `computed` to 0 and put them at the front of the queue: the log has it all.
        """
        lost = list(self._running)
        self._forget_epoch()
        self._idle_since = now
        return [self._failed(session, error) for session in lost]

    def _forget_epoch(self) -> None:
        self._plan = self._room = None
        self._arena = Arena(0)
        self._running, self._closing, self._released, self._in_flight = {}, {}, [], {}

    # ------------------------------------------------------------ steps

    def step_finished(self, done: StepDone, now: float) -> list[Effect]:
        """Take in a step's tokens; a step of another epoch, or unknown, is ignored.

        Raises FrameMalformed, before anything has changed, when its tokens are not those that were asked for.
        """
        if self._plan is None or done.epoch != self._plan.epoch or done.step not in self._in_flight:
            return []
        rows = self._in_flight[done.step].rows
        tokens = {sampled.session: sampled.token for sampled in done.tokens}
        wanted = {part.session for part in rows if part.sample}
        if tokens.keys() != wanted or len(done.tokens) != len(wanted):
            raise FrameMalformed(f"step {done.step} brought tokens for {sorted(tokens)}, not {sorted(wanted)}")
        if any(token >= self._spec.vocab for token in tokens.values()):
            raise FrameMalformed(f"step {done.step} brought a token outside the vocabulary of {self._spec.vocab}")
        del self._in_flight[done.step]
        effects: list[Effect] = []
        for part in rows:
            if self._closing.pop(part.session, None) is not None:
                self._released.append(part.session)
                continue
            session = self._running[part.session]
            session.is_in_flight = False
            session.computed = part.start + part.count
            if part.sample:
                effects += self._commit(session, tokens[part.session], now)
        return effects

    def schedule(self, now: float) -> list[Effect]:
        """Release what ended, admit what fits, and send steps until the pipeline is full."""
        if self._plan is None:
            return []
        effects = self._release(self._plan)
        effects += self._admit(now)
        while len(self._in_flight) < len(self._plan.stages):
            batch = self._pick(len(self._plan.stages))
            if not batch:
                break
            effects.append(self._send(self._plan, batch, now))
        return effects

    def _release(self, plan: Plan) -> list[Effect]:
        if not self._released:
            return []
        message = Release(sessions=tuple(self._released))
        for session in self._released:
            self._arena.free(session)
        self._released = []
        return [SendControl(worker=worker, message=message) for worker in plan.workers]

    def _admit(self, now: float) -> list[Effect]:
        """Move waiting sessions to running, in their order; one that can never fit fails and is passed."""
        effects: list[Effect] = []
        while self._waiting and self._room is not None:
            session = self._waiting[0]
            try:
                self._require_room(session)
            except PromptTooLong as error:
                effects.append(self._drop(session, error))
                continue
            if len(self._running) + len(self._closing) >= self._policy.max_sessions:
                break
            place = self._arena.take(session.session, session.capacity)
            if place is None:
                break
            self._waiting.popleft()
            session.at, session.started_at = place, now
            self._running[session.session] = session
            self._count(prompt_tokens=session.num_prompt)
        return effects

    def _pick(self, num_stages: int) -> list[tuple[Session, SessionRows]]:
        """Choose the next step's rows: decoding sessions, the longest unserved first, and one chunk of one prompt.

        A step takes at most its fair part of the sessions, so that every stage of the pipeline has a step to compute.
        """
        free = [session for session in self._running.values() if not session.is_in_flight]
        fair = -(-len(self._running) // num_stages)
        decoding = sorted((one for one in free if one.num_pending == 1), key=lambda one: one.last_step)
        prompts = [session for session in free if session.num_pending > 1]
        chosen = [*decoding[:fair], *prompts[:1]]
        return [(session, session.next_rows(self._policy.prefill_chunk)) for session in chosen]

    def _send(self, plan: Plan, batch: list[tuple[Session, SessionRows]], now: float) -> SendStep:
        step = self._next_step
        self._next_step += 1
        rows = tuple(part for _, part in batch)
        payload = b"".join(token_bytes(one.tokens[part.start : part.start + part.count]) for one, part in batch)
        opens = tuple(SessionSampling(session=one.session, sampling=one.sampling) for one, _ in batch if one.is_new)
        for session, _ in batch:
            session.is_in_flight, session.last_step = True, step
        self._in_flight[step] = _InFlight(rows, now)
        return SendStep(
            worker=plan.head, step=Step(epoch=plan.epoch, step=step, rows=rows, opens=opens), tokens=payload
        )

    # ------------------------------------------------------------ ends

    def _commit(self, session: Session, token: int, now: float) -> list[Effect]:
        """Append a token to the log, or end the session when it is an end-of-text token (which is not part of it)."""
        if session.first_token_at is None:
            session.first_token_at = now
        if token in session.stop_tokens:
            return [self._end(session, FinishReason.STOP, now)]
        index = session.num_answer
        session.tokens.append(token)
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
        elif session.is_new:  # the workers never saw it
            self._arena.free(session.session)
        else:
            self._released.append(session.session)
        return self._ended(session, reason, now)

    def _ended(self, session: Session, reason: FinishReason, now: float) -> SessionEnded:
        return SessionEnded(session=session.session, reason=reason, usage=session.usage(), timings=session.timings(now))

    def _drop(self, waiting: Session, error: ManyhandsError) -> SessionFailed:
        self._waiting.remove(waiting)
        return self._failed(waiting.session, error)

    def _failed(self, session: SessionId, error: ManyhandsError) -> SessionFailed:
        self._count(errors=1)
        return SessionFailed(session=session, error=error)

    def _count(self, **more: int) -> None:
        self.totals = self.totals.plus(**more)
