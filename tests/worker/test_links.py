"""Links and compute threads when something is wrong: strangers, other epochs, broken connections, stray tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zmq
from linked_ends import linked_ends
from tiny_cluster import LOOPBACK, SPEC, TinyCluster, plan_of

from protocol import flat
from protocol.batches import SessionRows
from protocol.errors import AccessRefused, BudgetTooSmall, CoordinatorLost, DeadlineExceeded, ManyhandsError, PeerLost
from protocol.frames import decode, encode
from protocol.ids import SessionId, WorkerId
from protocol.messages import Activation, LinkHello, LinkWelcome, Partial, Step
from protocol.plans import Plan
from protocol.security import Gate, KeyPair
from protocol.specs import ActivationFormat, Span
from protocol.tiles import TileId, TileKind
from protocol.transport import bind_router, dial
from worker.commands import Begin, Drop, Failed, Forget, LoadTiles, Ready, Rest, Stop, TilesSpoiled
from worker.links import Links
from worker.wire import unpack_data

ALL, GROUPS, FFN = Span(0, SPEC.layers), Span(0, SPEC.kv_heads), Span(0, SPEC.ffn_tiles)
A, B, C = (WorkerId(name) for name in "abc")


def pair(epoch: int = 1) -> Plan:
    return plan_of([(ALL, [("a", Span(0, 1), Span(0, 1)), ("b", Span(1, 2), Span(1, 3))], 0)], head="a", epoch=epoch)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[TinyCluster]:
    one = TinyCluster(tmp_path)
    yield one
    one.close()


@pytest.fixture
def ends() -> Iterator[tuple[Links, Links]]:
    """Two linked ends, b dials a."""
    with linked_ends(A, B) as (one, two):
        yield one, two


def test_a_broken_line_to_the_coordinator_is_told() -> None:
    context, keys = zmq.Context[zmq.Socket[bytes]](), KeyPair.generate()
    with closing(Gate(context, lambda key: True)) as gate, closing(Links(KeyPair.generate(), LOOPBACK)) as links:
        gate.start()
        router, address = bind_router(context, keys, LOOPBACK, 2**20)
        links.attach(A, address, keys.public)
        for _ in range(500):
            if not links.unlinked:
                break
            assert links.receive(0.02) is None
        router.close()
        with pytest.raises(CoordinatorLost, match="broke"):
            for _ in range(500):
                assert links.receive(0.02) is None
    context.term()


def partial(epoch: int, op: int = 0) -> Partial:
    return Partial(epoch=epoch, step=1, op=op, rank=1, format=ActivationFormat.FLOAT32)


def test_frames_go_both_ways_and_those_of_other_epochs_are_dropped(ends: tuple[Links, Links]) -> None:
    one, two = ends
    two.send((A,), partial(0), b"old")
    two.send((A,), partial(2), b"new")
    two.send((A,), partial(1), b"now")
    arrival = one.receive(5.0)
    assert arrival is not None
    assert (arrival.sender, flat.unpack(arrival.message), bytes(arrival.payload)) == (B, partial(1), b"now")
    assert one.num_dropped == 2
    one.send((B,), partial(1, op=1), bytes(100_000))
    answer = two.receive(5.0)
    assert answer is not None
    assert (answer.sender, len(answer.payload)) == (A, 100_000)


def test_a_broken_connection_is_told_at_both_ends(ends: tuple[Links, Links]) -> None:
    one, two = ends
    two.end()
    with pytest.raises(PeerLost) as caught:
        one.receive(5.0)
    assert caught.value.node == B


def test_the_dialling_end_hears_of_a_break_too(ends: tuple[Links, Links]) -> None:
    one, two = ends
    one._listener.socket.close(linger=0)
    with pytest.raises(PeerLost) as caught:
        two.receive(5.0)
    assert caught.value.node == A
    one._listener.socket = one._context.socket(zmq.ROUTER)  # something for the fixture to close


def test_what_a_neighbour_may_not_send_is_refused(ends: tuple[Links, Links]) -> None:
    one, two = ends
    rows = (SessionRows(session=SessionId(1), start=0, count=1, capacity=1),)
    two.send((A,), Step(epoch=1, step=1, rows=rows), b"\0\0\0\0")
    with pytest.raises(ManyhandsError, match="b may not send Step"):
        one.receive(5.0)


def test_a_wake_ends_a_wait(ends: tuple[Links, Links]) -> None:
    ends[0].wake()
    assert ends[0].receive(60.0) is None


def test_a_stranger_is_not_let_in_and_a_probe_is_answered_but_changes_no_route(ends: tuple[Links, Links]) -> None:
    one, two = ends
    context: zmq.Context[Any] = zmq.Context()
    server_key = one._keys.public
    stranger = dial(context, one.address, KeyPair.generate(), server_key, b"b/1.0", 2**20)
    prober = dial(context, one.address, two._keys, server_key, b"b/probe", 2**20)
    with pytest.raises(zmq.Again):
        stranger.send_multipart(encode(LinkHello(worker=B, epoch=1)), zmq.NOBLOCK)
    assert prober.poll(5000, zmq.POLLOUT)
    prober.send_multipart(encode(LinkHello(worker=B, epoch=0)))
    assert one.receive(0.3) is None
    assert not stranger.poll(0, zmq.POLLOUT)
    assert prober.poll(5000)
    assert decode(prober.recv_multipart()).message == LinkWelcome(worker=A, epoch=0)
    prober.send_multipart(encode(partial(1), b"not through this door"))
    one.send((B,), partial(1), b"still the old route")
    assert one.receive(0.2) is None
    assert two.receive(5.0) is not None
    context.destroy(linger=0)


def test_no_token_reaches_a_worker_that_is_not_the_head(cluster: TinyCluster) -> None:
    prompt = [51, 52, 53, 54, 55, 56, 57]
    first = (Span(0, 2), [("b", Span(0, 1), FFN), ("c", Span(1, 2), Span(3, 3))], 0)
    plan = plan_of([first, (Span(2, 4), [("d", GROUPS, FFN)], 0)], head="a")
    for name in plan.workers:
        cluster.add(name)
    cluster.form(plan, lambda one, other: False)  # every frame passes through the test's hands
    tokens = cluster.greedy(plan, prompt, 6)
    seen = 0
    for source, target, frames in cluster.relayed:
        message, payload = unpack_data(frames)
        if isinstance(message, LinkHello | LinkWelcome):
            continue
        seen += 1
        assert len(payload) % (4 * SPEC.hidden) == 0, (source, target)  # hidden states, nothing beside them
        for ids in (prompt, tokens):
            assert np.asarray(ids[:3], "<i4").tobytes() not in bytes(payload)
        if isinstance(message, Activation):
            assert message.stage == len(plan.stages) or target != plan.head
    assert seen == 6 * 10  # every frame of six steps was looked at


def test_a_worker_that_is_not_the_head_refuses_tokens(cluster: TinyCluster) -> None:
    for name in "ab":
        cluster.add(name)
    plan = pair()
    cluster.form(plan)
    rows = (SessionRows(session=SessionId(1), start=0, count=1, capacity=4, sample=True),)
    cluster._router.send_multipart([b"b/data", *encode(Step(epoch=1, step=0, rows=rows), b"\1\0\0\0")])
    reports = cluster.hands["b"].reports
    cluster.pump(lambda: len(reports) > 1)
    assert isinstance(reports[1], Failed)
    assert isinstance(reports[1].error, AccessRefused)
    assert not isinstance(cluster.hands["a"].reports[-1], Failed)


def test_a_lost_neighbour_is_named_in_the_middle_of_a_step(cluster: TinyCluster) -> None:
    for name in "ab":
        cluster.add(name)
    plan = pair()
    cluster.form(plan)
    gone = cluster.hands["b"].executor
    gone.submit(Stop())
    assert gone.join(10.0)
    rows = [SessionRows(session=SessionId(1), start=0, count=1, capacity=4, sample=True)]
    cluster.step(plan, 0, rows, [5], history=0)
    reports = cluster.hands["a"].reports
    cluster.pump(lambda: isinstance(reports[-1], Failed))
    failed = reports[-1]
    assert isinstance(failed, Failed)
    assert (failed.lost, failed.epoch) == ("b", 1)


def test_a_neighbour_that_never_answers_is_named(cluster: TinyCluster) -> None:
    cluster.add("a", step_timeout_s=0.2)
    cluster.add("b")
    plan = pair()
    cluster.form(plan)
    frozen = cluster.hands["b"].links
    frozen.epoch = 99  # b is there and drops what it hears
    rows = [SessionRows(session=SessionId(1), start=0, count=1, capacity=4, sample=True)]
    cluster.step(plan, 0, rows, [5], history=0)
    reports = cluster.hands["a"].reports
    cluster.pump(lambda: isinstance(reports[-1], Failed))
    assert isinstance(reports[-1].error, DeadlineExceeded)  # type: ignore[union-attr]
    assert reports[-1].error.node == "b"  # type: ignore[union-attr]


def test_a_new_plan_ends_a_step_that_waits(cluster: TinyCluster) -> None:
    cluster.add("a")
    cluster.add("b")
    cluster.form(pair())
    cluster.hands["b"].links.epoch = 99
    rows = [SessionRows(session=SessionId(1), start=0, count=1, capacity=4, sample=True)]
    cluster.step(pair(), 0, rows, [5], history=0)
    for hand in cluster.hands.values():
        hand.executor.submit(Rest(epoch=1))
        hand.reports.clear()
    cluster.form(pair(epoch=2))
    assert len(cluster.greedy(pair(epoch=2), [1, 2, 3], 3)) == 3
    assert all(type(hand.reports[-1]) is Ready for hand in cluster.hands.values())


def test_a_spoiled_tile_is_reported_and_can_be_loaded_after_all(cluster: TinyCluster) -> None:
    hand = cluster.add("a")
    plan = plan_of([(ALL, [("a", GROUPS, FFN)], 0)], head="a")
    cluster.form(plan)
    entry = cluster.entries[TileId(1, TileKind.FFN, 1)]
    hand.store._path(entry.digest).write_bytes(b"nonsense")
    entries = tuple(cluster.entries[tile] for tile in plan.tiles_of(A))
    hand.reports.clear()
    hand.executor.submit(Drop())  # else its blocks would stay in memory
    hand.executor.submit(Begin(plan=plan, links=()))
    hand.executor.submit(LoadTiles(epoch=1, entries=entries))
    cluster.pump(lambda: bool(hand.reports))
    assert isinstance(hand.reports[0], TilesSpoiled)
    assert hand.store.missing(entries) == (entry,)


def test_tiles_beyond_the_budget_are_refused_before_they_are_loaded(cluster: TinyCluster) -> None:
    hand = cluster.add("a", budget_bytes=1000)
    cluster.begin(plan_of([(ALL, [("a", GROUPS, FFN)], 0)], head="a"))
    cluster.pump(lambda: bool(hand.reports))
    assert isinstance(hand.reports[0], Failed)
    assert isinstance(hand.reports[0].error, BudgetTooSmall)


def test_released_sessions_give_their_cache_back(cluster: TinyCluster) -> None:
    hand = cluster.add("a")
    plan = plan_of([(ALL, [("a", GROUPS, FFN)], 0)], head="a")
    cluster.form(plan)
    cluster.greedy(plan, [1, 2, 3], 2, session=7)
    assert hand.executor.kv_bytes == SPEC.kv_bytes_per_token(SPEC.kv_heads, SPEC.layers) * 5
    hand.executor.submit(Forget(sessions=(SessionId(7),)))
    cluster.pump(lambda: hand.executor.kv_bytes == 0)
    assert hand.executor.progress > 0
    assert torch.get_num_threads() >= 1
