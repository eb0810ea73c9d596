"""Who takes which share: seats are kept by those who stay, filled by newcomers, and left out while nobody is there.

Knows nothing of memory or links. A seat is the place of one share in the words of a plan; the head has the first one.

    words 1,1/2   seats head b c     all here:  1,1/2     b is gone:  1/2     and d takes b's seat when it comes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from coordinator.planner import PlanRequest, seat_workers
from protocol.ids import WorkerId

Seats = tuple[WorkerId | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seating:
    """The workers in the order of their shares, the request that fits their number, and the seats to remember."""

    request: PlanRequest
    order: tuple[WorkerId, ...]
    seats: Seats

    @property
    def is_complete(self) -> bool:
        """Whether every seat is taken."""
        return None not in self.seats


def seat(request: PlanRequest, head: WorkerId, others: Sequence[WorkerId], seats: Seats) -> Seating:
    """Seat the workers that are here. `others` in the order in which they joined, `seats` as they were before.

    An explicit plan is cut down to the seats that are taken; a stage without members leaves its layers to the others.
    """
    if request.shares is None:
        before = tuple(worker for worker in seats if worker is not None)
        order = seat_workers(head, others, before)
        return Seating(request=request, order=order, seats=order)
    taken = _fill(head, others, seats, request.num_workers or 1)
    kept = iter(taken[request.head_only :])
    stages = [tuple(share for share, worker in zip(stage, kept, strict=False) if worker) for stage in request.shares]
    shares = tuple(stage for stage in stages if stage)
    order = tuple(worker for worker in taken if worker)
    return Seating(request=replace(request, shares=shares or None), order=order, seats=taken)


def _fill(head: WorkerId, others: Sequence[WorkerId], seats: Seats, num_seats: int) -> Seats:
    before = (*seats[:num_seats], *[None] * (num_seats - len(seats)))
    stay = [worker if worker in others else None for worker in before[1:]]
    newcomers = iter([worker for worker in others if worker not in stay])
    return (head, *(worker or next(newcomers, None) for worker in stay))
