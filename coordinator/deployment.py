"""The life of the plan: waiting, probing, loading, ready, and back when a worker is lost or fails.

Knows nothing of sessions or sockets. Epochs only rise. Every phase but READY has a deadline that progress extends;
after a failure the next try waits 1 s, 2 s, 4 s ... until a step has succeeded.

    WAITING --enough workers--> PROBING --all answered or deadline--> LOADING --all loaded--> READY
       ^                           |                                     |                      |
       +------ worker of the plan lost, fault, or deadline --------------+----------------------+
"""

from __future__ import annotations

from typing import NamedTuple

from coordinator.cluster_status import LoadingStatus
from coordinator.events import Effect, Phase, SendControl
from coordinator.links import decide_links, probe_targets
from coordinator.memory import Candidate, KvRoom, bytes_text, kv_room
from coordinator.planner import PlanRequest, make_plan, seat_workers
from coordinator.policy import ClusterPolicy
from coordinator.registry import Registry
from protocol.errors import BudgetTooSmall, DeadlineExceeded, InvariantBroken, ManyhandsError, PeerLost, PlanImpossible
from protocol.ids import WorkerId
from protocol.messages import (
    ErrorReport,
    Fault,
    LinkMode,
    LinkOrder,
    Load,
    Loaded,
    LoadProgress,
    Probe,
    Reached,
    Unload,
)
from protocol.plans import Plan

EPOCHS_PER_TERM = 10**9
MAX_REASON = 1000  # characters
MAX_DOUBLINGS = 16


class _Loading(NamedTuple):
    """How far a worker has come, and since when."""

    step: str
    done_bytes: int
    total_bytes: int
    since: float


class Deployment:
    """The plan that is being formed or served. Methods return effects; `advance` takes every step that time allows."""

    def __init__(self, request: PlanRequest, policy: ClusterPolicy, registry: Registry, *, term: int) -> None:
        self._request = request
        self._policy = policy
        self._registry = registry
        self.epoch = term * EPOCHS_PER_TERM
        self.phase = Phase.WAITING
        self.detail = ""
        self.plan: Plan | None = None
        self.error: ManyhandsError | None = None
        self.links: dict[WorkerId, tuple[LinkOrder, ...]] = {}
        self._seats: list[WorkerId] = []
        self._planned_for: frozenset[tuple[WorkerId, int]] = frozenset()
        self._refused_for: frozenset[tuple[WorkerId, int]] | None = None
        self._candidates: tuple[Candidate, ...] = ()
        self._draft: Plan | None = None
        self._was_ready = self._is_stopped = False
        self._failures = 0
        self._retry_at = self._probe_until = 0.0
        self._probe = 0
        self._reach: set[tuple[WorkerId, WorkerId]] = set()
        self._unanswered: set[WorkerId] = set()
        self._loading: dict[WorkerId, _Loading] = {}
        self._reports: dict[WorkerId, Loaded] = {}

    # ------------------------------------------------------------ what others ask

    @property
    def ready_plan(self) -> Plan | None:
        """The plan when sessions may run under it."""
        return self.plan if self.phase is Phase.READY else None

    @property
    def kv_room(self) -> KvRoom:
        """The room for sessions under the ready plan; raises PlanImpossible when there is none."""
        if self.ready_plan is None:
            raise PlanImpossible("no plan is ready")
        return kv_room(self.ready_plan, self._candidates, self._request.step, self._request.kv_positions)

    def link_mode(self, worker: WorkerId, peer: WorkerId) -> LinkMode | None:
        """Return how `worker` reaches `peer` under the plan that loads or is ready; None when it doesn't."""
        orders = self.links.get(worker, ())
        return next((order.mode for order in orders if order.peer.worker == peer), None)

    def loading_of(self, worker: WorkerId) -> LoadingStatus | None:
        """Return how far a worker has come with loading; None when the plan does not wait for it."""
        state = self._loading.get(worker)
        if state is None:
            return None
        return LoadingStatus(step=state.step, done_bytes=state.done_bytes, total_bytes=state.total_bytes)

    def loaded_report(self, worker: WorkerId) -> Loaded | None:
        """Return what a worker said when it had loaded its part of the plan; None before that."""
        return self._reports.get(worker)

    def progress_text(self) -> str:
        """Say how far loading has come; empty in other phases."""
        if self.phase is not Phase.LOADING:
            return ""
        done = sum(state.done_bytes for state in self._loading.values())
        total = sum(state.total_bytes for state in self._loading.values())
        return f"{bytes_text(done)} of {bytes_text(total)}, waiting for {', '.join(self._loading)}"

    # ------------------------------------------------------------ events

    def lost(self, worker: WorkerId, error: ManyhandsError, now: float) -> list[Effect]:
        """A worker is no longer in the registry: if it is part of the plan, the plan is over."""
        plan = self.plan or self._draft
        if plan is None or worker not in plan.workers:
            return []
        # A worker that dies while it loads may do so again and again; one that dies while serving may just be gone.
        return self._fail(error, now, pause=self.phase is Phase.LOADING)

    def reached(self, worker: WorkerId, reached: Reached) -> None:
        """A worker answered the probe; an answer to an older probe is ignored."""
        if self.phase is Phase.PROBING and reached.probe == self._probe and worker in self._unanswered:
            self._unanswered.discard(worker)
            self._reach.update((worker, peer) for peer in reached.workers)

    def progressed(self, worker: WorkerId, progress: LoadProgress, now: float) -> None:
        """A worker's loading got further (or not: then its deadline stays)."""
        before = self._loading.get(worker)
        if self.phase is not Phase.LOADING or progress.epoch != self.epoch or before is None:
            return
        moved = (progress.phase, progress.done_bytes) != (before.step, before.done_bytes)
        since = now if moved else before.since
        self._loading[worker] = _Loading(progress.phase, progress.done_bytes, progress.total_bytes, since)

    def loaded(self, worker: WorkerId, loaded: Loaded) -> None:
        """A worker is ready under an epoch; when it was the last one, so is the plan."""
        if self.phase is not Phase.LOADING or loaded.epoch != self.epoch or worker not in self._loading:
            return
        del self._loading[worker]
        self._reports[worker] = loaded
        if not self._loading:
            self._was_ready = True
            self._enter(Phase.READY, "")

    def faulted(self, worker: WorkerId, fault: Fault, now: float) -> list[Effect]:
        """A worker can't go on: the plan is over, and the next try pauses first."""
        if self.plan is None or fault.epoch != self.epoch or worker not in self.plan.workers:
            return []
        if fault.lost:
            text = f"{worker} lost its link to {fault.lost}: {fault.error.text}"
            return self._fail(PeerLost(text, node=fault.lost, phase=self.phase.value), now, pause=True)
        return self.failed(_named(fault.error, worker), now)

    def failed(self, error: ManyhandsError, now: float) -> list[Effect]:
        """The plan can't go on for a reason of its own; the next try pauses first."""
        return self._fail(error, now, pause=True) if self.plan else []

    def succeeded(self) -> None:
        """A step has passed all stages: the next failure pauses from the beginning."""
        self._failures = 0

    def stop(self) -> list[Effect]:
        """End for good: tell the workers to unload."""
        effects = self._retire("the coordinator is stopping")
        self._is_stopped = True
        self._enter(Phase.WAITING, "stopping")
        return effects

    # ------------------------------------------------------------ steps that time and membership allow

    def advance(self, now: float, *, is_idle: bool) -> list[Effect]:
        """Take the next steps of forming. `is_idle`: no session runs, so a ready plan may be replaced."""
        if self._is_stopped:
            return []
        if self.phase is Phase.PROBING and (not self._unanswered or now >= self._probe_until):
            return self._load(now)
        if self.phase is Phase.LOADING:
            return self._check_loading(now)
        if self.phase is Phase.READY:
            return self._take_in(now) if is_idle else []
        if self.phase is Phase.WAITING:
            return self._form(now)
        return []

    def _form(self, now: float) -> list[Effect]:
        missing = self._missing()
        if missing:
            self._enter(Phase.WAITING, missing)
            return []
        if now < self._retry_at or self._refused_for == self._incarnations():
            return []
        return self._draft_plan(now)

    def _missing(self) -> str:
        """Say which workers are still wanted; empty when there are enough."""
        wanted = self._request.num_workers
        if wanted is None:
            wanted = 1 if self._was_ready else self._policy.workers
        here = [member.worker for member in self._registry]
        if self._registry.head is None:
            return f"waiting for a trusted worker to be the head; {len(here)} other workers are here"
        if len(here) < wanted:
            return f"waiting for {wanted - len(here)} of {wanted} workers; here: {', '.join(here)}"
        return ""

    @property
    def refusal(self) -> ManyhandsError | None:
        """Why no plan fits the workers that are here; None while one may."""
        is_same_crew = self._refused_for is not None and self._refused_for == self._incarnations()
        return self.error if is_same_crew and self.phase is Phase.WAITING else None

    def _draft_plan(self, now: float) -> list[Effect]:
        self._planned_for = self._incarnations()
        self._candidates = self._list_candidates()
        self._reach = set()
        try:
            draft = self._make_plan()
        except (PlanImpossible, BudgetTooSmall) as error:
            self.error, self._refused_for = error, self._planned_for
            self._enter(Phase.WAITING, str(error))
            return []
        return self._probe_links(draft, now)

    def _list_candidates(self) -> tuple[Candidate, ...]:
        """Return the workers in the order of shares."""
        members = {member.worker: member for member in self._registry}
        head = self._registry.head
        if head is None:
            raise InvariantBroken("a plan was begun without a head")
        others = [worker for worker in members if worker != head.worker]
        seated = seat_workers(head.worker, others, self._seats)
        return tuple(Candidate.of(name, members[name].profile) for name in seated)

    def _make_plan(self) -> Plan:
        return make_plan(self._request, self._candidates, epoch=self.epoch + 1, reach=frozenset(self._reach))

    def _incarnations(self) -> frozenset[tuple[WorkerId, int]]:
        return frozenset((member.worker, member.incarnation) for member in self._registry)

    def _probe_links(self, draft: Plan, now: float) -> list[Effect]:
        self._draft = draft
        self._probe += 1
        self._probe_until = now + self._policy.probe_timeout_s
        targets = probe_targets(draft)
        self._unanswered = set(targets)
        if not targets:
            return self._load(now)
        self._enter(Phase.PROBING, f"probing the links between {', '.join(draft.workers)}")
        peers = {member.worker: member.peer for member in self._registry}
        return [
            SendControl(worker=worker, message=Probe(probe=self._probe, peers=tuple(peers[name] for name in partners)))
            for worker, partners in targets.items()
        ]

    def _load(self, now: float) -> list[Effect]:
        plan = self._make_plan()  # the draft again, but with hubs chosen by what the probes found
        self.plan, self._draft, self.epoch = plan, None, plan.epoch
        self._seats = [candidate.worker for candidate in self._candidates]
        peers = {member.worker: member.peer for member in self._registry}
        self.links = decide_links(plan, frozenset(self._reach), peers)
        self._loading = {worker: _Loading("", 0, 0, now) for worker in plan.workers}
        self._enter(Phase.LOADING, f"loading on {', '.join(plan.workers)}")
        return [
            SendControl(worker=worker, message=Load(plan=plan, links=self.links[worker]), wants_manifest=True)
            for worker in plan.workers
        ]

    def _check_loading(self, now: float) -> list[Effect]:
        limit_s = self._policy.load_timeout_s
        for worker, state in self._loading.items():
            if now - state.since >= limit_s:
                text = f"{worker} made no progress in loading for {limit_s:g} s ({state.step or 'not begun'})"
                return self.failed(DeadlineExceeded(text, node=worker, phase="loading"), now)
        return []

    def _take_in(self, now: float) -> list[Effect]:
        """Replace an automatic plan that newcomers would change."""
        if self._request.shares is not None or self.plan is None or self._incarnations() <= self._planned_for:
            return []
        self._planned_for = self._incarnations()
        candidates, self._candidates = self._candidates, self._list_candidates()
        try:
            plan = self._make_plan()
        except (PlanImpossible, BudgetTooSmall):
            plan = self.plan  # the one we have works: keep it
        if _without_hubs(plan) == _without_hubs(self.plan):
            self._candidates = candidates
            return []
        return [*self._retire("a worker joined"), *self._draft_plan(now)]

    # ------------------------------------------------------------ the end of a plan

    def _fail(self, error: ManyhandsError, now: float, *, pause: bool) -> list[Effect]:
        effects = self._retire(str(error)[:MAX_REASON])
        self.error = error
        if pause:
            first_s, most_s = self._policy.retry_first_s, self._policy.retry_most_s
            pause_s = min(most_s, first_s * 2 ** min(self._failures, MAX_DOUBLINGS))
            self._failures += 1
            self._retry_at = now + pause_s
            self._enter(Phase.WAITING, f"pausing {pause_s:g} s after: {error}")
        else:
            self._enter(Phase.WAITING, str(error))
        return effects

    def _retire(self, reason: str) -> list[Effect]:
        """Drop the plan or draft and tell its workers, as far as they are here."""
        plan, self.plan, self._draft = self.plan, None, None
        self.links, self._loading, self._reports, self._unanswered = {}, {}, {}, set()
        if plan is None:
            return []
        unload = Unload(epoch=plan.epoch, reason=reason)
        return [SendControl(worker=worker, message=unload) for worker in plan.workers if worker in self._registry]

    def _enter(self, phase: Phase, detail: str) -> None:
        self.phase, self.detail = phase, detail


def _without_hubs(plan: Plan) -> tuple[object, ...]:
    return (plan.head, *((stage.layers, stage.members) for stage in plan.stages))


def _named(report: ErrorReport, worker: WorkerId) -> ManyhandsError:
    """Rebuild a worker's error and name the worker, should it not do so itself."""
    error = report.error()
    error.node = error.node or worker
    return error
