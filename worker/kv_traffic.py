"""All keys and values that travel under one plan: once before it is loaded, and step by step while it serves.

Knows nothing of what else travels. Who is linked for this alone may go at any time: that fails no epoch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from protocol.ids import WorkerId
from protocol.messages import KvRows
from worker.commands import Begin
from worker.handover import Handover, Lender
from worker.kv_shelf import KvShelf
from worker.kv_travel import split_rows
from worker.mirrors import Mirrors
from worker.wire import Arrival

_log = logging.getLogger(__name__)


class KvTraffic:
    """The keys and values of one plan that come and go."""

    def __init__(self, begin: Begin, own: WorkerId, kv: KvShelf, lender: Lender, clock: Callable[[], float]) -> None:
        plan = begin.plan
        # Whoever else is linked is so for keys and values alone.
        self.neighbours = frozenset(peer for pair in plan.links() if own in pair for peer in pair) - {own}
        self.handover = Handover(plan, begin.kv, kv, lender, clock)
        self._plan = plan
        self._orders = begin.kv
        self._kv = kv
        self._lender = lender
        self._mirrors: Mirrors | None = None

    def serve(self) -> None:
        """The plan is loaded: from now on copies are kept up to date."""
        if self._kv.arena is not None:
            self._mirrors = Mirrors(self._plan.epoch, self._orders.mirrors, self._kv.arena, self._lender)

    def push(self) -> None:
        """A step may have ended: send what is new to those who keep copies."""
        if self._mirrors is not None:
            self._mirrors.push()

    def take(self, arrival: Arrival) -> None:
        """Take rows that were due, or those of a copy that is kept here; raises FrameMalformed."""
        message: KvRows = arrival.message
        if self.handover.took(arrival.sender, message, arrival.payload) or not message.count:
            return
        for rows in split_rows(self._plan.model, arrival.sender, message, arrival.payload):
            self._kv.take(message.session, rows.cell, message.start, rows.keys, rows.values)

    def lost(self, worker: WorkerId) -> None:
        """Go on without a peer."""
        _log.info("%s, which had keys and values to give or to keep, is gone", worker)
        self.handover.lost(worker)
        if self._mirrors is not None:
            self._mirrors.lost(worker)
