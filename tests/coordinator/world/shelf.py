"""Keys and values of one simulated worker: how many positions of which cells of which sessions it truly has.

Knows nothing of links. A cell is one KV-head group of one layer; of every cell the positions from the first one on.
"""

from __future__ import annotations

import itertools

from protocol.batches import SessionRows
from protocol.ids import SessionId, WorkerId
from protocol.messages import Carry, Cells
from protocol.plans import Plan

Cell = tuple[int, int]


def cells_in(cells: Cells) -> list[Cell]:
    """Return the cells of a rectangle."""
    return list(itertools.product(cells.layers, cells.groups))


def cells_of(plan: Plan, worker: WorkerId) -> list[Cell]:
    """Return the cells of a worker under a plan."""
    number = plan.stage_of(worker)
    if number is None:
        return []
    stage = plan.stages[number]
    return list(itertools.product(stage.layers, stage.members[stage.rank_of(worker)].groups))


class Shelf:
    """What is here of every session: in the arena, at its place there, and in the spool."""

    def __init__(self) -> None:
        self.cells: list[Cell] = []
        self.arena: dict[SessionId, int] = {}
        self.places: dict[SessionId, range] = {}
        self.positions = 0
        self._spool: dict[SessionId, dict[Cell, int]] = {}
        self._released: set[SessionId] = set()  # copies that come late are of no use

    @property
    def sessions(self) -> frozenset[SessionId]:
        """Sessions of which anything is here."""
        return frozenset(self.arena) | frozenset(self._spool)

    def turn_to(self, plan: Plan, worker: WorkerId, carries: tuple[Carry, ...]) -> None:
        """Put the rows of carried sessions into the spool and forget all others; the arena is free then."""
        carried = {carry.session: carry for carry in carries}
        self._spool = {session: rows for session, rows in self._spool.items() if session in carried}
        for session, length in self.arena.items():
            if session in carried and length:
                rows = self._spool.setdefault(session, {})
                for cell in self.cells:
                    rows[cell] = max(rows.get(cell, 0), min(length, carried[session].computed))
        self.cells, self.positions = cells_of(plan, worker), plan.kv_positions
        self.arena, self.places, self._released = {}, {}, set()

    def truncate(self, session: SessionId, length: int) -> None:
        """Lose the rows behind some position."""
        rows = self._spool.get(session, {})
        self._spool[session] = {cell: min(had, length) for cell, had in rows.items()}

    def restore(self, carries: tuple[Carry, ...]) -> dict[SessionId, int]:
        """Bring carried sessions back into the arena; return the positions that each has there."""
        held = {}
        for carry in carries:
            self._put(carry.session, range(carry.at, carry.at + carry.capacity))
            length = min((self.length(carry.session, cell) for cell in self.cells), default=carry.computed)
            held[carry.session] = self.arena[carry.session] = min(length, carry.computed)
            rows = self._spool.get(carry.session, {})
            for cell in self.cells:
                rows.pop(cell, None)
        return {session: length for session, length in held.items() if length}

    def length(self, session: SessionId, cell: Cell) -> int:
        """Return how many positions of a cell are here."""
        if session in self.arena and cell in self.cells:
            return self.arena[session]
        return self._spool.get(session, {}).get(cell, 0)

    def take(self, session: SessionId, cells: Cells, start: int, end: int) -> None:
        """Keep rows of a peer; those behind a gap are of no use."""
        if session in self._released:
            return
        rows = self._spool.setdefault(session, {})
        for cell in cells_in(cells):
            if start <= rows.get(cell, 0) < end:
                rows[cell] = end

    def compute(self, part: SessionRows) -> None:
        """Add the rows of a step, which must go on where those that are here end.

        A session that begins takes the place of others: the word that they are over may still be on its way.
        """
        place = range(part.at, part.at + part.capacity)
        if part.start == 0:
            for other in [one for one, taken in self.places.items() if _overlap(taken, place) and one != part.session]:
                self.arena.pop(other)
                self.places.pop(other)
            self._put(part.session, place)
        elif self.places.get(part.session) != place:
            raise AssertionError(f"{part} goes on where nothing is")
        length = self.arena.get(part.session, 0)
        if self.cells and part.start > length:
            raise AssertionError(f"{length} positions are here, the step has {part}")
        self.arena[part.session] = part.start + part.count

    def release(self, session: SessionId) -> None:
        self._released.add(session)
        self.arena.pop(session, None)
        self.places.pop(session, None)
        self._spool.pop(session, None)

    def _put(self, session: SessionId, place: range) -> None:
        if self.places.setdefault(session, place) != place:
            raise AssertionError(f"session {session} moves within the arena")
        if place.stop > self.positions:
            raise AssertionError(f"session {session} lies outside the arena of {self.positions}")


def _overlap(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop
