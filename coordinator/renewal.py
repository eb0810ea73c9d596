"""Finds better plans while one serves, and prepares the change to them beside the running work.

Knows nothing of how a plan is loaded or ends. A better plan is one without those who should not be used any more, or
one that pays (`Crew.pays_at`), or, while no session runs, any other that the planner would make now.
"""

from __future__ import annotations

from typing import NamedTuple

from coordinator.change import Change, Depot, Stage
from coordinator.crew import Crew
from coordinator.drafting import Draft, Drafter
from coordinator.events import Effect
from coordinator.loads import holders
from coordinator.reach import ReachBook
from coordinator.service import Service
from coordinator.story import Story
from protocol.errors import BudgetTooSmall, ManyhandsError, PlanImpossible
from protocol.ids import WorkerId
from protocol.messages import Stocked


class Outcome(NamedTuple):
    """What to do now; `load` when the change is due, `stop` when the plan may not go on although there is no other."""

    effects: list[Effect]
    load: Draft | None = None
    stop: ManyhandsError | None = None


class Renewal:
    """At most one change at a time."""

    def __init__(
        self, *, drafter: Drafter, crew: Crew, service: Service, story: Story, reach: ReachBook, depot: Depot,
        stock_timeout_s: float,
    ) -> None:  # fmt: skip
        self._drafter = drafter
        self._crew = crew
        self._registry = depot.registry
        self._service = service
        self._story = story
        self._reach = reach
        self._depot = depot
        self._stock_timeout_s = stock_timeout_s
        self._change: Change | None = None
        self._better: Draft | None = None  # found, but maybe not worth a pause now
        self._pays_at = 0.0  # so many open requests
        self._considered = -1  # the usable workers for which this is so

    @property
    def reason(self) -> str:
        """Why a change is being prepared; empty when none is."""
        return self._change.reason if self._change is not None else ""

    @property
    def detail(self) -> str:
        """What is being prepared, for people."""
        return f"{self._change.reason} ({self._change.stage})" if self._change is not None else ""

    def advance(self, current: Draft, now: float, *, epoch: int) -> Outcome:
        """Take the next step. `current` is what serves, `epoch` the one that the next plan would have."""
        if self._change is not None and not all(map(self._drafter.is_willing, self._change.draft.plan.workers)):
            self.drop()  # somebody who was to take part does not want to any more
        if self._change is None:
            return self._seek(current, now, epoch)
        return self._go_on(self._change, current, now)

    def lost(self, worker: WorkerId) -> None:
        """A worker is gone: a change that counts on it is given up."""
        if self._change is not None and worker in self._change.draft.plan.workers:
            self.drop()

    def stocked(self, worker: WorkerId, stocked: Stocked, now: float) -> None:
        """Take in how far a worker has come with its tiles."""
        if self._change is not None:
            self._change.stocked(worker, stocked, now)

    def settled(self, draft: Draft) -> None:
        """A plan is loaded; who came while its links were probed or its tiles stocked is not considered yet."""
        self._change = self._better = None
        self._considered = draft.usable

    def drop(self) -> None:
        """Give up a change; the plan that serves goes on, or is over as well."""
        self._change = self._better = None
        self._considered = -1
        self._service.is_held = False

    def _seek(self, current: Draft, now: float, epoch: int) -> Outcome:
        usable = self._drafter.usable(now)
        if usable.number == self._considered and self._better is None:
            return Outcome([])
        names = usable.names
        going = [worker for worker in current.plan.workers if worker in self._registry and worker not in names]
        if usable.number != self._considered:
            self._considered, self._better = usable.number, None
            try:
                draft = self._drafter.draft(self._crew.seats, now, epoch=epoch, reach=self._reach.pairs)
            except (PlanImpossible, BudgetTooSmall) as error:
                return self._keep(going, error, now)
            if not draft.is_like(current.plan):
                self._better, self._pays_at = draft, self._crew.pays_at(current, draft)
        if self._better is None:
            return Outcome([])
        if not (going or self._service.is_idle or self._service.num_open >= self._pays_at):
            return Outcome([])
        reason = f"{', '.join(going)} hands over" if going else "a worker joined"
        self._change = Change(self._better, reason, forced=bool(going), now=now)
        self._story.tell(now, f"preparing a change: {reason}")
        probes = self._reach.begin(self._better.plan, now)
        return Outcome(probes) if probes else self._go_on(self._change, current, now)

    def _keep(self, going: list[WorkerId], error: ManyhandsError, now: float) -> Outcome:
        """There is no plan without those who should go: tell, and let those go who must."""
        if not going:
            return Outcome([])
        self._story.tell(now, f"{', '.join(going)} can't be spared: {error.message}")
        must = any(self._crew.must_stop(worker) for worker in going)
        return Outcome(list(self._crew.let_go(going)), stop=error if must else None)

    def _go_on(self, change: Change, current: Draft, now: float) -> Outcome:
        effects: list[Effect] = []
        if change.stage is Stage.PROBING:
            if not self._reach.is_over(now):
                return Outcome([])
            effects += change.stock(self._depot, holders(self._registry, [current.plan]), now)
        if change.stage is Stage.STOCKING:
            is_stuck = change.is_stuck(now, self._stock_timeout_s)
            if not change.is_stocked and not is_stuck:
                return Outcome(effects)
            if not change.forced and (is_stuck or change.error):
                self._give_up(change, now)
                return Outcome(effects)
            change.stage = Stage.HOLDING
        self._service.is_held = True
        return Outcome(effects, load=change.draft if self._service.is_between_steps else None)

    def _give_up(self, change: Change, now: float) -> None:
        """The plan stays as it is until the crew changes."""
        self._story.tell(now, f"gave up a change ({change.reason}): {change.error or 'no progress'}")
        considered = self._considered
        self.drop()
        self._considered = considered
