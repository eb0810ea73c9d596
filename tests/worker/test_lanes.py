"""The short way of small sums over real sockets: what it takes, what it leaves to the long way, and to whom."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import zmq
from linked_ends import linked_ends
from tiny_cluster import SPEC, plan_of

from protocol import flat
from protocol.batches import SessionRows
from protocol.errors import PeerLost
from protocol.ids import SessionId, WorkerId
from protocol.messages import Activation, Partial, Sum
from protocol.plans import Plan
from protocol.security import KeyPair
from protocol.specs import ActivationFormat, Span
from protocol.transport import dial
from runtime.reduce import Room, to_wire
from worker.lanes import HubLane, Lane, MemberLane, PairLane, Unfinished
from worker.links import Links
from worker.seat import PARTIAL, SUM, Seat
from worker.wire import Arrival

FP32 = ActivationFormat.FLOAT32
STEP, ATTENTION, FFN = 5, 2, 3
A, B, C = (WorkerId(name) for name in "abc")
ALL = Span(0, SPEC.layers)
STAR = plan_of(
    [(ALL, [("a", Span(0, 1), Span(0, 1)), ("b", Span(1, 2), Span(1, 2)), ("c", Span(2, 2), Span(2, 3))], 0)], head="a"
)
PAIR = plan_of([(ALL, [("a", Span(0, 1), Span(0, 1)), ("b", Span(1, 2), Span(1, 3))], 0)], head="a")
FRAME_BYTES = 4 * SPEC.hidden
Ends = dict[WorkerId, Links]


@pytest.fixture
def three() -> Iterator[Ends]:
    """Three linked ends: b and c have dialled a, the hub."""
    with linked_ends(A, B, C) as ends:
        yield dict(zip((A, B, C), ends, strict=True))


@pytest.fixture
def two() -> Iterator[Ends]:
    """Two linked ends: b has dialled a."""
    with linked_ends(A, B) as ends:
        yield dict(zip((A, B), ends, strict=True))


def lane_of(ends: Ends, own: WorkerId, value: float = 0.0) -> tuple[Lane, Room]:
    """The short way of sums of one row at one end, and its room with an own part of this value."""
    plan: Plan = STAR if C in ends else PAIR
    doors, seat = ends[own].doors(), Seat(plan, own)
    assert doors is not None
    ways = doors.between(seat.sources, seat.targets)
    assert ways is not None
    room = Room(1, SPEC.hidden, FP32, PARTIAL.num_bytes, SUM.num_bytes)
    room.part_TD.fill_(value)
    kind = PairLane if plan is PAIR else HubLane if own == A else MemberLane
    return kind(ways, seat, room), room


def row(value: float) -> memoryview:
    return to_wire(torch.full((1, SPEC.hidden), value), FP32)


def part(rank: int, *, epoch: int = 1, op: int = ATTENTION) -> Partial:
    return Partial(epoch=epoch, step=STEP, op=op, rank=rank, format=FP32)


def total(*, op: int = ATTENTION) -> Sum:
    return Sum(epoch=1, step=STEP, op=op, format=FP32)


def next_of(links: Links) -> tuple[WorkerId, Any, bytes]:
    arrival = links.receive(60.0)
    assert arrival is not None
    return arrival.sender, flat.unpack(arrival.message), bytes(arrival.payload)


def in_time(lane: Lane, op: int = ATTENTION) -> Unfinished | None:
    """Go the short way until what has been sent is here, which may take longer than the 10 ms of one try."""
    while True:
        left = lane.sum(STEP, op)
        if left is None or left.unread is not None:
            return left
        assert left.due.owing


def test_a_member_sends_its_part_and_takes_the_sum(three: Ends) -> None:
    lane, room = lane_of(three, B, 2.0)
    for op in (ATTENTION, FFN):
        three[A].send((B,), total(op=op), row(3.0))
        assert lane.sum(STEP, op) is None
        assert torch.equal(room.total_TD, torch.full((1, SPEC.hidden), 3.0))
        assert next_of(three[A]) == (B, part(1, op=op), row(2.0))


def test_a_member_without_a_part_only_takes_the_sum(three: Ends) -> None:
    lane, room = lane_of(three, C, 2.0)
    three[A].send((C,), total(), row(3.0))
    assert lane.sum(STEP, ATTENTION) is None
    assert torch.equal(room.total_TD, torch.full((1, SPEC.hidden), 3.0))
    three[A].wake()
    assert three[A].receive(60.0) is None


def test_the_hub_takes_the_parts_and_hands_the_sum_out(three: Ends) -> None:
    lane, room = lane_of(three, A, 1.0)
    three[B].send((A,), part(1), row(2.0))
    assert in_time(lane) is None  # c has no part in attention
    assert torch.equal(room.total_TD, torch.full((1, SPEC.hidden), 3.0))
    three[C].send((A,), part(2, op=FFN), row(4.0))
    left = lane.sum(STEP, FFN)
    while left is None or C in left.due.owing:
        left = lane.sum(STEP, FFN)
    assert (left.due.owing, list(left.targets), left.unread) == ([B], [B, C], None)  # within 10 ms
    assert bytes(left.due.parts[C]) == bytes(row(4.0))
    for member in (B, C):
        assert next_of(three[member]) == (A, total(), row(3.0))


@pytest.mark.parametrize("own", [A, B])  # the end that was dialled, and the one that dialled
def test_two_exchange_their_parts(two: Ends, own: WorkerId) -> None:
    other, rank = (B, 0) if own == A else (A, 1)
    lane, room = lane_of(two, own, 1.0)
    for op in (ATTENTION, FFN):
        two[other].send((own,), part(1 - rank, op=op), row(2.0))
        assert in_time(lane, op) is None
        assert torch.equal(room.total_TD, torch.full((1, SPEC.hidden), 3.0))
        assert next_of(two[other]) == (own, part(rank, op=op), row(1.0))


def not_due(links: Links, lane: Lane) -> tuple[Unfinished, Arrival]:
    """Do as the compute thread does, by the short way first and then by all, until something comes that is not due."""
    while True:
        left = lane.sum(STEP, ATTENTION)
        assert left is not None
        if left.unread is not None:
            links.read(left.unread)
            arrival = links.receive(0)
            if arrival is not None:
                return left, arrival


@pytest.mark.parametrize("own", [A, B])
def test_what_is_not_due_is_left_for_the_long_way_in_its_order(two: Ends, own: WorkerId) -> None:
    other, rank = (B, 0) if own == A else (A, 1)
    lane, _ = lane_of(two, own)
    rows = (SessionRows(session=SessionId(1), start=0, count=1, capacity=1),)
    two[other].send((own,), part(1 - rank, epoch=0), b"of another epoch")
    two[other].send((own,), Activation(epoch=1, step=1, stage=0, format=FP32, rows=rows), b"first")
    two[other].send((own,), part(1 - rank, op=FFN), row(7.0))
    two[other].send((own,), part(rank), row(8.0))  # of the wrong rank
    two[other].send((own,), part(1 - rank), row(2.0))
    assert bytes(not_due(two[own], lane)[1].payload) == b"first"
    assert two[own].num_dropped == 1
    assert not_due(two[own], lane)[1].payload == row(7.0)
    assert not_due(two[own], lane)[1].payload == row(8.0)
    assert in_time(lane) is None


def test_a_part_that_comes_twice_is_left_for_the_long_way(three: Ends) -> None:
    lane, _ = lane_of(three, A)
    for value in (1.0, 2.0):
        three[B].send((A,), part(1, op=FFN), row(value))
    while (left := lane.sum(STEP, FFN)) is not None and left.unread is None:
        assert C in left.due.owing
    assert left is not None
    assert (left.due.owing, bytes(left.due.parts[B])) == ([C], bytes(row(1.0)))


def test_what_waits_to_be_taken_comes_before_the_short_way(two: Ends) -> None:
    lane, _ = lane_of(two, A)
    two[B].send((A,), part(1, op=FFN), row(7.0))
    left = in_time(lane)
    assert left is not None and left.unread is not None
    two[A].read(left.unread)
    assert two[A].doors() is None
    assert two[A].receive(0) is not None
    assert two[A].doors() is not None


@pytest.mark.parametrize("num_bytes", [0, FRAME_BYTES - 1, FRAME_BYTES + 1, 40_000])
@pytest.mark.parametrize(("own", "sender"), [(A, B), (B, A)])
@pytest.mark.parametrize("ends", ["two", "three"])
def test_a_frame_of_another_length_is_not_taken_as_due(
    request: pytest.FixtureRequest, ends: str, own: WorkerId, sender: WorkerId, num_bytes: int
) -> None:
    those: Ends = request.getfixturevalue(ends)
    lane, _ = lane_of(those, own)
    message = total() if ends == "three" and own == B else part("ab".index(sender))
    those[sender].send((own,), message, bytes(num_bytes))
    left, arrival = not_due(those[own], lane)
    assert not left.due.take(arrival)
    assert (len(arrival.payload), left.due.owing) == (num_bytes, [sender])


@pytest.mark.parametrize(("own", "sender"), [(A, B), (B, A)])
@pytest.mark.parametrize("ends", ["two", "three"])
def test_a_frame_with_more_behind_it_is_not_taken_as_due(
    request: pytest.FixtureRequest, ends: str, own: WorkerId, sender: WorkerId
) -> None:
    those: Ends = request.getfixturevalue(ends)
    lane, _ = lane_of(those, own)
    message = total() if ends == "three" and own == B else part("ab".index(sender))
    frames = [flat.FORMS[type(message)].pack(message) + bytes(row(1.0)), b"more"]
    if sender == B:
        dealer = those[B]._peers[A].dealer
        assert dealer is not None
        dealer.send_multipart(frames)
    else:
        those[A]._listener.socket.send_multipart([those[A]._peers[B].route, *frames])
    left = in_time(lane)
    assert left is not None and left.unread is not None
    assert [frame.bytes for frame in left.unread.frames][-2:] == frames
    assert left.due.owing == [sender]


@pytest.mark.parametrize("ends", ["two", "three"])
def test_who_has_gone_is_left_to_the_long_way_which_says_so(request: pytest.FixtureRequest, ends: str) -> None:
    those: Ends = request.getfixturevalue(ends)
    one, listener = those[A], those[A]._listener
    lane, _ = lane_of(those, A)
    those[B].send((A,), part(1), row(2.0))
    assert listener.socket.poll(5000)
    those[B].end()
    assert listener.monitor.poll(5000)  # gone, and the I/O thread tells the socket a little later
    for _ in range(500):
        with pytest.raises(zmq.ZMQError) as caught:
            for _ in range(1000):
                listener.socket.send_multipart([one._peers[B].route, b"?"], zmq.NOBLOCK)
        if caught.value.errno == zmq.EHOSTUNREACH:
            break
        listener.socket.poll(10)
    left = lane.sum(STEP, ATTENTION)
    assert left is not None
    assert B in left.targets
    with pytest.raises(PeerLost):
        one.send((B,), total(), row(0.0))


def test_a_stolen_name_is_not_taken_for_its_owner(two: Ends) -> None:
    """A third worker, admitted with its own key, claims the routing id of one that has just gone."""
    one, thief_keys = two[A], KeyPair.generate()
    one.admit([two[B]._keys.public, thief_keys.public])
    route = one._peers[B].route
    lane, _ = lane_of(two, A)
    two[B].end()
    assert one._listener.monitor.poll(5000)  # gone, and nobody has been told yet
    context: zmq.Context[Any] = zmq.Context()
    try:
        for _ in range(40):  # a ROUTER is deaf to a second owner of a name until it has let go of the first
            thief = dial(context, one.address, thief_keys, one._keys.public, route, 2**20)
            assert thief.poll(5000, zmq.POLLOUT)
            thief.send(flat.FORMS[Partial].pack(part(1)) + bytes(row(666.0)))
            if one._listener.socket.poll(250):
                break
            thief.close(linger=0)
        left = lane.sum(STEP, ATTENTION)
        assert left is not None and left.unread is not None
        assert left.due.owing == [B]
        assert left.unread.frames[0].bytes == route
    finally:
        context.destroy(linger=0)
