"""One member's seat in its stage's star under one plan: whom it sends to, who has a part, and what is due.

Knows nothing of sockets or tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final

from protocol import flat
from protocol.ids import WorkerId
from protocol.messages import Partial, Sum
from protocol.plans import Plan
from worker.due import OWING, Due

PARTIAL: Final = flat.FORMS[Partial]
SUM: Final = flat.FORMS[Sum]


class Seat:
    """What a member has to know of its stage."""

    def __init__(self, plan: Plan, own: WorkerId) -> None:
        """Raises ValueError for who is a member of no stage."""
        number = plan.stage_of(own)
        if number is None:
            raise ValueError(f"{own} is a member of no stage")
        stage = plan.stages[number]
        members = tuple(share.worker for share in stage.members)
        others = tuple(worker for worker in members if worker != own)
        is_hub = own == stage.hub_worker
        self.own = own
        self.is_pair = len(members) == 2
        """Both send their part and add, so that a sum takes one way instead of two (decision 0012)."""
        self.adds = is_hub or self.is_pair
        self.hands_out = is_hub and not self.is_pair
        self.hub = stage.hub_worker
        self.ranks = {worker: rank for rank, worker in enumerate(members)}
        self.targets = others if self.adds else (self.hub,)
        self.owners = (
            tuple(share.worker for share in stage.members if len(share.groups)),
            tuple(share.worker for share in stage.members if len(share.ffn)),
        )
        """Who has a part, in the order of ranks; of even operations (attention), then of odd ones (FFN)."""
        self.has_part = tuple(own in owners for owners in self.owners)
        self.sources = {owner for owners in self.owners for owner in owners} - {own} if self.adds else {self.hub}
        """Who sends to this member."""
        self.form = flat.place_of(plan.wire)
        self.partial_header: Callable[[int, int, int, int], bytes] = functools.partial(PARTIAL.header, plan.epoch)
        """Make the header of a part, given step, operation, rank and `form`."""
        self.sum_header: Callable[[int, int, int], bytes] = functools.partial(SUM.header, plan.epoch)
        """Make the header of a sum, given step, operation and `form`."""

    def due(self, step: int, op: int, num_bytes: int) -> Due:
        """Return what is to come for an operation; an own part that is added here is owing too."""
        if not self.adds:
            return Due(step, op, num_bytes, {self.hub: self.sum_header(step, op, self.form)}, {self.hub: OWING})
        headers = {owner: self.partial_header(step, op, self.ranks[owner], self.form) for owner in self.owners[op & 1]}
        return Due(step, op, num_bytes, headers, dict.fromkeys(headers, OWING))
