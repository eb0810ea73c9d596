"""Whom the cluster waits for, whom it lets go, and whether a newcomer is worth a pause.

Knows nothing of plans' lives or of links.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

from coordinator.drafting import Draft
from coordinator.events import SendControl
from coordinator.memory import need_of
from coordinator.planner import PlanRequest
from coordinator.policy import ClusterPolicy
from coordinator.probation import Probation
from coordinator.registry import Member, Registry
from coordinator.seating import Seats
from protocol.ids import WorkerId
from protocol.messages import Goodbye


class Crew:
    """The workers of a cluster over time. `seats`: who has which share, or had before the coordinator's restart."""

    def __init__(self, request: PlanRequest, policy: ClusterPolicy, registry: Registry, seats: Seats) -> None:
        self._request = request
        self._policy = policy
        self._registry = registry
        self.seats = seats
        self.probation = Probation(policy.probation_s)
        self._was_whole = bool(seats)
        self._awaits_return = bool(seats)
        self._return_until: float | None = None
        self._is_first = True
        registry.was_head(seats[0] if seats else None)

    @property
    def is_complete(self) -> bool:
        """Whether every seat is taken."""
        return None not in self.seats

    def seated(self, seats: Seats) -> None:
        """Remember the seats of a plan that is loaded; from then on a smaller crew will do."""
        self.seats = seats
        self._was_whole, self._is_first = True, False
        self._registry.was_head(seats[0])

    @property
    def returned(self) -> frozenset[WorkerId] | None:
        """The crew of the plan before the coordinator's restart when it is here again, until there is a plan.

        The first plan is theirs alone, whoever else is here: so each finds the keys and values that it had.
        """
        names = frozenset(worker for worker in self.seats if worker is not None)
        return names if self._is_first and names and names <= self._registry.names else None

    def missing(self, now: float) -> str:
        """Say which workers are still wanted; empty when there are enough.

        The first plan waits for all that were asked for; later ones go on with who is left, but for a while after the
        coordinator's own restart.
        """
        num_here = len(self._registry)
        if self._registry.head is None:
            return f"waiting for a trusted worker to be the head; {num_here} other workers are here"
        if self._awaits_return:
            return self._missing_after_restart(now)
        wanted = self._request.num_workers or self._policy.workers
        if not self._was_whole and num_here < wanted:
            here = ", ".join(member.worker for member in self._registry)
            return f"waiting for {wanted - num_here} of {wanted} workers; here: {here}"
        return ""

    def _missing_after_restart(self, now: float) -> str:
        if self._return_until is None:
            self._return_until = now + self._policy.return_s
        away = [worker for worker in self.seats if worker is not None and worker not in self._registry]
        self._awaits_return = bool(away) and now < self._return_until
        return f"waiting for {', '.join(away)} to come back" if self._awaits_return else ""

    @staticmethod
    def pays_at(current: Draft, better: Draft) -> float:
        """Return for how many open requests a plan is worth a short pause: 0 for any, infinity for none.

        It is for any when a seat was empty that is taken now, or when less must be read from disks; and when there are
        more requests than stages to compute them, if there will be more stages.
        """
        if better.seating.seats.count(None) < current.seating.seats.count(None):
            return 0
        if _streamed_bytes(better) < _streamed_bytes(current):
            return 0
        stages = len(current.plan.stages)
        return stages + 1 if len(better.plan.stages) > stages else math.inf

    def state_of(self, member: Member, now: float) -> str:
        """Say in a few words what is special about a member; empty when nothing is."""
        if member.is_leaving:
            return "leaving: it hands over first"
        if member.paused:
            return f"paused: {member.paused}"
        left_s = self.probation.left_s(member.worker, now)
        if left_s:
            return f"on probation for {left_s:.0f} s: it was lost time and again"
        return "suspect: far behind its own pace" if member.is_suspect else ""

    # ------------------------------------------------------------ leaving

    def must_stop(self, worker: WorkerId) -> bool:
        """Say whether a worker may not be used any more, whatever it costs: its owner says so."""
        member = self._registry.get(worker)
        return member is not None and bool(member.paused)

    def let_go(self, going: Iterable[WorkerId]) -> list[SendControl]:
        """Nobody can take over from these: who wants to leave itself may; who was asked to by others stays."""
        effects = []
        for worker in going:
            member = self._registry.get(worker)
            if member is None or not member.is_leaving:
                continue
            if member.is_own_wish:
                effects += self._dismiss(member, "nobody could take over")
            else:
                self._registry.mark_staying(member)
        return effects

    def dismiss(self, needed: Collection[WorkerId]) -> list[SendControl]:
        """Say goodbye to those who want to leave and are not needed any more; a head alone is let go as it is."""
        effects = []
        for member in self._registry.leaving:
            if member.worker not in needed or member is self._registry.head:
                effects += self._dismiss(member, "handed over")
        return effects

    def keep_head(self) -> WorkerId | None:
        """Have the only head stay that others want to leave, and return its name; None when there is none such."""
        head = self._registry.head
        if head is None or not head.is_leaving or head.is_own_wish:
            return None
        self._registry.mark_staying(head)
        return head.worker

    @staticmethod
    def _dismiss(member: Member, reason: str) -> list[SendControl]:
        if member.is_dismissed:
            return []
        member.is_dismissed = True
        return [SendControl(worker=member.worker, message=Goodbye(reason=reason))]


def _streamed_bytes(draft: Draft) -> int:
    """Return the bytes of weights that don't fit into the workers' memory."""
    step = draft.seating.request.step
    needs = [
        (need_of(draft.plan, one, step), one.budget_bytes)
        for one in draft.candidates
        if one.worker in draft.plan.workers
    ]
    return sum(max(0, need.total_bytes - budget) for need, budget in needs)
