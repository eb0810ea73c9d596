"""Keys and values of a worker's sessions, kept from one plan to the next.

Knows nothing of links or of how a plan is loaded. While a worker's cells and the size of the arena stay as they were,
its rows stay where they are; else they wait in the spool, and the arena is free before the next one is made. Two
arenas at once would break the memory contract.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product

from protocol.ids import SessionId
from protocol.messages import Carry, HeldKv
from protocol.plans import Plan
from runtime.kv import KvCache
from runtime.shares import StageShare
from runtime.tensors import as_bytes, as_tensor
from worker.spool import Cell, Spool

PIECE_ROWS = 1024


def own_cells(share: StageShare) -> list[Cell]:
    """Return the cells of a share."""
    return [Cell(layer, group) for layer, group in product(share.layers, share.groups)]


class KvShelf:
    """The arena of the plan before, as long as the next one can use it, and the spool."""

    def __init__(self, spool: Spool) -> None:
        self.arena: KvCache | None = None
        self._spool = spool

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the arena that sessions have reserved."""
        return self.arena.num_bytes if self.arena is not None else 0

    def turn_to(self, plan: Plan, share: StageShare, positions: int, carries: Iterable[Carry]) -> None:
        """Make ready for a plan: keep the rows of these sessions, forget all others, free an arena that can't stay.

        `positions`: of the arena to come.
        """
        carried = {carry.session: carry for carry in carries}
        spec, arena = plan.model, self.arena
        self._spool.shape(spec.head_dim * spec.activations.num_bytes)
        self._spool.keep_only(carried)
        if arena is None:
            return
        stays = (arena.spec, arena.layers, arena.groups, arena.positions) == (
            spec, share.layers, share.groups, positions,
        )  # fmt: skip
        for session in arena.lengths():
            carry, place = carried.get(session), arena.find(session)
            if place is None or (stays and carry and (carry.at, carry.capacity) == (place.at, place.capacity)):
                continue
            if carry is not None and arena.spec == spec:
                self._put_away(session, place.length)
            arena.release(session)
        if not stays:
            self.arena = None

    def restore(
        self, arena: KvCache | None, share: StageShare, carries: Iterable[Carry], on_bytes: Callable[[int], None]
    ) -> tuple[HeldKv, ...]:
        """Bring carried sessions back into the arena and return how many positions each has there.

        `on_bytes` is told of bytes read and may raise: then `turn_to` finds again what was here. An arena of None is
        a head's without layers, which needs no rows. Raises Overloaded when a place is outside the arena.
        """
        self.arena = arena
        cells = own_cells(share)
        held: list[HeldKv] = []
        for carry in carries:
            place = arena.find(carry.session) if arena is not None else None
            if place is not None:  # it stayed
                length = place.length = min(place.length, carry.computed)
            else:
                length = self._bring_back(arena, cells, carry, on_bytes)
            if length:
                held.append(HeldKv(session=carry.session, positions=length))
        return tuple(held)

    def release(self, session: SessionId) -> None:
        """Forget a session that is over."""
        self._spool.forget(session)
        if self.arena is not None:
            self.arena.release(session)

    def clear(self) -> None:
        """Forget all sessions, and free the arena."""
        self._spool.clear()
        self.arena = None

    def close(self) -> None:
        """Free the arena and remove the spool's file."""
        self.arena = None
        self._spool.close()

    def length(self, session: SessionId, cell: Cell) -> int:
        """Return how many positions of a cell, from the first one on, are here."""
        place = self._place(session, cell)
        return self._spool.length(session, cell) if place is None else place

    def read(self, session: SessionId, cell: Cell, start: int, count: int) -> tuple[bytes, bytes] | None:
        """Return a copy of keys and values of some rows; None when not all of them are here."""
        arena = self.arena
        if arena is None or self._place(session, cell) is None:
            found = self._spool.read(session, cell, start, count)
            return None if found is None else (bytes(found[0]), bytes(found[1]))
        place = arena.find(session)
        if place is None or start + count > place.length:
            return None
        keys_Td, values_Td = arena.rows(cell.layer, cell.group, place.at + start, count)
        return bytes(as_bytes(keys_Td)), bytes(as_bytes(values_Td))

    def take(self, session: SessionId, cell: Cell, start: int, keys: memoryview, values: memoryview) -> bool:
        """Keep rows that a peer sent; False when they are of no use: known better, behind a gap, or without room."""
        if self._place(session, cell) is not None:
            return False
        return self._spool.write(session, cell, start, keys, values)

    def _place(self, session: SessionId, cell: Cell) -> int | None:
        """Return the length of a session whose cell is in the arena."""
        arena = self.arena
        if arena is None or cell.layer not in arena.layers or cell.group not in arena.groups:
            return None
        place = arena.find(session)
        return place.length if place is not None else None

    def _put_away(self, session: SessionId, length: int) -> None:
        arena = self.arena
        place = arena.find(session) if arena is not None else None
        if arena is None or place is None:
            return
        for layer, group in product(arena.layers, arena.groups):
            cell = Cell(layer, group)
            for start in range(0, length, PIECE_ROWS):
                count = min(PIECE_ROWS, length - start)
                keys_Td, values_Td = arena.rows(layer, group, place.at + start, count)
                if not self._spool.write(session, cell, start, as_bytes(keys_Td), as_bytes(values_Td)):
                    return

    def _bring_back(
        self, arena: KvCache | None, cells: list[Cell], carry: Carry, on_bytes: Callable[[int], None]
    ) -> int:
        """Read a session's rows out of the spool; return how many positions it has now."""
        session = carry.session
        least = min((self._spool.length(session, cell) for cell in cells), default=carry.computed)
        length = min(least, carry.computed, carry.capacity)
        if arena is None or not length:
            return length
        arena.require_place(session, carry.at, carry.capacity)
        for cell in cells:
            if not self._read_into(arena, carry, cell, length):
                return 0
            on_bytes(length * self._row_bytes(arena))
        arena.restore(session, at=carry.at, capacity=carry.capacity, length=length)
        own = frozenset(cells)
        self._spool.forget_cells(session, lambda cell: cell in own)
        return length

    def _read_into(self, arena: KvCache, carry: Carry, cell: Cell, length: int) -> bool:
        for start in range(0, length, PIECE_ROWS):
            count = min(PIECE_ROWS, length - start)
            found = self._spool.read(carry.session, cell, start, count)
            if found is None:
                return False
            views = arena.rows(cell.layer, cell.group, carry.at + start, count)
            for view_Td, data in zip(views, found, strict=True):
                view_Td.copy_(as_tensor(memoryview(data), view_Td.dtype, tuple(view_Td.shape)))
        return True

    @staticmethod
    def _row_bytes(arena: KvCache) -> int:
        return 2 * arena.spec.head_dim * arena.spec.activations.num_bytes
