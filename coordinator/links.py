"""Who dials whom: which pairs of workers to probe, and how each link of a plan is made.

Knows nothing of sockets; a pure function from a plan and what the probes found.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping

from coordinator.planner import Reach
from protocol.ids import WorkerId
from protocol.messages import LinkMode, LinkOrder, Peer
from protocol.plans import Plan


def probe_targets(plan: Plan) -> dict[WorkerId, tuple[WorkerId, ...]]:
    """Return whom each worker of a drafted plan should try to reach; workers without a partner are left out.

    Pairs within a stage, and between neighbouring stages and the head, whoever becomes hub.
    """
    stages = [[share.worker for share in stage.members] for stage in plan.stages]
    rings = [[plan.head], *stages, [plan.head]]
    pairs = [pair for members in stages for pair in itertools.combinations(members, 2)]
    pairs += [pair for before, after in itertools.pairwise(rings) for pair in itertools.product(before, after)]
    targets: dict[WorkerId, dict[WorkerId, None]] = defaultdict(dict)
    for one, other in pairs:
        if one != other:
            targets[one][other] = targets[other][one] = None
    return {worker: tuple(partners) for worker, partners in targets.items()}


def decide_links(
    plan: Plan, reach: Reach, peers: Mapping[WorkerId, Peer], more: Iterable[tuple[WorkerId, WorkerId]] = ()
) -> dict[WorkerId, tuple[LinkOrder, ...]]:
    """Return the links that each worker must hold: those of the plan, and `more` for keys and values on their way.

    The far side dials the hub when it reaches it, else the hub dials, else both go through the coordinator.
    """
    pairs = {frozenset(pair): pair for pair in [*more, *plan.links()]}
    workers = dict.fromkeys([*plan.workers, *(worker for pair in pairs.values() for worker in pair)])
    orders: dict[WorkerId, list[LinkOrder]] = {worker: [] for worker in workers}
    for hub, other in pairs.values():
        if (other, hub) in reach:
            modes = (LinkMode.LISTEN, LinkMode.DIAL)
        elif (hub, other) in reach:
            modes = (LinkMode.DIAL, LinkMode.LISTEN)
        else:
            modes = (LinkMode.RELAY, LinkMode.RELAY)
        orders[hub].append(LinkOrder(peer=peers[other], mode=modes[0]))
        orders[other].append(LinkOrder(peer=peers[hub], mode=modes[1]))
    return {worker: tuple(links) for worker, links in orders.items()}
