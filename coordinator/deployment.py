"""The life of the plan: waiting, probing, loading, ready, and on to the next one when somebody is lost, comes or goes.

Knows nothing of sockets, nor of sessions beyond `Service`. Epochs only rise. Every phase but READY has a deadline that
progress extends. A lost worker is answered by the next plan at once; after other failures the next try waits 1 s, 2 s,
4 s ... until a step has succeeded.

    WAITING --enough workers--> PROBING --all links known--> LOADING --all loaded--> READY
       ^  '---------------- all links known already ----------^                       | a `Change`, when it is prepared
       |                           |                          |<----------------------'
       +------ worker of the plan lost, fault, or deadline ---+-----------------------+
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from coordinator.change import Depot
from coordinator.cluster_status import LoadingStatus
from coordinator.crew import Crew
from coordinator.drafting import Draft, Drafter
from coordinator.events import Effect, Phase, SeatsChanged, SendControl
from coordinator.load_watch import LoadWatch
from coordinator.loads import Loads, Serving, holders, make_loads
from coordinator.planner import PlanRequest
from coordinator.policy import ClusterPolicy
from coordinator.reach import ReachBook
from coordinator.readiness import Readiness, make_ready
from coordinator.registry import Registry
from coordinator.renewal import Renewal
from coordinator.retry import Retry
from coordinator.seating import Seats
from coordinator.service import Service
from coordinator.story import Story
from protocol.errors import BudgetTooSmall, ManyhandsError, PeerLost, PlanImpossible
from protocol.ids import WorkerId
from protocol.messages import (
    ErrorReport,
    Fault,
    LinkMode,
    LinkOrder,
    Loaded,
    LoadProgress,
    Reached,
    Stocked,
    Unload,
)
from protocol.plans import Plan

EPOCHS_PER_TERM = 10**9
MAX_REASON = 1000  # characters


class Deployment:
    """The plan that is being formed or served. Methods return effects; `advance` takes every step that time allows."""

    def __init__(
        self, request: PlanRequest, policy: ClusterPolicy, registry: Registry, service: Service, *, term: int,
        seats: Seats = (),
    ) -> None:  # fmt: skip
        """`seats`: those of the last plan before the coordinator's own restart."""
        self._request = request
        self._policy = policy
        self._registry = registry
        self._service = service
        self.story = Story()
        self.crew = Crew(request, policy, registry, seats)
        self._drafter = Drafter(request, registry, self.crew.probation)
        self._reach = ReachBook(registry, policy.probe_timeout_s)
        self._depot = Depot(registry)
        self.epoch = term * EPOCHS_PER_TERM
        self.phase = Phase.WAITING
        self.detail = ""
        self.plan: Plan | None = None
        self.error: ManyhandsError | None = None
        self._current: Draft | None = None  # what `plan` was made of
        self._drafted: Draft | None = None  # while its links are probed
        self._loads: Loads | None = None
        self._readiness = Readiness(spares={}, copies=())
        self._serving: Serving | None = None
        self._refused_for = -1  # the revision of the registry for which there is no plan
        self._is_stopped = False
        self._retry = Retry(policy.retry_first_s, policy.retry_most_s)
        self._watch = LoadWatch()
        self._renewal = Renewal(
            drafter=self._drafter, crew=self.crew, service=service, story=self.story, reach=self._reach,
            depot=self._depot, stock_timeout_s=policy.load_timeout_s,
        )  # fmt: skip

    # ------------------------------------------------------------ what others ask

    @property
    def ready_plan(self) -> Plan | None:
        """The plan when sessions may run under it."""
        return self.plan if self.phase is Phase.READY else None

    @property
    def links(self) -> Mapping[WorkerId, tuple[LinkOrder, ...]]:
        """The links of the plan that loads or is ready."""
        return self._loads.links if self._loads is not None else {}

    def link_mode(self, worker: WorkerId, peer: WorkerId) -> LinkMode | None:
        """Return how `worker` reaches `peer` under the plan that loads or is ready; None when it doesn't."""
        return next((order.mode for order in self.links.get(worker, ()) if order.peer.worker == peer), None)

    def loading_of(self, worker: WorkerId) -> LoadingStatus | None:
        """Return how far a worker has come with loading; None when the plan does not wait for it."""
        return self._watch.status_of(worker)

    def loaded_report(self, worker: WorkerId) -> Loaded | None:
        """Return what a worker said when it had loaded its part of the plan; None before that."""
        return self._watch.reports.get(worker)

    @property
    def refusal(self) -> ManyhandsError | None:
        """Why no plan fits the workers that are here; None while one may."""
        is_same_crew = self._refused_for == self._registry.revision
        return self.error if is_same_crew and self.phase is Phase.WAITING else None

    def progress_text(self) -> str:
        """Say how far loading has come; empty in other phases."""
        return self._watch.text() if self.phase is Phase.LOADING else ""

    # ------------------------------------------------------------ events

    def lost(self, worker: WorkerId, error: ManyhandsError, now: float, *, on_purpose: bool = False) -> list[Effect]:
        """A worker is no longer in the registry: if it is part of the plan, the plan is over."""
        self._reach.forget(worker)
        if not on_purpose:
            self.crew.probation.lost(worker, now)
        self._retry.lost(worker, now)
        self._renewal.lost(worker)
        self._watch.lost(worker)
        plan = self.plan or (self._drafted.plan if self._drafted else None)
        if plan is None or worker not in plan.workers:
            return []
        return self._fail(error, now, pause_s=self._retry.at_once(now))

    def reached(self, worker: WorkerId, reached: Reached) -> None:
        """A worker answered a probe."""
        self._reach.answer(worker, reached.probe, reached.workers)

    def progressed(self, worker: WorkerId, progress: LoadProgress, now: float) -> None:
        """A worker's loading got further (or not: then its deadline stays)."""
        self._watch.progressed(worker, progress, now)

    def loaded(self, worker: WorkerId, loaded: Loaded) -> None:
        """A worker is ready under an epoch."""
        if self._watch.loaded(worker, loaded) and self.plan is not None:
            self._registry.note_tiles(worker, self.plan.tiles_of(worker))

    def stocked(self, worker: WorkerId, stocked: Stocked, now: float) -> None:
        """A worker got further with the tiles it should have on its disk."""
        self._depot.stocked(worker, stocked)
        self._renewal.stocked(worker, stocked, now)

    def faulted(self, worker: WorkerId, fault: Fault, now: float) -> list[Effect]:
        """A worker can't go on: the plan is over, and the next try pauses first.

        One that lost its link to a neighbour gives that neighbour the time to turn out dead; if it lives, the next
        plan does not count on their link.
        """
        takes_part = self._loads is not None and worker in self._loads.workers
        if self.plan is None or fault.epoch != self.epoch or not takes_part:
            return []
        if not fault.lost:
            return self.failed(_named(fault.error, worker), now)
        lost = WorkerId(fault.lost)
        self._reach.broke(worker, lost)
        text = f"{worker} lost its link to {lost}: {fault.error.text}"
        error = PeerLost(text, node=lost, phase=self.phase.value)
        return self._fail(error, now, pause_s=self._retry.after_broken_link(lost, now))

    def failed(self, error: ManyhandsError, now: float) -> list[Effect]:
        """The plan can't go on for a reason of its own; the next try pauses first."""
        if self.plan is None:
            return []
        return self._fail(error, now, pause_s=self._retry.after_error(now))

    def succeeded(self, now: float, *, has_token: bool) -> None:
        """A step has passed all stages: the next failure pauses from the beginning."""
        self._retry.succeeded()
        if has_token:
            self.story.resumed(now)

    def stop(self) -> list[Effect]:
        """End for good: tell the workers to unload."""
        effects = self._retire("the coordinator is stopping")
        self._is_stopped = True
        self._enter(Phase.WAITING, "stopping")
        return effects

    # ------------------------------------------------------------ steps that time and membership allow

    def advance(self, now: float) -> list[Effect]:
        """Take the next step of forming or changing, if it is time."""
        if self._is_stopped:
            return []
        if (head := self.crew.keep_head()) is not None:
            self.story.tell(now, f"{head} can't be spared: no other trusted worker is here")
        effects: list[Effect] = list(self.crew.dismiss(self._needed(now)))
        match self.phase:
            case Phase.WAITING:
                return effects + self._form(now)
            case Phase.PROBING if self._drafted is not None and self._reach.is_over(now):
                return effects + self._load(self._drafted, now)
            case Phase.LOADING:
                return effects + (self._check_loading(now) if self._watch.awaited else self._serve(now))
            case Phase.READY if self._current is not None:
                return effects + self._renew(self._current, now)
        return effects

    def _needed(self, now: float) -> Collection[WorkerId]:
        """Return the workers that may not go yet: also between two plans, for what they have to give."""
        if self._loads is not None:
            return self._loads.workers
        is_coming = not self.crew.missing(now) and self._refused_for != self._registry.revision
        return self._serving.plan.workers if self._serving is not None and is_coming else ()

    def _form(self, now: float) -> list[Effect]:
        missing = self.crew.missing(now)
        if missing:
            self._enter(Phase.WAITING, missing)
            return []
        if not self._retry.is_due(now) or self._refused_for == self._registry.revision:
            return []
        try:
            draft = self._drafter.draft(
                self.crew.seats, now, epoch=self.epoch + 1, reach=self._reach.pairs, among=self.crew.returned
            )
        except (PlanImpossible, BudgetTooSmall) as error:
            self.error, self._refused_for = error, self._registry.revision
            self.story.tell(now, f"no plan: {error.message}")
            self._enter(Phase.WAITING, str(error))
            return []
        probes = self._reach.begin(draft.plan, now)
        if not probes:
            return self._load(draft, now)
        self._drafted = draft
        self._enter(Phase.PROBING, f"probing the links between {', '.join(draft.plan.workers)}")
        return probes

    def _load(self, draft: Draft, now: float) -> list[Effect]:
        draft = draft.with_hubs(self._reach.pairs)
        plan = draft.plan
        self.plan, self._current, self.epoch = plan, draft, plan.epoch
        self._drafted = None
        self.crew.seated(draft.seating.seats)
        self._renewal.settled(draft)
        self._readiness = self._get_ready(draft)
        carries = self._service.prepare(plan, draft.room())
        copies = self._readiness.copies
        self._loads = make_loads(plan, self._serving, self._registry, self._reach.pairs, carries=carries, copies=copies)
        self._watch = LoadWatch(plan.epoch, self._loads.workers, now)
        lacking = [tile for worker in plan.workers for tile in self._registry.lacks(worker, plan.tiles_of(worker))]
        self.story.planned(now, plan, lacking)
        self._enter(Phase.LOADING, f"loading on {', '.join(plan.workers)}")
        return list(self._loads.effects(plan))

    def _get_ready(self, draft: Draft) -> Readiness:
        spares, copies = self._policy.spares, self._policy.replicate_kv
        successors = self._drafter.successors(draft, max(spares, int(copies)))
        return make_ready(draft.plan, successors, spares=bool(spares), copies=copies)

    def _check_loading(self, now: float) -> list[Effect]:
        error = self._watch.stuck(now, self._policy.load_timeout_s)
        return self.failed(error, now) if error is not None else []

    def _serve(self, now: float) -> list[Effect]:
        """All have loaded: sessions run, who only gave is free, and what a loss would need is stocked."""
        plan, loads = self.plan, self._loads
        if plan is None or loads is None:
            return []
        repeated = self._service.serve(plan, self._watch.remains(plan))
        self._serving = Serving(plan=plan, copies=loads.copies)
        reports = self._watch.reports.values()
        fetched = sum(report.fetched_bytes for report in reports)
        load_s = max(report.load_s for report in reports)
        self.story.ready(now, plan, fetched_bytes=fetched, worker_load_s=load_s, repeated=repeated)
        self._enter(Phase.READY, self._shortage())
        effects: list[Effect] = [SeatsChanged(seats=self.crew.seats)]
        unload = Unload(epoch=plan.epoch, reason="thank you for what you gave")
        effects += [SendControl(worker=giver, message=unload) for giver in loads.givers if giver in self._registry]
        self._loads = Loads(links=loads.links, messages={one: loads.messages[one] for one in plan.workers})
        return effects + self._stock_spares(plan, now)

    def _stock_spares(self, plan: Plan, now: float) -> list[Effect]:
        cost = self._readiness.cost_text(plan.model)
        if cost:
            self.story.tell(now, f"getting ready for a loss: {cost}")
        held = holders(self._registry, [plan])
        return [
            self._depot.order(worker, tiles, held)
            for worker, tiles in self._readiness.spares.items()
            if worker in self._registry and self._registry.lacks(worker, tiles)
        ]

    def _renew(self, current: Draft, now: float) -> list[Effect]:
        """Let a better plan be prepared beside the running work, and load it between two steps."""
        outcome = self._renewal.advance(current, now, epoch=self.epoch + 1)
        self.detail = self._renewal.detail or self._shortage()
        if outcome.stop is not None:
            return outcome.effects + self._fail(outcome.stop, now, pause_s=self._retry.at_once(now))
        if outcome.load is None:
            return outcome.effects
        cause = self._renewal.reason
        self.story.broke(now, cause)
        self._service.rest(cause, now)
        return outcome.effects + self._load(outcome.load, now)

    def _shortage(self) -> str:
        return "" if self.crew.is_complete else f"some seats of plan {self._request.words} are empty"

    # ------------------------------------------------------------ the end of a plan

    def _fail(self, error: ManyhandsError, now: float, *, pause_s: float) -> list[Effect]:
        served = self.phase is Phase.READY
        where = f" at token {self._service.num_tokens_shown}" if served else f" while {self.phase.value}"
        self.story.tell(now, error.message + where)
        self.story.broke(now, error.message)
        effects = self._service.interrupt(error, now)
        effects += self._retire(str(error)[:MAX_REASON])
        self.error = error
        self._enter(Phase.WAITING, f"pausing {pause_s:g} s after: {error}" if pause_s else str(error))
        return effects

    def _retire(self, reason: str) -> list[Effect]:
        """Drop the plan or draft and tell its workers, as far as they are here."""
        plan, loads = self.plan, self._loads
        self.plan = self._drafted = self._loads = self._current = None
        self._watch = LoadWatch()
        self._renewal.drop()
        self._reach.give_up()
        if plan is None or loads is None:
            return []
        unload = Unload(epoch=plan.epoch, reason=reason)
        return [SendControl(worker=worker, message=unload) for worker in loads.workers if worker in self._registry]

    def _enter(self, phase: Phase, detail: str) -> None:
        self.phase, self.detail = phase, detail


def _named(report: ErrorReport, worker: WorkerId) -> ManyhandsError:
    """Rebuild a worker's error and name the worker, should it not do so itself."""
    error = report.error()
    error.node = error.node or worker
    return error
