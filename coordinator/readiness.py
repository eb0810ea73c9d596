"""What the workers keep ready for the loss of others: tiles on their disks, copies of keys and values.

Knows nothing of time or sessions. Costs are told in bytes before anybody pays them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from coordinator.memory import bytes_text
from coordinator.moves import Copy, find_copies
from protocol.ids import WorkerId
from protocol.plans import Plan
from protocol.specs import ModelSpec
from protocol.tiles import HEAD_KINDS, TileId, tile_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """For each worker the tiles it should have beside its own; and the copies that all of them keep."""

    spares: dict[WorkerId, tuple[TileId, ...]]
    copies: tuple[Copy, ...]

    def cost_text(self, spec: ModelSpec) -> str:
        """Say what this costs, for people; empty when it costs nothing."""
        tiles = [tile for wanted in self.spares.values() for tile in wanted]
        parts = []
        if tiles:
            disk = bytes_text(sum(tile_bytes(spec, tile) for tile in tiles))
            parts.append(f"{len(tiles)} spare tiles ({disk} of disk)")
        if self.copies:
            each = sum(spec.kv_bytes_per_token(len(copy.cells.groups), len(copy.cells.layers)) for copy in self.copies)
            parts.append(f"copies of keys and values ({bytes_text(each)} of disk and of sending a token)")
        return " and ".join(parts)


def make_ready(plan: Plan, successors: Iterable[Plan], *, spares: bool, copies: bool) -> Readiness:
    """Return what must be kept so that each of `successors` can take the place of `plan` quickly."""
    following = tuple(successors)
    own = {worker: frozenset(plan.tiles_of(worker)) for worker in plan.workers} if spares else {}
    kept: dict[WorkerId, dict[TileId, None]] = {}
    if spares:
        for successor in following:
            for worker in successor.workers:
                lacking = [tile for tile in successor.tiles_of(worker) if tile not in own.get(worker, ())]
                wanted = (tile for tile in lacking if tile.kind not in HEAD_KINDS)
                kept.setdefault(worker, {}).update(dict.fromkeys(wanted))
    tiles = {worker: tuple(wanted) for worker, wanted in kept.items() if wanted}
    return Readiness(spares=tiles, copies=find_copies(plan, following) if copies else ())
