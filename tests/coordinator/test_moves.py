"""Which keys and values travel: for any two plans every cell that somebody has arrives, and none of them twice."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from core_cases import joined, make_spec

from coordinator.loads import Serving, make_loads
from coordinator.moves import Copy, find_copies, find_moves, holdings, intersection, without
from coordinator.registry import Registry
from protocol.ids import SessionId, WorkerId
from protocol.messages import Carry, Cells, KvMove, LinkMode
from protocol.plans import Plan, Share, Stage
from protocol.specs import Span

SPEC = make_spec(layers=6, kv_heads=4, ffn_tiles=8)
NAMES = [WorkerId(name) for name in "abcdef"]
Cell = tuple[int, int]


def cut(dice: random.Random, whole: int, parts: int, *, least: int) -> list[Span]:
    """Cut `[0, whole)` into so many spans at random."""
    while True:
        ends = sorted(dice.randint(0, whole) for _ in range(parts - 1))
        spans = [Span(start, end) for start, end in itertools.pairwise([0, *ends, whole])]
        if all(len(span) >= least for span in spans):
            return spans


def a_plan(dice: random.Random, epoch: int, among: list[WorkerId]) -> Plan:
    """A plan of random stages and shares over some of these workers."""
    workers = dice.sample(among, dice.randint(1, len(among)))
    num_stages = dice.randint(1, min(len(workers), SPEC.layers))
    borders = [span for span in cut(dice, len(workers), num_stages, least=1)]
    stages = []
    for layers, seats in zip(cut(dice, SPEC.layers, num_stages, least=1), borders, strict=True):
        members = workers[seats.start : seats.end]
        groups = cut(dice, SPEC.kv_heads, len(members), least=0)
        ffn = cut(dice, SPEC.ffn_tiles, len(members), least=1)
        shares = tuple(
            Share(worker=worker, groups=mine, ffn=tiles)
            for worker, mine, tiles in zip(members, groups, ffn, strict=True)
        )
        stages.append(Stage(layers=layers, members=shares))
    return Plan(epoch=epoch, model=SPEC, head=workers[0], stages=tuple(stages), wire=SPEC.activations)


def cells_of(cells: Cells) -> list[Cell]:
    return list(itertools.product(cells.layers, cells.groups))


def tell(
    worker: WorkerId, moves: list[KvMove], cells: Counter[tuple[WorkerId, WorkerId, Cell]], *, gives: bool
) -> None:
    for move in moves:
        way = (worker, move.peer) if gives else (move.peer, worker)
        cells.update((*way, cell) for cell in cells_of(move.cells))


@pytest.mark.parametrize("seed", range(300))
def test_every_cell_that_somebody_has_arrives_once_and_nothing_else_travels(seed: int) -> None:
    dice = random.Random(seed)
    before = a_plan(dice, 1, NAMES)
    copies = find_copies(before, [a_plan(dice, 2, [name for name in NAMES if name != lost]) for lost in NAMES[:2]])
    here = set(dice.sample(NAMES, dice.randint(1, len(NAMES))))
    after = a_plan(dice, 3, sorted(here))
    has: dict[WorkerId, set[Cell]] = {name: set() for name in NAMES}
    for owner, cells in holdings(before):
        has[owner].update(cells_of(cells))
    for copy in copies:
        if copy.owner not in here:
            has[copy.holder].update(cells_of(copy.cells))
    given: Counter[tuple[WorkerId, WorkerId, Cell]] = Counter()
    taken: Counter[tuple[WorkerId, WorkerId, Cell]] = Counter()
    for worker, moves in find_moves(before, after, here, copies).items():
        assert worker in here
        tell(worker, moves.gives, given, gives=True)
        tell(worker, moves.takes, taken, gives=False)
    assert given == taken
    assert all(count == 1 for count in given.values())
    for giver, taker, cell in given:
        assert giver in here
        assert giver != taker
        assert cell in has[giver]
        assert cell not in has[taker]
    arrived = Counter((taker, cell) for _, taker, cell in given)
    somewhere = set().union(*(has[name] for name in here))
    for taker, cells in holdings(after):
        for cell in cells_of(cells):
            assert arrived.pop((taker, cell), 0) == (cell in somewhere and cell not in has[taker])
    assert not arrived


def test_a_worker_that_is_here_gives_its_own_and_no_copy_of_it() -> None:
    cells = Cells(layers=Span(0, 6), groups=Span(0, 4))
    share = {name: Share(worker=name, groups=Span(0, 4), ffn=Span(0, 8)) for name in NAMES[:3]}
    a, b, c = NAMES[:3]
    stage = {name: (Stage(layers=Span(0, 6), members=(share[name],)),) for name in share}
    before, after = (Plan(epoch=1, model=SPEC, head=name, stages=stage[name], wire=SPEC.activations) for name in (a, c))
    copies = (Copy(a, b, cells),)
    assert find_moves(before, after, {a, b, c}, copies)[c].takes == [KvMove(peer=a, cells=cells)]
    assert find_moves(before, after, {b, c}, copies)[c].takes == [KvMove(peer=b, cells=cells)]
    assert find_moves(before, after, {c}, copies) == {}
    assert find_moves(before, after, {a, c})[a].gives == [KvMove(peer=c, cells=cells)]


@pytest.mark.parametrize("seed", range(100))
def test_copies_are_of_all_that_each_successor_takes_from_those_that_are_lost(seed: int) -> None:
    dice = random.Random(seed)
    plan = a_plan(dice, 1, NAMES)
    lost = dice.choice(plan.workers)
    successor = a_plan(dice, 2, [name for name in NAMES if name != lost])
    kept = {(copy.owner, copy.holder, cell) for copy in find_copies(plan, [successor]) for cell in cells_of(copy.cells)}
    gone = [(owner, cell) for owner, cells in holdings(plan) for cell in cells_of(cells)]
    wanted = {cell: taker for taker, cells in holdings(successor) for cell in cells_of(cells)}
    assert kept == {(owner, wanted[cell], cell) for owner, cell in gone if owner not in successor.workers}


@pytest.mark.parametrize("seed", range(100))
def test_what_is_left_of_a_rectangle_are_the_cells_outside_the_other(seed: int) -> None:
    dice = random.Random(seed)

    def a_rectangle() -> Cells:
        layers, groups = (sorted(dice.sample(range(7), 2)) for _ in range(2))
        return Cells(layers=Span(*layers), groups=Span(*groups))

    one, other = a_rectangle(), a_rectangle()
    left = [cell for part in without(one, other) for cell in cells_of(part)]
    assert len(left) == len(set(left))
    assert set(left) == set(cells_of(one)) - set(cells_of(other))
    both = intersection(one, other)
    assert set(cells_of(both) if both else []) == set(cells_of(one)) & set(cells_of(other))


@pytest.mark.parametrize("seed", range(100))
def test_whoever_exchanges_rows_has_a_link_and_whoever_only_gives_takes_part(seed: int) -> None:
    dice = random.Random(seed)
    registry = Registry(3.0)
    here = sorted(dice.sample(NAMES, dice.randint(1, len(NAMES))))
    for name in here:
        registry.join(joined(name), 0.0)
    before, plan = a_plan(dice, 1, NAMES), a_plan(dice, 2, here)
    copies = find_copies(plan, [a_plan(dice, 3, [one for one in NAMES if one != lost]) for lost in plan.workers[1:]])
    copies = tuple(copy for copy in copies if copy.holder in plan.workers)
    serving = Serving(plan=before, copies=find_copies(before, [a_plan(dice, 2, NAMES[:3])]))
    reach = frozenset(pair for pair in itertools.permutations(NAMES, 2) if dice.random() < 0.5)
    carry = Carry(session=SessionId(1), at=0, capacity=9, computed=5)
    loads = make_loads(plan, serving, registry, reach, carries=(carry,), copies=copies)
    assert set(loads.workers) == {*plan.workers, *loads.givers}
    ends = {}
    for worker, load in loads.messages.items():
        links = {order.peer.worker: order.mode for order in load.links}
        assert len(links) == len(load.links)
        assert worker not in links
        ends.update({(worker, peer): mode for peer, mode in links.items()})
        assert {move.peer for move in (*load.gives, *load.takes, *load.mirrors)} <= links.keys()
        assert (worker in plan.workers) or (load.gives and not load.takes and not load.mirrors)
        assert load.carries == (carry,)
    for (worker, peer), mode in ends.items():
        other = ends[peer, worker]
        assert {mode, other} in ({LinkMode.RELAY}, {LinkMode.DIAL, LinkMode.LISTEN})
        assert mode is not LinkMode.DIAL or (worker, peer) in reach
    assert make_loads(plan, serving, registry, reach, carries=(), copies=()).givers == ()
