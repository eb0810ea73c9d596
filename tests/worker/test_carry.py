"""A new plan carries sessions over: what workers keep, and that the tokens after the cut are those of no cut."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from tiny_cluster import SPEC, TinyCluster, plan_of

from coordinator.moves import Copy, find_copies, find_moves
from protocol.ids import SessionId, WorkerId
from protocol.messages import Carry, KvMove
from protocol.plans import Plan
from protocol.specs import Span
from worker.commands import Drop, KvOrders
from worker.spool import Cell

ALL, GROUPS, FFN = Span(0, SPEC.layers), Span(0, SPEC.kv_heads), Span(0, SPEC.ffn_tiles)
PROMPTS = {1: [3, 14, 15, 92, 65, 35, 8, 9], 2: [5, 6, 7]}
CAPACITY, COUNT = 40, 14
NAMES = ("a", "b", "c")


def alone(name: str = "a", epoch: int = 1) -> Plan:
    return plan_of([(ALL, [(name, GROUPS, FFN)], 0)], head="a", epoch=epoch)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyCluster]:
    one = TinyCluster(tmp_path_factory.mktemp("carry"))
    for name in NAMES:
        one.add(name)
    yield one
    one.close()


@pytest.fixture(scope="module")
def logs(cluster: TinyCluster) -> dict[int, list[int]]:
    """The undisturbed runs."""
    plan = alone()
    cluster.form(plan)
    return {
        session: cluster.go_on(plan, prompt, COUNT, capacity=CAPACITY, session=session)
        for session, prompt in PROMPTS.items()
    }


class Run:
    """Sessions that go on under one plan after the other."""

    def __init__(self, cluster: TinyCluster) -> None:
        self.cluster = cluster
        self.logs = {session: list(prompt) for session, prompt in PROMPTS.items()}
        self.computed = dict.fromkeys(PROMPTS, 0)
        self.most = dict.fromkeys(PROMPTS, 0)
        self.places: dict[int, int] = {}
        self.num_steps = 0

    def turn(
        self, plan: Plan, order: Sequence[int], before: Plan | None = None, *, without: frozenset[str] = frozenset(),
        copies: tuple[Copy, ...] = (), mirrors: tuple[Copy, ...] = (), is_direct: bool = True,
    ) -> dict[str, dict[int, int]]:  # fmt: skip
        """Form a plan, sessions lying in this order; returns what each worker holds.

        Where there was a plan `before`, keys and values travel: from those who are left `without` some, and from those
        who kept `copies`. `mirrors`: copies to keep from now on.
        """
        self.num_steps = 0
        self.places = {session: number * CAPACITY for number, session in enumerate(order)}
        carries = tuple(
            Carry(session=SessionId(session), at=at, capacity=CAPACITY, computed=self.most[session])
            for session, at in self.places.items()
        )
        here = {name for name in NAMES if name not in without}
        moves = find_moves(before, plan, here, copies) if before is not None else {}
        orders = {
            name: KvOrders(
                carries=carries,
                gives=tuple(moves[name].gives) if name in moves else (),
                takes=tuple(moves[name].takes) if name in moves else (),
                mirrors=tuple(KvMove(peer=one.holder, cells=one.cells) for one in mirrors if one.owner == name),
            )
            for name in (WorkerId(one) for one in {*plan.workers, *moves})
        }
        self.cluster.form(plan, lambda one, other: is_direct, orders)
        held = {name: self.held(name, plan) for name in plan.workers}
        for session in self.logs:
            self.computed[session] = min(found.get(session, 0) for found in held.values())
        return held

    def has_copy(self, copy: Copy) -> bool:
        shelf = self.cluster.hands[copy.holder].executor._kv
        cells = [Cell(layer, group) for layer in copy.cells.layers for group in copy.cells.groups]
        return all(
            shelf.length(SessionId(session), cell) == length for session, length in self.most.items() for cell in cells
        )

    def end(self) -> None:
        for name in NAMES:
            self.cluster.hands[name].executor.submit(Drop())

    def held(self, name: str, plan: Plan) -> dict[int, int]:
        ready = self.cluster.ready(name, plan.epoch)
        assert ready is not None
        return {one.session: one.positions for one in ready.held if one.positions}

    def step(self, plan: Plan, session: int, count: int) -> None:
        log = self.logs[session]
        self.logs[session] = self.cluster.go_on(
            plan, log, count, capacity=CAPACITY, computed=self.computed[session], session=session,
            at=self.places[session],
        )  # fmt: skip
        self.num_steps += count
        # The head's word comes when the last stage's hub has computed; its members may be a moment behind.
        executors = [self.cluster.hands[name].executor for name in plan.workers]
        self.cluster.pump(lambda: all(executor.work.steps >= self.num_steps for executor in executors))
        if count:
            self.computed[session] = self.most[session] = len(self.logs[session]) - 1


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any way to cut the model over some of the workers; "a" is the head."""
    names = draw(st.permutations(NAMES).map(list))[: draw(st.integers(1, 3))]
    stages, layers = [], _cuts(draw, SPEC.layers, draw(st.integers(1, len(names))))
    for number, span in enumerate(layers):
        left = len(layers) - number - 1
        members = [names.pop() for _ in range(draw(st.integers(1, len(names) - left)) if left else len(names))]
        groups, ffn = _cuts(draw, SPEC.kv_heads, len(members)), _cuts(draw, SPEC.ffn_tiles, len(members))
        if any(not len(one) and not len(other) for one, other in zip(groups, ffn, strict=True)):
            members, groups, ffn = members[:1], [GROUPS], [FFN]
        lines = [(name, one, other) for name, one, other in zip(members, groups, ffn, strict=True)]
        stages.append((span, lines, draw(st.integers(0, len(members) - 1))))
    return plan_of(stages, head="a")


def _cuts(draw: st.DrawFn, whole: int, parts: int) -> list[Span]:
    """Cut `[0, whole)` into spans; where there are more parts than items, some are empty."""
    least = min(parts, whole)
    inner = sorted(draw(st.lists(st.integers(1, whole - 1), min_size=least - 1, max_size=least - 1, unique=True)))
    borders = [0, *inner, *([whole] * (parts - least)), whole]
    return [Span(start, end) for start, end in itertools.pairwise(borders)]


EPOCHS = iter(range(10, 10**9))
TOGETHER = plan_of([(ALL, [("a", Span(0, 1), Span(0, 1)), ("b", Span(1, 2), Span(1, 3))], 0)], head="a")
IN_TURN = plan_of([(Span(0, 1), [("b", GROUPS, FFN)], 0), (Span(1, SPEC.layers), [("a", GROUPS, FFN)], 0)], head="a")
BY_ONE = plan_of([(ALL, [("a", GROUPS, FFN)], 0)], head="a")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(plans(), min_size=2, max_size=4),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=4, max_size=4),
    st.lists(st.permutations([1, 2]), min_size=4, max_size=4),
)
@example(  # layer 0 was forgotten as a whole under a plan that lacked one group of it
    [TOGETHER, IN_TURN, BY_ONE, TOGETHER], [(1, 0), (1, 0), (0, 0), (0, 0)], [[1, 2]] * 4
)
def test_tokens_after_any_cut_are_those_of_no_cut(
    cluster: TinyCluster, logs: dict[int, list[int]], chosen: list[Plan], counts: list[tuple[int, int]],
    orders: list[list[int]],
) -> None:  # fmt: skip
    run, known = Run(cluster), Known()
    try:
        for cut, (first, second), order in zip(chosen, counts, orders, strict=False):
            plan = dataclasses.replace(cut, epoch=next(EPOCHS))
            before = dict(run.most)
            held = run.turn(plan, order)
            assert held == {name: known.turn(plan, name, before) for name in plan.workers}
            run.step(plan, 1, first)
            run.step(plan, 2, second)
            for name in plan.workers:
                known.stepped(plan, name, {1: first, 2: second}, run.computed)
    finally:
        run.end()
    for session, log in run.logs.items():
        assert log == logs[session][: len(log)]


class Known:
    """Which rows each worker has: by worker, session and cell."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int, tuple[int, int]], int] = {}

    def turn(self, plan: Plan, name: str, most: dict[int, int]) -> dict[int, int]:
        """Return what it holds of each session under a plan."""
        held: dict[int, int] = {}
        for session, length in most.items():
            keys = [(name, session, cell) for cell in _cells(plan, name)]
            least = min([length, *(self.rows.get(key, 0) for key in keys)])
            if least:
                held[session] = least
                self.rows.update(dict.fromkeys(keys, least))
        return held

    def stepped(self, plan: Plan, name: str, counts: dict[int, int], computed: dict[int, int]) -> None:
        """Its own cells have grown in the arena; rows of before that wait in the spool are as good."""
        for session, count in counts.items():
            for cell in _cells(plan, name) if count else ():
                key = (name, session, cell)
                self.rows[key] = max(self.rows.get(key, 0), computed[session])


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.tuples(plans(), plans()), st.tuples(st.integers(1, 3), st.integers(0, 3)), st.booleans())
def test_what_a_worker_lacks_is_given_by_those_who_have_it(
    cluster: TinyCluster, logs: dict[int, list[int]], pair: tuple[Plan, Plan], counts: tuple[int, int], is_direct: bool
) -> None:
    before, after = pair
    run = Run(cluster)
    try:
        one, two = (dataclasses.replace(plan, epoch=next(EPOCHS)) for plan in (before, after))
        run.turn(one, [1, 2])
        for session, count in zip((1, 2), counts, strict=True):
            run.step(one, session, count)
        held = run.turn(two, [2, 1], before=one, is_direct=is_direct)
        everything = {session: length for session, length in run.most.items() if length}
        assert held == dict.fromkeys(held, everything)
        run.step(two, 1, 2)
        run.step(two, 2, 2)
    finally:
        run.end()
    for session, log in run.logs.items():
        assert log == logs[session][: len(log)]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.tuples(plans(), plans()), st.tuples(st.integers(1, 3), st.integers(0, 3)), st.booleans())
def test_who_keeps_copies_takes_over_from_one_that_is_lost(
    cluster: TinyCluster, logs: dict[int, list[int]], pair: tuple[Plan, Plan], counts: tuple[int, int], is_direct: bool
) -> None:
    before, after = pair
    lost = frozenset(before.workers).difference(after.workers)
    assume(lost and set(after.workers) <= set(before.workers))
    run = Run(cluster)
    try:
        one, two = (dataclasses.replace(plan, epoch=next(EPOCHS)) for plan in (before, after))
        copies = find_copies(one, [two])
        run.turn(one, [1, 2], mirrors=copies, is_direct=is_direct)
        for session, count in zip((1, 2), counts, strict=True):
            run.step(one, session, count)
        cluster.pump(lambda: all(run.has_copy(copy) for copy in copies))
        held = run.turn(two, [2, 1], before=one, without=lost, copies=copies)
        everything = {session: length for session, length in run.most.items() if length}
        assert held == dict.fromkeys(held, everything)
        run.step(two, 1, 2)
    finally:
        run.end()
    for session, log in run.logs.items():
        assert log == logs[session][: len(log)]


def _cells(plan: Plan, name: str) -> set[tuple[int, int]]:
    return {
        (layer, group)
        for stage in plan.stages
        for share in stage.members
        for layer in stage.layers
        for group in share.groups
        if share.worker == name
    }


def test_a_plan_like_the_last_one_reads_no_weights_again(cluster: TinyCluster) -> None:
    run = Run(cluster)
    try:
        one, two = (dataclasses.replace(alone(), epoch=next(EPOCHS)) for _ in range(2))
        run.turn(one, [1, 2])
        executor = cluster.hands["a"].executor
        blocks = executor._blocks.blocks
        before, _ = executor.load_progress
        run.turn(two, [1, 2])
        assert executor._blocks.blocks == blocks
        read, _ = executor.load_progress
        assert 0 < read < before / 10  # the norms
    finally:
        run.end()
