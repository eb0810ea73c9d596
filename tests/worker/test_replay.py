"""A stage is lost: only its layers are computed again, from what a hub kept, and all is as after a whole replay."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_carry import plans
from tiny_cluster import SPEC, TinyCluster, plan_of

from coordinator.moves import find_moves
from coordinator.replays import Remains, Replay, find_remains, find_replay
from protocol.batches import SessionRows
from protocol.errors import ManyhandsError, ProtocolViolation, StepFailed
from protocol.ids import SessionId, WorkerId
from protocol.messages import Carry, Loaded, SampledToken
from protocol.plans import Plan
from protocol.specs import NO_LAYERS, Span
from worker.commands import Drop, Failed, KvOrders

GROUPS, FFN = Span(0, SPEC.kv_heads), Span(0, SPEC.ffn_tiles)
NAMES = ("a", "b", "c", "d")
ONE, TWO = SessionId(1), SessionId(2)
IDS = [(7 * number + 3) % SPEC.vocab for number in range(20)]
CHUNKS = (6, 5, 6, 1, 1)  # a prompt and two tokens; one more token is pending
CAPACITY = 40
EPOCHS = itertools.count(10)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyCluster]:
    one = TinyCluster(tmp_path_factory.mktemp("replay"))
    for name in NAMES:
        one.add(name)
    yield one
    one.close()


@pytest.fixture
def fresh(cluster: TinyCluster) -> Iterator[TinyCluster]:
    yield cluster
    for name in NAMES:
        cluster.hands[name].executor.submit(Drop())


def pipeline(*stages: tuple[int, int, str]) -> Plan:
    """Stages from (first layer, end, names of members); two members share groups and FFN tiles.

    "a" is the head, and the last member of a stage its hub.
    """
    lines = []
    for start, end, names in stages:
        groups = [Span(0, 1), Span(1, 2)] if len(names) > 1 else [GROUPS]
        ffn = [Span(0, 2), Span(2, 3)] if len(names) > 1 else [FFN]
        lines.append((Span(start, end), list(zip(names, groups, ffn, strict=True)), len(names) - 1))
    return plan_of(lines, head="a", epoch=next(EPOCHS))


class Run:
    """Sessions under one plan after the other, whose steps the test chooses itself."""

    def __init__(self, cluster: TinyCluster) -> None:
        self.cluster = cluster
        self.step_number = 0
        self.known: set[SessionId] = set()  # to the head

    def turn(
        self, plan: Plan, reached: int = 0, before: Plan | None = None, *, lost: Sequence[str] = (),
        is_direct: bool = True,
    ) -> Remains:  # fmt: skip
        """Form a plan after some workers are lost; return what is left of session 1."""
        here = {WorkerId(name) for name in NAMES if name not in lost}
        moves = find_moves(before, plan, here) if before is not None and reached else {}
        carries = (Carry(session=ONE, at=0, capacity=CAPACITY, computed=reached),) if reached else ()
        orders: dict[str, KvOrders] = {name: KvOrders(carries=carries) for name in {*plan.workers, *moves}}
        for name, move in moves.items():
            orders[name] = KvOrders(carries=carries, gives=tuple(move.gives), takes=tuple(move.takes))
        self.cluster.form(plan, lambda one, other: is_direct, orders)
        self.known = set()
        found = find_remains(plan, {name: self.report(name, plan) for name in plan.workers})
        return found.get(ONE, Remains([0] * SPEC.layers))

    def report(self, name: str, plan: Plan) -> Loaded:
        ready = self.cluster.ready(name, plan.epoch)
        assert ready is not None
        return Loaded(
            epoch=plan.epoch, weight_bytes=0, fetched_bytes=0, resident_bytes=0, load_s=0.0, held=ready.held,
            knows_layers=True,
        )  # fmt: skip

    def step(
        self, plan: Plan, ids: Sequence[int], start: int, count: int, *, session: SessionId = ONE,
        layers: Span = NO_LAYERS, sample: bool = False,
    ) -> SampledToken | None:  # fmt: skip
        rows = SessionRows(
            session=session, start=start, count=count, capacity=CAPACITY, sample=sample, at=CAPACITY * (session - 1)
        )
        history = None if session in self.known else start
        self.known.add(session)
        self.cluster.done.clear()
        self.cluster.step(
            plan, self.step_number, [rows], ids[start if history is None else 0 : start + count], history=history,
            layers=layers,
        )  # fmt: skip
        self.step_number += 1
        self.cluster.pump(lambda: bool(self.cluster.done))
        (done,) = self.cluster.done
        return done.tokens[0] if done.tokens else None

    def chunks(self, plan: Plan, session: SessionId = ONE, layers: Span = NO_LAYERS) -> None:
        """Compute all of the log but the last token, in the usual chunks."""
        start = 0
        for count in CHUNKS:
            self.step(plan, IDS, start, count, session=session, layers=layers)
            start += count

    def rows_of(self, plan: Plan, session: SessionId) -> dict[tuple[int, int], Any]:
        """Keys and values of all cells, as far as the log was computed."""
        found = {}
        for stage in plan.stages:
            for share in stage.members:
                arena = self.cluster.hands[share.worker].executor._kv.arena
                assert arena is not None
                for layer, group in itertools.product(stage.layers, share.groups):
                    keys, values = arena.rows(layer, group, CAPACITY * (session - 1), sum(CHUNKS))
                    found[layer, group] = torch.stack((keys, values)).clone()
        return found


Stages = tuple[tuple[int, int, str], ...]
THREE: Stages = ((0, 1, "a"), (1, 3, "b"), (3, 4, "c"))
FOUR: Stages = ((0, 1, "a"), (1, 2, "b"), (2, 3, "c"), (3, 4, "d"))
CASES: dict[str, tuple[Stages, Stages, Span]] = {  # before, after, what is computed again
    "the middle stage": (THREE, ((0, 2, "a"), (2, 4, "c")), Span(1, 3)),
    "the last stage": (THREE, ((0, 1, "a"), (1, 4, "b")), Span(3, 4)),
    "the first stage": (((0, 1, "b"), (1, 3, "c"), (3, 4, "a")), ((0, 3, "c"), (3, 4, "a")), Span(0, 1)),
    "a stage of two": (((0, 1, "a"), (1, 3, "bc"), (3, 4, "d")), ((0, 2, "a"), (2, 4, "d")), Span(1, 3)),
    "one member of two": (((0, 2, "a"), (2, 4, "bc")), ((0, 2, "a"), (2, 4, "c")), Span(2, 4)),
    "a member of the first stage": (((0, 2, "ab"), (2, 4, "c")), ((0, 2, "a"), (2, 4, "c")), Span(0, 2)),
    "the stage after one of two": (((0, 3, "ab"), (3, 4, "c")), ((0, 4, "ab"),), Span(3, 4)),
    "two in a row": (FOUR, ((0, 3, "a"), (3, 4, "d")), Span(1, 3)),
    "borders far from the keeper": (FOUR, ((0, 1, "a"), (1, 2, "b"), (2, 4, "d")), Span(2, 3)),
}
# Two members add their parts, one has no parts to add: what stays was computed with other last bits.
OTHER_SHARES = ("a stage of two", "a member of the first stage")


@pytest.mark.parametrize("is_direct", [True, False], ids=["direct", "relayed"])
@pytest.mark.parametrize("name", CASES)
def test_rows_and_logits_are_those_of_a_whole_replay(fresh: TinyCluster, name: str, is_direct: bool) -> None:
    before, after, layers = pipeline(*CASES[name][0]), pipeline(*CASES[name][1]), CASES[name][2]
    run, reached = Run(fresh), sum(CHUNKS)
    run.turn(before, is_direct=is_direct)
    run.chunks(before)
    remains = run.turn(after, reached, before, lost=[*set(before.workers) - set(after.workers)], is_direct=is_direct)
    replay = find_replay(remains, reached)
    assert (replay.start, replay.until, replay.layers) == (0, reached, layers)
    run.chunks(after, layers=layers)
    token = run.step(after, IDS, reached, 1, sample=True)

    run.chunks(after, TWO)
    wanted = run.step(after, IDS, reached, 1, session=TWO, sample=True)
    assert token is not None
    assert wanted is not None
    found, expected = run.rows_of(after, ONE), run.rows_of(after, TWO)
    assert found.keys() == expected.keys()
    unequal = [cell for cell in found if not torch.equal(found[cell], expected[cell])]
    if name in OTHER_SHARES:
        assert [cell for cell in unequal if cell[0] in layers] == []
        assert token.token == wanted.token
        torch.testing.assert_close(list(found.values()), list(expected.values()), rtol=0, atol=1e-4)
    else:
        assert (token.token, token.logprob) == (wanted.token, wanted.logprob)
        assert unequal == []


def test_layers_that_lack_nothing_are_not_computed_again(fresh: TinyCluster) -> None:
    """A worker that is outside of these layers has no part in the steps, beyond handing them on."""
    before, after, layers = pipeline(*THREE), pipeline((0, 1, "a"), (1, 4, "b")), Span(3, 4)
    run, reached = Run(fresh), sum(CHUNKS)
    run.turn(before)
    run.chunks(before)
    run.turn(after, reached, before, lost=["c"])
    run.chunks(after, layers=layers)
    first, second = (fresh.hands[name].executor for name in ("a", "b"))
    assert (first.work.steps, second.work.steps) == (0, len(CHUNKS))
    assert second._star is not None
    assert second._star.num_ops == 2 * len(layers) * len(CHUNKS)


def test_what_a_replay_computes_is_kept_for_the_next_loss(fresh: TinyCluster) -> None:
    """The border moves from 1 to 2, and the rows computed again come by the new one."""
    first, second, last = (
        pipeline(*stages) for stages in (THREE, ((0, 2, "a"), (2, 4, "c")), ((0, 2, "a"), (2, 4, "d")))
    )
    run, reached = Run(fresh), sum(CHUNKS)
    run.turn(first)
    run.chunks(first)
    replay = find_replay(run.turn(second, reached, first, lost=["b"]), reached)
    run.chunks(second, layers=replay.layers)
    replay = find_replay(run.turn(last, reached, second, lost=["b", "c"]), reached)
    assert replay == Replay(0, reached, Span(2, 4))
    run.chunks(last, layers=replay.layers)
    token = run.step(last, IDS, reached, 1, sample=True)
    run.chunks(last, TWO)
    wanted = run.step(last, IDS, reached, 1, session=TWO, sample=True)
    assert token is not None
    assert wanted is not None
    assert (token.token, token.logprob) == (wanted.token, wanted.logprob)


def test_who_keeps_nothing_any_more_says_so(fresh: TinyCluster) -> None:
    before, after = pipeline(*THREE), pipeline((0, 2, "a"), (2, 4, "c"))
    run, reached = Run(fresh), sum(CHUNKS)
    run.turn(before)
    run.chunks(before)
    fresh.hands["a"].executor._kv.inputs.clear()
    assert find_replay(run.turn(after, reached, before, lost=["b"]), reached) == Replay(0, 0)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.tuples(plans(), plans()), st.integers(1, 9))
def test_tokens_after_any_loss_are_those_of_no_loss(cluster: TinyCluster, pair: tuple[Plan, Plan], most: int) -> None:
    before, after = (dataclasses.replace(plan, epoch=next(EPOCHS)) for plan in pair)
    lost = set(before.workers) - set(after.workers)
    assume(lost)
    run, reached = Run(cluster), sum(CHUNKS)
    try:
        run.turn(before)
        run.chunks(before)
        wanted = run.step(before, IDS, reached, 1, sample=True)
        replay = find_replay(run.turn(after, reached, before, lost=[*lost]), reached)
        start = replay.start
        while start < replay.until:
            count = min(most, replay.until - start)
            run.step(after, IDS, start, count, layers=replay.layers)
            start += count
        token = run.step(after, IDS, start, len(IDS) - start, sample=True)
    finally:
        for name in NAMES:
            cluster.hands[name].executor.submit(Drop())
    assert token is not None
    assert wanted is not None
    assert token.token == wanted.token
    assert token.logprob == pytest.approx(wanted.logprob, abs=1e-4)


@pytest.mark.parametrize(
    ("layers", "sample", "kind"),
    [(Span(1, 3), False, StepFailed), (Span(1, 3), True, ProtocolViolation), (Span(1, 9), False, ProtocolViolation)],
    ids=["inputs that nobody keeps", "a token from some layers", "layers that are none"],
)
def test_a_step_that_can_not_be_computed_ends_the_epoch(
    fresh: TinyCluster, layers: Span, sample: bool, kind: type[ManyhandsError]
) -> None:
    plan = pipeline(*THREE)
    Run(fresh).turn(plan)
    rows = SessionRows(session=ONE, start=0, count=4, capacity=CAPACITY, sample=sample)
    fresh.step(plan, 0, [rows], IDS[:4], history=0, layers=layers)
    told = [hand.reports for hand in fresh.hands.values()]

    def failures() -> list[Failed]:
        return [one for one in itertools.chain(*told) if isinstance(one, Failed) and one.epoch == plan.epoch]

    fresh.pump(lambda: bool(failures()))
    assert type(failures()[0].error) is kind
