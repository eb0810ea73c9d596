"""The coordinator's one ROUTER: binds it, receives, sends without ever waiting for a peer, and sees connections break.

Knows nothing of messages. A peer that is gone or does not keep up is a `False`, which the caller must act on.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import zmq
from zmq.utils.monitor import parse_monitor_message

from protocol.frames import Buffer
from protocol.gate import Gate
from protocol.messages import MAX_TENSOR_BYTES
from protocol.security import KeyPair
from protocol.transport import Envelope, bind_router, envelope_of

SEND_HWM: Final = 256  # messages kept for a peer that does not read; tile chunks of 1 MiB are the largest of them
GOODBYE_MS: Final = 500  # how long last words may take to leave
MAX_AHEAD: Final = 512  # messages taken in before a break is told: what its peer said last comes first
_MONITOR: Final = "inproc://connections"
_UNDELIVERED: Final = frozenset({errno.EAGAIN, errno.EHOSTUNREACH})


class Broken(NamedTuple):
    """The connection of a peer that was followed is no more; all it has said came before."""

    routing_id: bytes


class Exchange:
    """The listening socket with its gate and context; `port` is the actual one. One event loop uses it.

    The sockets are plain ones whose descriptors the loop watches: breaks and messages come by two sockets, and their
    order can only be told where both can be read at once.
    """

    def __init__(self, address: str, keys: KeyPair, admits: Callable[[bytes], bool]) -> None:
        """Listen on "host:port"; raises ConfigInvalid. `admits` is called in the gate's thread."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._gate = Gate(self._context, admits)
        try:
            self._gate.start()
            self._router, endpoint = bind_router(self._context, keys, address, MAX_TENSOR_BYTES, SEND_HWM)
            self._router.monitor(_MONITOR, zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
            self._monitor = self._context.socket(zmq.PAIR)
            # No bound: where one is met, libzmq's thread stands still with its locks held. A few bytes an event.
            self._monitor.setsockopt(zmq.RCVHWM, 0)
            self._monitor.connect(_MONITOR)
        except BaseException:
            self._gate.close()
            self._context.destroy(linger=0)
            raise
        self.port = int(endpoint.rpartition(":")[2])
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stirred = asyncio.Event()
        self._ahead: deque[tuple[Envelope, int] | Broken] = deque()
        self._descriptor = -1  # of the connection by which the last message came
        self._followed: dict[int, bytes] = {}  # descriptor: routing id
        self._closed: set[int] = set()  # descriptors whose connection is over and that no other one has yet

    async def receive(self) -> Envelope | Broken:
        """Wait for the next message of anybody, or for the break of a connection that is followed."""
        self._watch()
        while True:
            self._stirred.clear()  # before looking: what comes after the look stirs again
            self._see_breaks()
            found = self._ahead.popleft() if self._ahead else self._take()
            if isinstance(found, Broken):
                return found
            if found is not None:
                envelope, self._descriptor = found
                return envelope
            await self._stirred.wait()

    def follow(self, routing_id: bytes) -> None:
        """Have `receive` tell when the connection by which the last message came breaks, under this routing id.

        If it is broken already, that is what comes next. A routing id is followed on its latest connection only.
        """
        # Descriptors come again. What became of this one's earlier connections was written before the latest began,
        # so it can be read by now; whatever is written from now on is of this connection.
        self._see_breaks()
        for descriptor in [known for known, who in self._followed.items() if who == routing_id]:
            del self._followed[descriptor]
        if self._descriptor in self._closed:
            self._ahead.append(Broken(routing_id))
        else:
            self._followed[self._descriptor] = routing_id

    def send(self, routing_id: bytes, frames: Sequence[Buffer]) -> bool:
        """Hand a message to the transport at once; False when the peer is not connected, or its queue is full.

        The frames must not change any more.
        """
        self._stirred.set()  # sending may use up the signal of messages that have come
        try:
            self._router.send_multipart([routing_id, *frames], flags=zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:
            if error.errno in _UNDELIVERED:
                return False
            raise
        return True

    def close(self) -> None:
        """Stop listening; blocks for at most half a second until last words have left."""
        if self._loop is not None:
            for socket in (self._router, self._monitor):
                self._loop.remove_reader(socket.fileno())
        self._router.disable_monitor()
        self._monitor.close(linger=0)
        self._router.close(linger=GOODBYE_MS)
        self._gate.close()
        self._context.destroy(linger=0)  # closes what is left open, which would hold the process for ever

    def _watch(self) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            for socket in (self._router, self._monitor):
                self._loop.add_reader(socket.fileno(), self._stirred.set)

    def _take(self) -> tuple[Envelope, int] | None:
        """Take the next message and the descriptor by which it came; None when there is none."""
        try:
            frames: list[zmq.Frame] = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        return envelope_of(frames), int(frames[0].get(zmq.SRCFD))

    def _see_breaks(self) -> None:
        """Read what happened to connections; a break of a followed one is put behind what has come until now."""
        broken: list[bytes] = []
        for event, descriptor in self._events():
            routing_id = self._followed.pop(descriptor, None)  # a new connection on it: the old one is over as well
            if routing_id is not None:
                broken.append(routing_id)
            if event == zmq.EVENT_DISCONNECTED:
                self._closed.add(descriptor)
            else:
                self._closed.discard(descriptor)
        if broken:
            self._take_ahead()
            self._ahead.extend(Broken(routing_id) for routing_id in broken)

    def _take_ahead(self) -> None:
        while len(self._ahead) < MAX_AHEAD and (found := self._take()) is not None:
            self._ahead.append(found)

    def _events(self) -> list[tuple[int, int]]:
        events: list[tuple[int, int]] = []
        with contextlib.suppress(zmq.Again):
            while True:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
                events.append((int(event["event"]), int(event["value"])))
        return events
