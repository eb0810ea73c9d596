"""Which socket leads to which neighbour, while links and sockets stay as they are.

Knows nothing of messages. Neighbours that dialled us come in by the listener, one that we dialled by a dealer of its
own, and what the coordinator relays goes over the line to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import zmq

from protocol.frames import Buffer
from protocol.ids import WorkerId
from worker.coordinator_line import CoordinatorLine
from worker.peer import Peer

Socket = zmq.Socket[Any]


class Unread(NamedTuple):
    """A message for somebody else to read, and the socket it came in by."""

    door: Socket
    frames: list[zmq.Frame]


class Way(NamedTuple):
    """How a neighbour is reached: the frame that goes before a message for it, if any, and the socket."""

    worker: WorkerId
    socket: Socket
    before: Buffer | None


class Ways(NamedTuple):
    """How one end of a star reaches its targets, and where its sources come in."""

    targets: tuple[Way, ...]
    door: Socket
    """The one socket by which all sources come in; it has an RCVTIMEO of `DEAF_MOST_MS`."""
    callers: Mapping[tuple[bytes, bytes], WorkerId] | None
    """Who comes in by proven key and routing id, where the door is the listener; None where it leads to one only."""
    touched: set[Socket]
    """Is told of every socket used (`worker.watch`)."""


class Doors:
    """The sockets as they are now: made anew when a link or a socket changes."""

    def __init__(
        self, listener: Socket, line: CoordinatorLine, peers: Mapping[WorkerId, Peer], touched: set[Socket]
    ) -> None:
        """Sockets of `peers` and the listener have an RCVTIMEO of `DEAF_MOST_MS`; `touched` is told which was used."""
        linked = [peer for peer in peers.values() if peer.is_linked]
        ways = {peer.worker: peer.way(listener, line) for peer in linked}
        self.ways = {worker: (socket, before) for worker, (socket, before) in ways.items() if socket is not None}
        self._doors = {peer.worker: listener if peer.route else peer.dealer for peer in linked}
        self._callers = {(peer.key, peer.route): peer.worker for peer in linked if peer.route}
        self._listener = listener
        self._touched = touched

    def between(self, sources: Iterable[WorkerId], targets: Sequence[WorkerId]) -> Ways | None:
        """Return how to reach all targets and by which one door all sources come in; None where that is not so."""
        doors = {self._doors.get(source) for source in sources}
        door = doors.pop() if len(doors) == 1 else None
        if door is None or any(target not in self.ways for target in targets):
            return None
        ways = tuple(Way(target, self.ways[target][0], _only(self.ways[target][1])) for target in targets)
        return Ways(ways, door, self._callers if door is self._listener else None, self._touched)


def _only(before: Sequence[Buffer]) -> Buffer | None:
    (frame,) = before or (None,)
    return frame
