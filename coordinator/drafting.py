"""From who is here to a plan: which workers may be used, who takes which share, and what should be ready for a loss.

Knows nothing of time's passing, links or sessions.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from coordinator.memory import Candidate, KvRoom, kv_room
from coordinator.planner import PlanRequest, Reach, make_plan
from coordinator.probation import Probation
from coordinator.registry import Member, Registry
from coordinator.seating import Seating, Seats, seat
from protocol.errors import BudgetTooSmall, InvariantBroken, PlanImpossible
from protocol.ids import WorkerId
from protocol.messages import DeviceProfile
from protocol.plans import Plan

MAX_SUCCESSORS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A plan that could be loaded, and all that it was made of; `usable`: the number of those who were usable then."""

    seating: Seating
    candidates: tuple[Candidate, ...]
    plan: Plan
    usable: int = 0

    def with_hubs(self, reach: Reach) -> Draft:
        """Return the same with hubs chosen by what the probes found."""
        plan = make_plan(self.seating.request, self.candidates, epoch=self.plan.epoch, reach=reach)
        return replace(self, plan=plan)

    def room(self) -> KvRoom:
        """Return the room for sessions under it."""
        return kv_room(self.plan, self.candidates, self.seating.request.kv_positions)

    def is_like(self, plan: Plan) -> bool:
        """Say whether everybody would hold what they hold under `plan`."""
        return _holdings(self.plan) == _holdings(plan)


def _holdings(plan: Plan) -> tuple[object, ...]:
    return (plan.head, *((stage.layers, stage.members) for stage in plan.stages))


class Usable(NamedTuple):
    """The members that a plan should use, in their order; `number` rises when these are others than before."""

    number: int
    members: tuple[Member, ...]
    names: frozenset[WorkerId]


class Drafter:
    """Drafts plans of one request over the members of a registry."""

    def __init__(self, request: PlanRequest, registry: Registry, probation: Probation) -> None:
        self._request = request
        self._registry = registry
        self._probation = probation
        self._usable = Usable(0, (), frozenset())
        self._revision = -1  # of the registry, for which this is so
        self._until = 0.0  # somebody's probation ends

    def usable(self, now: float) -> Usable:
        """Return the members that a plan should use; the head in any case."""
        if self._revision == self._registry.revision and now < self._until:
            return self._usable
        head = self._registry.head
        able = [member for member in self._registry if member is head or self._is_willing(member)]
        left_s = {member.worker: self._probation.left_s(member.worker, now) for member in able}
        members = tuple(member for member in able if member is head or not left_s[member.worker])
        self._until = min((now + wait_s for wait_s in left_s.values() if wait_s), default=math.inf)
        self._revision = self._registry.revision
        if members != self._usable.members:
            names = frozenset(member.worker for member in members)
            self._usable = Usable(self._usable.number + 1, members, names)
        return self._usable

    def is_willing(self, worker: WorkerId) -> bool:
        """Say whether a worker is here and may be planned with, on probation or not; the head in any case."""
        member = self._registry.get(worker)
        return member is not None and (member is self._registry.head or self._is_willing(member))

    def draft(
        self,
        seats: Seats,
        now: float,
        *,
        epoch: int,
        reach: Reach = frozenset(),
        among: frozenset[WorkerId] | None = None,
    ) -> Draft:
        """Return a plan over the usable members, and over those on probation as well when it takes them.

        `among`: over the usable ones of these, if that is possible. An explicit plan that its workers' memory can not
        hold any more gives way to an automatic one. Raises PlanImpossible, BudgetTooSmall.
        """
        head = self._registry.head
        if head is None:
            raise InvariantBroken("a plan was begun without a head")
        usable = self.usable(now)
        if among is not None:
            ours = [member for member in usable.members if member.worker in among]
            with contextlib.suppress(PlanImpossible, BudgetTooSmall):
                draft = self._over(head, ours, seats, epoch, reach)
                return replace(draft, usable=usable.number if len(ours) == len(usable.members) else -1)
        willing = [member for member in self._registry if member is head or self._is_willing(member)]
        try:
            draft = self._over(head, usable.members, seats, epoch, reach)
        except (PlanImpossible, BudgetTooSmall):
            if len(willing) == len(usable.members):
                raise
            draft = self._over(head, willing, seats, epoch, reach)
        return replace(draft, usable=usable.number)

    def successors(self, draft: Draft, losses: int) -> Iterator[Plan]:
        """Yield the plans that would follow when up to so many of a plan's workers, but the head, were lost at once."""
        members = {member.worker: member for member in self._registry}
        head = members.get(draft.plan.head)
        if head is None:
            return
        others = [worker for worker in draft.plan.workers if worker != draft.plan.head and worker in members]
        lost = (gone for count in range(1, losses + 1) for gone in itertools.combinations(others, count))
        for gone in itertools.islice(lost, MAX_SUCCESSORS):
            left = [members[worker] for worker in draft.plan.workers if worker in members and worker not in gone]
            try:
                yield self._over(head, left, draft.seating.seats, draft.plan.epoch, frozenset()).plan
            except (PlanImpossible, BudgetTooSmall):
                continue  # nobody could take over: there is nothing to get ready

    def _over(self, head: Member, members: Collection[Member], seats: Seats, epoch: int, reach: Reach) -> Draft:
        others = [member.worker for member in members if member is not head]
        others.sort(key=lambda worker: -self._registry.num_tiles(worker))  # whoever has most tiles takes a seat first
        profiles = {member.worker: member.profile for member in members}
        seating = seat(self._request, head.worker, others, seats)
        try:
            return _draft(seating, profiles, epoch, reach)
        except (PlanImpossible, BudgetTooSmall):
            if self._request.shares is None or seating.is_complete:
                raise
        # Words are for the whole crew; of who is left everybody takes what it can.
        automatic = seat(replace(self._request, shares=None), head.worker, others, seats)
        return _draft(replace(automatic, seats=seating.seats), profiles, epoch, reach)

    @staticmethod
    def _is_willing(member: Member) -> bool:
        return not member.is_leaving and not member.paused


def _draft(seating: Seating, profiles: Mapping[WorkerId, DeviceProfile], epoch: int, reach: Reach) -> Draft:
    candidates = tuple(Candidate.of(name, profiles[name]) for name in seating.order)
    plan = make_plan(seating.request, candidates, epoch=epoch, reach=reach)
    return Draft(seating=seating, candidates=candidates, plan=plan)
