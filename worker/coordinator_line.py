"""The data connection to the coordinator: steps for the head, and the way to neighbours that are only relayed to.

Knows nothing of epochs or of who is a neighbour.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import zmq
from zmq.utils.monitor import recv_monitor_message

from protocol.errors import CoordinatorLost, ProtocolViolation
from protocol.frames import Buffer, decode, encode
from protocol.ids import WorkerId
from protocol.messages import ROW_OF, Relay, Step
from protocol.security import KeyPair
from protocol.transport import dial, end_monitor, monitor_of
from worker.sending import MAX_FRAME_BYTES, send_within

RELAY_CODE: Final = ROW_OF[Relay].code


class Relayed(NamedTuple):
    """Frames that a neighbour sent through the coordinator, which vouches for their source."""

    source: WorkerId
    target: WorkerId
    frames: list[memoryview]


class StepFrames(NamedTuple):
    """A step of the coordinator itself."""

    step: Step
    payload: memoryview


class CoordinatorLine:
    """The `<worker>/data` connection; there is none until `attach`."""

    def __init__(self, context: zmq.Context[Any], keys: KeyPair) -> None:
        self._context = context
        self._keys = keys
        self._at: tuple[WorkerId, str, bytes, str] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self.socket: zmq.Socket[bytes] | None = None

    @property
    def own(self) -> WorkerId:
        """This worker's name, empty before `attach`."""
        return self._at[0] if self._at else WorkerId("")

    @property
    def is_up(self) -> bool:
        """Whether the coordinator has let us in and takes frames."""
        return self.socket is not None and bool(self.socket.poll(0, zmq.POLLOUT))

    def attach(self, own: WorkerId, address: str, server_key: bytes, nonce: str) -> None:
        """Connect as `<own>/data/<nonce>`; an unchanged connection is kept."""
        wanted = (own, address, server_key, nonce)
        if self._at == wanted:
            return
        self.close()
        routing_id = "/".join(part for part in (own, "data", nonce) if part).encode("ascii")
        self.socket = dial(self._context, address, self._keys, server_key, routing_id, MAX_FRAME_BYTES)
        self._monitor = monitor_of(self.socket, zmq.EVENT_DISCONNECTED)
        self._at = wanted

    def takers(self, take: Callable[[zmq.Socket[bytes]], None]) -> dict[Any, Callable[[], None]]:
        """Return who takes what: `take` the socket's frames; the news that the connection broke is a CoordinatorLost.

        A frame may be lost then. And libzmq does not always reconnect: not after one that it could not decrypt.
        """
        if self.socket is None or self._monitor is None:
            return {}
        return {self.socket: partial(take, self.socket), self._monitor: partial(_take_break, self._monitor)}

    def send(self, frames: Sequence[Buffer]) -> None:
        """Send a message to the coordinator itself; raises CoordinatorLost."""
        if self.socket is None:
            raise CoordinatorLost("there is no data connection to the coordinator", phase="send")
        try:
            send_within(self.socket, frames)
        except zmq.ZMQError as error:
            raise CoordinatorLost(f"the data connection is gone: {error.strerror}", phase="send") from error

    def relay(self, target: WorkerId, frames: Sequence[Buffer]) -> None:
        """Send frames to a neighbour through the coordinator; raises CoordinatorLost."""
        self.send([*encode(Relay(source=self.own, target=target)), *frames])

    def close(self) -> None:
        """End the connection."""
        if self.socket is not None:
            if self._monitor is not None:
                end_monitor(self.socket, self._monitor)
            self.socket.close(linger=200)
        self.socket = self._monitor = self._at = None


def _take_break(monitor: zmq.Socket[bytes]) -> None:
    recv_monitor_message(monitor)
    raise CoordinatorLost("the data connection to the coordinator broke", phase="link")


def read_line(frames: list[memoryview]) -> Relayed | StepFrames:
    """Tell what came over the line; raises ProtocolViolation for what has no business there."""
    if _is_relay(frames[0]):
        relay = decode(frames[:1]).message
        return Relayed(relay.source, relay.target, frames[1:])
    message, payload = decode(frames)
    if not isinstance(message, Step):
        raise ProtocolViolation(f"{type(message).__name__} on the data connection", node="coordinator")
    return StepFrames(message, payload)


def _is_relay(header: memoryview) -> bool:
    """Whether a header is a `Relay`: a msgpack array of at most 15 fields that begins with its code."""
    return len(header) > 1 and header[0] & 0xF0 == 0x90 and header[1] == RELAY_CODE
