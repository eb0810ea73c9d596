"""The door of a worker: where neighbours dial in, and how their connections are told apart.

Knows nothing of epochs, of messages, or of who is a neighbour: it says which proven key spoke, and by which way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import zmq
from zmq.utils.monitor import recv_monitor_message

from protocol.frames import Buffer
from protocol.security import Gate, KeyPair
from protocol.transport import bind_router, end_monitor, monitor_of, proven_key
from worker.sending import DEAF_MOST_MS, MAX_FRAME_BYTES, receive_now, send_now
from worker.watch import has_message

LINGER_MS: Final = 200


class Heard(NamedTuple):
    """A message that came in: the key that proved to have sent it, the way back to it, and its frames."""

    key: bytes
    route: bytes
    frames: list[memoryview]
    origin: zmq.Frame

    @property
    def descriptor(self) -> int:
        """The connection's descriptor, by which its end is told; used again for another once it has ended."""
        return int(self.origin.get(zmq.SRCFD))


class Listener:
    """A ROUTER behind the gate, and the monitor of its connections. `admit` and `address` are for any thread."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: KeyPair, address: str) -> None:
        """Bind, e.g. to "tcp://0.0.0.0:*"; raises ConfigInvalid when that is not possible."""
        self._admitted: frozenset[bytes] = frozenset()
        self._gate = Gate(context, lambda key: key in self._admitted)
        self._gate.start()
        self.socket, self.address = bind_router(context, keys, address, MAX_FRAME_BYTES)
        self.socket.setsockopt(zmq.RCVTIMEO, DEAF_MOST_MS)
        self.monitor: zmq.Socket[Any] = monitor_of(self.socket, zmq.EVENT_DISCONNECTED)

    def admit(self, keys: Iterable[bytes]) -> None:
        """Let these keys, and no others, open connections."""
        self._admitted = frozenset(keys)

    def receive(self) -> Heard:
        """Return the message that waits, or raise zmq.Again."""
        return heard(receive_now(self.socket))

    def send(self, route: bytes, frames: Sequence[Buffer]) -> None:
        """Send or raise zmq.Again; ZMQError when nobody is there any more."""
        send_now(self.socket, [route, *frames])

    def ended(self) -> Iterator[int]:
        """Yield the descriptors of connections that have ended since the last call."""
        while has_message(self.monitor):
            yield recv_monitor_message(self.monitor)["value"]

    def close(self) -> None:
        """Close the door and the gate."""
        end_monitor(self.socket, self.monitor)
        self.socket.close(linger=LINGER_MS)
        self._gate.close()


def heard(frames: Sequence[zmq.Frame]) -> Heard:
    """Tell who sent the frames of one message; raises AccessRefused without a proven key."""
    return Heard(proven_key(frames[-1]), frames[0].bytes, [frame.buffer for frame in frames[1:]], frames[-1])
