"""Ways to neighbours while their links stay as they are, and the short way of the parts of a sum.

That is: send a small frame at once, and wait at the one socket by which all who owe a part come in, and take what is
due. Knows nothing of other messages: what is not due byte by byte, from a neighbour and by its own way, it hands back
unread. A look at all sockets costs as much as a small sum itself, and between two sums of a step nothing else is due;
so what else happens is heard of when this wait ends, within 10 ms. Each is one loop, because they run in processor
caches that other processes have just filled, where every further function costs microseconds: with thirteen calls
between a tensor and its sockets instead of six a sum took an eighth longer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import zmq

from protocol.frames import Buffer
from protocol.ids import WorkerId
from protocol.transport import proven_key
from worker.coordinator_line import CoordinatorLine
from worker.due import Due
from worker.peer import Peer
from worker.sending import BLOCK, NOBLOCK, NOBLOCK_MORE, receive_rest, send_plain
from worker.wire import JOIN_MOST_BYTES

Socket = zmq.Socket[Any]


class Unread(NamedTuple):
    """A message for somebody else to read, and the socket it came in by."""

    door: Socket
    frames: list[zmq.Frame]


class Doors:
    """Which socket leads to which neighbours, as it is now: made anew when a link or a socket changes."""

    def __init__(
        self, listener: Socket, line: CoordinatorLine, peers: Mapping[WorkerId, Peer], touched: set[Socket]
    ) -> None:
        """Sockets of `peers` and the listener have an RCVTIMEO of `DEAF_MOST_MS`; `touched` is told which was used."""
        linked = [peer for peer in peers.values() if peer.is_linked]
        ways = {peer.worker: peer.way(listener, line) for peer in linked}
        self.ways = {worker: (socket, before) for worker, (socket, before) in ways.items() if socket is not None}
        self._doors = {peer.worker: listener if peer.route else peer.dealer for peer in linked}
        self._callers = {peer.key: peer for peer in linked if peer.route}
        self._known: dict[tuple[WorkerId, ...], Socket | None] = {}
        self._listener = listener
        self._touched = touched

    def door(self, sources: tuple[WorkerId, ...]) -> Socket | None:
        """Return the one socket by which all of these come in, None when there is none."""
        if sources not in self._known:
            doors = {self._doors.get(source) for source in sources}
            self._known[sources] = doors.pop() if len(doors) == 1 else None
        return self._known[sources]

    def send(self, targets: Sequence[WorkerId], header: bytes, payload: Buffer) -> Sequence[WorkerId]:
        """Send a message in its flat form to neighbours, in order, as long as each takes it at once.

        Returns those who have yet to get it: all of them when it is too large to be copied.
        """
        if len(payload) > JOIN_MOST_BYTES:
            return targets
        frame, ways, touched = b"".join((header, payload)), self.ways, self._touched
        for number, target in enumerate(targets):
            if target not in ways:
                return targets[number:]
            socket, before = ways[target]
            touched.add(socket)
            try:
                for part in before:
                    send_plain(socket, part, NOBLOCK_MORE)
                send_plain(socket, frame, NOBLOCK)
            except zmq.ZMQError:  # full, or gone: the next try tells
                return targets[number:]
        return ()

    def take(self, due: Due) -> Unread | None:
        """Take what is due as it comes in by the door of its sources, if they have one.

        Returns a message that is not due; None when all is there, or nothing came for 10 ms.
        """
        sources = due.sources
        door = self._known[sources] if sources in self._known else self.door(sources)
        if door is None:
            return None
        self._touched.add(door)
        headers, parts, num_bytes = due.headers, due.parts, due.num_bytes
        is_listener = door is self._listener
        sender = sources[0]  # a dealer leads to one only
        while headers:
            try:
                frames = [frame := door.recv(BLOCK, copy=False)]
            except zmq.Again:
                return None
            if is_listener:
                route = frame.bytes
                frames.append(frame := door.recv(BLOCK, copy=False))
                peer = self._callers.get(proven_key(frame))
                if peer is None or peer.route != route:
                    return Unread(door, receive_rest(door, frames))
                sender = peer.worker
            header = headers.get(sender, b"")
            start, view = len(header), frame.buffer
            if not header or frame.more or len(view) != start + num_bytes or view[:start] != header:
                return Unread(door, receive_rest(door, frames))
            del headers[sender]
            parts[sender] = view[start:]
        return None
