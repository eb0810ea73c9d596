"""A change that nobody forces at once: prepared beside the running work, then made at the border of a step.

Knows nothing of why the change is wanted, nor how a plan is loaded.

    PROBING --links known--> STOCKING --tiles on disk--> HOLDING --no step under way--> (the plan is loaded)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum

from coordinator.drafting import Draft
from coordinator.events import SendControl
from coordinator.registry import Registry
from protocol.ids import WorkerId
from protocol.messages import Holder, Stock, Stocked
from protocol.tiles import TileId


class Stage(StrEnum):
    """How far a change has come."""

    PROBING = "probing"
    STOCKING = "stocking"
    HOLDING = "holding"


class Change:
    """One change. `reason` is for people; a `forced` one is made even when not all tiles could be had before."""

    def __init__(self, draft: Draft, reason: str, *, forced: bool, now: float) -> None:
        self.draft = draft
        self.reason = reason
        self.forced = forced
        self.stage = Stage.PROBING
        self.error = ""
        self._missing: dict[WorkerId, int] = {}  # workers that still fetch, with the bytes they have got
        self._orders: dict[WorkerId, int] = {}
        self._moved_at = now

    def stock(self, depot: Depot, holders: Sequence[Holder], now: float) -> list[SendControl]:
        """Have every worker fetch what it lacks for the plan."""
        self.stage, self._moved_at = Stage.STOCKING, now
        effects = []
        for worker in self.draft.plan.workers:
            tiles = self.draft.plan.tiles_of(worker)
            if depot.registry.lacks(worker, tiles):
                effects.append(depot.order(worker, tiles, holders))
                self._missing[worker], self._orders[worker] = 0, depot.number
        return effects

    def stocked(self, worker: WorkerId, stocked: Stocked, now: float) -> None:
        """Take in how far a worker has come."""
        before = self._missing.get(worker)
        if before is None or stocked.order != self._orders[worker]:
            return
        if stocked.done_bytes != before or stocked.is_over:
            self._moved_at = now
            self._missing[worker] = stocked.done_bytes
        if stocked.is_over:
            del self._missing[worker]
            self.error = self.error or stocked.error

    @property
    def is_stocked(self) -> bool:
        """Whether nobody fetches any more."""
        return not self._missing

    def is_stuck(self, now: float, limit_s: float) -> bool:
        """Say whether nobody who fetches has got further for so long."""
        return bool(self._missing) and now - self._moved_at >= limit_s


class Depot:
    """Orders of tiles to keep on disk, numbered, so that an answer to an older one is known as such."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.number = 0
        self._tiles: dict[WorkerId, tuple[int, tuple[TileId, ...]]] = {}

    def order(self, worker: WorkerId, tiles: Iterable[TileId], holders: Sequence[Holder]) -> SendControl:
        """Return the order for a worker to have these tiles on its disk."""
        self.number += 1
        wanted = tuple(tiles)
        self._tiles[worker] = self.number, wanted
        others = tuple(holder for holder in holders if holder.peer.worker != worker)
        return SendControl(worker=worker, message=Stock(order=self.number, holders=others), tiles=wanted)

    def stocked(self, worker: WorkerId, stocked: Stocked) -> None:
        """Remember what a worker has once its order is over."""
        number, tiles = self._tiles.get(worker, (0, ()))
        if stocked.is_over and not stocked.error and stocked.order == number:
            self.registry.note_tiles(worker, tiles)
