"""Keys and values of one simulated worker: how many positions of which cells of which sessions it truly has.

Knows nothing of links. A cell is one KV-head group of one layer; of every cell, and of what enters a layer, the
positions from the first one on.
"""

from __future__ import annotations

import itertools

from protocol.batches import SessionRows
from protocol.ids import SessionId, WorkerId
from protocol.messages import Carry, Cells, HeldKv, HeldLayers, KeptInputs
from protocol.plans import Plan
from protocol.specs import Span

Cell = tuple[int, int]


def cells_in(cells: Cells) -> list[Cell]:
    """Return the cells of a rectangle."""
    return list(itertools.product(cells.layers, cells.groups))


class Shelf:
    """What is here of every session: in the arena, at its place there, in the spool, and kept for later stages."""

    def __init__(self) -> None:
        self.layers = self.groups = Span(0, 0)
        self.arena: dict[SessionId, dict[int, int]] = {}  # by layer
        self.places: dict[SessionId, range] = {}
        self.positions = 0
        self._spool: dict[SessionId, dict[Cell, int]] = {}
        self._inputs: dict[SessionId, dict[int, int]] = {}
        self._released: set[SessionId] = set()  # copies that come late are of no use

    @property
    def sessions(self) -> frozenset[SessionId]:
        """Sessions of which anything is here."""
        return frozenset(self.arena) | frozenset(self._spool) | frozenset(self._inputs)

    def turn_to(self, plan: Plan, worker: WorkerId, carries: tuple[Carry, ...]) -> None:
        """Put the rows of carried sessions into the spool and forget all others; the arena is free then."""
        carried = {carry.session: carry for carry in carries}
        self._spool = {session: rows for session, rows in self._spool.items() if session in carried}
        self._inputs = {session: kept for session, kept in self._inputs.items() if session in carried}
        for session, lengths in self.arena.items():
            if session in carried and any(lengths.values()):
                rows = self._spool.setdefault(session, {})
                for layer, group in itertools.product(lengths, self.groups):
                    rows[layer, group] = max(rows.get((layer, group), 0), lengths[layer])
        for carry in carries:
            self.truncate(carry.session, carry.computed)
        number = plan.stage_of(worker)
        self.layers = self.groups = Span(0, 0)
        if number is not None:
            stage = plan.stages[number]
            self.layers, self.groups = stage.layers, stage.members[stage.rank_of(worker)].groups
        self.positions = plan.kv_positions
        self.arena, self.places, self._released = {}, {}, set()

    def truncate(self, session: SessionId, length: int) -> None:
        """Lose what is behind some position."""
        for held in (self._spool.get(session, {}), self._inputs.get(session, {})):
            held.update({key: min(had, length) for key, had in held.items()})

    def lose_inputs(self, session: SessionId) -> None:
        """Lose what was kept for later stages."""
        self._inputs.pop(session, None)

    def restore(self, carries: tuple[Carry, ...]) -> list[HeldKv]:
        """Bring carried sessions back into the arena; return what there is of each."""
        held = []
        for carry in carries:
            session = carry.session
            self._put(session, range(carry.at, carry.at + carry.capacity))
            rows = self._spool.get(session, {})
            for layer in self.layers:
                lengths = (rows.pop((layer, group), 0) for group in self.groups)
                self.arena[session][layer] = min([carry.computed, *lengths])
            held.append(self._held(carry))
        return held

    def _held(self, carry: Carry) -> HeldKv:
        lengths = self.arena[carry.session]
        least = min(lengths.values(), default=carry.computed)
        kept = self._inputs.get(carry.session, {})
        return HeldKv(
            session=carry.session,
            positions=least,
            layers=tuple(
                HeldLayers(layers=Span(layer, layer + 1), positions=length)
                for layer, length in lengths.items()
                if length > least
            ),
            inputs=tuple(KeptInputs(layer=layer, positions=length) for layer, length in kept.items()),
        )

    def length(self, session: SessionId, cell: Cell) -> int:
        """Return how many positions of a cell are here."""
        layer, group = cell
        if session in self.arena and layer in self.layers and group in self.groups:
            return self.arena[session][layer]
        return self._spool.get(session, {}).get(cell, 0)

    def least(self, session: SessionId) -> int:
        """Return how many positions are in the arena, of all layers."""
        return min(self.arena.get(session, {}).values(), default=0)

    def take(self, session: SessionId, cells: Cells, start: int, end: int) -> None:
        """Keep rows of a peer; those behind a gap are of no use."""
        if session in self._released:
            return
        rows = self._spool.setdefault(session, {})
        for cell in cells_in(cells):
            if start <= rows.get(cell, 0) < end:
                rows[cell] = end

    def compute(self, part: SessionRows, layers: Span) -> None:
        """Add the rows of a step, in these layers of it, each of which must go on where it ends.

        A session that begins takes the place of others: the word that they are over may still be on its way.
        """
        place = range(part.at, part.at + part.capacity)
        is_new = part.start == 0 and (layers == self.layers or part.session not in self.places)
        if is_new:
            for other in [one for one, taken in self.places.items() if _overlap(taken, place) and one != part.session]:
                self.arena.pop(other)
                self.places.pop(other)
            self._put(part.session, place)
            self.arena[part.session] = dict.fromkeys(self.layers, 0)
        elif self.places.get(part.session) != place:
            raise AssertionError(f"{part} goes on where nothing is")
        lengths = self.arena[part.session]
        for layer in layers:
            if len(self.groups) and part.start > lengths[layer]:
                raise AssertionError(f"{lengths[layer]} positions of layer {layer} are here, the step has {part}")
            lengths[layer] = part.start + part.count

    def keep(self, part: SessionRows, layer: int) -> None:
        """Keep what enters a later layer, unless there is a gap."""
        kept = self._inputs.setdefault(part.session, {})
        if part.start <= kept.get(layer, 0):
            kept[layer] = max(kept.get(layer, 0), part.start + part.count)

    def can_put_in(self, part: SessionRows, layer: int) -> bool:
        """Say whether what enters a layer is here, for these rows."""
        return self._inputs.get(part.session, {}).get(layer, 0) >= part.start + part.count

    def release(self, session: SessionId) -> None:
        self._released.add(session)
        for held in (self.arena, self.places, self._spool, self._inputs):
            held.pop(session, None)  # type: ignore[attr-defined]

    def _put(self, session: SessionId, place: range) -> None:
        if self.places.setdefault(session, place) != place:
            raise AssertionError(f"session {session} moves within the arena")
        if place.stop > self.positions:
            raise AssertionError(f"session {session} lies outside the arena of {self.positions}")
        self.arena.setdefault(session, {})


def _overlap(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop
