"""Which keys and values travel when one plan takes the place of another, as rectangles of layers and KV-head groups.

Knows nothing of sessions: what holds for one holds for all. A pure function from two plans and who is still here.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from protocol.ids import WorkerId
from protocol.messages import Cells, KvMove
from protocol.plans import Plan
from protocol.specs import Span


class Copy(NamedTuple):
    """`holder` keeps a copy, up to date at every step, of cells that `owner` computes."""

    owner: WorkerId
    holder: WorkerId
    cells: Cells


@dataclass(slots=True)
class Moves:
    """What one worker sends and waits for."""

    gives: list[KvMove] = field(default_factory=list)
    takes: list[KvMove] = field(default_factory=list)


def holdings(plan: Plan) -> Iterator[tuple[WorkerId, Cells]]:
    """Yield each member of a plan that has KV-head groups, with its cells."""
    for stage in plan.stages:
        for share in stage.members:
            if len(share.groups):
                yield share.worker, Cells(layers=stage.layers, groups=share.groups)


def find_moves(
    before: Plan, after: Plan, here: Container[WorkerId], copies: Iterable[Copy] = ()
) -> dict[WorkerId, Moves]:
    """Return what must travel so that every worker of `after` has its cells, as far as somebody who is here has them.

    A worker keeps its own cells; others come from their owner or, when that is gone, from who keeps a copy.
    """
    moves: dict[WorkerId, Moves] = {}
    sources = [(owner, cells) for owner, cells in holdings(before) if owner in here]
    sources += [(copy.holder, copy.cells) for copy in copies if copy.owner not in here and copy.holder in here]
    for taker, wanted in holdings(after):
        needed = [wanted]
        for holder, cells in sources:
            if holder == taker:
                needed = [left for one in needed for left in without(one, cells)]
        for giver, cells in sources:
            for part in [part for one in needed if (part := intersection(one, cells)) is not None]:
                moves.setdefault(giver, Moves()).gives.append(KvMove(peer=taker, cells=part))
                moves.setdefault(taker, Moves()).takes.append(KvMove(peer=giver, cells=part))
            needed = [left for one in needed for left in without(one, cells)]
    return moves


def find_copies(plan: Plan, successors: Iterable[Plan]) -> tuple[Copy, ...]:
    """Return who should keep a copy of whose cells, so that under each of `successors` nothing is computed again.

    A successor is a plan of the same workers less some that are lost; what it takes from those needs a copy.
    """
    copies: dict[Copy, None] = {}
    for successor in successors:
        left = set(successor.workers)
        lost = [(owner, cells) for owner, cells in holdings(plan) if owner not in left]
        for holder, wanted in holdings(successor):
            for owner, cells in lost:
                part = intersection(wanted, cells)
                if part is not None:
                    copies[Copy(owner, holder, part)] = None
    return tuple(copies)


def intersection(one: Cells, other: Cells) -> Cells | None:
    """Return the cells that are in both; None when there are none."""
    layers, groups = one.layers & other.layers, one.groups & other.groups
    return Cells(layers=layers, groups=groups) if len(layers) and len(groups) else None


def without(one: Cells, other: Cells) -> list[Cells]:
    """Return the cells of one that are not in the other, as rectangles that don't overlap."""
    both = intersection(one, other)
    if both is None:
        return [one]
    layers, groups = one.layers, one.groups
    beside = [
        Cells(layers=Span(layers.start, both.layers.start), groups=groups),
        Cells(layers=Span(both.layers.end, layers.end), groups=groups),
        Cells(layers=both.layers, groups=Span(groups.start, both.groups.start)),
        Cells(layers=both.layers, groups=Span(both.groups.end, groups.end)),
    ]
    return [cells for cells in beside if len(cells.layers) and len(cells.groups)]
