"""The short way of small sums over real sockets: what it takes, what it leaves to the long way, and to whom."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import zmq
from linked_ends import A, B, linked_ends
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
from worker.lanes import HubLane, MemberLane, Unfinished
from worker.links import Links
from worker.seat import PARTIAL, SUM, Seat
from worker.wire import Arrival

FP32 = ActivationFormat.FLOAT32
STEP, ATTENTION, FFN = 5, 2, 3
Ends = tuple[Links, Links]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """Two linked ends, b dials a."""
    with linked_ends() as both:
        yield both


def pair(hub: WorkerId) -> Plan:
    members = [("a", Span(0, 1), Span(0, 1)), ("b", Span(1, 2), Span(1, 3))]
    return plan_of([(Span(0, SPEC.layers), members, "ab".index(hub))], head="a")


def lane_of(links: Links, own: WorkerId, hub: WorkerId, value: float = 0.0) -> tuple[Any, Room]:
    """The short way of sums of one row at one end, and its room with an own part of this value."""
    doors, seat = links.doors(), Seat(pair(hub), own)
    assert doors is not None
    ways = doors.between(seat.sources, seat.targets)
    assert ways is not None
    room = Room(1, SPEC.hidden, FP32, PARTIAL.num_bytes, SUM.num_bytes)
    room.part_TD.fill_(value)
    return (HubLane(ways, seat, room) if own == hub else MemberLane(ways, seat, room)), room


def row(value: float) -> memoryview:
    return to_wire(torch.full((1, SPEC.hidden), value), FP32)


def part(rank: int, *, epoch: int = 1, op: int = ATTENTION) -> Partial:
    return Partial(epoch=epoch, step=STEP, op=op, rank=rank, format=FP32)


def total(*, epoch: int = 1, op: int = ATTENTION) -> Sum:
    return Sum(epoch=epoch, step=STEP, op=op, format=FP32)


def next_of(links: Links) -> tuple[WorkerId, Any, bytes]:
    arrival = links.receive(60.0)
    assert arrival is not None
    return arrival.sender, flat.unpack(arrival.message), bytes(arrival.payload)


@pytest.mark.parametrize("hub", [A, B])  # the end that was dialled, and the one that dials
def test_a_part_goes_out_and_the_sum_comes_back(ends: Ends, hub: WorkerId) -> None:
    by_name = dict(zip((A, B), ends, strict=True))
    member = B if hub == A else A
    lane, room = lane_of(by_name[member], member, hub, 2.0)
    for op in (ATTENTION, FFN):
        by_name[hub].send((member,), total(op=op), row(3.0))
        assert lane.sum(STEP, op) is None
        assert torch.equal(room.total_TD, torch.full((1, SPEC.hidden), 3.0))
        assert next_of(by_name[hub]) == (member, part("ab".index(member), op=op), row(2.0))


@pytest.mark.parametrize("hub", [A, B])
def test_the_hub_takes_the_part_and_hands_the_sum_out(ends: Ends, hub: WorkerId) -> None:
    by_name = dict(zip((A, B), ends, strict=True))
    member = B if hub == A else A
    lane, room = lane_of(by_name[hub], hub, hub, 1.0)
    for op in (ATTENTION, FFN):
        by_name[member].send((hub,), part("ab".index(member), op=op), row(2.0))
        left = lane.sum(STEP, op)
        while left is not None and left.unread is None:  # not here yet, within 10 ms
            assert (left.due.owing, list(left.targets)) == ([member], [member])
            left = lane.sum(STEP, op)
        assert left is None
        assert torch.equal(room.total_TD, torch.full((1, SPEC.hidden), 3.0))
        assert next_of(by_name[member]) == (hub, total(op=op), row(3.0))


def not_due(links: Links, lane: Any) -> tuple[Unfinished, Arrival]:
    """Do as the compute thread does, by the short way first and then by all, until something comes that is not due."""
    while True:
        left = lane.sum(STEP, ATTENTION)
        assert left is not None
        if left.unread is not None:
            links.read(left.unread)
            arrival = links.receive(0)
            if arrival is not None:
                return left, arrival


def test_what_is_not_due_is_left_for_the_long_way_in_its_order(ends: Ends) -> None:
    one, two = ends
    lane, _ = lane_of(one, A, A)
    rows = (SessionRows(session=SessionId(1), start=0, count=1, capacity=1),)
    two.send((A,), part(1, epoch=0), b"of another epoch")
    two.send((A,), Activation(epoch=1, step=1, stage=0, format=FP32, rows=rows), b"first")
    two.send((A,), part(1, op=FFN), row(7.0))
    two.send((A,), part(1), row(2.0))
    assert bytes(not_due(one, lane)[1].payload) == b"first"
    assert one.num_dropped == 1
    assert not_due(one, lane)[1].payload == row(7.0)
    while (left := lane.sum(STEP, ATTENTION)) is not None:
        assert left.unread is None


def test_what_waits_to_be_taken_comes_before_the_short_way(ends: Ends) -> None:
    one, two = ends
    lane, _ = lane_of(one, A, A)
    two.send((A,), part(1, op=FFN), row(7.0))
    left = lane.sum(STEP, ATTENTION)
    while left.unread is None:
        left = lane.sum(STEP, ATTENTION)
    one.read(left.unread)
    assert one.doors() is None
    assert one.receive(0) is not None
    assert one.doors() is not None


@pytest.mark.parametrize(
    "payload", [bytes(4 * SPEC.hidden + 1), b"", bytes(4 * SPEC.hidden - 1), bytes(40_000)], ids=len
)
@pytest.mark.parametrize("own", [A, B])
def test_a_frame_of_another_length_is_not_taken_as_due(ends: Ends, own: WorkerId, payload: bytes) -> None:
    by_name = dict(zip((A, B), ends, strict=True))
    lane, _ = lane_of(by_name[own], own, A)
    by_name[B if own == A else A].send((own,), part(1) if own == A else total(), payload)
    left, arrival = not_due(by_name[own], lane)
    assert not left.due.take(arrival)
    assert (len(arrival.payload), len(left.due.owing)) == (len(payload), 1)


@pytest.mark.parametrize("own", [A, B])
def test_a_frame_with_more_behind_it_is_not_taken_as_due(ends: Ends, own: WorkerId) -> None:
    one, two = ends
    lane, _ = lane_of(one if own == A else two, own, A)
    header = flat.FORMS[Partial].pack(part(1)) if own == A else flat.FORMS[Sum].pack(total())
    frames = [header + bytes(row(1.0)), b"more"]
    if own == A:
        assert two._peers[A].dealer is not None
        two._peers[A].dealer.send_multipart(frames)
    else:
        one._listener.socket.send_multipart([one._peers[B].route, *frames])
    left = lane.sum(STEP, ATTENTION)
    while left.unread is None:
        left = lane.sum(STEP, ATTENTION)
    assert [frame.bytes for frame in left.unread.frames][-2:] == frames
    assert len(left.due.owing) == 1


def test_who_has_gone_is_left_to_the_long_way_which_says_so(ends: Ends) -> None:
    one, two = ends
    lane, _ = lane_of(one, A, A)
    two.send((A,), part(1), row(2.0))
    assert one._listener.socket.poll(5000)
    two.end()
    assert one._listener.monitor.poll(5000)  # gone
    for _ in range(500):  # the I/O thread tells the socket a little later
        if one._listener.socket.poll(0, zmq.POLLOUT) == 0:
            break
        one._listener.socket.poll(10)
    left = lane.sum(STEP, ATTENTION)
    if left is None:  # the part was taken, and the sum too before the socket had heard
        left = lane.sum(STEP, ATTENTION)
    assert list(left.targets) == [B]
    with pytest.raises(PeerLost):
        one.send((B,), total(), row(0.0))


def test_a_stolen_name_is_not_taken_for_its_owner(ends: Ends) -> None:
    """A third worker, admitted with its own key, claims the routing id of one that has just gone."""
    one, two = ends
    thief_keys = KeyPair.generate()
    one.admit([two._keys.public, thief_keys.public])
    route = one._peers[B].route
    lane, _ = lane_of(one, A, A)
    two.end()
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
        assert left.due.owing == [B]
        assert left.unread is not None
        assert left.unread.frames[0].bytes == route
    finally:
        context.destroy(linger=0)
