"""The bytes of one tile that is being fetched: which are there, under way, or still to be asked for.

Knows nothing of sources or sockets. A piece is what one request asks for; several sources may be asked for the same
piece, the first answer counts. Bytes are handed on in order, because a part on disk grows at its end.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

from protocol.ids import WorkerId
from protocol.tiles import TileEntry


@dataclass(slots=True)
class _Piece:
    length: int
    askers: set[WorkerId] = field(default_factory=set)


class Pieces:
    """A tile on its way; `have_bytes` of it were on disk before."""

    def __init__(self, entry: TileEntry, have_bytes: int) -> None:
        self.entry = entry
        self.had_bytes = have_bytes
        self.written = have_bytes
        self.givers: set[WorkerId] = set()  # whose bytes it consists of so far
        self.under_way: dict[int, _Piece] = {}
        self._to_ask = [(have_bytes, entry.num_bytes)] if have_bytes < entry.num_bytes else []  # spans, in order
        self._early: dict[int, memoryview] = {}

    @property
    def is_complete(self) -> bool:
        """Whether all bytes were handed on."""
        return self.written == self.entry.num_bytes

    @property
    def early_bytes(self) -> int:
        """Bytes that wait here for those before them."""
        return sum(map(len, self._early.values()))

    @property
    def next_offset(self) -> int | None:
        """Where the next piece to ask for begins; None when all are asked for."""
        return self._to_ask[0][0] if self._to_ask else None

    def workers(self) -> set[WorkerId]:
        """Return whose bytes it has, and whose it may get."""
        return self.givers.union(*(piece.askers for piece in self.under_way.values()))

    def ask(self, worker: WorkerId, most_bytes: int) -> tuple[int, int]:
        """Take the next piece: return its offset and length. Call it when `next_offset` is one."""
        start, end = self._to_ask.pop(0)
        length = min(most_bytes, end - start)
        if start + length < end:
            self._to_ask.insert(0, (start + length, end))
        self.under_way[start] = _Piece(length, {worker})
        return start, length

    def ask_too(self, worker: WorkerId, offset: int) -> int:
        """Ask one more source for a piece that is under way: return its length."""
        piece = self.under_way[offset]
        piece.askers.add(worker)
        return piece.length

    def unask(self, worker: WorkerId, offset: int) -> None:
        """This source will not give the piece: ask for it anew unless another is asked already."""
        piece = self.under_way.get(offset)
        if piece is None or worker not in piece.askers:
            return
        piece.askers.discard(worker)
        if not piece.askers:
            del self.under_way[offset]
            bisect.insort(self._to_ask, (offset, offset + piece.length))

    def receive(self, worker: WorkerId, offset: int, data: memoryview) -> list[memoryview] | None:
        """Take a chunk: return what can be handed on now, in order; None when nobody waits for it (any more)."""
        piece = self.under_way.get(offset)
        if piece is None or worker not in piece.askers or piece.length != len(data):
            return None
        del self.under_way[offset]
        self.givers.add(worker)
        self._early[offset] = data
        ready: list[memoryview] = []
        while self.written in self._early:
            chunk = self._early.pop(self.written)
            ready.append(chunk)
            self.written += len(chunk)
        return ready
