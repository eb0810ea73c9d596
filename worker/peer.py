"""One neighbour under a plan: which way leads to it, and whether it has answered.

Knows nothing of polling or of other neighbours; time is a parameter.
"""

from __future__ import annotations

from typing import Final

import zmq

from protocol.frames import encode
from protocol.ids import WorkerId
from protocol.messages import LinkMode, LinkOrder, Relay
from protocol.security import KeyPair
from protocol.transport import dial, end_monitor, monitor_of
from worker.coordinator_line import CoordinatorLine
from worker.sending import DEAF_MOST_MS, MAX_FRAME_BYTES

DIAL_S: Final = 0.7
HELLO_S: Final = 0.4


class Peer:
    """The link to one worker: a DEALER of ours, a route through our listener, or the coordinator's relay."""

    def __init__(self, order: LinkOrder) -> None:
        self.worker: WorkerId = order.peer.worker
        self.key = order.peer.public_key
        self.mode = order.mode
        self.is_linked = False
        self.dealer: zmq.Socket[bytes] | None = None
        self.monitor: zmq.Socket[bytes] | None = None
        self.route = b""
        self.descriptor = -1
        self.number_of_dials = 0
        self._addresses = order.peer.addresses
        self._hello_at = 0.0
        self._dial_at = 0.0
        self._has_greeted = False

    def next_address(self) -> str:
        """Return the address to try next, round robin."""
        return self._addresses[self.number_of_dials % len(self._addresses)]

    def must_dial(self, now: float) -> bool:
        """Whether a (new) connection is due: none yet, or the last one has not even come up."""
        if self.is_linked or self.mode is not LinkMode.DIAL or self._has_greeted or not self._addresses:
            return False
        return now >= self._dial_at

    def dial(self, context: zmq.Context[zmq.Socket[bytes]], keys: KeyPair, name: str, now: float) -> None:
        """Open a new connection, as `<name>.<number>`, to the next address; the old one is closed."""
        routing_id = f"{name}.{self.number_of_dials}".encode()
        dealer = dial(context, self.next_address(), keys, self.key, routing_id, MAX_FRAME_BYTES)
        dealer.setsockopt(zmq.RCVTIMEO, DEAF_MOST_MS)
        self.close()
        self.dealer = dealer
        self.monitor = monitor_of(dealer, zmq.EVENT_DISCONNECTED)
        self.number_of_dials += 1
        self._dial_at = now + DIAL_S
        self._hello_at = now

    def must_greet(self, now: float) -> bool:
        """Whether a hello is due: it is repeated, because the other side may not have heard of this epoch yet."""
        if self.is_linked or now < self._hello_at:
            return False
        return self.mode is LinkMode.RELAY or (self.mode is LinkMode.DIAL and self.dealer is not None)

    def greeted(self, now: float) -> None:
        """A hello went out."""
        self._has_greeted = True
        self._hello_at = now + HELLO_S

    def way(
        self, listener: zmq.Socket[bytes], line: CoordinatorLine
    ) -> tuple[zmq.Socket[bytes] | None, list[bytes | bytearray | memoryview]]:
        """Return the socket that leads to it and the frames that go before a message; None while it is not linked."""
        if not self.is_linked:
            return None, []
        if self.mode is LinkMode.RELAY:
            return line.socket, encode(Relay(source=line.own, target=self.worker))
        return (self.dealer, []) if self.dealer is not None else (listener, [self.route])

    def close(self) -> None:
        """End our own connection to it, if there is one."""
        if self.dealer is not None:
            if self.monitor is not None:
                end_monitor(self.dealer, self.monitor)
            self.dealer.close(linger=0)
        self.dealer = self.monitor = None
