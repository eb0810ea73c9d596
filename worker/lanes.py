"""The short way of small sums: a part goes out and the sum comes back, by few calls and in memory that is at hand.

Knows nothing of other messages: what is not due byte by byte, from a neighbour and by its own way, is left unread for
the long way, which is everybody's (`worker.links`). A look at all sockets costs as much as a small sum itself, and
between two sums of a step nothing else is due; so what else happens is heard of when a wait here ends, within 10 ms.

Each end does all of it in one function, because that runs in processor caches which other processes have just filled:
there every call in Python costs about a microsecond, on every member. Taken apart into the calls that they replace,
these made a sum of 4 KiB a fifth longer.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Final, NamedTuple

import zmq

from protocol.ids import WorkerId
from protocol.transport import proven_key
from runtime.reduce import Adder, Room
from worker.doors import Socket, Unread, Ways
from worker.due import OWING, Due
from worker.seat import Seat
from worker.sending import BLOCK, NOBLOCK, NOBLOCK_MORE, receive_rest, send_plain

STRANGER: Final = WorkerId("")
NOWHERE: Final = (-1, OWING)


class Unfinished(NamedTuple):
    """What is left to the long way: frames that are due, a message that came instead, and who has yet to be sent to."""

    due: Due
    unread: Unread | None
    targets: Sequence[WorkerId]


class HubLane:
    """The hub's short way of the sums of one shape."""

    def __init__(self, ways: Ways, seat: Seat, room: Room) -> None:
        """The ways lead to all targets of the seat, and all its sources come in by their door."""
        self._targets, self._door, self._callers, self._touched = ways
        self._used = {self._door, *(way.socket for way in ways.targets)}
        self._seat = seat
        self._room = room
        self._neighbour = next(iter(seat.sources))  # the only one where the door is not the listener
        self._adders = _adders(seat, room)
        self._places = _places(seat, self._adders)

    def sum(self, step: int, op: int) -> Unfinished | None:
        """Take the parts, add the own one to them and hand the sum out; None when all that is done.

        The own part, if there is one, and the sum lie in the room.
        """
        seat, room, door, callers = self._seat, self._room, self._door, self._callers
        owing, receive, header_of, form = dict(self._places[op & 1]), door.recv, seat.partial_header, seat.form
        if seat.own in owing:
            owing.pop(seat.own)[1][:] = room.part
        header, total = seat.sum_header(step, op, form), room.total_frame
        total[: len(header)] = header  # now, while the others compute
        size = len(room.part_frame)
        start = size - len(room.part)
        self._touched.update(self._used)
        while owing:
            try:
                route = b"" if callers is None else receive(BLOCK)
                frame = receive(BLOCK, copy=False)
            except zmq.Again:
                return self._unfinished(step, op, owing)
            sender = self._neighbour if callers is None else callers.get((proven_key(frame), route), STRANGER)
            rank, row = owing.get(sender, NOWHERE)
            view = frame.buffer
            if row is OWING or len(view) != size or view[:start] != header_of(step, op, rank, form) or frame.more:
                return self._unfinished(step, op, owing, _unread(door, route, frame))
            row[:] = view[start:]
            del owing[sender]
        self._adders[op & 1].add()
        num_sent = 0
        try:
            for _, socket, before in self._targets:
                if before is not None:
                    send_plain(socket, before, NOBLOCK_MORE)
                send_plain(socket, total, NOBLOCK)
                num_sent += 1
        except zmq.ZMQError:  # full, or gone: the long way tells
            return self._unfinished(step, op, owing, num_sent=num_sent)
        return None

    def _unfinished(
        self, step: int, op: int, owing: Container[WorkerId], unread: Unread | None = None, num_sent: int = 0
    ) -> Unfinished:
        due = _filled(self._seat.due(step, op, len(self._room.part)), self._places[op & 1], owing)
        return Unfinished(due, unread, [way.worker for way in self._targets[num_sent:]])


class MemberLane:
    """Another member's short way of the sums of one shape."""

    def __init__(self, ways: Ways, seat: Seat, room: Room) -> None:
        """The ways lead to the hub, which comes in by their door."""
        ((self._hub, self._socket, self._before),), self._door, self._callers, self._touched = ways
        self._used = {self._door, self._socket}
        self._seat = seat
        self._rank = seat.ranks[seat.own]
        self._room = room

    def sum(self, step: int, op: int) -> Unfinished | None:
        """Send the own part, if there is one, and take the sum; None when that is done. Both lie in the room."""
        seat, room, door, callers = self._seat, self._room, self._door, self._callers
        self._touched.update(self._used)
        if seat.has_part[op & 1]:
            header, part = seat.partial_header(step, op, self._rank, seat.form), room.part_frame
            part[: len(header)] = header
            try:
                if self._before is not None:
                    send_plain(self._socket, self._before, NOBLOCK_MORE)
                send_plain(self._socket, part, NOBLOCK)
            except zmq.ZMQError:  # full, or gone: the long way tells
                return self._unfinished(step, op, is_sent=False)
        header, total = seat.sum_header(step, op, seat.form), room.total_frame
        try:
            route = b"" if callers is None else door.recv(BLOCK)
            frame = door.recv(BLOCK, copy=False)
        except zmq.Again:
            return self._unfinished(step, op)
        is_of_hub = callers is None or callers.get((proven_key(frame), route)) == self._hub
        view = frame.buffer
        if is_of_hub and len(view) == len(total) and view[: len(header)] == header and not frame.more:
            total[:] = view
            return None
        return self._unfinished(step, op, _unread(door, route, frame))

    def _unfinished(self, step: int, op: int, unread: Unread | None = None, *, is_sent: bool = True) -> Unfinished:
        due = self._seat.due(step, op, len(self._room.part))
        return Unfinished(due, unread, () if is_sent else (self._hub,))


class PairLane:
    """The short way of one of two members, who send each other their parts and both add them."""

    def __init__(self, ways: Ways, seat: Seat, room: Room) -> None:
        """The ways lead to the other, who comes in by their door."""
        ((self._other, self._socket, self._before),), self._door, self._callers, self._touched = ways
        self._used = {self._door, self._socket}
        self._seat = seat
        self._rank, self._other_rank = seat.ranks[seat.own], seat.ranks[self._other]
        self._room = room
        self._adders = _adders(seat, room)
        self._places = _places(seat, self._adders)

    def sum(self, step: int, op: int) -> Unfinished | None:
        """Send the own part, take the other one and add both; None when that is done. Part and sum lie in the room."""
        seat, room, door, callers = self._seat, self._room, self._door, self._callers
        places, part, form = self._places[op & 1], room.part_frame, seat.form
        size = len(part)
        start = size - len(room.part)
        self._touched.update(self._used)
        if seat.own in places:
            part[:start] = seat.partial_header(step, op, self._rank, form)
            try:
                if self._before is not None:
                    send_plain(self._socket, self._before, NOBLOCK_MORE)
                send_plain(self._socket, part, NOBLOCK)
            except zmq.ZMQError:  # full, or gone: the long way tells
                return self._unfinished(step, op, is_sent=False)
            places[seat.own][1][:] = room.part
        if self._other in places:
            header = seat.partial_header(step, op, self._other_rank, form)
            try:
                route = b"" if callers is None else door.recv(BLOCK)
                frame = door.recv(BLOCK, copy=False)
            except zmq.Again:
                return self._unfinished(step, op)
            is_of_other = callers is None or callers.get((proven_key(frame), route)) == self._other
            view = frame.buffer
            if not is_of_other or len(view) != size or view[:start] != header or frame.more:
                return self._unfinished(step, op, _unread(door, route, frame))
            places[self._other][1][:] = view[start:]
        self._adders[op & 1].add()
        return None

    def _unfinished(self, step: int, op: int, unread: Unread | None = None, *, is_sent: bool = True) -> Unfinished:
        owing = (self._other,) if is_sent else tuple(self._places[op & 1])
        due = _filled(self._seat.due(step, op, len(self._room.part)), self._places[op & 1], owing)
        return Unfinished(due, unread, () if is_sent else (self._other,))


Lane = HubLane | MemberLane | PairLane
Places = Mapping[WorkerId, tuple[int, memoryview]]
"""The rank of who has a part, and where its part is laid."""


def _adders(seat: Seat, room: Room) -> tuple[Adder, Adder]:
    """Return the adders of even and of odd operations: one for both where the same members have parts."""
    even, odd = seat.owners
    adder = Adder(room, len(even))
    return adder, adder if odd == even else Adder(room, len(odd))


def _places(seat: Seat, adders: Sequence[Adder]) -> tuple[Places, ...]:
    return tuple(
        {owner: (seat.ranks[owner], row) for owner, row in zip(owners, adder.rows, strict=True)}
        for owners, adder in zip(seat.owners, adders, strict=True)
    )


def _filled(due: Due, places: Places, owing: Container[WorkerId]) -> Due:
    """Fill in the parts that have been laid in their places."""
    due.parts.update((owner, row) for owner, (_, row) in places.items() if owner not in owing)
    return due


def _unread(door: Socket, route: bytes, frame: zmq.Frame) -> Unread:
    first = [zmq.Frame(route), frame] if route else [frame]
    return Unread(door, receive_rest(door, first))
