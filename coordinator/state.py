"""The coordinator's core: one state, `handle(event, now) -> effects`.

Knows nothing of sockets, clocks, files or threads; `now` is a parameter, and the rim carries out the effects.
"""

from __future__ import annotations

from collections.abc import Iterable

from coordinator.cluster_status import ClusterStatus, WorkerStatus
from coordinator.deployment import EPOCHS_PER_TERM, Deployment
from coordinator.events import (
    DisconnectWorker,
    Effect,
    Event,
    LeaveAsked,
    LoadProgressed,
    PeersReached,
    Phase,
    PhaseChanged,
    RequestArrived,
    RequestCancelled,
    SendControl,
    StepFinished,
    Stopping,
    Tick,
    TilesStocked,
    WorkerFaulted,
    WorkerGone,
    WorkerHeard,
    WorkerJoined,
    WorkerLoaded,
)
from coordinator.memory import StepBounds
from coordinator.pace import Pace
from coordinator.planner import PlanRequest
from coordinator.policy import ClusterPolicy
from coordinator.registry import Member, Registry
from coordinator.seating import Seats
from coordinator.session import Session
from coordinator.sessions import Sessions
from coordinator.shares import parse_words
from protocol.errors import AccessRefused, DeadlineExceeded, PeerLost, ProtocolViolation
from protocol.ids import SessionId, WorkerId
from protocol.messages import HeartbeatReply, LinkMode, Unload, WorkerPhase
from protocol.plans import Plan
from protocol.specs import ModelSpec

SLOWEST_STEP = 10  # in step timeouts: beyond that a step is lost, whatever else moves


class ClusterState:
    """Membership, the plan and the sessions of one model. Mutated through `handle` only, by one thread.

    `term` rises with every start of the coordinator; epochs of a later term are greater than all before.
    """

    def __init__(
        self, spec: ModelSpec, policy: ClusterPolicy, *, term: int, seats: Seats = (), saved: Iterable[Session] = ()
    ) -> None:
        """`seats` and `saved`: the last plan's seats and the open sessions before the coordinator's own restart.

        Raises PlanImpossible when the policy's plan words can't be read or never fit this model.
        """
        request = PlanRequest(
            spec=spec,
            shares=None if policy.plan_words is None else parse_words(policy.plan_words),
            head_only=policy.head_only,
            step=StepBounds(rows=policy.prefill_chunk + policy.max_sessions, sampled=policy.max_sessions),
            kv_positions=policy.kv_positions,
        )
        self._policy = policy
        self._term = term
        self._registry = Registry(policy.lease_s)
        self._sessions = Sessions(spec, policy)
        self._sessions.restore(saved)
        self._deployment = Deployment(request, policy, self._registry, self._sessions, term=term, seats=seats)
        self._told: tuple[Phase, str] | None = None
        self._pace = Pace()
        self._seen: float | None = None  # the latest time that was told
        self._away_s = 0.0

    # ------------------------------------------------------------ what the rim asks

    @property
    def plan(self) -> Plan | None:
        """The plan that is loading or ready."""
        return self._deployment.plan

    def can_relay(self, source: WorkerId, target: WorkerId) -> bool:
        """Say whether the plan that is loading or ready has a relayed link between these two."""
        return self._deployment.link_mode(source, target) is LinkMode.RELAY

    def session_phase(self, session: SessionId) -> str:
        """Say in a few words what an open session waits for; empty for an unknown one."""
        phase = self._sessions.phase_of(session)
        if not phase or self._deployment.phase is Phase.READY:
            return phase
        progress, recovery = self._deployment.progress_text(), self._deployment.story.current
        cause = f"{recovery.cause}; " if recovery is not None else ""
        return f"{cause}{self._deployment.phase}: {self._deployment.detail}" + (f" ({progress})" if progress else "")

    def status(self, now: float) -> ClusterStatus:
        """Describe the whole cluster."""
        now -= self._away_s
        deployment, error = self._deployment, self._deployment.error
        return ClusterStatus(
            term=self._term,
            epoch=deployment.epoch,
            phase=deployment.phase,
            detail=" ".join(part for part in (deployment.detail, deployment.progress_text()) if part),
            plan=deployment.plan,
            workers=tuple(self._worker_status(member, now) for member in self._registry),
            sessions=self._sessions.counts,
            kv=self._sessions.kv,
            totals=self._sessions.totals,
            last_error=str(error) if error else "",
            refusal=deployment.refusal,
            happenings=tuple(deployment.story.happenings),
            recoveries=tuple(deployment.story.recoveries),
            now=now,
        )

    def _worker_status(self, member: Member, now: float) -> WorkerStatus:
        relayed = any(order.mode is LinkMode.RELAY for order in self._deployment.links.get(member.worker, ()))
        return WorkerStatus(
            name=member.worker,
            role=member.role,
            profile=member.profile,
            addresses=member.addresses,
            heartbeat=member.heartbeat,
            loaded=self._deployment.loaded_report(member.worker),
            last_heard_s=member.lease.silence_s(now),
            link="relay" if relayed else "direct",
            loading=self._deployment.loading_of(member.worker),
            state=self._deployment.crew.state_of(member, now),
        )

    # ------------------------------------------------------------ the one way in

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in one event at monotonic time `now` (seconds) and return what must be done, in order.

        Raises InvariantBroken for a bug (a session number used twice); everything a peer can cause comes back as
        effects.
        """
        now = self._own_time(now)
        effects = self._take(event, now)
        effects += self._deployment.advance(now)
        effects += self._sessions.schedule(now)
        effects += self._tell_phase()
        return effects

    def _own_time(self, now: float) -> float:
        """Return the time that counts for deadlines: it stands still while nothing was handled, not even a tick.

        Then the whole process was away (suspended, stopped), and nobody's silence or slowness proves anything.
        """
        seen, self._seen = self._seen, now if self._seen is None else max(now, self._seen)
        if seen is not None and self._seen - seen > self._policy.lease_s / 2:
            self._away_s += self._seen - seen
            self._registry.renew_all(self._seen - self._away_s)
        return self._seen - self._away_s

    def _take(self, event: Event, now: float) -> list[Effect]:
        match event:
            case WorkerJoined():
                return self._join(event, now)
            case WorkerGone():
                return self._leave(event, now)
            case LeaveAsked():
                return self._ask_to_leave(event, now)
            case RequestArrived():
                return self._sessions.arrive(event, now)
            case RequestCancelled():
                return self._sessions.cancel(event, now)
            case Tick():
                return self._tick(now)
            case Stopping():
                return [*self._sessions.stop(event.reason), *self._deployment.stop()]
            case _:
                return self._hear(event, now)

    def _hear(
        self,
        event: WorkerHeard | PeersReached | LoadProgressed | WorkerLoaded | WorkerFaulted | StepFinished | TilesStocked,
        now: float,
    ) -> list[Effect]:
        """Take in what a worker says; every message renews its lease, and a stranger's changes nothing."""
        heartbeat = event.heartbeat if isinstance(event, WorkerHeard) else None
        if self._registry.heard(event.worker, heartbeat, now) is None:
            return [_say_hello_again(event.worker)] if heartbeat else []
        match event:
            case WorkerHeard():
                if heartbeat is not None:
                    return [SendControl(worker=event.worker, message=HeartbeatReply(sequence=heartbeat.sequence))]
            case PeersReached():
                self._deployment.reached(event.worker, event.reached)
            case LoadProgressed():
                self._deployment.progressed(event.worker, event.progress, now)
            case WorkerLoaded():
                self._deployment.loaded(event.worker, event.loaded)
            case WorkerFaulted():
                return self._deployment.faulted(event.worker, event.fault, now)
            case TilesStocked():
                self._deployment.stocked(event.worker, event.stocked, now)
            case StepFinished():
                return self._finish_step(event, now)
        return []

    def _tell_phase(self) -> list[Effect]:
        deployment = self._deployment
        told, self._told = self._told, (deployment.phase, deployment.detail)
        if told == self._told:
            return []
        return [PhaseChanged(phase=deployment.phase, epoch=deployment.epoch, detail=deployment.detail)]

    # ------------------------------------------------------------ workers

    def _join(self, event: WorkerJoined, now: float) -> list[Effect]:
        if event.hello.epoch >= (self._term + 1) * EPOCHS_PER_TERM:
            error = AccessRefused(
                f"{event.worker} obeys a coordinator that started later than this one",
                node=event.worker,
                remedy="end this coordinator: another one has taken its place",
            )
            return [DisconnectWorker(worker=event.worker, error=error)]
        effects = self._lose(event.worker, PeerLost(f"{event.worker} restarted", node=event.worker), now)
        self._registry.join(event, now)
        self._deployment.story.tell(now, f"{event.worker} is here")
        if event.hello.phase in (WorkerPhase.LOADING, WorkerPhase.READY):
            stale = Unload(epoch=event.hello.epoch, reason="this plan is over")
            effects.append(SendControl(worker=event.worker, message=stale))
        return effects

    def _lose(self, worker: WorkerId, error: PeerLost, now: float, *, on_purpose: bool = False) -> list[Effect]:
        if self._registry.leave(worker) is None:
            return []
        return self._deployment.lost(worker, error, now, on_purpose=on_purpose)

    def _leave(self, event: WorkerGone, now: float) -> list[Effect]:
        if event.worker not in self._registry:
            return []
        error = PeerLost(f"{event.worker} is gone: {event.reason}", node=event.worker)
        effects = self._lose(event.worker, error, now, on_purpose=event.on_purpose)
        return effects

    def _ask_to_leave(self, event: LeaveAsked, now: float) -> list[Effect]:
        """Note that a worker is to hand over and go; the plan does the rest."""
        if self._registry.mark_leaving(event.worker, own_wish=event.ask is not None) is None:
            return []
        reason = event.ask.reason if event.ask is not None else "somebody asked for it"
        self._deployment.story.tell(now, f"{event.worker} wants to leave: {reason}")
        return []

    def _finish_step(self, event: StepFinished, now: float) -> list[Effect]:
        plan = self._deployment.ready_plan
        if plan is None or event.worker != plan.head or event.done.epoch != plan.epoch:
            return []
        try:
            effects = self._sessions.step_finished(event.done, now)
        except ProtocolViolation as error:
            error.node = event.worker
            return self._deployment.failed(error, now)
        self._deployment.succeeded(now, has_token=bool(event.done.tokens))
        return effects

    # ------------------------------------------------------------ time

    def _tick(self, now: float) -> list[Effect]:
        effects = self._check_leases(now) + self._check_steps(now)
        if self._deployment.phase is Phase.WAITING:
            effects += self._sessions.expire(now, self._deployment.detail)
        self._watch_pace(now)
        return effects

    def _check_leases(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        silent = [member.worker for member in self._registry.silent(now)]
        errors = [
            PeerLost(f"{worker} was silent for {self._policy.lease_s:g} s", node=worker, phase="lease")
            for worker in silent
        ]
        for worker in silent:
            self._registry.leave(worker)
        for worker, error in zip(silent, errors, strict=True):
            effects += self._deployment.lost(worker, error, now)
            effects.append(DisconnectWorker(worker=worker, error=error))
        return effects

    def _watch_pace(self, now: float) -> None:
        """Suspect who is far behind its own statistics; a suspect stays, it is only told."""
        sent_at = self._sessions.steps.oldest_at
        for member in self._registry:
            is_suspect = self._pace.is_late(member, sent_at, now)
            if is_suspect and not member.is_suspect:
                self._deployment.story.tell(now, f"{member.worker} is far behind its own pace")
            member.is_suspect = is_suspect

    def _check_steps(self, now: float) -> list[Effect]:
        """End a plan whose oldest step is lost, or under which no worker makes progress any more."""
        sent_at, plan = self._sessions.steps.oldest_at, self._deployment.ready_plan
        limit_s = self._policy.step_timeout_s
        if sent_at is None or plan is None:
            return []
        members = [member for worker in plan.workers if (member := self._registry.get(worker)) is not None]
        moved_at = max((member.progress_at for member in members), default=sent_at)
        if now - max(sent_at, moved_at) < limit_s and now - sent_at < SLOWEST_STEP * limit_s:
            return []
        slowest = min(members, key=lambda member: member.progress_at, default=None)
        node = slowest.worker if slowest else plan.head
        text = f"a step made no progress for {limit_s:g} s; {node} moved last {now - moved_at:.0f} s ago"
        return self._deployment.failed(DeadlineExceeded(text, node=node, phase="step"), now)


def _say_hello_again(worker: WorkerId) -> DisconnectWorker:
    return DisconnectWorker(worker=worker, error=PeerLost(f"{worker} is not a member any more", node=worker))
