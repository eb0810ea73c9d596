"""What each worker is sent when a plan is loaded: links, keys and values on their way, sources of tiles.

Knows nothing of time or of sessions beyond what they carry over. A pure function from plans and who is here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from coordinator.events import SendControl
from coordinator.links import decide_links
from coordinator.moves import Copy, Moves, find_moves
from coordinator.planner import Reach
from coordinator.registry import Registry
from protocol.ids import WorkerId
from protocol.messages import Carry, Holder, KvMove, LinkOrder, Load
from protocol.plans import Plan

MAX_HOLDERS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """A plan that served sessions: whose keys and values there may be, and who keeps copies of them."""

    plan: Plan
    copies: tuple[Copy, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Loads:
    """The orders of one plan. `workers`: all that take part, those included that only give what they had."""

    links: Mapping[WorkerId, tuple[LinkOrder, ...]]
    messages: Mapping[WorkerId, Load]
    copies: tuple[Copy, ...] = ()
    givers: tuple[WorkerId, ...] = field(default=())

    @property
    def workers(self) -> tuple[WorkerId, ...]:
        """Everybody who must answer."""
        return tuple(self.messages)

    def effects(self, plan: Plan) -> list[SendControl]:
        """Return the orders to be sent."""
        return [
            SendControl(worker=worker, message=load, tiles=plan.tiles_of(worker))
            for worker, load in self.messages.items()
        ]


def make_loads(
    plan: Plan,
    before: Serving | None,
    registry: Registry,
    reach: Reach,
    *,
    carries: tuple[Carry, ...],
    copies: tuple[Copy, ...],
) -> Loads:
    """Return the orders of a plan that takes the place of `before`; `copies`: what to mirror while it serves."""
    moves = find_moves(before.plan, plan, registry.names, before.copies) if before is not None and carries else {}
    givers = tuple(worker for worker in moves if worker not in plan.workers)
    peers = {member.worker: member.peer for member in registry}
    pairs = [(worker, give.peer) for worker, move in moves.items() for give in move.gives]
    pairs += [(copy.holder, copy.owner) for copy in copies]
    links = decide_links(plan, reach, peers, pairs)
    held = holders(registry, [before.plan] if before is not None else [])
    messages = {}
    for worker in (*plan.workers, *givers):
        move = moves.get(worker, Moves())
        messages[worker] = Load(
            plan=plan,
            links=links[worker],
            carries=carries,
            gives=tuple(move.gives),
            takes=tuple(move.takes),
            mirrors=tuple(KvMove(peer=copy.holder, cells=copy.cells) for copy in copies if copy.owner == worker),
            holders=_helpful(held, plan, worker),
        )
    return Loads(links=links, messages=messages, copies=copies, givers=givers)


def holders(registry: Registry, plans: Sequence[Plan]) -> tuple[Holder, ...]:
    """Return who has which tiles on its disk, as far as these plans say, of those that are here and serve tiles."""
    found: dict[Holder, None] = {}
    for plan in plans:
        for stage in plan.stages:
            for share in stage.members:
                member = registry.get(share.worker)
                if member is not None and member.tile_addresses:
                    holder = Holder(peer=member.tile_peer, layers=stage.layers, groups=share.groups, ffn=share.ffn)
                    found[holder] = None
    return tuple(found)[:MAX_HOLDERS]


def _helpful(held: Iterable[Holder], plan: Plan, worker: WorkerId) -> tuple[Holder, ...]:
    """Return those who have tiles that a worker of the plan needs: a `Load` has no room for everybody."""
    number = plan.stage_of(worker)
    if number is None:
        return ()
    stage = plan.stages[number]
    share = stage.members[stage.rank_of(worker)]
    return tuple(
        holder
        for holder in held
        if holder.peer.worker != worker
        and len(holder.layers & stage.layers)
        and (len(holder.groups & share.groups) or len(holder.ffn & share.ffn))
    )
