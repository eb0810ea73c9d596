"""Keys and values that go from worker to worker once, after a plan's links are made and before it is loaded.

Knows nothing of plans or sockets. Nothing here fails an epoch: rows that can't be had are computed again. A give or
a take that sees no progress for 10 seconds is given up.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple, Protocol

from protocol.frames import Buffer
from protocol.ids import SessionId, WorkerId
from protocol.messages import Cells, KvRows
from protocol.plans import Plan
from protocol.specs import Span
from worker.commands import KvOrders
from worker.kv_shelf import KvShelf
from worker.kv_travel import pieces, split_rows
from worker.sending import Lent
from worker.spool import Cell

SILENCE_S: Final = 10.0
MOST_LENT: Final = 4
_log = logging.getLogger(__name__)


class Lender(Protocol):
    """The way to neighbours."""

    def offer(self, target: WorkerId, message: object, payload: Buffer) -> Lent | None:
        """Lend a message if it is taken at once; None when not."""
        ...


class _Parcel(NamedTuple):
    message: KvRows
    payload: bytes


class _Give:
    """What one peer is to get: parcels, made as they are sent."""

    def __init__(self, parcels: Iterator[_Parcel], now: float) -> None:
        self.parcels = parcels
        self.next: _Parcel | None = next(parcels, None)
        self.lent: deque[Lent] = deque()
        self.moved_at = now

    @property
    def is_over(self) -> bool:
        """Whether all has been sent."""
        return self.next is None and not self.lent


class Handover:
    """The gives and takes of one plan. Call `advance` time and again until `is_over`."""

    def __init__(self, plan: Plan, orders: KvOrders, kv: KvShelf, lender: Lender, clock: Callable[[], float]) -> None:
        self._plan = plan
        self._orders = orders
        self._kv = kv
        self._lender = lender
        self._clock = clock
        self._carried = {carry.session: carry.computed for carry in orders.carries}
        now = clock()
        peers = dict.fromkeys(move.peer for move in orders.gives)
        self._gives = {peer: _Give(self._parcels(peer), now) for peer in peers}
        self._takes = dict.fromkeys((move.peer for move in orders.takes), now)

    @property
    def is_over(self) -> bool:
        """Whether nothing is on its way any more."""
        return not self._gives and not self._takes

    def advance(self) -> None:
        """Send what is taken at once; give up what has stood still for long."""
        now = self._clock()
        for peer, give in list(self._gives.items()):
            while give.lent and give.lent[0].done:
                give.lent.popleft()
                give.moved_at = now
            while give.next is not None and len(give.lent) < MOST_LENT:
                lent = self._lender.offer(peer, give.next.message, give.next.payload)
                if lent is None:
                    break
                give.lent.append(lent)
                give.moved_at = now
                give.next = next(give.parcels, None)
            if give.is_over:
                del self._gives[peer]
            elif now - give.moved_at >= SILENCE_S:
                _log.warning("%s took no keys and values for %g s: it must compute them again", peer, SILENCE_S)
                del self._gives[peer]
        for peer, heard_at in list(self._takes.items()):
            if now - heard_at >= SILENCE_S:
                _log.warning("%s gave no keys and values for %g s: they are computed again", peer, SILENCE_S)
                del self._takes[peer]

    def took(self, sender: WorkerId, message: KvRows, payload: memoryview) -> bool:
        """Take rows, or the word that no more will come; False when nothing is due from there.

        Raises FrameMalformed.
        """
        if sender not in self._takes:
            return False
        self._takes[sender] = self._clock()
        if not message.count:
            del self._takes[sender]
        elif message.session in self._carried:
            for rows in split_rows(self._plan.model, sender, message, payload):
                self._kv.take(message.session, rows.cell, message.start, rows.keys, rows.values)
        return True

    def lost(self, worker: WorkerId) -> None:
        """A peer is gone: nothing goes there, and nothing comes from there."""
        self._gives.pop(worker, None)
        self._takes.pop(worker, None)

    def _parcels(self, peer: WorkerId) -> Iterator[_Parcel]:
        for move in self._orders.gives:
            if move.peer == peer:
                for session, computed in self._carried.items():
                    for layer in move.cells.layers:
                        cells = Cells(layers=Span(layer, layer + 1), groups=move.cells.groups)
                        yield from self._rows(session, cells, computed)
        nothing = Cells(layers=Span(0, 0), groups=Span(0, 0))
        yield _Parcel(KvRows(epoch=self._plan.epoch, session=SessionId(0), cells=nothing, start=0, count=0), b"")

    def _rows(self, session: SessionId, cells: Cells, computed: int) -> Iterator[_Parcel]:
        """Yield one layer's rows, as far as all its cells are here."""
        own = [Cell(cells.layers.start, group) for group in cells.groups]
        length = min([computed, *(self._kv.length(session, cell) for cell in own)])
        for span in pieces(self._plan.model, cells, 0, length):
            found = [self._kv.read(session, cell, span.start, len(span)) for cell in own]
            halves = [part for part in found if part is not None]
            if len(halves) < len(found):  # the disk could not give them back
                return
            payload = b"".join([*(keys for keys, _ in halves), *(values for _, values in halves)])
            message = KvRows(epoch=self._plan.epoch, session=session, cells=cells, start=span.start, count=len(span))
            yield _Parcel(message, payload)
