"""Keys and values of a worker's sessions, kept from one plan to the next.

Knows nothing of links or of how a plan is loaded. While a worker's cells and the size of the arena stay as they were,
its rows stay where they are; else they wait in the spool, and the arena is free before the next one is made. Two
arenas at once would break the memory contract. Each layer goes on with as many positions as there are of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby, product

from protocol.ids import SessionId
from protocol.messages import Carry, HeldKv, HeldLayers, KeptInputs
from protocol.plans import Plan
from protocol.specs import Span
from runtime.kv import KvCache
from runtime.shares import StageShare
from runtime.tensors import as_bytes, as_tensor
from worker.kept_inputs import InputStore
from worker.spool import Cell, Spool

PIECE_ROWS = 1024
MOST_DETAILED = 256  # sessions of which more is told than one number, and how many details of each
MOST_DETAILS = 4


class KvShelf:
    """The arena of the plan before, as long as the next one can use it, and the spool."""

    def __init__(self, spool: Spool) -> None:
        self.arena: KvCache | None = None
        self._spool = spool

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the arena that sessions have reserved."""
        return self.arena.num_bytes if self.arena is not None else 0

    @property
    def inputs(self) -> InputStore:
        """What is kept for later stages to be computed again."""
        return self._spool.inputs

    def turn_to(self, plan: Plan, share: StageShare, positions: int, carries: Iterable[Carry]) -> None:
        """Make ready for a plan: keep the rows of these sessions, forget all others, free an arena that can't stay.

        `positions`: of the arena to come.
        """
        carried = {carry.session: carry for carry in carries}
        spec, arena = plan.model, self.arena
        self._spool.shape(spec.head_dim * spec.activations.num_bytes)
        self.inputs.turn_to(plan)
        self._spool.keep_only(carried)
        self.inputs.keep_only(carried)
        for session, carry in carried.items():  # what is beyond may be of tokens that never got into the log
            self._spool.truncate(session, carry.computed)
            self.inputs.truncate(session, carry.computed)
        if arena is None:
            return
        stays = (arena.spec, arena.layers, arena.groups, arena.positions) == (
            spec, share.layers, share.groups, positions,
        )  # fmt: skip
        for session in arena.lengths():
            goes_on, place = carried.get(session), arena.find(session)
            if place is None or (stays and goes_on and (goes_on.at, goes_on.capacity) == (place.at, place.capacity)):
                continue
            if goes_on is not None and arena.spec == spec:
                self._put_away(goes_on)
            arena.release(session)
        if not stays:
            self.arena = None

    def restore(
        self, arena: KvCache | None, share: StageShare, carries: Iterable[Carry], on_bytes: Callable[[int], None]
    ) -> tuple[HeldKv, ...]:
        """Bring carried sessions back into the arena and return what each has there, and what is kept beside.

        `on_bytes` is told of bytes read and may raise: then `turn_to` finds again what was here. An arena of None is
        a head's without layers, which needs no rows. Raises Overloaded when a place is outside the arena.
        """
        self.arena = arena
        held: list[HeldKv] = []
        for number, carry in enumerate(carries):
            place = arena.find(carry.session) if arena is not None else None
            if place is not None:  # it stayed
                lengths = place.lengths = [min(length, carry.computed) for length in place.lengths]
            else:
                lengths = self._bring_back(arena, share, carry, on_bytes)
            held.append(
                _held(carry.session, share.layers, lengths, self.inputs.lengths(carry.session))
                if number < MOST_DETAILED
                else HeldKv(session=carry.session, positions=min(lengths))
            )
        return tuple(one for one in held if one.positions or one.layers or one.inputs)

    def release(self, session: SessionId) -> None:
        """Forget a session that is over."""
        self._spool.forget(session)
        self.inputs.forget(session)
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
        if place is None or start + count > place.lengths[cell.layer - arena.layers.start]:
            return None
        keys_Td, values_Td = arena.rows(cell.layer, cell.group, place.at + start, count)
        return bytes(as_bytes(keys_Td)), bytes(as_bytes(values_Td))

    def take(self, session: SessionId, cell: Cell, start: int, keys: memoryview, values: memoryview) -> bool:
        """Keep rows that a peer sent; False when they are of no use: known better, behind a gap, or without room."""
        if self._place(session, cell) is not None:
            return False
        return self._spool.write(session, cell, start, keys, values)

    def _place(self, session: SessionId, cell: Cell) -> int | None:
        """Return how many positions of a cell there are, of a session that is in the arena with it."""
        arena = self.arena
        if arena is None or cell.layer not in arena.layers or cell.group not in arena.groups:
            return None
        place = arena.find(session)
        return place.lengths[cell.layer - arena.layers.start] if place is not None else None

    def _put_away(self, carry: Carry) -> None:
        arena, session = self.arena, carry.session
        place = arena.find(session) if arena is not None else None
        if arena is None or place is None:
            return
        for layer, group in product(arena.layers, arena.groups):
            length = min(place.lengths[layer - arena.layers.start], carry.computed)
            for start in range(0, length, PIECE_ROWS):
                count = min(PIECE_ROWS, length - start)
                keys_Td, values_Td = arena.rows(layer, group, place.at + start, count)
                if not self._spool.write(session, Cell(layer, group), start, as_bytes(keys_Td), as_bytes(values_Td)):
                    return

    def _bring_back(
        self, arena: KvCache | None, share: StageShare, carry: Carry, on_bytes: Callable[[int], None]
    ) -> list[int]:
        """Read a session's rows out of the spool; return how many positions each layer has now."""
        session, most = carry.session, min(carry.computed, carry.capacity)
        if arena is None:
            return [most]
        lengths = [
            min((self._spool.length(session, Cell(layer, group)) for group in share.groups), default=most)
            for layer in share.layers
        ]
        lengths = [min(length, most) for length in lengths]
        if not any(lengths):
            return lengths
        arena.require_place(session, carry.at, carry.capacity)
        for layer, length in zip(share.layers, lengths, strict=True):
            for group in share.groups:
                if not self._read_into(arena, carry, Cell(layer, group), length):
                    return [0] * len(lengths)
                on_bytes(length * self._row_bytes(arena))
        arena.restore(session, at=carry.at, capacity=carry.capacity, lengths=lengths)
        # A cell of which more is here than of its whole layer waits on: under another plan it may be of use again.
        here = dict(zip(share.layers, lengths, strict=True))
        self._spool.forget_cells(
            session,
            lambda cell: cell.group in share.groups and self._spool.length(session, cell) <= here.get(cell.layer, -1),
        )
        return lengths

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


def _held(session: SessionId, layers: Span, lengths: Sequence[int], inputs: Mapping[int, int]) -> HeldKv:
    """Say what is here of a session; `lengths`: positions by layer. What there is no room for is not said."""
    least = min(lengths)
    runs: list[HeldLayers] = []
    for length, run in groupby(range(len(lengths)), key=lengths.__getitem__):
        numbers = [layers.start + number for number in run]
        if length > least:
            runs.append(HeldLayers(layers=Span(numbers[0], numbers[-1] + 1), positions=length))
    most = sorted(runs, key=lambda run: run.positions * len(run.layers))[-MOST_DETAILS:]
    kept = sorted(inputs.items(), key=lambda item: item[1])[-MOST_DETAILS:]
    return HeldKv(
        session=session,
        positions=least,
        layers=tuple(run for run in runs if run in most),
        inputs=tuple(KeptInputs(layer=layer, positions=positions) for layer, positions in sorted(kept)),
    )
