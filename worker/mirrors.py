"""Copies of this worker's keys and values, kept up to date at peers that would take its place.

Knows nothing of plans or sockets. What a link does not take at once is sent after a later step, so a copy may lag, and
no step ever waits for it.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from protocol.ids import SessionId, WorkerId
from protocol.messages import Cells, KvMove, KvRows
from runtime.kv import KvCache
from runtime.tensors import as_bytes
from worker.handover import Lender
from worker.kv_travel import pieces
from worker.sending import Lent

MOST_LENT: Final = 4


class _Copy:
    """One peer's copy of some cells: how far it has got, by session, and what is on its way."""

    def __init__(self, move: KvMove) -> None:
        self.move = move
        self.sent: dict[SessionId, int] = {}
        self.lent: deque[Lent] = deque()

    @property
    def is_full(self) -> bool:
        """Whether enough is on its way."""
        while self.lent and self.lent[0].done:
            self.lent.popleft()
        return len(self.lent) >= MOST_LENT


class Mirrors:
    """The copies that this worker keeps up to date under one plan; its own rows are in `arena`."""

    def __init__(self, epoch: int, moves: tuple[KvMove, ...], arena: KvCache, lender: Lender) -> None:
        self._epoch = epoch
        self._arena = arena
        self._lender = lender
        self._copies = [_Copy(move) for move in moves if _is_within(move.cells, arena)]

    def push(self) -> None:
        """Send the rows of finished steps, as far as they are taken at once; call it between steps."""
        lengths = self._arena.lengths() if self._copies else {}
        for copy in self._copies:
            copy.sent = {session: min(copy.sent.get(session, 0), length) for session, length in lengths.items()}
            for session, length in lengths.items():
                if copy.sent[session] < length and not self._send(copy, session, length):
                    break

    def lost(self, worker: WorkerId) -> None:
        """A peer is gone, and its copies with it."""
        self._copies = [copy for copy in self._copies if copy.move.peer != worker]

    def _send(self, copy: _Copy, session: SessionId, length: int) -> bool:
        place, cells = self._arena.find(session), copy.move.cells
        if place is None:
            return True
        for span in pieces(self._arena.spec, cells, copy.sent[session], length):
            if copy.is_full:
                return False
            rows = self._arena.cut(cells.layers, cells.groups, place.at + span.start, len(span))
            message = KvRows(epoch=self._epoch, session=session, cells=cells, start=span.start, count=len(span))
            lent = self._lender.offer(copy.move.peer, message, as_bytes(rows))
            if lent is None:
                return False
            copy.lent.append(lent)
            copy.sent[session] = span.end
        return True


def _is_within(cells: Cells, arena: KvCache) -> bool:
    return (cells.layers & arena.layers, cells.groups & arena.groups) == (cells.layers, cells.groups)
